//! What a file of kept writes looks like.
//!
//! ```text
//!   label: owner, layout (a page) │ heads of the first thread's places (whole pages) │ their bytes │ of the second thread …
//! ```

use crate::{
    device::{Backing, number},
    failure::{Context, Outcome},
};
use serde::{Deserialize, Serialize};
use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::Path,
    sync::atomic::AtomicU64,
};
use zerocopy::{FromBytes, IntoBytes, KnownLayout};

/// Bytes of the largest write that is kept. Larger ones gain little by an early answer.
pub const MOST_BYTES: usize = 16 << 10;

/// Of a place that holds a write, in this layout.
pub const TAKEN: u64 = u64::from_le_bytes(*b"kept wr2");
/// Of one that holds none.
pub const FREE: u64 = 0;

/// What is known of the bytes in a place.
#[derive(FromBytes, IntoBytes, KnownLayout)]
#[repr(C)]
pub struct Head {
    /// [`TAKEN`] or [`FREE`]; written last, so that whoever finds it taken finds all of it.
    pub state: AtomicU64,
    pub first_block: u64,
    pub blocks: u64,
    /// All records of the log before this one were durable.
    pub after: u64,
}

/// Bytes of a page of memory.
pub const PAGE: usize = 4096;

/// How many places a file has.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Layout {
    /// One for each thread.
    pub parts: usize,
    /// Of each part.
    pub places: usize,
}

impl Layout {
    /// Bytes of the heads of a part: whole pages, for each thread maps its own.
    pub fn heads_bytes(self) -> usize {
        (self.places * size_of::<Head>()).next_multiple_of(PAGE)
    }

    /// Where the head of a place is.
    pub fn head_at(self, part: usize, place: usize) -> u64 {
        (PAGE + part * (self.heads_bytes() + self.places * MOST_BYTES) + place * size_of::<Head>()) as u64
    }

    /// Where its bytes are.
    pub fn bytes_at(self, part: usize, place: usize) -> u64 {
        self.head_at(part, 0) + (self.heads_bytes() + place * MOST_BYTES) as u64
    }

    /// All places, part by part.
    pub fn all(self) -> impl Iterator<Item = Place> {
        let place = move |part, place| Place { head: self.head_at(part, place), bytes: self.bytes_at(part, place) };
        (0..self.parts).flat_map(move |part| (0..self.places).map(move |i| place(part, i)))
    }

    /// Bytes of a file.
    pub fn file_bytes(self) -> u64 {
        self.head_at(self.parts, 0)
    }
}

/// Whose writes are kept: the data device, by its path and its number. Either may change, unless what it was leads to another
/// device by now; where both have, it is another.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Owner {
    /// Empty where it is too long to be kept.
    pub path: String,
    pub number: (Option<u64>, u64),
}

impl Owner {
    /// That of an open data device.
    pub fn of(data: &Backing) -> Outcome<Self> {
        let what = || format!("can't use {}", data.path().display());
        let path = std::path::absolute(data.path()).doing(what())?;
        Ok(Self { path: path.to_string_lossy().into(), number: data.number().doing(what())? })
    }

    /// Whether `now`, an open device, is the same. Numbers come again, and so do paths: what speaks for it is not enough where
    /// the other speaks against it.
    pub fn is(&self, now: &Self) -> bool {
        let same_path = !self.path.is_empty() && self.path == now.path;
        match (same_path, self.number == now.number) {
            (true, true) => true,
            (false, true) => !self.path_leads_elsewhere(now),
            (true, false) => !self.number_is_elsewhere(),
            (false, false) => false,
        }
    }

    /// Whether another device is at its path now: what has its number is not the one that had it.
    fn path_leads_elsewhere(&self, now: &Self) -> bool {
        Path::new(&self.path).metadata().is_ok_and(|found| number(&found) != now.number)
    }

    /// Whether the block device of its number is still there, and so not what is at its path now.
    fn number_is_elsewhere(&self) -> bool {
        match self.number {
            (None, device) => {
                Path::new(&format!("/sys/dev/block/{}:{}", libc::major(device), libc::minor(device))).exists()
            }
            // A file can't be looked for by its number.
            (Some(_), _) => false,
        }
    }
}

/// The first page of a file.
#[derive(Serialize, Deserialize)]
pub struct Label {
    pub owner: Owner,
    pub layout: Layout,
}

impl Label {
    /// In a page.
    pub fn page(mut self) -> Vec<u8> {
        let json = |label: &Self| serde_json::to_vec(label).expect("plain data");
        let mut page = json(&self);
        if page.len() > PAGE {
            self.owner.path.clear();
            page = json(&self);
        }
        page.resize(PAGE, b' ');
        page
    }
}

/// A place, by its offsets in the file.
#[derive(Clone, Copy)]
pub struct Place {
    pub head: u64,
    pub bytes: u64,
}

/// A file, whose it is and how large.
pub fn opened(path: &Path) -> io::Result<(File, Label)> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let mut label = vec![0; PAGE];
    file.read_exact_at(&mut label, 0)?;
    Ok((file, serde_json::from_slice(&label)?))
}

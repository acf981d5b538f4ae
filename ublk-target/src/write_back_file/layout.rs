//! What a write-back file looks like.
//!
//! ```text
//!   label: owner, layout (a page) │ heads of the first thread's slots (whole pages) │ their bytes │ of the second thread …
//! ```

use crate::{
    device::{Backing, number, stack::sysfs_folder},
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
use ublk_integrity::{BlockRange, RecordNumber};
use zerocopy::{FromBytes, IntoBytes, KnownLayout};

/// Bytes of the largest write that is admitted. Larger ones gain little by write-back.
pub const MOST_BYTES: usize = 16 << 10;

/// State of a slot that holds a write.
pub const TAKEN: u64 = u64::from_le_bytes(*b"kept wr3");
/// State of a slot that holds none.
pub const FREE: u64 = 0;

/// What is known of the bytes in a slot.
#[derive(FromBytes, IntoBytes, KnownLayout)]
#[repr(C)]
pub struct Head {
    /// [`TAKEN`] or [`FREE`]. Written last: a reader that finds it taken finds all the rest.
    pub state: AtomicU64,
    pub first_block: u64,
    pub blocks: u64,
    /// The first record of the log that was not durable when it was admitted: a volume without
    /// those before is an older one.
    pub first_not_durable: u64,
    /// Of two writes of one block the later has the higher number.
    pub number: u64,
}

/// A write that is kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KeptWrite {
    pub range: BlockRange,
    /// See [`Head::first_not_durable`].
    pub first_not_durable: RecordNumber,
    /// See [`Head::number`].
    pub number: u64,
}

/// Bytes of a page of memory.
pub const PAGE: usize = 4096;

/// How many slots a file has. Its first page says so, in JSON: the names there are part of the
/// format.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FileLayout {
    /// One for each thread.
    pub parts: usize,
    /// Of each part, with heads that have numbers. A file whose label says `places` here has others, and is left alone.
    #[serde(rename = "numbered")]
    pub slots: usize,
}

impl FileLayout {
    /// Bytes of the heads of a part: whole pages, for each thread maps its own.
    pub fn heads_bytes(self) -> usize {
        (self.slots * size_of::<Head>()).next_multiple_of(PAGE)
    }

    /// Where the head of a slot is.
    pub fn head_at(self, part: usize, slot: usize) -> u64 {
        (PAGE + part * (self.heads_bytes() + self.slots * MOST_BYTES) + slot * size_of::<Head>()) as u64
    }

    /// Where its bytes are.
    pub fn bytes_at(self, part: usize, slot: usize) -> u64 {
        self.head_at(part, 0) + (self.heads_bytes() + slot * MOST_BYTES) as u64
    }

    /// All slots, part by part.
    pub fn all(self) -> impl Iterator<Item = Slot> {
        let slot = move |part, slot| Slot { head: self.head_at(part, slot), bytes: self.bytes_at(part, slot) };
        (0..self.parts).flat_map(move |part| (0..self.slots).map(move |i| slot(part, i)))
    }

    /// Bytes of a file.
    pub fn file_bytes(self) -> u64 {
        self.head_at(self.parts, 0)
    }
}

/// Whose writes a file holds: those of a data device, known by its path and its number. It is the
/// same device if either still matches, unless the other provably names a different one.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Owner {
    /// Empty where it is too long for the page.
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

    /// Whether `now`, an open device, is the same. Numbers are used again, and so are paths: so one
    /// that matches proves nothing where the other names a different device.
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
            (None, device) => sysfs_folder(device).is_some(),
            // A file can't be looked for by its number.
            (Some(_), _) => false,
        }
    }
}

/// The first page of a file.
#[derive(Serialize, Deserialize)]
pub struct FileLabel {
    pub owner: Owner,
    pub layout: FileLayout,
}

impl FileLabel {
    /// The first page of a file.
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

/// A slot, by its offsets in the file.
#[derive(Clone, Copy)]
pub struct Slot {
    pub head: u64,
    pub bytes: u64,
}

/// A file, whose it is and how large.
pub fn opened(path: &Path) -> io::Result<(File, FileLabel)> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let mut label = vec![0; PAGE];
    file.read_exact_at(&mut label, 0)?;
    Ok((file, serde_json::from_slice(&label)?))
}

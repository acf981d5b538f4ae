//! What one thread has of the places for kept writes, mapped: their heads, and a buffer in each.
//!
//! A write is fetched into such a buffer, and hashed and written from there: what is kept is no copy.

use super::{FREE, Head, Kept, Layout, MOST_BYTES, OpenId, Owner, PAGE, TAKEN};
use crate::{
    failure::{Context, Outcome},
    os,
};
use memmap2::MmapMut;
use std::{
    io,
    sync::{Mutex, PoisonError, atomic::Ordering},
};
use ublk_integrity::{BlockRange, Buf, RecordNumber};
use zerocopy::FromBytes;

/// The heads of one thread's places. While they are mapped nobody else looks at them.
pub struct Heads(MmapMut);

/// What a thread takes.
pub struct Part {
    /// Of its places.
    pub heads: Heads,
    /// Of [`MOST_BYTES`], one for each place.
    pub bufs: Vec<Buf>,
}

/// What a daemon keeps: its file, and the part of each thread, for that to take.
pub struct KeptWrites {
    /// The file.
    pub file: Kept,
    parts: Vec<Mutex<Option<Part>>>,
}

impl KeptWrites {
    /// Of `each` writes for so many threads.
    pub fn new(id: &OpenId, owner: &Owner, threads: usize, each: usize) -> Outcome<Self> {
        let file = Kept::create(id, owner, Layout { parts: threads, places: each })?;
        let part = |thread| Ok(Mutex::new(Some(file.part(thread)?)));
        Ok(Self { parts: (0..threads).map(part).collect::<Outcome<_>>()?, file })
    }

    /// The part of a thread, once.
    pub fn take(&self, thread: usize) -> Option<Part> {
        self.parts[thread].lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Kept {
    /// That of a thread, of a new file.
    pub(super) fn part(&self, thread: usize) -> Outcome<Part> {
        self.map(thread).doing(format!("can't map {}", self.path.display()))
    }

    fn map(&self, thread: usize) -> io::Result<Part> {
        let layout = self.layout;
        let heads = os::map_shared(&self.file, layout.head_at(thread, 0), layout.heads_bytes())?;
        let buf = |place| Ok(Buf::of(touched(os::map_shared(&self.file, layout.bytes_at(thread, place), MOST_BYTES)?)));
        Ok(Part { heads: Heads(touched(heads)), bufs: (0..layout.places).map(buf).collect::<io::Result<_>>()? })
    }
}

/// The first store to each page is a fault.
fn touched(mut map: MmapMut) -> MmapMut {
    map.chunks_mut(PAGE).for_each(|page| page[0] = std::hint::black_box(0));
    map
}

impl Heads {
    fn head(&mut self, place: usize) -> &mut Head {
        Head::mut_from_prefix(&mut self.0[place * size_of::<Head>()..]).expect("heads are aligned").0
    }

    /// Keeps the write whose bytes lie in a place that is free.
    pub fn keep(&mut self, place: usize, range: BlockRange, after: RecordNumber) {
        let head = self.head(place);
        (head.first_block, head.blocks, head.after) = (range.first.0, range.count, after.0);
        head.state.store(TAKEN, Ordering::Release);
    }

    /// Lets go of it.
    pub fn forget(&mut self, place: usize) {
        self.head(place).state.store(FREE, Ordering::Release);
    }
}

/// For tests: the part of one thread, of a file in a folder of their own.
#[cfg(test)]
pub fn of_test(folder: &std::path::Path, places: usize) -> (Kept, Part) {
    let owner = Owner { path: "/dev/a".into(), number: (None, 1) };
    let kept = Kept::create_in(folder, folder, &[1; 32], &owner, Layout { parts: 1, places }).unwrap();
    let part = kept.part(0).unwrap();
    (kept, part)
}

//! One thread's slots of the write-back file, mapped: a head and a buffer each.
//!
//! A write is fetched into such a buffer, and hashed and written from there. So
//! keeping it takes no copy.

use super::{FREE, FileLayout, Head, KeptWrite, MOST_BYTES, OpenId, Owner, PAGE, TAKEN, WriteBackFile};
use crate::{
    failure::{Context, Outcome},
    os,
};
use memmap2::MmapMut;
use std::{
    io,
    sync::{Mutex, PoisonError, atomic::Ordering},
};
use ublk_integrity::Buf;
use zerocopy::FromBytes;

/// The heads of one thread's slots. While they are mapped nobody else looks at them.
pub struct Heads(MmapMut);

/// The part of one thread.
pub struct MappedPart {
    /// Those of its slots.
    pub heads: Heads,
    /// Of [`MOST_BYTES`], one for each slot.
    pub bufs: Vec<Buf>,
}

/// The write-back file of a daemon, and the part of each thread, for that thread to take.
pub struct MappedFile {
    /// The file.
    pub file: WriteBackFile,
    parts: Vec<Mutex<Option<MappedPart>>>,
}

impl MappedFile {
    /// Of `each` writes for so many threads.
    pub fn new(id: &OpenId, owner: &Owner, threads: usize, each: usize) -> Outcome<Self> {
        let file = WriteBackFile::create(id, owner, FileLayout { parts: threads, slots: each })?;
        let part = |thread| Ok(Mutex::new(Some(file.part(thread)?)));
        Ok(Self { parts: (0..threads).map(part).collect::<Outcome<_>>()?, file })
    }

    /// The part of a thread, once.
    pub fn take(&self, thread: usize) -> Option<MappedPart> {
        self.parts[thread].lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl WriteBackFile {
    /// The part of a thread, of a new file.
    pub(super) fn part(&self, thread: usize) -> Outcome<MappedPart> {
        self.map(thread).doing(format!("can't map {}", self.path.display()))
    }

    fn map(&self, thread: usize) -> io::Result<MappedPart> {
        let layout = self.layout;
        let heads = os::map_shared(&self.file, layout.head_at(thread, 0), layout.heads_bytes())?;
        let buf = |slot| Ok(Buf::of(touched(os::map_shared(&self.file, layout.bytes_at(thread, slot), MOST_BYTES)?)));
        Ok(MappedPart { heads: Heads(touched(heads)), bufs: (0..layout.slots).map(buf).collect::<io::Result<_>>()? })
    }
}

/// Touches every page now, so that no page fault happens on the I/O path.
fn touched(mut map: MmapMut) -> MmapMut {
    map.chunks_mut(PAGE).for_each(|page| page[0] = std::hint::black_box(0));
    map
}

impl Heads {
    fn head(&mut self, slot: usize) -> &mut Head {
        Head::mut_from_prefix(&mut self.0[slot * size_of::<Head>()..]).expect("heads are aligned").0
    }

    /// Keeps the write whose bytes are in a slot: the slot was free, and is taken now.
    pub fn keep(&mut self, slot: usize, write: KeptWrite) {
        let KeptWrite { range, first_not_durable, number } = write;
        let head = self.head(slot);
        (head.first_block, head.blocks) = (range.first.0, range.count);
        (head.first_not_durable, head.number) = (first_not_durable.0, number);
        head.state.store(TAKEN, Ordering::Release);
    }

    /// Marks a slot as free: its write is in place.
    pub fn clear(&mut self, slot: usize) {
        self.head(slot).state.store(FREE, Ordering::Release);
    }
}

/// For tests: the part of one thread, of a file in a folder of their own.
#[cfg(test)]
pub fn of_test(folder: &std::path::Path, slots: usize) -> (WriteBackFile, MappedPart) {
    let owner = Owner { path: "/dev/a".into(), number: (None, 1) };
    let kept = WriteBackFile::create_in(folder, folder, &[1; 32], &owner, FileLayout { parts: 1, slots }).unwrap();
    let part = kept.part(0).unwrap();
    (kept, part)
}

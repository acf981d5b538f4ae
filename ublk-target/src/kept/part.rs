//! The places for kept writes, mapped: each thread has its own.

use super::{FREE, Head, Kept, OpenId, Owner, PAGE, STRIDE, TAKEN};
use crate::failure::Outcome;
use memmap2::MmapMut;
use std::sync::{Mutex, PoisonError, atomic::Ordering};
use ublk_integrity::{BlockRange, RecordNumber};
use zerocopy::FromBytes;

/// The places of one thread. While they are mapped nobody else looks at them.
pub struct Part(pub(super) MmapMut);

/// What a daemon keeps: its file, and the places of each thread, for that to take.
pub struct KeptWrites {
    /// The file.
    pub file: Kept,
    /// Writes that each thread keeps at most.
    pub each: usize,
    parts: Vec<Mutex<Option<Part>>>,
}

impl KeptWrites {
    /// Of `each` writes for so many threads.
    pub fn new(id: &OpenId, owner: &Owner, threads: usize, each: usize) -> Outcome<Self> {
        let file = Kept::create(id, owner, threads * each)?;
        let part = |thread| Ok(Mutex::new(Some(file.part(thread * each, each)?)));
        Ok(Self { parts: (0..threads).map(part).collect::<Outcome<_>>()?, file, each })
    }

    /// The places of a thread, once.
    pub fn take(&self, thread: usize) -> Option<Part> {
        self.parts[thread].lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Part {
    fn head(&mut self, place: usize) -> &mut Head {
        Head::mut_from_prefix(&mut self.0[place * STRIDE..]).expect("places are aligned").0
    }

    /// Keeps a write of at most [`MOST_BYTES`] in a place that is free.
    pub fn keep(&mut self, place: usize, range: BlockRange, after: RecordNumber, bytes: &[u8]) {
        let at = place * STRIDE + PAGE;
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        let head = self.head(place);
        (head.first_block, head.blocks, head.after) = (range.first.0, range.count, after.0);
        head.state.store(TAKEN, Ordering::Release);
    }

    /// Lets go of it.
    pub fn forget(&mut self, place: usize) {
        self.head(place).state.store(FREE, Ordering::Release);
    }
}

//! Groups of blocks on their way to the threads that hash.
//!
//! As many may lie here as there are threads, so that each finds another when it is done. Nobody waits for a thread: whoever
//! leaves a group here takes what still lies here, its own or another's, before it sleeps.

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use ublk_integrity::{HashJob, HashThreads};

/// The way to the threads that hash, and back.
#[derive(Clone)]
pub struct HashQueue {
    sender: Sender<HashJob>,
    jobs: Receiver<HashJob>,
}

impl HashQueue {
    /// For so many threads.
    pub fn new(threads: usize) -> Self {
        let (sender, jobs) = bounded(threads);
        Self { sender, jobs }
    }

    /// For a volume; only threads that [`take`](Self::take) before they sleep may make tags for it.
    pub fn way(&self) -> HashThreads {
        let sender = self.sender.clone();
        HashThreads::new(move |job| sender.try_send(job).err().map(TrySendError::into_inner))
    }

    /// What lies here, for threads that hash: they end with the last way.
    pub fn jobs(&self) -> Receiver<HashJob> {
        self.jobs.clone()
    }

    /// A group that no thread has taken yet.
    pub fn take(&self) -> Option<HashJob> {
        self.jobs.try_recv().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::{Backings, Use},
        offline::Offline,
        ring::OwnRing,
    };
    use std::{cell::Cell, time::Duration};
    use ublk_integrity::{
        Access, BlockIndex, BlockRange, Buf, Durability, MasterKey, OnMismatch, Slot, TagAlgorithm,
        create::{FormatOptions, format},
        open::{OpenOptions, open},
    };

    const REQUESTS: usize = 8;
    const REQUEST: usize = 64 << 10;

    fn options(hash_threads: HashThreads) -> OpenOptions {
        OpenOptions {
            access: Access::ReadWrite,
            cache_bytes: 1 << 20,
            max_slots: REQUESTS,
            queues: 1,
            max_request_bytes: REQUEST,
            separate_meta: false,
            on_mismatch: OnMismatch::Fail,
            open_id: [1; 32],
            hints: None,
            hash_threads: Some(hash_threads),
        }
    }

    /// No thread hashes, so all that is left here is for the one that left it. If it slept before, for ever.
    #[test]
    fn what_no_thread_takes_is_hashed_before_the_thread_sleeps() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(16 << 20).unwrap();
        let offline =
            Offline::with(Backings::open(file.path(), None, Use::Exclusive, Duration::ZERO).unwrap()).unwrap();
        let key = MasterKey::new(&[7; 32]).unwrap();
        let layout = FormatOptions {
            block_size: 4096,
            size: Some(4 << 20),
            log_size: None,
            tag: TagAlgorithm::default(),
            uuid: [2; 16],
            separate_meta: false,
        };
        offline.run(format(&offline.io(), &key, &layout)).unwrap().unwrap();
        let queue = HashQueue::new(1);
        let volume = offline.run(open(&offline.io(), &key, &options(queue.way()))).unwrap().unwrap();

        let (fds, files) = offline.handles();
        let ring = OwnRing::new(&fds).unwrap();
        let io = ring.storage(files);
        let mut slots: Vec<_> = (0..REQUESTS).map(|_| volume.slot(0)).collect();
        Slot::work_together(&mut slots);
        let (taken, written) = (Cell::new(0), Cell::new(0));
        let (volume, io, count) = (&volume, &io, &written);
        let write = |(i, (mut slot, buf)): (u64, (Slot, Buf))| async move {
            let blocks = (REQUEST / volume.block_size()) as u64;
            let range = BlockRange::new(BlockIndex(i * blocks), blocks);
            volume.write(io, &mut slot, range, buf, Durability::MayBeLost).await.0.unwrap();
            count.set(count.get() + 1);
        };
        let writes = (0..).zip(slots.into_iter().zip(Buf::several(REQUESTS, REQUEST))).map(write);
        let left = || queue.take().inspect(|_| taken.set(taken.get() + 1));
        ring.run_together(writes, left).unwrap();
        assert_eq!(written.get(), REQUESTS);
        assert!(taken.get() > 0, "nothing was left");
        assert!(queue.take().is_none());
    }
}

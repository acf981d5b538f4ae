//! Groups of blocks on their way to the threads that hash.
//!
//! As many may lie here as there are threads, so that each finds another when it is done. Nobody waits for that: a thread that
//! hashes waits for nothing else, so what lies here is taken; and before a thread that serves requests sleeps it takes what
//! none of them is about to.

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded, select};
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};
use ublk_integrity::{HashJob, HashThreads};

/// The way to the threads that hash, and back.
#[derive(Clone)]
pub struct HashQueue {
    sender: Sender<HashJob>,
    jobs: Receiver<HashJob>,
    threads: Arc<Threads>,
}

/// The threads that hash, counted.
#[derive(Default)]
struct Threads {
    all: AtomicUsize,
    /// That wait for a group. One that has just got one may be among them.
    idle: AtomicUsize,
}

impl HashQueue {
    /// For so many threads.
    pub fn new(threads: usize) -> Self {
        let (sender, jobs) = bounded(threads);
        Self { sender, jobs, threads: Arc::default() }
    }

    /// For a volume.
    pub fn way(&self) -> HashThreads {
        let queue = self.clone();
        HashThreads::new(move |job| queue.offer(job))
    }

    /// Gives the group back where there is no room for it, or no thread.
    fn offer(&self, job: HashJob) -> Option<HashJob> {
        match self.threads.all.load(Relaxed) {
            0 => Some(job),
            _ => self.sender.try_send(job).err().map(TrySendError::into_inner),
        }
    }

    /// A thread that hashes is there from here on, until this is dropped.
    pub fn thread(&self) -> HashThread {
        self.threads.all.fetch_add(1, Relaxed);
        HashThread { jobs: self.jobs.clone(), threads: Arc::clone(&self.threads) }
    }

    /// Whether groups lie here that no idle thread is about to take.
    pub fn has_left(&self) -> bool {
        self.jobs.len() > self.threads.idle.load(Relaxed)
    }

    /// One of them.
    pub fn take(&self) -> Option<HashJob> {
        if self.has_left() { self.jobs.try_recv().ok() } else { None }
    }
}

/// A thread that hashes.
pub struct HashThread {
    jobs: Receiver<HashJob>,
    threads: Arc<Threads>,
}

impl HashThread {
    /// Hashes until the other end of `end` is dropped.
    pub fn hash_until(self, end: &Receiver<()>) {
        loop {
            self.threads.idle.fetch_add(1, Relaxed);
            let job = select! {
                recv(self.jobs) -> job => job.ok(),
                recv(end) -> _ => None,
            };
            self.threads.idle.fetch_sub(1, Relaxed);
            match job {
                Some(job) => job.run(),
                None => return,
            }
        }
    }
}

impl Drop for HashThread {
    fn drop(&mut self) {
        self.threads.all.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{offline::scratch, ring::OwnRing};
    use std::cell::Cell;
    use ublk_integrity::{
        Access, BlockIndex, BlockRange, Buf, Durability, Slot,
        open::{OpenOptions, open},
    };

    const REQUESTS: usize = 8;
    const REQUEST: usize = 64 << 10;

    fn options(hash_threads: HashThreads) -> OpenOptions {
        OpenOptions {
            cache_bytes: 1 << 20,
            max_slots: REQUESTS,
            max_request_bytes: REQUEST,
            hash_threads: Some(hash_threads),
            ..OpenOptions::new(Access::ReadWrite, [1; 32])
        }
    }

    /// The thread that hashes never comes, so what lies here is for the one that left it. If it slept before, for ever.
    #[test]
    fn what_no_thread_takes_is_hashed_before_the_thread_sleeps() {
        let (_file, offline, key) = scratch();
        let queue = HashQueue::new(1);
        let _busy = queue.thread();
        let left = Arc::new(AtomicUsize::new(0));
        let (offer, count) = (queue.clone(), Arc::clone(&left));
        let way = HashThreads::new(move |job| {
            let back = offer.offer(job);
            count.fetch_add(back.is_none().into(), Relaxed);
            back
        });
        let volume = offline.run(open(&offline.io(), &key, &options(way))).unwrap().unwrap();

        let (backings, files) = offline.handles();
        let ring = OwnRing::new(backings.descriptors().unwrap()).unwrap();
        let io = ring.storage(files);
        let mut slots: Vec<_> = (0..REQUESTS).map(|_| volume.slot(0)).collect();
        Slot::work_together(&mut slots);
        let written = Cell::new(0);
        let (volume, io, count) = (&volume, &io, &written);
        let write = |(i, (mut slot, buf)): (u64, (Slot, Buf))| async move {
            let blocks = (REQUEST / volume.block_size()) as u64;
            let range = BlockRange::new(BlockIndex(i * blocks), blocks);
            volume.write(io, &mut slot, range, buf, Durability::MayBeLost).await.0.unwrap();
            count.set(count.get() + 1);
        };
        let writes = (0..).zip(slots.into_iter().zip(Buf::several(REQUESTS, REQUEST))).map(write);
        ring.run_together(writes, Some(&queue)).unwrap();
        assert_eq!(written.get(), REQUESTS);
        assert!(left.load(Relaxed) > 0, "nothing was left");
        assert!(queue.take().is_none());
    }
}

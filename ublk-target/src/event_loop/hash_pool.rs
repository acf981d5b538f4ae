//! The channel by which jobs go to the hash workers.
//!
//! It has room for as many jobs as there are workers, so that each finds another when it is done.
//! No thread waits for room: an offer succeeds or fails at once. No job is stranded: a worker waits
//! for nothing but jobs, so it takes those in the channel. And before an I/O thread sleeps it takes
//! a job that no idle worker is about to take.

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded, select};
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};
use ublk_integrity::{HashJob, HashThreads};

/// The hash workers' job channel.
#[derive(Clone)]
pub struct HashPool {
    sender: Sender<HashJob>,
    jobs: Receiver<HashJob>,
    workers: Arc<Workers>,
}

/// The hash workers, counted.
#[derive(Default)]
struct Workers {
    all: AtomicUsize,
    /// How many wait for a job. One that has just got one may still count.
    idle: AtomicUsize,
}

impl HashPool {
    /// For so many workers.
    pub fn new(workers: usize) -> Self {
        let (sender, jobs) = bounded(workers);
        Self { sender, jobs, workers: Arc::default() }
    }

    /// The handle by which a volume offers its jobs.
    pub fn threads(&self) -> HashThreads {
        let pool = self.clone();
        HashThreads::new(move |job| pool.offer(job))
    }

    /// Gives the job back where there is no room for it, or no worker.
    fn offer(&self, job: HashJob) -> Option<HashJob> {
        match self.workers.all.load(Relaxed) {
            0 => Some(job),
            _ => self.sender.try_send(job).err().map(TrySendError::into_inner),
        }
    }

    /// Registers a worker, until this is dropped.
    pub fn worker(&self) -> HashWorker {
        self.workers.all.fetch_add(1, Relaxed);
        HashWorker { jobs: self.jobs.clone(), workers: Arc::clone(&self.workers) }
    }

    /// Whether there are jobs that no idle worker is about to take.
    pub fn has_stranded(&self) -> bool {
        self.jobs.len() > self.workers.idle.load(Relaxed)
    }

    /// Takes one of them.
    pub fn steal(&self) -> Option<HashJob> {
        if self.has_stranded() { self.jobs.try_recv().ok() } else { None }
    }
}

/// A thread that hashes.
pub struct HashWorker {
    jobs: Receiver<HashJob>,
    workers: Arc<Workers>,
}

impl HashWorker {
    /// Hashes until the other end of `end` is dropped.
    pub fn hash_until(self, end: &Receiver<()>) {
        loop {
            self.workers.idle.fetch_add(1, Relaxed);
            let job = select! {
                recv(self.jobs) -> job => job.ok(),
                recv(end) -> _ => None,
            };
            self.workers.idle.fetch_sub(1, Relaxed);
            match job {
                Some(job) => job.run(),
                None => return,
            }
        }
    }
}

impl Drop for HashWorker {
    fn drop(&mut self) {
        self.workers.all.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{event_loop::OwnRing, offline::scratch};
    use std::cell::Cell;
    use ublk_integrity::{
        Access, BlockIndex, BlockRange, Buf, Credential, Durability, RequestContext,
        open::{OpenOptions, open},
    };

    const REQUESTS: usize = 8;
    const REQUEST: usize = 64 << 10;

    fn options(hash_threads: HashThreads) -> OpenOptions {
        OpenOptions {
            cache_bytes: 1 << 20,
            max_requests: REQUESTS,
            max_request_bytes: REQUEST,
            hash_threads: Some(hash_threads),
            ..OpenOptions::new(Access::ReadWrite, [1; 32])
        }
    }

    /// The worker never comes, so the jobs are for the thread that offered them. If it slept
    /// before, it would for ever.
    #[test]
    fn a_job_that_no_worker_takes_is_hashed_before_the_io_thread_sleeps() {
        let (_file, offline, key) = scratch();
        let Credential::Key(key) = &key else { unreachable!("it has no slots") };
        let pool = HashPool::new(1);
        let _busy = pool.worker();
        let left = Arc::new(AtomicUsize::new(0));
        let (offer, count) = (pool.clone(), Arc::clone(&left));
        let threads = HashThreads::new(move |job| {
            let back = offer.offer(job);
            count.fetch_add(back.is_none().into(), Relaxed);
            back
        });
        let volume = offline.run(open(&offline.io(), key, &options(threads))).unwrap().unwrap();

        let (backings, files) = offline.handles();
        let ring = OwnRing::new(backings.descriptors().unwrap()).unwrap();
        let io = ring.storage(files);
        let mut slots: Vec<_> = (0..REQUESTS).map(|_| volume.context(0)).collect();
        RequestContext::work_together(&mut slots);
        let written = Cell::new(0);
        let (volume, io, count) = (&volume, &io, &written);
        let write = |(i, (mut slot, buf)): (u64, (RequestContext, Buf))| async move {
            let blocks = (REQUEST / volume.block_size()) as u64;
            let range = BlockRange::new(BlockIndex(i * blocks), blocks);
            volume.write(io, &mut slot, range, buf, Durability::MayBeLost).await.0.unwrap();
            count.set(count.get() + 1);
        };
        let writes = (0..).zip(slots.into_iter().zip(Buf::several(REQUESTS, REQUEST))).map(write);
        ring.run_together(writes, Some(&pool)).unwrap();
        assert_eq!(written.get(), REQUESTS);
        assert!(left.load(Relaxed) > 0, "nothing was offered");
        assert!(pool.steal().is_none());
    }
}

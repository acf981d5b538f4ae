//! A ring of our own and the loop that drives it: for the checkpoint and prefetch threads, and for
//! the commands that work without ublk.

use super::{
    Batch, EventLoop, Executor, HashPool,
    ring::{DeviceFiles, EnterWait, Ops, Port, RingStorage, register},
};
use std::{cell::RefCell, future::Future, io, os::fd::OwnedFd, rc::Rc};
use ublk_integrity::Buf;

/// Submission entries of such a ring.
const ENTRIES: u32 = 256;
/// Tasks, and operations in flight at a time before the table grows.
const OPS: usize = 256;

/// A ring and the loop that drives it.
pub struct OwnRing {
    pub(super) ops: Rc<Ops>,
    batch: Rc<Batch>,
}

impl OwnRing {
    /// A ring for `files`, which are closed with it.
    pub fn new(files: Vec<OwnedFd>) -> io::Result<Self> {
        let ops = Ops::on_files(Port::own(ENTRIES)?, OPS, Some(files))?;
        Ok(Self { ops, batch: Batch::new(OPS) })
    }

    /// Makes the kernel know buffers beforehand; see [`register`].
    pub fn register<'a>(&self, bufs: impl IntoIterator<Item = &'a mut Buf>) -> io::Result<()> {
        register(&self.ops, bufs)
    }

    /// A handle on the devices for use inside [`block_on`](Self::block_on).
    pub fn storage(&self, files: DeviceFiles) -> RingStorage {
        RingStorage::new(Rc::clone(&self.ops), Rc::clone(&self.batch), files)
    }

    /// Runs `future` to its end. Wakes from other threads reach it.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> io::Result<T> {
        self.block_on_expecting(future, || 1)
    }

    /// The same, with so many completions [expected](EventLoop::expected) at once.
    pub(super) fn block_on_expecting<T>(
        &self,
        future: impl Future<Output = T>,
        expected: impl Fn() -> usize,
    ) -> io::Result<T> {
        let result = RefCell::new(None);
        let mut executor = Executor::new(1, self.ops.doorbell(), &self.batch);
        executor.spawn(async { *result.borrow_mut() = Some(future.await) });
        self.drive(&executor, expected, None)?;
        drop(executor);
        Ok(result.into_inner().expect("the only task has ended"))
    }

    /// Runs all futures to their ends, each as a task of its own, and before it sleeps
    /// a stranded hash job.
    ///
    /// # Panics
    /// When there are more than [`OPS`].
    pub fn run_together(
        &self,
        futures: impl IntoIterator<Item = impl Future<Output = ()>>,
        hash_pool: Option<&HashPool>,
    ) -> io::Result<()> {
        let futures: Vec<_> = futures.into_iter().collect();
        let mut executor = Executor::new(futures.len(), self.ops.doorbell(), &self.batch);
        futures.into_iter().for_each(|future| executor.spawn(future));
        self.drive(&executor, || 1, hash_pool)
    }

    fn drive(
        &self,
        executor: &Executor<'_>,
        expected: impl Fn() -> usize,
        hash_pool: Option<&HashPool>,
    ) -> io::Result<()> {
        EventLoop { executor, ops: &self.ops, reap: || self.ops.reap(), expected, sending: &|| (), hash_pool }.drive()
    }
}

impl Drop for OwnRing {
    fn drop(&mut self) {
        // A sleep's time is read when it is submitted; the ring's end cancels it.
        let mut entered = self.ops.enter(EnterWait::No);
        // Operations whose futures were dropped: let them end, so that their memory can be freed.
        while entered.is_ok() && self.ops.in_flight() > 0 {
            entered = self.ops.enter(EnterWait::One);
            self.ops.reap();
        }
        // Where the ring has failed `Ops` leaks them.
    }
}

//! The seam between a request and the thread that runs it beside others: batches, and
//! which others are ready.
//!
//! A thread runs its requests in batches. What is cheaper once for many than once for each waits
//! for the end of the batch: small hash jobs run side by side there, and one log record carries the
//! entries of all.

use crate::Storage;
use std::future::{Future, ready};

/// What is done for all requests of a thread at the end of a batch, in this order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Tags are computed. A request that takes long for that may be put off to a later batch. More
    /// blocks side by side are cheaper, so new completions and new requests are looked for before.
    Hash,
    /// One log record is sealed and written for all entries.
    Commit,
}

/// The scheduler of the thread that runs a request. The defaults are those of a thread that runs
/// one request at a time.
pub trait Scheduler {
    /// Completes at the end of the batch, when `phase` is due. Never waits for I/O or for another
    /// thread.
    fn batch_boundary(&self, phase: Phase) -> impl Future<Output = ()> {
        let _ = phase;
        ready(())
    }
    /// Says that the request has used the processor for long, as hashing does: the scheduler may
    /// look at the clock.
    fn charge(&self) {}
    /// How many other requests of this thread can go on now. Where there are any, work that another
    /// thread can do is better done there.
    fn runnable(&self) -> usize {
        0
    }
}

/// What an operation of a volume runs on: the devices, and the thread's scheduler.
pub trait Io: Storage + Scheduler {}

impl<T: Storage + Scheduler> Io for T {}

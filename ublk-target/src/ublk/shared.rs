//! What the queues share, and what each request has.

use super::{
    gate::Gate,
    request::{BlockShift, Request},
    stopwatch::Latencies,
};
use crate::{
    daemon::log::{Event, Log},
    event_loop::{HashPool, ring::DeviceFiles},
    failure::Outcome,
    write_back_file::MappedFile,
};
use std::sync::Arc;
use ublk_integrity::{BlockTarget, Buf, Errno};

/// What all queues share.
pub struct Shared<T> {
    /// What serves the requests.
    pub target: Arc<T>,
    /// The devices, as registered in each queue's ring.
    pub files: DeviceFiles,
    /// Size of a block.
    pub shift: BlockShift,
    /// Whether the data device is told of discards.
    pub discard: bool,
    /// Where the bytes of admitted writes are kept. `None`: no write is admitted.
    pub write_back_file: Option<MappedFile>,
    /// The hash workers.
    pub hashing: HashPool,
    /// What each request passes first.
    pub gate: Gate,
    /// How long requests have taken.
    pub latencies: Latencies,
    /// Where failures are told.
    pub log: Log,
}

/// All that a request needs, taken once.
pub(super) struct Memory<T: BlockTarget> {
    pub(super) context: T::Context,
    pub(super) buf: Buf,
}

impl<T> Shared<T> {
    /// Retires the write-back file, if there is one: the writes that are left in it.
    pub fn retire_kept(&self) -> Outcome<usize> {
        self.write_back_file.as_ref().map_or(Ok(0), |mapped| mapped.file.retire())
    }

    /// The driver has not copied the bytes of a request.
    pub(super) fn not_copied(&self, request: Request, e: Errno) -> Errno {
        self.log.tell(Event::NotCopied(request, e));
        e
    }
}

#[cfg(test)]
impl<T> Shared<T> {
    /// For blocks of 4096 bytes, one thread, and few requests at a time.
    pub fn of_test(target: Arc<T>, files: DeviceFiles) -> Self {
        Self {
            target,
            files,
            shift: BlockShift::of(4096),
            discard: false,
            write_back_file: None,
            hashing: HashPool::new(0),
            gate: Gate::new(1, 4),
            latencies: Latencies::new(1),
            log: Log::of_test(),
        }
    }
}

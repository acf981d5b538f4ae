//! The queue of one shard of the range locks: who waits for whom, and which writes of a block have
//! been answered before they are in place.

use crate::BlockRange;

/// How a range is held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mode {
    /// Reads: together with other reads.
    Shared,
    /// Writes: alone, but that parked locks before it don't matter until it becomes exclusive.
    Write,
    /// Whatever looks at the medium or changes it: alone.
    Exclusive,
}

/// A write that was admitted and is not in place, whose bytes the caller keeps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct KeptWrite {
    /// Its blocks.
    pub(crate) range: BlockRange,
    /// Where its bytes are, as the caller has said.
    pub(crate) at: u64,
    /// Its number among all that were admitted.
    pub(super) number: u64,
}

/// What an admitted write means to a read of its blocks before it is in place.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Admission {
    /// The write was not admitted: it is answered once it is in place, and its lock is released.
    No,
    /// It may have been answered, so nothing older may be read.
    Admitted,
    /// The same, and its bytes can be had.
    Kept { at: u64, number: u64 },
}

/// Which admitted writes a read finds before it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum AdmittedBefore {
    /// None.
    None,
    /// The newest has all blocks of the read, and its bytes can be had.
    Kept(KeptWrite),
    /// Others.
    Some,
}

/// A request in the queue of a shard.
#[derive(Clone, Copy)]
pub(super) struct LockRequest {
    pub(super) request: usize,
    pub(super) range: BlockRange,
    pub(super) mode: Mode,
    pub(super) admission: Admission,
    /// Nothing before it in this shard's queue is in its way.
    pub(super) granted: bool,
    /// What it writes is durable in the log, and not in place yet.
    pub(super) parked: bool,
}

impl LockRequest {
    pub(super) fn new(request: usize, range: BlockRange, mode: Mode, admission: Admission) -> Self {
        Self { request, range, mode, admission, granted: false, parked: false }
    }

    /// Whether it writes what the caller keeps.
    pub(super) fn is_kept(&self) -> bool {
        matches!(self.admission, Admission::Kept { .. })
    }

    /// Whether they can't both touch the medium.
    pub(super) fn conflicts(&self, other: &Self) -> bool {
        (self.mode != Mode::Shared || other.mode != Mode::Shared) && self.range.overlaps(other.range)
    }

    /// Whether it must wait for one that came earlier.
    pub(super) fn waits_for(&self, earlier: &Self) -> bool {
        self.conflicts(earlier) && !(self.mode == Mode::Write && earlier.parked)
    }
}

/// The lock requests of a shard, in the order in which they came.
pub(super) struct LockQueue {
    pub(super) requests: Vec<LockRequest>,
    /// How many of them are not granted.
    pub(super) waiting: usize,
}

impl LockQueue {
    /// # Panics
    /// When the request is not in this queue.
    pub(super) fn position(&self, request: usize) -> usize {
        self.requests.iter().position(|lock| lock.request == request).expect("it leaves once")
    }

    /// Which admitted writes of these blocks are here.
    pub(super) fn admitted_before(&self, range: BlockRange) -> AdmittedBefore {
        let admitted = |lock: &&LockRequest| lock.admission != Admission::No && lock.range.overlaps(range);
        match self.requests.iter().rev().find(admitted) {
            None => AdmittedBefore::None,
            Some(LockRequest { admission: Admission::Kept { at, number }, range: kept, .. }) if kept.covers(range) => {
                AdmittedBefore::Kept(KeptWrite { range: *kept, at: *at, number: *number })
            }
            Some(_) => AdmittedBefore::Some,
        }
    }

    /// The newest lock of any of these blocks before that of `request`.
    pub(super) fn newest_before(&self, request: usize, range: BlockRange) -> Option<&LockRequest> {
        self.requests[..self.position(request)].iter().rev().find(|lock| lock.range.overlaps(range))
    }

    /// Whether the lock at `i` must wait.
    pub(super) fn must_wait(&self, i: usize) -> bool {
        self.requests[..i].iter().any(|earlier| self.requests[i].waits_for(earlier))
    }

    /// Grants a lock that need not wait any more, of those that overlap `range`.
    pub(super) fn grant_next(&mut self, range: BlockRange) -> Option<usize> {
        if self.waiting == 0 {
            return None;
        }
        let free = |i: usize| {
            let lock = &self.requests[i];
            !lock.granted && lock.range.overlaps(range) && !self.must_wait(i)
        };
        let next = (0..self.requests.len()).find(|i| free(*i))?;
        self.waiting -= 1;
        self.requests[next].granted = true;
        Some(self.requests[next].request)
    }
}

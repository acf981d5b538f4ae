//! A flush, and the held writes that it logs.
//!
//! A held write has its tags. The flush puts both into the record that gathers, and writes that record where nobody else
//! does. So nobody is woken before the flush can be answered: the write, which may be another thread's, goes on when it is
//! to be in place, or when a request waits for its range. Until then it is kept, and no later write of its blocks begins.
//!
//! What does not fit into the record, or finds the log too full, is told to log itself, and the flush waits for it.

use super::{AdmittedWrites, Awaited, Place, lazy::GoOn};
use crate::{
    Io,
    log::{Change, Log, Logged, Requester},
    request::{hash_batch::HashWork, range_lock::RangeLocks},
    sync::Ordering,
};
use arrayvec::ArrayVec;
use std::task::Waker;

/// Most writes that one flush logs. A record has room for fifteen of 4 KiB.
const MOST_LOGGED: usize = 32;

/// A write that is held, until its request goes on.
pub(super) struct Held {
    pub(super) work: HashWork,
    /// How many bytes its blocks have.
    pub(super) bytes: usize,
    /// What a flush has logged of it.
    pub(super) logged: Option<Logged>,
    /// Whether that is durable.
    pub(super) is_durable: bool,
}

impl Held {
    fn change(&self) -> Change<'_> {
        let HashWork { first, buf, at, count, tags } = &self.work;
        Change::Payload { first: *first, tags: &tags[..*count], blocks: &buf[*at..*at + self.bytes] }
    }
}

/// The writes that a flush has in hand. Dropped before their record is durable, it leaves each to its request.
struct InHand<'f> {
    writes: &'f AdmittedWrites,
    log: &'f Log,
    ranges: &'f RangeLocks,
    flush: Requester,
    logged: ArrayVec<(Place, Logged), MOST_LOGGED>,
}

impl InHand<'_> {
    /// Logs a held write, if that can be done at once.
    fn log(&mut self, place: Place) -> bool {
        if self.logged.is_full() || !self.ranges.begin(place.request) {
            return false;
        }
        let mut slot = self.writes.held[place.request].lock();
        let Some(held) = slot.as_mut() else { return false };
        let of = Requester { id: place.request, thread: self.flush.thread };
        let (logged, wake) = self.log.try_carry(of, &held.change());
        held.logged = logged;
        drop(slot);
        wake.into_iter().for_each(Waker::wake);
        self.logged.extend(logged.map(|logged| (place, logged)));
        logged.is_some()
    }

    /// Writes their record, unless somebody else does. They are safe then.
    async fn write_record<S: Io>(mut self, io: &S) {
        let Some((_, mut last)) = self.logged.last().copied() else { return };
        // One look at the batch boundary is enough for all of them.
        last.checks_at_boundary = self.logged.iter().any(|(_, logged)| logged.checks_at_boundary);
        if self.log.commit(io, self.flush.id, &last).await.is_err() {
            // Each finds the volume latched.
            return;
        }
        while let Some((place, logged)) = self.logged.pop() {
            // It goes in place whatever becomes of the volume from now on.
            self.writes.held[place.request].lock().iter_mut().for_each(|held| held.is_durable = true);
            self.writes.end(place.request);
            if !self.writes.lazy.park(place, || self.log.is_current(logged.epoch)) {
                self.writes.lazy.tell_one(place.request, GoOn::Logged);
            } else if self.ranges.is_contended(place.request) {
                // It looked before it was parked.
                self.writes.lazy.wake(place.request);
            }
        }
    }
}

impl Drop for InHand<'_> {
    fn drop(&mut self) {
        if self.logged.is_empty() {
            return;
        }
        // Nobody is to hand the lead on to what is no more.
        self.log.leave_waiters(self.flush.id);
        self.logged.iter().for_each(|(place, _)| self.writes.lazy.tell_one(place.request, GoOn::Logged));
    }
}

impl AdmittedWrites {
    /// Waits until all writes that were admitted before are safe, or have failed. Those that are
    /// held go on.
    pub(crate) async fn flush(&self, request: usize) {
        let below = self.next.load(Ordering::SeqCst);
        if self.oldest() < below {
            self.lazy.flush(below, |_| false);
            self.wait(request, Awaited::AllBelow(below)).await;
        }
    }

    /// The same, for a request on an I/O thread, which logs those that are held.
    pub(crate) async fn flush_and_log<S: Io>(&self, io: &S, flush: Requester, log: &Log, ranges: &RangeLocks) {
        let below = self.next.load(Ordering::SeqCst);
        if self.oldest() < below {
            let logged = ArrayVec::new();
            let mut in_hand = InHand { writes: self, log, ranges, flush, logged };
            self.lazy.flush(below, |place| in_hand.log(place));
            in_hand.write_record(io).await;
            self.wait(flush.id, Awaited::AllBelow(below)).await;
        }
    }
}

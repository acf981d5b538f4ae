//! Admitted writes that are not written: the next one covers them, and has come before anything began of them.

use super::{LockQueue, LockRequest, RangeGuard, RangeLocks};
use crate::{
    request::lock_queue::Admission,
    sync::{AtomicU8, MutexGuard, Ordering},
};
use std::{
    future::poll_fn,
    task::{Poll, Waker},
};

/// It has begun, or is not to have an heir.
const BEGUN: u8 = 0;
/// It waits, with nothing logged.
const WAITS: u8 = 1;
/// It has an heir, and ends unwritten.
const INHERITED: u8 = 2;

/// How far a write is, as far as a later one asks.
pub(super) struct Progress(AtomicU8);

impl Progress {
    pub(super) fn new() -> Self {
        Self(AtomicU8::new(BEGUN))
    }

    /// The next request of the context has come.
    pub(super) fn reset(&self) {
        self.0.store(BEGUN, Ordering::SeqCst);
    }

    /// From now on it may have an heir.
    fn wait(&self) {
        self.0.store(WAITS, Ordering::SeqCst);
    }

    fn waits(&self) -> bool {
        self.0.load(Ordering::SeqCst) == WAITS
    }

    pub(super) fn has_heir(&self) -> bool {
        self.0.load(Ordering::SeqCst) == INHERITED
    }

    /// Whether it still waited.
    fn leave(&self, to: u8) -> bool {
        self.0.compare_exchange(WAITS, to, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }
}

impl RangeLocks {
    /// The admitted write of a request begins: it has no heir from now on. `false`: it has one already, and is to end unwritten.
    /// The request holds its range meanwhile.
    pub(crate) fn begin(&self, request: usize) -> bool {
        let progress = &self.waiters[request].progress;
        progress.leave(BEGUN) || !progress.has_heir()
    }
}

impl RangeGuard<'_> {
    /// Says where the bytes of an admitted write are, until this is released, and whether it may have an heir.
    ///
    /// It is the heir of the write just before it if it covers that, and nothing has begun of it, and `inherit` agrees: that is
    /// called with the other's request before that can end. Whether it is.
    pub(crate) fn kept(&self, number: u64, at: u64, may_have_heir: bool, inherit: impl FnOnce(usize) -> bool) -> bool {
        let waiters = &self.ranges.waiters;
        // Held until the other has heard: it can't leave its context to the next request meanwhile.
        let mut queues = self.ranges.lock_all(self.range);
        for (shard, queue) in self.ranges.shards_of(self.range).zip(&mut queues) {
            let i = queue.position(self.request);
            let was_kept = queue.requests[i].is_kept();
            queue.requests[i].admission = Admission::Kept { at, number };
            self.ranges.shards[shard].kept.fetch_add((!was_kept).into(), Ordering::Relaxed);
        }
        if may_have_heir {
            waiters[self.request].progress.wait();
        }
        let Some(earlier) = self.predecessor(&queues).filter(|earlier| waiters[*earlier].progress.waits()) else {
            return false;
        };
        if !inherit(earlier) || !waiters[earlier].progress.leave(INHERITED) {
            return false;
        }
        waiters[earlier].contended.store(true, Ordering::SeqCst);
        drop(queues);
        // Whatever it waits for. A waker may be that of the context's next request by now, which then is polled once in vain.
        let wakers = [&waiters[earlier].lazy, &waiters[earlier].waker].map(|slot| slot.lock().take());
        wakers.into_iter().flatten().for_each(Waker::wake);
        true
    }

    /// The request just before this one that this one covers, with nobody between the two.
    fn predecessor(&self, queues: &[MutexGuard<'_, LockQueue>]) -> Option<usize> {
        let shards = || self.ranges.shards_of(self.range).zip(queues);
        let is_last = |earlier: &&LockRequest| {
            // Who has come between and overlaps it is in one of its shards, which are all among these.
            let of_earlier = self.ranges.shards_of(earlier.range);
            shards().filter(|(shard, _)| of_earlier.contains(*shard)).all(|(_, queue)| {
                let newest = queue.newest_before(self.request, earlier.range);
                newest.is_some_and(|newest| newest.request == earlier.request)
            })
        };
        let found = shards().filter_map(|(_, queue)| queue.newest_before(self.request, self.range));
        let mut found = found.filter(|earlier| self.range.covers(earlier.range)).filter(is_last);
        found.next().map(|earlier| earlier.request)
    }

    /// An admitted write waits for its range. `false`: it has an heir, and is to end unwritten.
    pub(crate) async fn granted(&self) -> bool {
        if !self.is_granted() {
            self.hurry_earlier();
        }
        poll_fn(|cx| {
            // It leaves its waker before it looks: who becomes its heir takes that afterwards.
            let granted = self.poll_granted(cx);
            if self.has_heir() { Poll::Ready(false) } else { granted.map(|()| true) }
        })
        .await
    }

    /// An admitted write [begins](RangeLocks::begin).
    pub(crate) fn begin(&self) -> bool {
        self.ranges.begin(self.request)
    }

    pub(crate) fn has_heir(&self) -> bool {
        self.ranges.waiters[self.request].progress.has_heir()
    }
}

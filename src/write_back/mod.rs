//! Write-back: a write is *admitted*, answered, and written in place afterwards. Nobody can tell,
//! as with a disk's own cache.
//!
//! 1. An admitted write has its place in the queue for its range from before its answer until it is in place. A request that
//!    overlaps it waits. It may itself wait there for others.
//! 2. A flush waits until all writes that were admitted before it began are *safe*: in place, or
//!    carried by a record that is durable, and all before it.
//! 3. The caller keeps the bytes where they outlive this process. If the process dies, they are
//!    written again after the next [`open`](crate::open::open), in the order of their numbers. Once the write is safe, be it
//!    some time later, the caller clears them, while no later write of these blocks can be: so they never overwrite
//!    anything newer. The engine leaves these bytes unchanged, whether the write succeeds or fails.
//! 4. An admitted write that fails latches the volume: no flush succeeds any more. Its blocks don't
//!    hold what was last written, so they can't be read.
//! 5. One that waits, with nothing logged, is not written where the next one covers it: that is its *heir*. For flushes the heir
//!    counts as admitted when the first of those was whose place it takes.
//!
//! With a sync log admitted writes wait so that a flush finds them and logs them ([`flush`]), and once they are safe
//! ([`lazy`]). A write that must be durable when it is answered can be admitted, too: it is answered
//! when it is safe.
//!
//! An admitted write waits for what any write waits for, and for the record of a flush that has logged it, but never for a
//! flush to end. So none waits for itself in a circle.

mod admitted;
mod flush;
mod lazy;

use crate::{
    BlockRange, Durability,
    log::Log,
    request::range_lock::RangeGuard,
    sync::{AtomicU64, AtomicUsize, Mutex, Ordering},
    wait_list::WaitList,
};
pub use admitted::Admitted;
pub(crate) use admitted::Next;
use flush::Held;
use lazy::LazyWrites;
use std::{
    future::poll_fn,
    task::{Poll, Waker},
};

/// The request has no admitted write in flight.
const NONE: u64 = 0;

/// The most writes in whose place an heir is written: so that a block which is written without a pause is written at all.
const MOST_INHERITED: u64 = 64;

/// What somebody waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Awaited {
    /// Flushes: no write with a number below this one is unsafe.
    AllBelow(u64),
    /// This one is safe.
    One(WriteBackId),
}

/// By this an admitted write can be waited for until it is safe.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WriteBackId {
    /// The context that it was admitted with.
    pub request: usize,
    /// Its number among all that were admitted. Of two writes of one block the later has the higher one.
    pub number: u64,
}

/// An admitted write, and the thread that it is of.
#[derive(Clone, Copy)]
struct Place {
    thread: usize,
    request: usize,
    /// The number of the first write whose place it takes: its own where it is nobody's heir.
    since: u64,
}

/// Of a request.
struct InFlight {
    /// The number of its admitted write while that is not safe, or [`NONE`].
    number: AtomicU64,
    /// [`Place::since`] of that.
    since: AtomicU64,
    /// How many writes it is written for besides itself.
    inherited: AtomicU64,
}

impl InFlight {
    fn none() -> Self {
        let [number, since, inherited] = [NONE, NONE, 0].map(AtomicU64::new);
        Self { number, since, inherited }
    }
}

/// The admitted writes that are not in place yet, and the flushes that wait for them.
pub(crate) struct AdmittedWrites {
    /// The number of the next write: each is given once, in order.
    next: AtomicU64,
    /// By request.
    in_flight: Vec<InFlight>,
    /// How many heirs there were: one may have come while somebody looked for the oldest.
    heirs: AtomicU64,
    /// Length of `waiters`, to be read without the lock.
    waiting: AtomicUsize,
    waiters: Mutex<WaitList<Awaited>>,
    lazy: LazyWrites,
    /// By request: its write while that is held, and after a flush has logged it.
    held: Vec<Mutex<Option<Held>>>,
    /// Ranges of the writes that failed, at most one of each request: after a failure none is
    /// admitted.
    failed: Mutex<Vec<BlockRange>>,
    /// Length of `failed`, to be read without the lock.
    failures: AtomicUsize,
}

impl AdmittedWrites {
    /// For so many threads, requests, and writes that each thread may have admitted and not in place.
    /// `sync_log`: records may carry these.
    pub(crate) fn new(threads: usize, requests: usize, per_thread: usize, sync_log: bool) -> Self {
        Self {
            next: AtomicU64::new(NONE + 1),
            in_flight: (0..requests).map(|_| InFlight::none()).collect(),
            heirs: AtomicU64::new(0),
            waiting: AtomicUsize::new(0),
            waiters: Mutex::new(WaitList::new(requests)),
            lazy: LazyWrites::new(threads, requests, if sync_log { per_thread } else { 0 }),
            held: (0..requests).map(|_| Mutex::new(None)).collect(),
            failed: Mutex::new(Vec::with_capacity(requests)),
            failures: AtomicUsize::new(0),
        }
    }

    /// The memory for so many requests.
    pub(crate) fn memory_bytes_for(requests: usize) -> u64 {
        let own = (requests as u64).saturating_mul(
            (size_of::<InFlight>() + size_of::<Mutex<Option<Held>>>() + size_of::<BlockRange>()) as u64,
        );
        own.saturating_add(WaitList::<Awaited>::memory_bytes_for(requests))
            .saturating_add(LazyWrites::memory_bytes_for(requests))
    }

    /// The number of the next write.
    pub(crate) fn next_number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::SeqCst)
    }

    /// Admits a write of a thread, whose range is held or in line: it may be answered at once, or when it is
    /// safe. `None` where the volume is latched.
    pub(crate) fn admit<'v>(
        &'v self,
        log: &'v Log,
        (guard, number): (RangeGuard<'v>, u64),
        thread: usize,
        durability: Durability,
    ) -> Option<Admitted<'v>> {
        let first_not_durable = log.first_not_durable().ok()?;
        self.begin(guard.request(), number);
        Some(Admitted::new(self, log, (guard, number), thread, durability, first_not_durable))
    }

    /// A flush that has begun since the number was given does not wait for it, and need not: it has not been answered.
    fn begin(&self, request: usize, number: u64) {
        let write = &self.in_flight[request];
        write.inherited.store(0, Ordering::SeqCst);
        write.since.store(number, Ordering::SeqCst);
        write.number.store(number, Ordering::SeqCst);
    }

    /// The write of a request is to be the heir of that of another, which has not ended: since when it counts. `None`: somebody
    /// waits for the other, or it has been put off for long enough.
    fn inherit(&self, request: usize, from: usize) -> Option<u64> {
        let [write, from] = [request, from].map(|request| &self.in_flight[request]);
        let (since, inherited) = (from.since.load(Ordering::SeqCst), from.inherited.load(Ordering::SeqCst) + 1);
        if since == NONE || inherited > MOST_INHERITED || self.lazy.is_flushed(since) {
            return None;
        }
        write.inherited.store(inherited, Ordering::SeqCst);
        write.since.store(since, Ordering::SeqCst);
        self.heirs.fetch_add(1, Ordering::SeqCst);
        Some(since)
    }

    /// The write is safe, or has failed.
    fn end(&self, request: usize) {
        self.in_flight[request].number.store(NONE, Ordering::SeqCst);
        self.in_flight[request].since.store(NONE, Ordering::SeqCst);
        // A waiter counts itself before it looks at the numbers, so either this sees the waiter or
        // the waiter sees this.
        if self.waiting.load(Ordering::SeqCst) == 0 {
            return;
        }
        let (oldest, mut from) = (self.oldest(), 0);
        let take = || {
            let mut waiters = self.waiters.lock();
            let request = waiters.find(from, |awaited| self.has_come(awaited, || oldest))?;
            // Each once: for one that waits again there may be an older write by now.
            from = request + 1;
            let waker = waiters.take_waker(request);
            waiters.remove(request);
            self.waiting.store(waiters.len(), Ordering::SeqCst);
            waker
        };
        // One at a time, so that no waker is called under the lock.
        std::iter::from_fn(take).for_each(Waker::wake);
    }

    /// The lowest number that anything in flight counts as.
    fn oldest(&self) -> u64 {
        loop {
            let heirs = self.heirs.load(Ordering::SeqCst);
            let since = self.in_flight.iter().map(|write| write.since.load(Ordering::SeqCst));
            let oldest = since.filter(|since| *since != NONE).min().unwrap_or(u64::MAX);
            // Else one that had been passed may have taken the place of one that was gone when its turn came.
            if self.heirs.load(Ordering::SeqCst) == heirs {
                return oldest;
            }
        }
    }

    fn has_come(&self, awaited: Awaited, oldest: impl FnOnce() -> u64) -> bool {
        match awaited {
            Awaited::AllBelow(below) => below <= oldest(),
            Awaited::One(id) => self.in_flight[id.request].number.load(Ordering::SeqCst) != id.number,
        }
    }

    /// Waits until a write is safe, or has failed.
    pub(crate) async fn wait_safe(&self, request: usize, id: WriteBackId) {
        self.wait(request, Awaited::One(id)).await;
    }

    async fn wait(&self, request: usize, awaited: Awaited) {
        let has_come = || self.has_come(awaited, || self.oldest());
        poll_fn(|cx| {
            if has_come() {
                return Poll::Ready(());
            }
            self.note_waiter(request, awaited, cx.waker());
            if has_come() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// Notes a waiter, one for each request. One whose future was dropped stays, and
    /// is woken once in vain.
    fn note_waiter(&self, request: usize, awaited: Awaited, waker: &Waker) {
        let mut waiters = self.waiters.lock();
        waiters.wait(request, awaited, waker);
        self.waiting.store(waiters.len(), Ordering::SeqCst);
    }

    /// An epoch has ended: what its records carry goes to its place.
    pub(crate) fn hurry_parked(&self) {
        self.lazy.hurry_parked();
    }

    /// No more writes of the thread are admitted: none of them waits any more.
    pub(crate) fn end_thread(&self, thread: usize) {
        self.lazy.end(thread);
    }

    /// Whether writes wait, so that a [`tick`](Self::tick) is due. If not, the waker is called when
    /// some do.
    pub(crate) fn poll_tick(&self, waker: &Waker) -> Poll<()> {
        self.lazy.poll_tick(waker)
    }

    /// Some time has passed: writes that have waited long enough go on.
    pub(crate) fn tick(&self) {
        self.lazy.tick(self.next.load(Ordering::SeqCst));
    }

    fn fail(&self, range: BlockRange) {
        self.failed.lock().push(range);
        self.failures.fetch_add(1, Ordering::Release);
    }

    /// Whether an answered write of blocks in `range` has failed. The caller holds the range.
    pub(crate) fn has_failed(&self, range: BlockRange) -> bool {
        self.failures.load(Ordering::Acquire) > 0 && self.failed.lock().iter().any(|failed| failed.overlaps(range))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BlockIndex;
    use std::{
        future::Future,
        pin::pin,
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering},
        },
        task::{Context, Wake},
    };

    struct Woken(AtomicBool);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_flush_waits_for_those_before_it_and_for_no_others() {
        let writes = AdmittedWrites::new(1, 4, 0, false);
        let woken = Arc::new(Woken(AtomicBool::new(false)));
        let waker = Waker::from(woken.clone());
        let mut cx = Context::from_waker(&waker);
        writes.begin(2, writes.next_number());
        writes.begin(0, writes.next_number());
        let mut flush = pin!(writes.flush(3));
        assert!(flush.as_mut().poll(&mut cx).is_pending());
        writes.end(2);
        // A later write of a request whose earlier one was waited for.
        writes.begin(2, writes.next_number());
        assert!(!woken.0.load(Ordering::SeqCst) && flush.as_mut().poll(&mut cx).is_pending());
        writes.end(0);
        assert!(woken.0.load(Ordering::SeqCst) && flush.as_mut().poll(&mut cx).is_ready());
        assert_eq!((writes.waiting.load(Ordering::SeqCst), writes.oldest()), (0, 3));
    }

    #[test]
    fn a_block_that_is_written_without_a_pause_is_written_at_all() {
        let writes = AdmittedWrites::new(1, 4, 2, true);
        let next = |request| writes.begin(request, writes.next_number());
        next(0);
        for i in 0..MOST_INHERITED as usize {
            next((i + 1) % 2);
            assert_eq!(writes.inherit((i + 1) % 2, i % 2), Some(1), "it counts as the first");
        }
        next(1);
        assert_eq!(writes.inherit(1, 0), None);
        next(0);
        assert_eq!(
            writes.inherit(0, 1),
            Some(writes.next.load(Ordering::SeqCst) - 2),
            "what was refused counts as itself"
        );
        assert!(pin!(writes.flush(3)).poll(&mut Context::from_waker(Waker::noop())).is_pending());
        writes.begin(1, writes.next_number());
        assert_eq!(writes.inherit(1, 0), None, "a flush waits for it");
    }

    #[test]
    fn a_flush_that_is_dropped_makes_room_for_the_next_waiter() {
        let writes = AdmittedWrites::new(1, 2, 0, false);
        writes.begin(0, writes.next_number());
        for _ in 0..3 {
            assert!(pin!(writes.flush(1)).poll(&mut Context::from_waker(Waker::noop())).is_pending());
        }
        assert_eq!(writes.waiting.load(Ordering::SeqCst), 1);
        writes.end(0);
        assert_eq!(writes.waiting.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn only_blocks_of_failed_writes_are_unreadable() {
        let range = |first, count| BlockRange::new(BlockIndex(first), count);
        let writes = AdmittedWrites::new(1, 2, 0, false);
        assert!(!writes.has_failed(range(0, 100)));
        writes.fail(range(7, 2));
        assert!(writes.has_failed(range(8, 1)) && writes.has_failed(range(0, 8)) && !writes.has_failed(range(9, 5)));
    }
}

/// Real threads under a model checker: see `sync.rs`.
#[cfg(all(test, shuttle))]
mod interleavings {
    use super::*;
    use crate::sync::check;
    use shuttle::{sync::Arc, thread};

    #[test]
    fn who_looks_for_the_oldest_misses_no_heir() {
        let test = || {
            let writes = Arc::new(AdmittedWrites::new(1, 2, 2, true));
            // Who looks comes to its heir first, and then to this.
            writes.begin(1, writes.next_number());
            let heir = {
                let writes = writes.clone();
                thread::spawn(move || {
                    writes.begin(0, writes.next_number());
                    assert_eq!(writes.inherit(0, 1), Some(NONE + 1));
                    writes.end(1);
                })
            };
            assert_eq!(
                writes.oldest(),
                NONE + 1,
                "a flush would not wait for what is written in the place of the first"
            );
            heir.join().unwrap();
        };
        check(test, 5000, 3);
    }
}

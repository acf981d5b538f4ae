//! Range locks: which request may touch which blocks. First come, first served; a whole range is
//! locked in one step.
//!
//! A request waits here only for requests that came before it and overlap it. Each of those either
//! has its range or waits for still earlier ones: no cycle.
//!
//! A write that is answered before it is in place (an admitted one) is so while it waits, too. As long as it has not begun, the
//! next one that covers it can be its *heir*: then it need not be written at all, if nobody came between the two.
//!
//! A write whose data is durable in the log *parks* its lock: it need not be in place before the
//! next write of its blocks is logged. Later writes pass it, reads and all else wait for it.
//! Before a write touches the medium it makes its lock exclusive, so data gets there in the
//! order of the locks. A request that is waited for can be told so, and hurries.
//!
//! Stripes of blocks are spread over shards, each with a mutex of its own, so that threads seldom
//! contend for one. A request enters the queue of each shard that its range touches, and holds the
//! mutexes of all of them meanwhile. That makes it one step: of two requests the same one is first
//! in every shard that both touch.

mod heir;

use super::{
    lock_queue::{Admission, AdmittedBefore, KeptWrite, LockQueue, LockRequest, Mode},
    range_watch::{RangeWatch, Watches},
};
use crate::{
    BlockRange,
    sync::{AtomicBool, AtomicUsize, Mutex, MutexGuard, Ordering},
};
use arrayvec::ArrayVec;
use heir::Progress;
use std::{
    future::poll_fn,
    task::{Context, Poll, Waker},
};

/// How many shards there are: a bit for each in [`ShardSet`].
const SHARDS: usize = 16;

/// Some of the shards.
#[derive(Clone, Copy)]
struct ShardSet(u16);

impl ShardSet {
    fn contains(self, shard: usize) -> bool {
        self.0 & 1 << shard != 0
    }
}

impl Iterator for ShardSet {
    type Item = usize;

    /// In ascending order: the one in which their mutexes are locked.
    fn next(&mut self) -> Option<usize> {
        let shard = self.0.trailing_zeros() as usize;
        self.0 &= self.0.wrapping_sub(1);
        (shard < SHARDS).then_some(shard)
    }
}

/// On cache lines of its own, so that threads at work on different shards don't slow each other down.
#[repr(align(128))]
struct Shard {
    queue: Mutex<LockQueue>,
    /// How many writes in the queue are kept, changed under its mutex: most reads need not take that to
    /// hear that there are none.
    ///
    /// Relaxed is enough. Nothing hangs on what else a read sees, and a count that is out of date harms
    /// nobody: one too high costs the mutex, one too low a wait, for the read then finds the write when it
    /// acquires its range, under the mutex. A read that was sent after the write was answered sees it in
    /// the count, too: whoever sent it has seen the answer, which came after the count.
    kept: AtomicUsize,
}

/// What a request waits for.
#[repr(align(128))]
struct Waiter {
    /// How many shards have not granted it its range yet.
    shards: AtomicUsize,
    waker: Mutex<Option<Waker>>,
    /// Whether a later request waits for it.
    contended: AtomicBool,
    /// Of one that has its range and does nothing until it is contended.
    lazy: Mutex<Option<Waker>>,
    progress: Progress,
}

pub(crate) struct RangeLocks {
    shards: Vec<Shard>,
    /// By request.
    waiters: Vec<Waiter>,
    watches: Watches,
    /// Binary logarithm of the blocks of a stripe.
    stripe: u32,
}

/// A range that is held or waited for; released when dropped.
pub(crate) struct RangeGuard<'a> {
    ranges: &'a RangeLocks,
    request: usize,
    range: BlockRange,
    /// Whether a lock before it conflicted with it when it came: none comes before it later.
    behind: bool,
}

impl RangeLocks {
    /// For `requests` contexts, one request at a time each, of at most `max_blocks` as a rule:
    /// those touch two shards at most. Memory is taken here.
    pub(crate) fn new(requests: usize, max_blocks: usize) -> Self {
        let queue = || Mutex::new(LockQueue { requests: Vec::with_capacity(requests), waiting: 0 });
        let shard = |_| Shard { queue: queue(), kept: AtomicUsize::new(0) };
        let waiter = |_| Waiter {
            shards: AtomicUsize::new(0),
            waker: Mutex::new(None),
            contended: AtomicBool::new(false),
            lazy: Mutex::new(None),
            progress: Progress::new(),
        };
        Self {
            shards: (0..SHARDS).map(shard).collect(),
            waiters: (0..requests).map(waiter).collect(),
            watches: Watches::new(),
            stripe: max_blocks.next_power_of_two().trailing_zeros(),
        }
    }

    /// The memory for so many requests.
    pub(crate) fn memory_bytes_for(requests: usize) -> u64 {
        (requests as u64).saturating_mul((SHARDS * size_of::<LockRequest>() + size_of::<Waiter>()) as u64)
    }

    /// Waits until the request holds the range.
    pub(crate) async fn acquire(&self, request: usize, range: BlockRange, mode: Mode) -> RangeGuard<'_> {
        let guard = self.enqueue(request, range, mode, Admission::No);
        if !guard.is_granted() {
            guard.hurry_earlier();
        }
        poll_fn(|cx| guard.poll_granted(cx)).await;
        guard
    }

    /// The range at once, or nothing. The attempt delays no other request.
    pub(crate) fn try_acquire(&self, request: usize, range: BlockRange, mode: Mode) -> Option<RangeGuard<'_>> {
        let guard = self.enqueue(request, range, mode, Admission::No);
        guard.is_granted().then_some(guard)
    }

    /// A lock for a write that is to be admitted, at once: it need not be [granted](RangeGuard::granted) yet. `number` is called while
    /// no other lock can come between: the numbers of writes that overlap are in the order of their locks.
    pub(crate) fn admit(
        &self,
        request: usize,
        range: BlockRange,
        number: impl FnOnce() -> u64,
    ) -> (RangeGuard<'_>, u64) {
        let mut queues = self.lock_all(range);
        let lock = LockRequest::new(request, range, Mode::Write, Admission::Admitted);
        (self.enqueue_in(&mut queues, &lock), number())
    }

    /// Which admitted writes of these blocks are not in place. Those that were not admitted don't
    /// count: they have not been answered, and a read may come before them.
    pub(crate) fn admitted_before(&self, range: BlockRange) -> AdmittedBefore {
        // All at once: the newest is the same in each, or there is a newer one in some.
        let queues = self.lock_all(range);
        let newest = queues.iter().map(|queue| queue.admitted_before(range));
        newest.reduce(|a, b| if a == b { a } else { AdmittedBefore::Some }).unwrap_or(AdmittedBefore::None)
    }

    /// The newest write of these blocks, if it was admitted and has not been put in place, and all of
    /// them are kept. Where nothing is kept no mutex is taken.
    pub(crate) fn kept_before(&self, range: BlockRange) -> Option<KeptWrite> {
        if self.shards_of(range).any(|shard| self.shards[shard].kept.load(Ordering::Relaxed) == 0) {
            return None;
        }
        match self.admitted_before(range) {
            AdmittedBefore::Kept(kept) => Some(kept),
            _ => None,
        }
    }

    /// Watches a range without a lock on it. Who holds it or waits for it, but to read, disturbs the watch.
    /// So does who comes later.
    pub(crate) fn watch(&self, range: BlockRange) -> RangeWatch<'_> {
        let watch = self.watches.begin(range);
        let changes = |lock: &LockRequest| lock.mode != Mode::Shared && lock.range.overlaps(range);
        if self.lock_all(range).iter().any(|queue| queue.requests.iter().any(changes)) {
            watch.disturb();
        }
        watch
    }

    /// Whether a later request waits for this one, which holds its range.
    pub(crate) fn is_contended(&self, request: usize) -> bool {
        self.waiters[request].contended.load(Ordering::SeqCst)
    }

    fn shards_of(&self, range: BlockRange) -> ShardSet {
        if range.count == 0 {
            return ShardSet(0);
        }
        let (first, last) = (range.first.0 >> self.stripe, (range.end() - 1) >> self.stripe);
        let last = last.min(first + SHARDS as u64 - 1);
        ShardSet((first..=last).fold(0, |set, stripe| set | 1 << (stripe % SHARDS as u64)))
    }

    /// The queues of all shards of a range, locked.
    fn lock_all(&self, range: BlockRange) -> ArrayVec<MutexGuard<'_, LockQueue>, SHARDS> {
        self.shards_of(range).map(|shard| self.shards[shard].queue.lock()).collect()
    }

    fn enqueue(&self, request: usize, range: BlockRange, mode: Mode, admission: Admission) -> RangeGuard<'_> {
        self.enqueue_in(&mut self.lock_all(range), &LockRequest::new(request, range, mode, admission))
    }

    fn enqueue_in(&self, queues: &mut [MutexGuard<'_, LockQueue>], lock: &LockRequest) -> RangeGuard<'_> {
        let LockRequest { request, range, .. } = *lock;
        if lock.mode != Mode::Shared {
            self.watches.disturb(range);
        }
        let (mut waiting, mut behind) = (0, false);
        for queue in queues {
            let mut lock = *lock;
            let mut earlier = queue.requests.iter().filter(|earlier| earlier.conflicts(&lock)).peekable();
            behind |= earlier.peek().is_some();
            lock.granted = !earlier.any(|earlier| lock.waits_for(earlier));
            let waits = usize::from(!lock.granted);
            queue.waiting += waits;
            waiting += waits;
            debug_assert!(queue.requests.iter().all(|lock| lock.request != request), "one range a request");
            queue.requests.push(lock);
        }
        let waiter = &self.waiters[request];
        waiter.contended.store(false, Ordering::Relaxed);
        waiter.progress.reset();
        // While the mutexes are held: until they are released nobody can grant anything.
        waiter.shards.store(waiting, Ordering::Release);
        RangeGuard { ranges: self, request, range, behind }
    }

    /// Leaves the queue of a shard, and wakes the requests that can go on now.
    fn release(&self, shard: usize, request: usize) {
        let mut queue = self.shards[shard].queue.lock();
        let i = queue.position(request);
        let released = queue.requests.remove(i);
        queue.waiting -= usize::from(!released.granted);
        if released.is_kept() {
            self.shards[shard].kept.fetch_sub(1, Ordering::Relaxed);
        }
        self.grant(shard, queue, released.range);
    }

    /// Wakes the requests of a shard that can go on now: one at a time, so that no waker is called
    /// under the mutex.
    fn grant<'a>(&'a self, shard: usize, mut queue: MutexGuard<'a, LockQueue>, range: BlockRange) {
        while let Some(next) = queue.grant_next(range) {
            let waiter = &self.waiters[next];
            // Still under the mutex. A request that is dropped while it waits takes it, too, before
            // the next request of its context sets the count anew.
            let granted = waiter.shards.fetch_sub(1, Ordering::AcqRel) == 1;
            drop(queue);
            if granted {
                // Without a waker its task has not been polled yet, or has stored none yet and
                // looks at the count once more afterwards. It may be the waker of the context's
                // next request, which then is polled once in vain.
                let waker = waiter.waker.lock().take();
                waker.into_iter().for_each(Waker::wake);
            }
            queue = self.shards[shard].queue.lock();
        }
    }
}

impl RangeGuard<'_> {
    /// The request that holds it.
    pub(crate) fn request(&self) -> usize {
        self.request
    }

    pub(crate) fn range(&self) -> BlockRange {
        self.range
    }

    /// Parks the lock, which is granted: what is written is durable in the log, and goes to its place
    /// later. Writes that wait for it go on: it is contended no more, if nobody else waits.
    pub(crate) fn park(&self) {
        let contended = &self.ranges.waiters[self.request].contended;
        // Who comes after this sets it again, or is in the queue below.
        contended.store(false, Ordering::SeqCst);
        for shard in self.ranges.shards_of(self.range) {
            let mut queue = self.ranges.shards[shard].queue.lock();
            let i = queue.position(self.request);
            queue.requests[i].parked = true;
            if queue.requests[i + 1..].iter().any(|later| later.waits_for(&queue.requests[i])) {
                contended.store(true, Ordering::SeqCst);
            }
            self.ranges.grant(shard, queue, self.range);
        }
    }

    /// Whether a later write of all these blocks is parked, so that this one, which is parked too,
    /// need not go to its place.
    pub(crate) fn is_superseded(&self) -> bool {
        // A lock that covers this one is in each of its shards.
        let Some(shard) = self.ranges.shards_of(self.range).next() else { return false };
        let queue = self.ranges.shards[shard].queue.lock();
        let later = &queue.requests[queue.position(self.request) + 1..];
        later.iter().any(|lock| lock.parked && lock.range.covers(self.range))
    }

    /// Waits until all parked locks that it has passed are released: it may touch the medium then.
    pub(crate) async fn exclusive(&self) {
        if !self.behind {
            return;
        }
        let waiting = self.become_exclusive();
        if waiting {
            self.hurry_earlier();
            poll_fn(|cx| self.poll_granted(cx)).await;
        }
    }

    /// Returns whether it must wait.
    fn become_exclusive(&self) -> bool {
        let mut waiting = 0;
        // Held until the count is set, as when it came.
        let mut queues = self.ranges.lock_all(self.range);
        for queue in &mut queues {
            let i = queue.position(self.request);
            queue.requests[i].mode = Mode::Exclusive;
            let waits = usize::from(queue.must_wait(i));
            queue.requests[i].granted = waits == 0;
            queue.waiting += waits;
            waiting += waits;
        }
        self.ranges.waiters[self.request].shards.store(waiting, Ordering::Release);
        waiting > 0
    }

    /// Tells all earlier requests in its way that they are waited for.
    fn hurry_earlier(&self) {
        const AT_ONCE: usize = 16;
        loop {
            // No waker is called under a mutex.
            let mut wakers = ArrayVec::<Waker, AT_ONCE>::new();
            for shard in self.ranges.shards_of(self.range) {
                let queue = self.ranges.shards[shard].queue.lock();
                let i = queue.position(self.request);
                for earlier in &queue.requests[..i] {
                    if queue.requests[i].waits_for(earlier) && !wakers.is_full() {
                        let waiter = &self.ranges.waiters[earlier.request];
                        waiter.contended.store(true, Ordering::SeqCst);
                        wakers.extend(waiter.lazy.lock().take());
                    }
                }
            }
            let all = !wakers.is_full();
            wakers.into_iter().for_each(Waker::wake);
            if all {
                return;
            }
        }
    }

    /// Whether a later request waits for this one. If not, the waker is called when one does.
    pub(crate) fn poll_contended(&self, cx: &Context<'_>) -> Poll<()> {
        let Waiter { contended, lazy, .. } = &self.ranges.waiters[self.request];
        if !contended.load(Ordering::SeqCst) {
            *lazy.lock() = Some(cx.waker().clone());
        }
        // Who waits sets this first, and takes the waker then.
        if contended.load(Ordering::SeqCst) { Poll::Ready(()) } else { Poll::Pending }
    }

    fn is_granted(&self) -> bool {
        self.ranges.waiters[self.request].shards.load(Ordering::Acquire) == 0
    }

    fn poll_granted(&self, cx: &mut Context<'_>) -> Poll<()> {
        if self.is_granted() {
            return Poll::Ready(());
        }
        *self.ranges.waiters[self.request].waker.lock() = Some(cx.waker().clone());
        // The request that grants it counts down first, and takes the waker then. So either it sees
        // this waker, or this sees the count.
        if self.is_granted() { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        self.ranges.shards_of(self.range).for_each(|shard| self.ranges.release(shard, self.request));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BlockIndex;
    use proptest::prelude::*;
    use std::{future::Future, pin::pin};

    fn range(first: u64, count: u64) -> BlockRange {
        BlockRange::new(BlockIndex(first), count)
    }
    fn held(g: &RangeGuard<'_>) -> bool {
        g.poll_granted(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    #[test]
    fn readers_share_writers_do_not_and_order_is_kept() {
        let r = RangeLocks::new(8, 4);
        let a = r.enqueue(0, range(0, 4), Mode::Shared, Admission::No);
        let b = r.enqueue(1, range(2, 4), Mode::Shared, Admission::No);
        let w = r.enqueue(2, range(3, 1), Mode::Exclusive, Admission::No);
        let late = r.enqueue(3, range(3, 1), Mode::Shared, Admission::No);
        let far = r.enqueue(4, range(100, 1), Mode::Exclusive, Admission::No);
        assert!(held(&a) && held(&b) && !held(&w) && !held(&late) && held(&far));
        drop(a);
        assert!(!held(&w));
        drop(b);
        assert!(held(&w) && !held(&late), "a writer is not overtaken by later readers");
        drop(w);
        assert!(held(&late));
    }

    fn admit(r: &RangeLocks, request: usize, range: BlockRange) -> RangeGuard<'_> {
        r.admit(request, range, || 0).0
    }

    #[test]
    fn a_read_finds_the_newest_admitted_write_and_passes_others() {
        let r = RangeLocks::new(8, 1);
        let _writing = r.enqueue(0, range(0, 3), Mode::Write, Admission::No);
        let waiting = r.enqueue(1, range(0, 3), Mode::Write, Admission::No);
        assert_eq!(r.admitted_before(range(0, 3)), AdmittedBefore::None, "neither has been answered");
        drop((_writing, waiting));
        let a = admit(&r, 2, range(0, 3));
        assert_eq!(r.admitted_before(range(2, 1)), AdmittedBefore::Some, "its bytes are not there yet");
        a.kept(7, 100, false, |_| true);
        let kept = AdmittedBefore::Kept(KeptWrite { range: range(0, 3), at: 100, number: 7 });
        assert_eq!([range(0, 3), range(2, 1)].map(|of| r.admitted_before(of)), [kept; 2]);
        assert_eq!(r.admitted_before(range(2, 2)), AdmittedBefore::Some, "only a part of it");
        assert_eq!(r.admitted_before(range(3, 9)), AdmittedBefore::None);
        a.park();
        let b = admit(&r, 3, range(2, 2));
        b.kept(8, 200, false, |_| true);
        let newer = KeptWrite { range: range(2, 2), at: 200, number: 8 };
        assert_eq!(r.admitted_before(range(2, 1)), AdmittedBefore::Kept(newer));
        assert_eq!(r.admitted_before(range(1, 2)), AdmittedBefore::Some, "of two");
        assert_eq!(r.admitted_before(range(0, 2)), kept);
        drop(b);
        assert_eq!(r.admitted_before(range(1, 2)), kept);
        drop(a);
        assert_eq!(r.admitted_before(range(1, 2)), AdmittedBefore::None);
    }

    #[test]
    fn a_read_takes_no_mutex_where_nothing_is_kept() {
        let r = RangeLocks::new(8, 1);
        let (writing, elsewhere) = (r.enqueue(0, range(1, 1), Mode::Write, Admission::No), range(SHARDS as u64 / 2, 1));
        let a = admit(&r, 1, range(0, 1));
        let untaken = |of: BlockRange| {
            // It would wait for itself.
            let _all = r.lock_all(of);
            r.kept_before(of)
        };
        assert_eq!([range(0, 1), range(1, 1), elsewhere].map(untaken), [None; 3]);
        a.kept(7, 100, false, |_| true);
        a.kept(7, 200, false, |_| true);
        assert_eq!(r.kept_before(range(0, 1)), Some(KeptWrite { range: range(0, 1), at: 200, number: 7 }));
        assert_eq!([range(1, 1), range(0, 2), elsewhere].map(untaken), [None; 3], "it is in one shard alone");
        // Another of this shard.
        assert_eq!(r.kept_before(range(SHARDS as u64, 1)), None);
        drop((a, writing));
        assert_eq!(untaken(range(0, 1)), None, "as before");
    }

    #[test]
    fn a_waiter_that_gives_up_lets_others_pass() {
        let r = RangeLocks::new(4, 1);
        let a = r.enqueue(0, range(0, 4), Mode::Shared, Admission::No);
        let w = r.enqueue(1, range(0, 4), Mode::Exclusive, Admission::No);
        let b = r.enqueue(2, range(0, 4), Mode::Shared, Admission::No);
        assert!(held(&a) && !held(&b));
        drop(w);
        assert!(held(&b));
    }

    #[test]
    fn ranges_that_share_a_shard_conflict_only_where_they_overlap() {
        let r = RangeLocks::new(4, 1);
        let all = r.enqueue(0, range(0, 1 << 40), Mode::Exclusive, Admission::No);
        let far = r.enqueue(1, range(SHARDS as u64 * 5 - 1, 2), Mode::Shared, Admission::No);
        let none = r.enqueue(2, range(7, 0), Mode::Exclusive, Admission::No);
        assert!(held(&all) && !held(&far) && held(&none));
        drop(all);
        assert!(held(&far));
        let beside = r.enqueue(3, range(SHARDS as u64 * 4 - 1, 2), Mode::Exclusive, Admission::No);
        assert!(held(&beside), "the same shards, other blocks");
    }

    #[test]
    fn a_write_passes_parked_ones_and_reaches_the_medium_after_them() {
        let r = RangeLocks::new(8, 1);
        let first = r.enqueue(0, range(0, 2), Mode::Write, Admission::No);
        let second = r.enqueue(1, range(1, 2), Mode::Write, Admission::No);
        assert!(held(&first) && !held(&second));
        first.park();
        assert!(held(&second), "what it waited for is durable in the log");
        let reader = r.enqueue(2, range(0, 1), Mode::Shared, Admission::No);
        let third = r.enqueue(3, range(0, 3), Mode::Write, Admission::No);
        assert!(!held(&reader) && !held(&third), "reads don't pass, and nobody passes them");
        assert!(second.become_exclusive() && !held(&second));
        second.park();
        drop(first);
        assert!(held(&second) && held(&reader) && !held(&third));
        drop(reader);
        assert!(held(&third), "it passes a parked one that is exclusive, too");
        drop(second);
        assert!(!third.become_exclusive());
    }

    #[test]
    fn admitted_writes_stand_in_line_and_have_their_numbers_in_its_order() {
        let r = RangeLocks::new(8, 1);
        let mut last = 0;
        let mut admit = |request, from, count| {
            r.admit(request, range(from, count), || {
                last += 1;
                last
            })
        };
        let reader = r.enqueue(0, range(0, 1), Mode::Shared, Admission::No);
        let (first, second, elsewhere) = (admit(1, 0, 2), admit(2, 1, 2), admit(3, 3, 1));
        assert_eq!(
            [&first, &second, &elsewhere].map(|(guard, number)| (held(guard), *number)),
            [(false, 1), (false, 2), (true, 3)]
        );
        drop(reader);
        assert!(held(&first.0) && !held(&second.0));
    }

    #[test]
    fn a_write_that_waits_leaves_to_the_next_one_that_covers_it() {
        let r = RangeLocks::new(16, 1);
        let admit = |request, from, count| admit(&r, request, range(from, count));
        let kept = |guard: &RangeGuard<'_>, may_have_heir| {
            let mut inherits = None;
            let is_heir = guard.kept(0, 0, may_have_heir, |from| inherits.replace(from).is_none());
            inherits.filter(|_| is_heir)
        };
        let has_ended = |guard: &RangeGuard<'_>| {
            let mut granted = pin!(guard.granted());
            granted.as_mut().poll(&mut Context::from_waker(Waker::noop()))
        };
        let begun = admit(0, 0, 2);
        assert_eq!((kept(&begun, true), begun.begin()), (None, true));
        let second = admit(1, 0, 2);
        assert_eq!(kept(&second, true), None, "the one before it has begun");
        assert!(has_ended(&second).is_pending());
        let part = admit(2, 1, 1);
        assert_eq!(kept(&part, true), None, "it covers a part");
        let third = admit(3, 1, 2);
        assert_eq!(kept(&third, true), Some(2));
        assert_eq!((has_ended(&part), part.begin()), (Poll::Ready(false), false));
        let wide = admit(4, 0, 3);
        assert_eq!(kept(&wide, true), Some(3), "the nearest alone");
        assert!(has_ended(&second).is_pending() && has_ended(&wide).is_pending());
        let reader = r.enqueue(5, range(2, 1), Mode::Shared, Admission::No);
        let behind = admit(6, 0, 3);
        assert_eq!(kept(&behind, true), None, "who reads has to find what was answered");
        let durable = admit(7, 0, 3);
        assert_eq!(kept(&durable, false), Some(6));
        let last = admit(8, 0, 4);
        assert_eq!(kept(&last, true), None, "that one is waited for");
        let refused = admit(9, 0, 4);
        assert!(!refused.kept(0, 0, true, |_| false) && has_ended(&last).is_pending(), "who may not inherit does not");
        drop((begun, second, part, third));
        assert_eq!((has_ended(&wide), wide.begin()), (Poll::Ready(true), true));
        drop((wide, reader, behind));
        assert!(held(&durable) && !held(&last) && !held(&refused));
    }

    #[test]
    fn only_a_parked_write_of_all_its_blocks_supersedes_another() {
        let r = RangeLocks::new(8, 1);
        let locks = [(0, 2), (1, 2), (0, 3)].into_iter().enumerate();
        let [first, second, third]: [_; 3] = locks
            .map(|(i, (from, count))| {
                let lock = r.enqueue(i, range(from, count), Mode::Write, Admission::No);
                lock.park();
                lock
            })
            .collect::<Vec<_>>()
            .try_into()
            .ok()
            .unwrap();
        assert!(first.is_superseded() && second.is_superseded() && !third.is_superseded());
        drop(third);
        assert!(!first.is_superseded(), "the second has one of its blocks alone");
        let fourth = r.enqueue(3, range(1, 2), Mode::Write, Admission::No);
        assert!(held(&fourth) && !second.is_superseded(), "it is not parked yet");
        fourth.park();
        assert!(second.is_superseded() && !first.is_superseded());
    }

    #[test]
    fn a_lazy_request_hears_of_those_that_wait_for_it() {
        let r = RangeLocks::new(64, 1);
        let poll = |guard: &RangeGuard<'_>| guard.poll_contended(&Context::from_waker(Waker::noop()));
        // More than are told at once.
        let lazy: Vec<_> = (0..40).map(|i| r.enqueue(i, range(i as u64, 1), Mode::Write, Admission::No)).collect();
        assert!(lazy.iter().all(|guard| poll(guard).is_pending()));
        assert!(r.try_acquire(50, range(3, 1), Mode::Write).is_none());
        assert!(poll(&lazy[3]).is_pending(), "nobody waits");
        let waits = r.enqueue(50, range(0, 39), Mode::Exclusive, Admission::No);
        waits.hurry_earlier();
        assert!(lazy[..39].iter().all(|guard| poll(guard).is_ready()) && poll(&lazy[39]).is_pending());
        drop((waits, lazy));
        let next = r.enqueue(3, range(3, 1), Mode::Write, Admission::No);
        assert!(poll(&next).is_pending(), "that was another request");
        let write = r.enqueue(4, range(3, 1), Mode::Write, Admission::No);
        write.hurry_earlier();
        assert!(poll(&next).is_ready());
        next.park();
        assert!(held(&write) && poll(&next).is_pending(), "a write needs it parked, not in place");
        let read = r.enqueue(5, range(3, 1), Mode::Shared, Admission::No);
        read.hurry_earlier();
        next.park();
        assert!(poll(&next).is_ready(), "a read needs it in place");
    }

    #[test]
    fn a_watch_is_quiet_until_somebody_comes_to_change_the_range() {
        let r = RangeLocks::new(8, 4);
        let watch = r.watch(range(3, 2));
        let reader = r.enqueue(0, range(0, 8), Mode::Shared, Admission::No);
        let beside = r.enqueue(1, range(5, 1), Mode::Exclusive, Admission::No);
        assert!(watch.is_quiet(), "readers and other blocks are nobody's concern");
        let waits = r.enqueue(2, range(4, 1), Mode::Write, Admission::No);
        assert!(!held(&waits) && !watch.is_quiet(), "it need not have its range");
        drop(waits);
        assert!(!watch.is_quiet(), "nor be there any more");
        drop((watch, reader, beside));
        let parked = r.enqueue(3, range(3, 1), Mode::Write, Admission::No);
        parked.park();
        let late = r.watch(range(3, 2));
        assert!(!late.is_quiet(), "it is not in place yet");
        drop(parked);
        assert!(!late.is_quiet() && r.watch(range(3, 2)).is_quiet());
        assert!(r.try_acquire(4, range(3, 1), Mode::Exclusive).is_some() && !late.is_quiet());
        // More than there is room for.
        let many: Vec<_> = (0..40).map(|block| r.watch(range(block, 1))).collect();
        assert!(many[0].is_quiet() && !many[39].is_quiet());
        drop(many);
        assert!(r.watch(range(39, 1)).is_quiet());
    }

    const CONTEXTS: usize = 6;

    proptest! {
        /// Ranges are granted as if there were one queue.
        #[test]
        fn shards_are_as_one_line(
            steps in prop::collection::vec((0..CONTEXTS, 0u64..40, prop_oneof![0u64..6, 0u64..60], 0..3usize), 1..60),
            max_blocks in 1usize..5,
        ) {
            let r = RangeLocks::new(CONTEXTS, max_blocks);
            let mut guards: [Option<RangeGuard<'_>>; CONTEXTS] = Default::default();
            let mut queue: Vec<LockRequest> = Vec::new();
            for (request, first, count, kind) in steps {
                let known = queue.iter_mut().find(|lock| lock.request == request);
                match (&guards[request], known) {
                    // A write that has its range parks, and then becomes exclusive; all else ends.
                    (Some(guard), Some(lock)) if lock.mode == Mode::Write && !lock.parked && held(guard) => {
                        guard.park();
                        lock.parked = true;
                    }
                    (Some(guard), Some(lock)) if lock.mode == Mode::Write && kind > 0 && held(guard) => {
                        guard.become_exclusive();
                        lock.mode = Mode::Exclusive;
                    }
                    (Some(_), _) => {
                        guards[request] = None;
                        queue.retain(|lock| lock.request != request);
                    }
                    (None, _) => {
                        let mode = [Mode::Shared, Mode::Write, Mode::Exclusive][kind];
                        let guard = r.enqueue(request, range(first, count), mode, Admission::No);
                        let (range, admission) = (range(first, count), Admission::No);
                        let lock = LockRequest::new(request, range, mode, admission);
                        match count {
                            0 => prop_assert!(held(&guard), "no blocks are in nobody's way"),
                            _ => queue.push(lock),
                        }
                        guards[request] = Some(guard);
                    }
                }
                for (i, lock) in queue.iter().enumerate() {
                    let expected = !queue[..i].iter().any(|earlier| lock.waits_for(earlier));
                    let guard = guards[lock.request].as_ref().expect("it is in the queue");
                    prop_assert_eq!(held(guard), expected, "request {} of {} in the queue", lock.request, queue.len());
                }
            }
        }
    }
}

/// Real threads under a model checker: see `sync.rs`.
#[cfg(all(test, shuttle))]
mod interleavings {
    use super::*;
    use crate::{BlockIndex, sync::check};
    use shuttle::{future::block_on, sync::Arc, thread};

    #[test]
    fn a_dropped_waiter_leaves_nothing_to_the_next_request_of_its_context() {
        let test = || {
            let blocks = BlockRange::new(BlockIndex(0), 1);
            let shared = Arc::new((RangeLocks::new(3, 1), AtomicUsize::new(0)));
            let hold = move |(ranges, holders): &(RangeLocks, AtomicUsize), request| {
                let _guard = block_on(ranges.acquire(request, blocks, Mode::Exclusive));
                assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0, "two hold it");
                holders.fetch_sub(1, Ordering::SeqCst);
            };
            let others = [0, 1].map(|request| {
                let shared = Arc::clone(&shared);
                thread::spawn(move || hold(&shared, request))
            });
            drop(shared.0.enqueue(2, blocks, Mode::Exclusive, Admission::No));
            hold(&shared, 2);
            others.into_iter().for_each(|thread| thread.join().unwrap());
        };
        check(test, 10_000, 4);
    }

    #[test]
    fn what_is_kept_is_counted_as_long_as_it_is() {
        let test = || {
            // In two shards.
            let blocks = BlockRange::new(BlockIndex(0), 2);
            let ranges = Arc::new(RangeLocks::new(2, 1));
            let writers = [0, 1].map(|request| {
                let ranges = Arc::clone(&ranges);
                thread::spawn(move || {
                    let (guard, number) = ranges.admit(request, blocks, || 7);
                    guard.kept(number, request as u64, false, |_| true);
                    // The other may have come since.
                    assert!(ranges.kept_before(blocks).is_none_or(|kept| kept.range == blocks));
                })
            });
            assert!(ranges.kept_before(blocks).is_none_or(|kept| kept.range == blocks));
            writers.into_iter().for_each(|thread| thread.join().unwrap());
            assert!(ranges.shards.iter().all(|shard| shard.kept.load(Ordering::Relaxed) == 0), "it is kept no more");
        };
        check(test, 5000, 4);
    }
}

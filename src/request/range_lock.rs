//! Range locks: which request may touch which blocks. First come, first served; a whole range is
//! locked in one step.
//!
//! A request waits here only for requests that came before it and overlap it. Each of those either
//! has its range or waits for still earlier ones: no cycle.
//!
//! Stripes of blocks are spread over shards, each with a mutex of its own, so that threads seldom
//! contend for one. A request enters the queue of each shard that its range touches, and holds the
//! mutexes of all of them meanwhile. That makes it one step: of two requests the same one is first
//! in every shard that both touch.

use crate::{
    BlockRange,
    sync::{AtomicUsize, Mutex, MutexGuard, Ordering},
};
use arrayvec::ArrayVec;
use std::{
    future::poll_fn,
    task::{Context, Poll, Waker},
};

/// How a range is held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mode {
    /// Reads: together with other reads.
    Shared,
    /// Writes and zeroing: alone.
    Exclusive,
}

/// How many shards there are: a bit for each in [`ShardSet`].
const SHARDS: usize = 16;

/// Some of the shards.
#[derive(Clone, Copy)]
struct ShardSet(u16);

impl Iterator for ShardSet {
    type Item = usize;

    /// In ascending order: the one in which their mutexes are locked.
    fn next(&mut self) -> Option<usize> {
        let shard = self.0.trailing_zeros() as usize;
        self.0 &= self.0.wrapping_sub(1);
        (shard < SHARDS).then_some(shard)
    }
}

/// A request in the queue of a shard.
struct LockRequest {
    request: usize,
    range: BlockRange,
    mode: Mode,
    /// Nothing before it in this shard's queue conflicts with it.
    granted: bool,
}

impl LockRequest {
    fn conflicts(&self, other: &Self) -> bool {
        (self.mode == Mode::Exclusive || other.mode == Mode::Exclusive) && self.range.overlaps(other.range)
    }
}

/// The lock requests of a shard, in the order in which they came.
struct LockQueue {
    requests: Vec<LockRequest>,
    /// How many of them are not granted.
    waiting: usize,
}

/// On cache lines of its own, so that threads at work on different shards don't slow each other down.
#[repr(align(128))]
struct Shard(Mutex<LockQueue>);

/// What a request waits for.
#[repr(align(128))]
struct Waiter {
    /// How many shards have not granted it its range yet.
    shards: AtomicUsize,
    waker: Mutex<Option<Waker>>,
}

pub(crate) struct RangeLocks {
    shards: Vec<Shard>,
    /// By request.
    waiters: Vec<Waiter>,
    /// Binary logarithm of the blocks of a stripe.
    stripe: u32,
}

/// A range that is held or waited for; released when dropped.
pub(crate) struct RangeGuard<'a> {
    ranges: &'a RangeLocks,
    request: usize,
    range: BlockRange,
}

impl RangeLocks {
    /// For `requests` contexts, one request at a time each, of at most `max_blocks` as a rule:
    /// those touch two shards at most. Memory is taken here.
    pub(crate) fn new(requests: usize, max_blocks: usize) -> Self {
        let shard = |_| Shard(Mutex::new(LockQueue { requests: Vec::with_capacity(requests), waiting: 0 }));
        let waiter = |_| Waiter { shards: AtomicUsize::new(0), waker: Mutex::new(None) };
        Self {
            shards: (0..SHARDS).map(shard).collect(),
            waiters: (0..requests).map(waiter).collect(),
            stripe: max_blocks.next_power_of_two().trailing_zeros(),
        }
    }

    /// The memory for so many requests.
    pub(crate) fn memory_bytes_for(requests: usize) -> u64 {
        (requests as u64).saturating_mul((SHARDS * size_of::<LockRequest>() + size_of::<Waiter>()) as u64)
    }

    /// Waits until the request holds the range.
    pub(crate) async fn acquire(&self, request: usize, range: BlockRange, mode: Mode) -> RangeGuard<'_> {
        let guard = self.enqueue(request, range, mode);
        poll_fn(|cx| guard.poll_granted(cx)).await;
        guard
    }

    /// The range at once, or nothing. The attempt delays no other request.
    pub(crate) fn try_acquire(&self, request: usize, range: BlockRange, mode: Mode) -> Option<RangeGuard<'_>> {
        let guard = self.enqueue(request, range, mode);
        guard.is_granted().then_some(guard)
    }

    fn shards_of(&self, range: BlockRange) -> ShardSet {
        if range.count == 0 {
            return ShardSet(0);
        }
        let (first, last) = (range.first.0 >> self.stripe, (range.end() - 1) >> self.stripe);
        let last = last.min(first + SHARDS as u64 - 1);
        ShardSet((first..=last).fold(0, |set, stripe| set | 1 << (stripe % SHARDS as u64)))
    }

    fn enqueue(&self, request: usize, range: BlockRange, mode: Mode) -> RangeGuard<'_> {
        let mut queues = ArrayVec::<MutexGuard<'_, LockQueue>, SHARDS>::new();
        let mut waiting = 0;
        for shard in self.shards_of(range) {
            let mut queue = self.shards[shard].0.lock();
            let mut lock = LockRequest { request, range, mode, granted: false };
            lock.granted = !queue.requests.iter().any(|earlier| earlier.conflicts(&lock));
            let waits = usize::from(!lock.granted);
            queue.waiting += waits;
            waiting += waits;
            debug_assert!(queue.requests.iter().all(|lock| lock.request != request), "one range a request");
            queue.requests.push(lock);
            queues.push(queue);
        }
        // While the mutexes are held: until they are released nobody can grant anything.
        self.waiters[request].shards.store(waiting, Ordering::Release);
        RangeGuard { ranges: self, request, range }
    }

    /// Leaves the queue of a shard, and wakes the requests that can go on now: one at a time, so
    /// that no waker is called under the mutex.
    fn release(&self, shard: usize, request: usize) {
        let mut queue = self.shards[shard].0.lock();
        let i = queue.requests.iter().position(|lock| lock.request == request).expect("it leaves once");
        let released = queue.requests.remove(i);
        queue.waiting -= usize::from(!released.granted);
        while queue.waiting > 0 {
            let free = |i: usize| {
                let lock = &queue.requests[i];
                !lock.granted
                    && lock.conflicts(&released)
                    && !queue.requests[..i].iter().any(|earlier| earlier.conflicts(lock))
            };
            let Some(next) = (0..queue.requests.len()).find(|i| free(*i)) else { return };
            queue.requests[next].granted = true;
            queue.waiting -= 1;
            let waiter = &self.waiters[queue.requests[next].request];
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
            queue = self.shards[shard].0.lock();
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

    fn range(first: u64, count: u64) -> BlockRange {
        BlockRange::new(BlockIndex(first), count)
    }
    fn held(g: &RangeGuard<'_>) -> bool {
        g.poll_granted(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    #[test]
    fn readers_share_writers_do_not_and_order_is_kept() {
        let r = RangeLocks::new(8, 4);
        let a = r.enqueue(0, range(0, 4), Mode::Shared);
        let b = r.enqueue(1, range(2, 4), Mode::Shared);
        let w = r.enqueue(2, range(3, 1), Mode::Exclusive);
        let late = r.enqueue(3, range(3, 1), Mode::Shared);
        let far = r.enqueue(4, range(100, 1), Mode::Exclusive);
        assert!(held(&a) && held(&b) && !held(&w) && !held(&late) && held(&far));
        drop(a);
        assert!(!held(&w));
        drop(b);
        assert!(held(&w) && !held(&late), "a writer is not overtaken by later readers");
        drop(w);
        assert!(held(&late));
    }

    #[test]
    fn a_waiter_that_gives_up_lets_others_pass() {
        let r = RangeLocks::new(4, 1);
        let a = r.enqueue(0, range(0, 4), Mode::Shared);
        let w = r.enqueue(1, range(0, 4), Mode::Exclusive);
        let b = r.enqueue(2, range(0, 4), Mode::Shared);
        assert!(held(&a) && !held(&b));
        drop(w);
        assert!(held(&b));
    }

    #[test]
    fn ranges_that_share_a_shard_conflict_only_where_they_overlap() {
        let r = RangeLocks::new(4, 1);
        let all = r.enqueue(0, range(0, 1 << 40), Mode::Exclusive);
        let far = r.enqueue(1, range(SHARDS as u64 * 5 - 1, 2), Mode::Shared);
        let none = r.enqueue(2, range(7, 0), Mode::Exclusive);
        assert!(held(&all) && !held(&far) && held(&none));
        drop(all);
        assert!(held(&far));
        let beside = r.enqueue(3, range(SHARDS as u64 * 4 - 1, 2), Mode::Exclusive);
        assert!(held(&beside), "the same shards, other blocks");
    }

    const CONTEXTS: usize = 6;

    proptest! {
        /// Ranges are granted as if there were one queue.
        #[test]
        fn shards_are_as_one_line(
            steps in prop::collection::vec((0..CONTEXTS, 0u64..40, prop_oneof![0u64..6, 0u64..60], any::<bool>()), 1..60),
            max_blocks in 1usize..5,
        ) {
            let r = RangeLocks::new(CONTEXTS, max_blocks);
            let mut guards: [Option<RangeGuard<'_>>; CONTEXTS] = Default::default();
            let mut queue: Vec<LockRequest> = Vec::new();
            for (request, first, count, exclusive) in steps {
                if guards[request].take().is_some() {
                    queue.retain(|lock| lock.request != request);
                } else {
                    let mode = if exclusive { Mode::Exclusive } else { Mode::Shared };
                    let guard = r.enqueue(request, range(first, count), mode);
                    match count {
                        0 => prop_assert!(held(&guard), "no blocks are in nobody's way"),
                        _ => queue.push(LockRequest { request, range: range(first, count), mode, granted: false }),
                    }
                    guards[request] = Some(guard);
                }
                for (i, lock) in queue.iter().enumerate() {
                    let expected = !queue[..i].iter().any(|earlier| earlier.conflicts(lock));
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
    use crate::BlockIndex;
    use shuttle::{future::block_on, sync::Arc, thread};

    #[test]
    fn a_dropped_waiter_leaves_nothing_to_the_next_request_of_its_context() {
        const SCHEDULES: usize = 10_000;
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
            drop(shared.0.enqueue(2, blocks, Mode::Exclusive));
            hold(&shared, 2);
            others.into_iter().for_each(|thread| thread.join().unwrap());
        };
        shuttle::check_random(test, SCHEDULES);
        shuttle::check_pct(test, SCHEDULES, 4);
    }
}

//! Range guards: who may touch which blocks. First come, first served; a whole range is taken in one step.
//!
//! A request waits here only for requests that came before it and overlap it, and each of those
//! either has its range or waits for still earlier ones: no cycle.
//!
//! Stripes of blocks are dealt out to shards, each with a lock of its own, so that the queues of a volume seldom meet at one.
//! A request stands in line in each shard that its range touches. It takes its places under the locks of all of them, which is
//! what makes that one step: whoever came before it in one shard came before it in all.

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

    /// In ascending order, in which their locks are taken.
    fn next(&mut self) -> Option<usize> {
        let shard = self.0.trailing_zeros() as usize;
        self.0 &= self.0.wrapping_sub(1);
        (shard < SHARDS).then_some(shard)
    }
}

/// A request's place in the line of a shard.
struct Claim {
    request: usize,
    range: BlockRange,
    mode: Mode,
    /// Nobody before it in this shard is in its way.
    granted: bool,
}

impl Claim {
    fn conflicts(&self, other: &Self) -> bool {
        (self.mode == Mode::Exclusive || other.mode == Mode::Exclusive) && self.range.overlaps(other.range)
    }
}

/// The requests of a shard, in the order in which they came.
struct Line {
    claims: Vec<Claim>,
    waiting: usize,
}

/// On cache lines of its own, so that queues at work on different shards really don't meet.
#[repr(align(128))]
struct Shard(Mutex<Line>);

/// What a request waits for.
#[repr(align(128))]
struct Wait {
    /// Shards that have not granted it its range.
    shards: AtomicUsize,
    waker: Mutex<Option<Waker>>,
}

pub(crate) struct RangeLocks {
    shards: Vec<Shard>,
    /// By request.
    waits: Vec<Wait>,
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
    /// For `requests` contexts, one request at a time each, of at most `max_blocks` as a rule: those touch two shards at most.
    /// Memory is taken here.
    pub(crate) fn new(requests: usize, max_blocks: usize) -> Self {
        let shard = |_| Shard(Mutex::new(Line { claims: Vec::with_capacity(requests), waiting: 0 }));
        let wait = |_| Wait { shards: AtomicUsize::new(0), waker: Mutex::new(None) };
        Self {
            shards: (0..SHARDS).map(shard).collect(),
            waits: (0..requests).map(wait).collect(),
            stripe: max_blocks.next_power_of_two().trailing_zeros(),
        }
    }

    /// The memory for so many requests.
    pub(crate) fn memory_bytes_for(requests: usize) -> u64 {
        (requests as u64).saturating_mul((SHARDS * size_of::<Claim>() + size_of::<Wait>()) as u64)
    }

    /// Waits until the range is the request's.
    pub(crate) async fn acquire(&self, request: usize, range: BlockRange, mode: Mode) -> RangeGuard<'_> {
        let guard = self.enqueue(request, range, mode);
        poll_fn(|cx| guard.poll_granted(cx)).await;
        guard
    }

    /// The range at once, or nothing. Nobody is held up by the attempt.
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
        let mut lines = ArrayVec::<MutexGuard<'_, Line>, SHARDS>::new();
        let mut waiting = 0;
        for shard in self.shards_of(range) {
            let mut line = self.shards[shard].0.lock();
            let mut claim = Claim { request, range, mode, granted: false };
            claim.granted = !line.claims.iter().any(|earlier| earlier.conflicts(&claim));
            let waits = usize::from(!claim.granted);
            line.waiting += waits;
            waiting += waits;
            debug_assert!(line.claims.iter().all(|c| c.request != request), "one range a request");
            line.claims.push(claim);
            lines.push(line);
        }
        // Before the locks go: nobody can grant anything until then.
        self.waits[request].shards.store(waiting, Ordering::Release);
        RangeGuard { ranges: self, request, range }
    }

    /// Leaves the line of a shard, and wakes whoever that makes go on; one at a time, so that no waker is called under the lock.
    fn leave(&self, shard: usize, request: usize) {
        let mut line = self.shards[shard].0.lock();
        let place = line.claims.iter().position(|claim| claim.request == request).expect("it left once");
        let released = line.claims.remove(place);
        line.waiting -= usize::from(!released.granted);
        while line.waiting > 0 {
            let free = |i: usize| {
                let claim = &line.claims[i];
                !claim.granted && claim.conflicts(&released) && !line.claims[..i].iter().any(|c| c.conflicts(claim))
            };
            let Some(next) = (0..line.claims.len()).find(|i| free(*i)) else { return };
            line.claims[next].granted = true;
            line.waiting -= 1;
            let wait = &self.waits[line.claims[next].request];
            // Still under the lock, which one that gives up takes before the next request of its context counts anew.
            let granted = wait.shards.fetch_sub(1, Ordering::AcqRel) == 1;
            drop(line);
            if granted {
                // Without a waker its task has not been polled yet, or looks once more after leaving it. It may also be that of
                // the next request of its context, which then looks again.
                let waker = wait.waker.lock().take();
                waker.into_iter().for_each(Waker::wake);
            }
            line = self.shards[shard].0.lock();
        }
    }
}

impl RangeGuard<'_> {
    /// Whose it is.
    pub(crate) fn request(&self) -> usize {
        self.request
    }

    pub(crate) fn range(&self) -> BlockRange {
        self.range
    }

    fn is_granted(&self) -> bool {
        self.ranges.waits[self.request].shards.load(Ordering::Acquire) == 0
    }

    fn poll_granted(&self, cx: &mut Context<'_>) -> Poll<()> {
        if self.is_granted() {
            return Poll::Ready(());
        }
        *self.ranges.waits[self.request].waker.lock() = Some(cx.waker().clone());
        // Who grants it counts down first and takes the waker then: one of the two sees the other.
        if self.is_granted() { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        self.ranges.shards_of(self.range).for_each(|shard| self.ranges.leave(shard, self.request));
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
    fn ranges_that_end_in_one_shard_and_wrap_around_meet_there_alone() {
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

    const SLOTS: usize = 6;

    proptest! {
        /// Whoever holds a range, and when, is as if there were one line.
        #[test]
        fn shards_are_as_one_line(
            steps in prop::collection::vec((0..SLOTS, 0u64..40, prop_oneof![0u64..6, 0u64..60], any::<bool>()), 1..60),
            max_blocks in 1usize..5,
        ) {
            let r = RangeLocks::new(SLOTS, max_blocks);
            let mut guards: [Option<RangeGuard<'_>>; SLOTS] = Default::default();
            let mut line: Vec<Claim> = Vec::new();
            for (request, first, count, exclusive) in steps {
                if guards[request].take().is_some() {
                    line.retain(|claim| claim.request != request);
                } else {
                    let mode = if exclusive { Mode::Exclusive } else { Mode::Shared };
                    let guard = r.enqueue(request, range(first, count), mode);
                    match count {
                        0 => prop_assert!(held(&guard), "no blocks are in nobody's way"),
                        _ => line.push(Claim { request, range: range(first, count), mode, granted: false }),
                    }
                    guards[request] = Some(guard);
                }
                for (i, claim) in line.iter().enumerate() {
                    let expected = !line[..i].iter().any(|earlier| earlier.conflicts(claim));
                    let guard = guards[claim.request].as_ref().expect("it is in line");
                    prop_assert_eq!(held(guard), expected, "request {} of {} in line", claim.request, line.len());
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
    fn who_gives_up_in_line_leaves_nothing_to_its_slots_next_request() {
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

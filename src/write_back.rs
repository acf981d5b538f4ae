//! Write-back: a write is *admitted*, answered, and written in place afterwards. Nobody can tell,
//! as with a disk's own cache.
//!
//! 1. An admitted write holds its range from before its answer until it is in place. A request that
//!    overlaps it waits.
//! 2. A flush waits for all writes that were admitted before it began.
//! 3. The caller keeps the bytes where they outlive this process. If the process dies, they are
//!    written again after the next [`open`](crate::open::open). Once the write is in place the
//!    caller clears them, while the range is still held: so they never overwrite anything newer.
//!    The engine leaves these bytes unchanged, whether the write succeeds or fails.
//! 4. An admitted write that fails latches the volume: no flush succeeds any more. Its blocks don't
//!    hold what was last written, so they can't be read.
//!
//! An admitted write waits for what any write waits for, and never for a flush. So none waits for
//! itself in a circle.

use crate::{
    BlockRange, Latched, RecordNumber, WriteError,
    log::Log,
    request::range_lock::RangeGuard,
    sync::{AtomicU64, AtomicUsize, Mutex, Ordering},
    wait_list::WaitList,
};
use std::{
    future::poll_fn,
    task::{Poll, Waker},
};

/// The request has no admitted write in flight.
const NONE: u64 = 0;

/// The admitted writes that are not in place yet, and the flushes that wait for them.
pub(crate) struct AdmittedWrites {
    /// The number of the next write: each is given once, in order.
    next: AtomicU64,
    /// By request: the number of its admitted write, or [`NONE`].
    in_flight: Vec<AtomicU64>,
    /// Length of `waiters`, to be read without the lock.
    waiting: AtomicUsize,
    /// Flushes, each of which waits until no write with a number below this one is in flight.
    waiters: Mutex<WaitList<u64>>,
    /// Ranges of the writes that failed, at most one of each request: after a failure none is
    /// admitted.
    failed: Mutex<Vec<BlockRange>>,
    /// Length of `failed`, to be read without the lock.
    failures: AtomicUsize,
}

/// A write whose range is held, and which may be answered though nothing has been written. Dropped
/// before it is [in place](crate::Volume::write_back), it latches the volume.
pub struct Admitted<'v> {
    writes: &'v AdmittedWrites,
    log: &'v Log,
    guard: RangeGuard<'v>,
    first_not_durable: RecordNumber,
    why_failed: Option<Latched>,
}

impl AdmittedWrites {
    /// For so many requests.
    pub(crate) fn new(requests: usize) -> Self {
        Self {
            next: AtomicU64::new(NONE + 1),
            in_flight: (0..requests).map(|_| AtomicU64::new(NONE)).collect(),
            waiting: AtomicUsize::new(0),
            waiters: Mutex::new(WaitList::new(requests)),
            failed: Mutex::new(Vec::with_capacity(requests)),
            failures: AtomicUsize::new(0),
        }
    }

    /// The memory for so many requests.
    pub(crate) fn memory_bytes_for(requests: usize) -> u64 {
        let own = (requests as u64).saturating_mul((size_of::<AtomicU64>() + size_of::<BlockRange>()) as u64);
        own.saturating_add(WaitList::<u64>::memory_bytes_for(requests))
    }

    /// Admits a write whose range is held: it may be answered at once. `None` where
    /// the volume is latched.
    pub(crate) fn admit<'v>(&'v self, log: &'v Log, guard: RangeGuard<'v>) -> Option<Admitted<'v>> {
        // Asked while the range is held: if the write that held it before has failed, the volume is
        // latched by now. Otherwise the bytes of two writes of one block could be kept, and nobody
        // could tell which is the newer.
        let first_not_durable = log.first_not_durable().ok()?;
        self.begin(guard.request());
        Some(Admitted { writes: self, log, guard, first_not_durable, why_failed: Some(Latched::Abandoned) })
    }

    fn begin(&self, request: usize) {
        let number = self.next.fetch_add(1, Ordering::SeqCst);
        // A flush that begins in between does not wait for it, and need not: it has not been
        // answered.
        self.in_flight[request].store(number, Ordering::SeqCst);
    }

    fn end(&self, request: usize) {
        self.in_flight[request].store(NONE, Ordering::SeqCst);
        // A waiter counts itself before it looks at the numbers, so either this sees the waiter or
        // the waiter sees this.
        if self.waiting.load(Ordering::SeqCst) == 0 {
            return;
        }
        let oldest = self.oldest();
        let take = || {
            let mut waiters = self.waiters.lock();
            let request = waiters.find(0, |below| below <= oldest)?;
            let waker = waiters.take_waker(request);
            waiters.remove(request);
            self.waiting.store(waiters.len(), Ordering::SeqCst);
            waker
        };
        // One at a time, so that no waker is called under the lock.
        std::iter::from_fn(take).for_each(Waker::wake);
    }

    /// The lowest number in flight.
    fn oldest(&self) -> u64 {
        let numbers = self.in_flight.iter().map(|number| number.load(Ordering::SeqCst));
        numbers.filter(|number| *number != NONE).min().unwrap_or(u64::MAX)
    }

    /// Waits until all writes that were admitted before are in place, or have failed.
    pub(crate) async fn wait_in_place(&self, request: usize) {
        let below = self.next.load(Ordering::SeqCst);
        let in_place = || self.oldest() >= below;
        poll_fn(|cx| {
            if in_place() {
                return Poll::Ready(());
            }
            self.wait(request, below, cx.waker());
            if in_place() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// Notes a waiter, one for each request. One whose future was dropped stays, and
    /// is woken once in vain.
    fn wait(&self, request: usize, below: u64, waker: &Waker) {
        let mut waiters = self.waiters.lock();
        waiters.wait(request, below, waker);
        self.waiting.store(waiters.len(), Ordering::SeqCst);
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

impl Admitted<'_> {
    /// What it is to write.
    pub fn range(&self) -> BlockRange {
        self.guard.range()
    }

    /// Notes how the write has ended. In place: `clear` clears what was kept of it, while its range
    /// is still held. Otherwise the volume is latched when this is dropped.
    pub(crate) fn ended(&mut self, result: Result<(), WriteError>, clear: impl FnOnce()) {
        self.why_failed = match result {
            Ok(()) => {
                clear();
                None
            }
            Err(WriteError::Device(e)) => Some(Latched::WriteBack(e)),
            Err(WriteError::Latched(why)) => Some(why),
            // A request larger than its buffer, or one that was never admitted.
            Err(_) => Some(Latched::Abandoned),
        };
    }

    pub(crate) fn request(&self) -> usize {
        self.guard.request()
    }

    /// Releases the range: the write has not been answered, and is not to be.
    pub fn withdraw(mut self) {
        self.why_failed = None;
    }

    /// The first record of the log that was not durable when it was admitted: a volume without
    /// those before is an older one.
    pub fn first_not_durable(&self) -> RecordNumber {
        self.first_not_durable
    }
}

impl Drop for Admitted<'_> {
    /// The write is in place, or has failed. The range is released after this.
    fn drop(&mut self) {
        if let Some(why) = self.why_failed {
            // In this order: a flush that sees it no longer in flight must find the volume latched.
            self.log.latch(why);
            self.writes.fail(self.guard.range());
        }
        self.writes.end(self.guard.request());
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
        let writes = AdmittedWrites::new(4);
        let woken = Arc::new(Woken(AtomicBool::new(false)));
        let waker = Waker::from(woken.clone());
        let mut cx = Context::from_waker(&waker);
        writes.begin(2);
        writes.begin(0);
        let mut flush = pin!(writes.wait_in_place(3));
        assert!(flush.as_mut().poll(&mut cx).is_pending());
        writes.end(2);
        // A later write of a request whose earlier one was waited for.
        writes.begin(2);
        assert!(!woken.0.load(Ordering::SeqCst) && flush.as_mut().poll(&mut cx).is_pending());
        writes.end(0);
        assert!(woken.0.load(Ordering::SeqCst) && flush.as_mut().poll(&mut cx).is_ready());
        assert_eq!((writes.waiting.load(Ordering::SeqCst), writes.oldest()), (0, 3));
    }

    #[test]
    fn a_flush_that_is_dropped_makes_room_for_the_next_waiter() {
        let writes = AdmittedWrites::new(2);
        writes.begin(0);
        for _ in 0..3 {
            assert!(pin!(writes.wait_in_place(1)).poll(&mut Context::from_waker(Waker::noop())).is_pending());
        }
        assert_eq!(writes.waiting.load(Ordering::SeqCst), 1);
        writes.end(0);
        assert_eq!(writes.waiting.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn only_blocks_of_failed_writes_are_unreadable() {
        let range = |first, count| BlockRange::new(BlockIndex(first), count);
        let writes = AdmittedWrites::new(2);
        assert!(!writes.has_failed(range(0, 100)));
        writes.fail(range(7, 2));
        assert!(writes.has_failed(range(8, 1)) && writes.has_failed(range(0, 8)) && !writes.has_failed(range(9, 5)));
    }
}

//! Writes that are answered before they are in place: a kernel's page cache does no less, so long as nobody can tell.
//!
//! 1. An admitted write holds its range from before its answer until it is in place. Whoever overlaps it comes after it.
//! 2. A flush waits for all that were admitted before it began.
//! 3. The caller keeps the bytes where they outlive this process, until they are in place, and writes them again after the
//!    next [`open`](crate::open::open). The range is still held when it lets go of them: nothing newer can be there. What is
//!    written from there is not changed, whether it succeeds or fails.
//! 4. One that fails latches the volume: no flush succeeds any more. Its blocks, which are not what was last written, can't
//!    be read.
//!
//! An admitted write waits for what any write waits for, never for a flush: no circle.

use crate::{
    BlockRange, Latched, RecordNumber, WriteError,
    log::Log,
    request::range_lock::RangeGuard,
    sync::{AtomicU64, AtomicUsize, Mutex, Ordering},
};
use std::{
    future::poll_fn,
    task::{Poll, Waker},
};

/// No ticket.
const NONE: u64 = 0;

/// Which admitted writes are not in place, and who waits for them.
pub(crate) struct InFlightWrites {
    /// The next ticket: they are given out in order, once.
    next: AtomicU64,
    /// By request: the ticket of its admitted write.
    under_way: Vec<AtomicU64>,
    /// How many are in `waiters`, to be asked without the lock.
    waiting: AtomicUsize,
    waiters: Mutex<Vec<Waiter>>,
    /// Ranges of those that failed. A context's fails but once, for none is admitted after it.
    failed: Mutex<Vec<BlockRange>>,
    /// How many are in `failed`.
    failures: AtomicUsize,
}

/// Waits until no ticket below `below` is under way.
struct Waiter {
    request: usize,
    below: u64,
    waker: Waker,
}

/// A write whose range is held, and which may be answered though nothing has been written: who drops it before it is
/// [in place](crate::Volume::write_back) latches the volume.
pub struct Admitted<'v> {
    writes: &'v InFlightWrites,
    log: &'v Log,
    guard: RangeGuard<'v>,
    after: RecordNumber,
    why_failed: Option<Latched>,
}

impl InFlightWrites {
    /// For so many requests.
    pub(crate) fn new(requests: usize) -> Self {
        Self {
            next: AtomicU64::new(NONE + 1),
            under_way: (0..requests).map(|_| AtomicU64::new(NONE)).collect(),
            waiting: AtomicUsize::new(0),
            waiters: Mutex::new(Vec::with_capacity(requests)),
            failed: Mutex::new(Vec::with_capacity(requests)),
            failures: AtomicUsize::new(0),
        }
    }

    /// The memory for so many requests.
    pub(crate) fn memory_bytes_for(requests: usize) -> u64 {
        (requests as u64)
            .saturating_mul((size_of::<AtomicU64>() + size_of::<Waiter>() + size_of::<BlockRange>()) as u64)
    }

    /// Takes on a write whose range is held: its answer may be given at once. `None` where the volume is latched.
    pub(crate) fn admit<'v>(&'v self, log: &'v Log, guard: RangeGuard<'v>) -> Option<Admitted<'v>> {
        // Asked with the range: whoever had it before and failed has latched. Two that failed must not be kept of one block.
        let after = log.first_unsure().ok()?;
        self.begin(guard.request());
        Some(Admitted { writes: self, log, guard, after, why_failed: Some(Latched::Abandoned) })
    }

    fn begin(&self, request: usize) {
        let ticket = self.next.fetch_add(1, Ordering::SeqCst);
        // A flush that begins in between does not wait for it, and need not: it has not been answered.
        self.under_way[request].store(ticket, Ordering::SeqCst);
    }

    fn end(&self, request: usize) {
        self.under_way[request].store(NONE, Ordering::SeqCst);
        // A waiter counts itself before it looks; one of the two sees the other.
        if self.waiting.load(Ordering::SeqCst) == 0 {
            return;
        }
        let oldest = self.oldest();
        let take = || {
            let mut waiters = self.waiters.lock();
            let done = waiters.iter().position(|waiter| waiter.below <= oldest)?;
            self.waiting.fetch_sub(1, Ordering::SeqCst);
            Some(waiters.swap_remove(done).waker)
        };
        // One at a time, so that no waker is called under the lock.
        std::iter::from_fn(take).for_each(Waker::wake);
    }

    /// The oldest ticket under way.
    fn oldest(&self) -> u64 {
        let tickets = self.under_way.iter().map(|place| place.load(Ordering::SeqCst));
        tickets.filter(|ticket| *ticket != NONE).min().unwrap_or(u64::MAX)
    }

    /// Waits until all that have been admitted before are in place, or have failed.
    pub(crate) async fn drained(&self, request: usize) {
        let below = self.next.load(Ordering::SeqCst);
        let drained = || self.oldest() >= below;
        poll_fn(|cx| {
            if drained() {
                return Poll::Ready(());
            }
            self.wait(Waiter { request, below, waker: cx.waker().clone() });
            if drained() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// One that is not waited for any more is woken once in vain.
    fn wait(&self, new: Waiter) {
        let mut waiters = self.waiters.lock();
        match waiters.iter_mut().find(|waiter| waiter.request == new.request) {
            Some(known) => *known = new,
            None => {
                waiters.push(new);
                self.waiting.fetch_add(1, Ordering::SeqCst);
            }
        }
    }

    fn fail(&self, range: BlockRange) {
        self.failed.lock().push(range);
        self.failures.fetch_add(1, Ordering::Release);
    }

    /// Whether blocks of a range that the caller holds were answered for and are not in place.
    pub(crate) fn has_failed(&self, range: BlockRange) -> bool {
        self.failures.load(Ordering::Acquire) > 0 && self.failed.lock().iter().any(|failed| failed.overlaps(range))
    }
}

impl Admitted<'_> {
    /// What it is to write.
    pub fn range(&self) -> BlockRange {
        self.guard.range()
    }

    /// What has become of it. In place it is forgotten by `forget`, with its range still held; else the volume is latched
    /// when this is dropped.
    pub(crate) fn ended(&mut self, result: Result<(), WriteError>, forget: impl FnOnce()) {
        self.why_failed = match result {
            Ok(()) => {
                forget();
                None
            }
            Err(WriteError::Device(e)) => Some(Latched::Accepted(e)),
            Err(WriteError::Latched(why)) => Some(why),
            // A request larger than its buffer, or one that was never admitted.
            Err(_) => Some(Latched::Abandoned),
        };
    }

    pub(crate) fn request(&self) -> usize {
        self.guard.request()
    }

    /// Gives the range back: the write is not to be answered for, and has not been.
    pub fn withdraw(mut self) {
        self.why_failed = None;
    }

    /// All records of the log before this one were durable when it was admitted: a volume without them is an older one.
    pub fn after(&self) -> RecordNumber {
        self.after
    }
}

impl Drop for Admitted<'_> {
    /// It is in place, or has failed; the range is released after this.
    fn drop(&mut self) {
        if let Some(why) = self.why_failed {
            // In this order: who sees that it is not under way must find the volume latched.
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
        let writes = InFlightWrites::new(4);
        let woken = Arc::new(Woken(AtomicBool::new(false)));
        let waker = Waker::from(woken.clone());
        let mut cx = Context::from_waker(&waker);
        writes.begin(2);
        writes.begin(0);
        let mut flush = pin!(writes.drained(3));
        assert!(flush.as_mut().poll(&mut cx).is_pending());
        writes.end(2);
        // A later one in a place that was waited for.
        writes.begin(2);
        assert!(!woken.0.load(Ordering::SeqCst) && flush.as_mut().poll(&mut cx).is_pending());
        writes.end(0);
        assert!(woken.0.load(Ordering::SeqCst) && flush.as_mut().poll(&mut cx).is_ready());
        assert_eq!((writes.waiting.load(Ordering::SeqCst), writes.oldest()), (0, 3));
    }

    #[test]
    fn who_gives_up_waiting_makes_room_for_the_next() {
        let writes = InFlightWrites::new(2);
        writes.begin(0);
        for _ in 0..3 {
            assert!(pin!(writes.drained(1)).poll(&mut Context::from_waker(Waker::noop())).is_pending());
        }
        assert_eq!(writes.waiting.load(Ordering::SeqCst), 1);
        writes.end(0);
        assert_eq!(writes.waiting.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn only_blocks_of_failed_ones_are_lost() {
        let range = |first, count| BlockRange::new(BlockIndex(first), count);
        let writes = InFlightWrites::new(2);
        assert!(!writes.has_failed(range(0, 100)));
        writes.fail(range(7, 2));
        assert!(writes.has_failed(range(8, 1)) && writes.has_failed(range(0, 8)) && !writes.has_failed(range(9, 5)));
    }
}

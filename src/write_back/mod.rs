//! Write-back: a write is *admitted*, answered, and written in place afterwards. Nobody can tell,
//! as with a disk's own cache.
//!
//! 1. An admitted write holds its range from before its answer until it is in place. A request that
//!    overlaps it waits.
//! 2. A flush waits until all writes that were admitted before it began are *safe*: in place, or
//!    carried by a record that is durable, and all before it.
//! 3. The caller keeps the bytes where they outlive this process. If the process dies, they are
//!    written again after the next [`open`](crate::open::open). Once the write is safe the
//!    caller clears them, while no later write of these blocks can be: so they never overwrite
//!    anything newer. The engine leaves these bytes unchanged, whether the write succeeds or fails.
//! 4. An admitted write that fails latches the volume: no flush succeeds any more. Its blocks don't
//!    hold what was last written, so they can't be read.
//!
//! With a sync log admitted writes wait so that a flush finds them, and once they are safe
//! ([`lazy`]). A write that must be durable when it is answered can be admitted, too: it is answered
//! when it is safe.
//!
//! An admitted write waits for what any write waits for, and never for a flush to end. So none waits
//! for itself in a circle.

mod lazy;

use crate::{
    BlockRange, Durability, Latched, RecordNumber, WriteError,
    log::{Appended, Log},
    request::range_lock::RangeGuard,
    sync::{AtomicU64, AtomicUsize, Mutex, Ordering},
    wait_list::WaitList,
};
use lazy::{GoOn, LazyWrites};
use std::{
    future::poll_fn,
    task::{Context, Poll, Waker},
};

/// The request has no admitted write in flight.
const NONE: u64 = 0;

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
    /// Its number among all that were admitted.
    pub number: u64,
}

/// An admitted write, and the thread that it is of.
#[derive(Clone, Copy)]
struct Place {
    thread: usize,
    request: usize,
    number: u64,
}

/// The admitted writes that are not in place yet, and the flushes that wait for them.
pub(crate) struct AdmittedWrites {
    /// The number of the next write: each is given once, in order.
    next: AtomicU64,
    /// By request: the number of its admitted write while that is not safe, or [`NONE`].
    in_flight: Vec<AtomicU64>,
    /// Length of `waiters`, to be read without the lock.
    waiting: AtomicUsize,
    waiters: Mutex<WaitList<Awaited>>,
    lazy: LazyWrites,
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
    place: Place,
    stage: Stage,
    durability: Durability,
    first_not_durable: RecordNumber,
    why_failed: Option<Latched>,
}

/// How far an admitted write is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Nothing is decided.
    Admitted,
    /// It waits, with nothing logged.
    Held,
    /// On its way in place, with nobody to carry it.
    InPlace,
    /// It is to be carried.
    Carried,
    /// It is safe, and waits.
    Parked,
    /// It is safe, and on its way in place.
    Safe,
}

impl AdmittedWrites {
    /// For so many threads, requests, and writes that each thread may have admitted and not in place.
    /// `sync_log`: records may carry these.
    pub(crate) fn new(threads: usize, requests: usize, per_thread: usize, sync_log: bool) -> Self {
        Self {
            next: AtomicU64::new(NONE + 1),
            in_flight: (0..requests).map(|_| AtomicU64::new(NONE)).collect(),
            waiting: AtomicUsize::new(0),
            waiters: Mutex::new(WaitList::new(requests)),
            lazy: LazyWrites::new(threads, requests, if sync_log { per_thread } else { 0 }),
            failed: Mutex::new(Vec::with_capacity(requests)),
            failures: AtomicUsize::new(0),
        }
    }

    /// The memory for so many requests.
    pub(crate) fn memory_bytes_for(requests: usize) -> u64 {
        let own = (requests as u64).saturating_mul((size_of::<AtomicU64>() + size_of::<BlockRange>()) as u64);
        own.saturating_add(WaitList::<Awaited>::memory_bytes_for(requests))
            .saturating_add(LazyWrites::memory_bytes_for(requests))
    }

    /// Admits a write of a thread, whose range is held: it may be answered at once, or when it is
    /// safe. `None` where the volume is latched.
    pub(crate) fn admit<'v>(
        &'v self,
        log: &'v Log,
        guard: RangeGuard<'v>,
        thread: usize,
        durability: Durability,
    ) -> Option<Admitted<'v>> {
        // Asked while the range is held: if the write that held it before has failed, the volume is
        // latched by now. Otherwise the bytes of two writes of one block could be kept, and nobody
        // could tell which is the newer.
        let first_not_durable = log.first_not_durable().ok()?;
        let number = self.begin(guard.request());
        Some(Admitted {
            writes: self,
            log,
            place: Place { thread, request: guard.request(), number },
            guard,
            stage: Stage::Admitted,
            durability,
            first_not_durable,
            why_failed: Some(Latched::Abandoned),
        })
    }

    fn begin(&self, request: usize) -> u64 {
        let number = self.next.fetch_add(1, Ordering::SeqCst);
        // A flush that begins in between does not wait for it, and need not: it has not been
        // answered.
        self.in_flight[request].store(number, Ordering::SeqCst);
        number
    }

    /// The write is safe, or has failed.
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
            let request = waiters.find(0, |awaited| self.has_come(awaited, || oldest))?;
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

    fn has_come(&self, awaited: Awaited, oldest: impl FnOnce() -> u64) -> bool {
        match awaited {
            Awaited::AllBelow(below) => below <= oldest(),
            Awaited::One(id) => self.in_flight[id.request].load(Ordering::SeqCst) != id.number,
        }
    }

    /// Waits until all writes that were admitted before are safe, or have failed. Those that are
    /// held go on.
    pub(crate) async fn flush(&self, request: usize) {
        let below = self.next.load(Ordering::SeqCst);
        if self.oldest() < below {
            self.lazy.flush(below);
            self.wait(request, Awaited::AllBelow(below)).await;
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

impl Admitted<'_> {
    /// What it is to write.
    pub fn range(&self) -> BlockRange {
        self.guard.range()
    }

    /// Says where the caller keeps its bytes, unchanged until the [write back](crate::Volume::write_back)
    /// has ended: reads of its blocks can be served [from there](crate::Volume::read_kept).
    pub fn kept_at(&self, at: u64) {
        self.guard.kept(self.place.number, at);
    }

    /// Waits for a flush, with its tags made and nothing logged, unless it is to go on. Whether a
    /// record is to carry so many bytes of it.
    pub(crate) async fn hold(&mut self, bytes: usize) -> bool {
        let go_on = match self.durability {
            Durability::Durable => GoOn::Flush,
            Durability::MayBeLost => match self.writes.lazy.hold(self.place, bytes) {
                Some(go_on) => go_on,
                None => self.wait(Stage::Held).await,
            },
        };
        self.stage = if go_on == GoOn::Flush { Stage::Carried } else { Stage::InPlace };
        go_on == GoOn::Flush
    }

    /// Waits until it is told to go on, or somebody waits for its range.
    async fn wait(&mut self, stage: Stage) -> GoOn {
        self.stage = stage;
        poll_fn(|cx| self.poll_go_on(cx)).await
    }

    fn poll_go_on(&self, cx: &Context<'_>) -> Poll<GoOn> {
        let lazy = &self.writes.lazy;
        if let Poll::Ready(told) = lazy.poll_told(self.place.request, cx.waker()) {
            return Poll::Ready(told);
        }
        self.guard.poll_contended(cx).map(|()| lazy.stop_waiting(self.place))
    }

    /// Its change has its place in the log: carried or not.
    pub(crate) fn appended(&mut self, change: &Appended<'_>) {
        if self.stage == Stage::Carried && !change.carried {
            self.writes.lazy.sets_out(self.place.thread);
            self.stage = Stage::InPlace;
        }
    }

    /// The record that carries it is durable, and all before it. `clear` clears what was kept of
    /// it; later writes of its blocks go on. Then it waits, unless `may_wait` says that it must not
    /// or somebody needs it in place.
    pub(crate) async fn park(&mut self, clear: impl FnOnce(), may_wait: impl FnOnce() -> bool) {
        clear();
        self.stage = Stage::Safe;
        self.writes.end(self.place.request);
        self.guard.park();
        if self.writes.lazy.park(self.place, may_wait).is_none() {
            self.wait(Stage::Parked).await;
            self.stage = Stage::Safe;
        }
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

    pub(crate) fn guard(&self) -> &RangeGuard<'_> {
        &self.guard
    }

    /// Whether a durable record carries it.
    pub(crate) fn is_safe(&self) -> bool {
        self.stage == Stage::Safe
    }

    pub(crate) fn durability(&self) -> Durability {
        self.durability
    }

    /// By this it can be waited for until it is safe.
    pub fn id(&self) -> WriteBackId {
        WriteBackId { request: self.place.request, number: self.place.number }
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
        let lazy = &self.writes.lazy;
        // One that still waits has been dropped.
        let waited = matches!(self.stage, Stage::Held | Stage::Parked).then(|| lazy.stop_waiting(self.place));
        let set_out = self.stage == Stage::InPlace || self.stage == Stage::Held && waited == Some(GoOn::InPlace);
        if set_out {
            lazy.arrives(self.place.thread);
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
        let writes = AdmittedWrites::new(1, 4, 0, false);
        let woken = Arc::new(Woken(AtomicBool::new(false)));
        let waker = Waker::from(woken.clone());
        let mut cx = Context::from_waker(&waker);
        writes.begin(2);
        writes.begin(0);
        let mut flush = pin!(writes.flush(3));
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
        let writes = AdmittedWrites::new(1, 2, 0, false);
        writes.begin(0);
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

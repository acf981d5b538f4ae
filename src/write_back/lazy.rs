//! Which admitted writes wait, though nothing keeps them from going on: those that others may make
//! cheaper.
//!
//! - A write that has its tags is *held*, with nothing logged: if a flush comes next, that logs it, one record
//!   carries its data, and that record is all that the flush waits for.
//! - A write that a durable record carries is *parked*: several go to their places together, and one
//!   that is written again meanwhile need not go at all.
//!
//! Nobody waits for either without telling it. A held write is parked at once where a flush has logged it. It goes on,
//! to be carried, when a flush has come that could not. Otherwise it goes in place at once: when a request waits for its range, when many
//! are held, at the next tick, at the end. A parked write goes on when a request waits for its
//! range, when half of its thread's writes are parked, when its epoch has ended, after some ticks,
//! at the end.
//!
//! Writes are held only while none of their thread is on its way in place: a stream without flushes
//! is not slowed down.

use super::Place;
use crate::sync::{AtomicU8, AtomicU64, AtomicUsize, Mutex, Ordering};
use std::task::{Poll, Waker};

/// Most bytes that one thread holds: a record carries no more.
const MOST_HELD_BYTES: usize = 60 << 10;

/// Ticks that a parked write waits. A held one waits for one; each at most one more.
const PARKED_TICKS: usize = 4;

/// Why a write that waits goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(super) enum GoOn {
    /// A flush waits for it.
    Flush = 1,
    /// It is to be in place, and nothing is logged.
    InPlace = 2,
    /// It is to be in place, and a record carries it.
    Logged = 3,
}

/// A write that waits.
#[derive(Clone, Copy)]
struct Waiting {
    /// Its request.
    request: usize,
    /// See [`Place::since`].
    since: u64,
    bytes: usize,
}

/// The admitted writes of one I/O thread.
struct ThreadWrites {
    /// Oldest first.
    held: Vec<Waiting>,
    held_bytes: usize,
    /// Oldest first.
    parked: Vec<Waiting>,
    /// On their way in place, as no record carries them.
    on_their_way: usize,
    /// No more writes come: none waits any more.
    ended: bool,
}

impl ThreadWrites {
    fn remove_held(&mut self, i: usize) -> Waiting {
        let waiting = self.held.remove(i);
        self.held_bytes -= waiting.bytes;
        waiting
    }
}

/// What a request that waits has been told. One that has been told nothing, and neither is held nor parked, is in the hands of
/// the flush that logs it.
struct Told {
    go_on: AtomicU8,
    waker: Mutex<Option<Waker>>,
}

pub(super) struct LazyWrites {
    /// By I/O thread.
    threads: Vec<Mutex<ThreadWrites>>,
    /// By request.
    told: Vec<Told>,
    /// The writes that a thread may have; half of them may be held, and half parked.
    per_thread: usize,
    /// Flushes have come that wait for all numbers below.
    flushed_below: AtomicU64,
    /// How many wait.
    count: AtomicUsize,
    /// Who gives the ticks, while none is due.
    ticker: Mutex<Option<Waker>>,
    /// The number that was next at each of the last ticks, newest first.
    ticks: Mutex<[u64; PARKED_TICKS]>,
    /// Those below have been held for long enough.
    due_below: AtomicU64,
}

impl LazyWrites {
    /// For so many threads, requests, and writes that each thread may have admitted: with less than
    /// two none waits.
    pub(super) fn new(threads: usize, requests: usize, per_thread: usize) -> Self {
        // Flushes of other threads park writes, too.
        let list = || Vec::with_capacity(per_thread);
        let thread =
            |_| Mutex::new(ThreadWrites { held: list(), held_bytes: 0, parked: list(), on_their_way: 0, ended: false });
        let told = |_| Told { go_on: AtomicU8::new(0), waker: Mutex::new(None) };
        Self {
            threads: (0..threads).map(thread).collect(),
            told: (0..requests).map(told).collect(),
            per_thread,
            flushed_below: AtomicU64::new(0),
            count: AtomicUsize::new(0),
            ticker: Mutex::new(None),
            ticks: Mutex::new([0; PARKED_TICKS]),
            due_below: AtomicU64::new(0),
        }
    }

    /// Whether a flush waits for writes since then, or has.
    pub(super) fn is_flushed(&self, since: u64) -> bool {
        since < self.flushed_below.load(Ordering::SeqCst)
    }

    /// The memory for so many requests.
    pub(super) fn memory_bytes_for(requests: usize) -> u64 {
        (requests as u64).saturating_mul((2 * size_of::<Waiting>() + size_of::<Told>()) as u64)
    }

    /// Whether any write may wait. If not, none is counted either.
    fn is_lazy(&self) -> bool {
        self.per_thread >= 2
    }

    /// Holds a write of so many bytes, unless it is to go on at once. `keep` is called before a flush can find it.
    pub(super) fn hold(&self, at: Place, bytes: usize, keep: impl FnOnce()) -> Option<GoOn> {
        if !self.is_lazy() {
            return Some(GoOn::InPlace);
        }
        let mut thread = self.threads[at.thread].lock();
        // Under the mutex: a flush sets this before it looks for those that are held.
        if self.is_flushed(at.since) {
            return Some(GoOn::Flush);
        }
        // Those whose place it takes have been held before.
        let is_due = at.since < self.due_below.load(Ordering::SeqCst);
        if thread.ended || is_due || thread.on_their_way > 0 || thread.held_bytes + bytes > MOST_HELD_BYTES {
            thread.on_their_way += 1;
            drop(thread);
            self.tell_held(at.thread, u64::MAX);
            return Some(GoOn::InPlace);
        }
        keep();
        thread.held_bytes += bytes;
        thread.held.push(Waiting { request: at.request, since: at.since, bytes });
        self.begin_wait(at.request);
        let many = thread.held.len() > self.per_thread / 2;
        drop(thread);
        match many {
            true => self.tell_held(at.thread, u64::MAX),
            false => self.wake_ticker(),
        }
        None
    }

    /// Parks a write: `true`, unless it is to go on at once. `may_wait` is asked while nobody who looks for
    /// parked writes can miss it.
    pub(super) fn park(&self, at: Place, may_wait: impl FnOnce() -> bool) -> bool {
        if !self.is_lazy() {
            return false;
        }
        let mut thread = self.threads[at.thread].lock();
        if thread.ended || !may_wait() {
            return false;
        }
        thread.parked.push(Waiting { request: at.request, since: at.since, bytes: 0 });
        self.begin_wait(at.request);
        let many = thread.parked.len() >= self.per_thread / 2;
        drop(thread);
        match many {
            true => self.tell_parked(at.thread, u64::MAX),
            false => self.wake_ticker(),
        }
        true
    }

    fn begin_wait(&self, request: usize) {
        self.told[request].go_on.store(0, Ordering::Relaxed);
        self.count.fetch_add(1, Ordering::SeqCst);
    }

    /// What a write that waits has been told.
    pub(super) fn poll_told(&self, request: usize, waker: &Waker) -> Poll<GoOn> {
        let told = self.told(request);
        if told.is_ready() {
            return told;
        }
        *self.told[request].waker.lock() = Some(waker.clone());
        self.told(request)
    }

    fn told(&self, request: usize) -> Poll<GoOn> {
        match self.told[request].go_on.load(Ordering::SeqCst) {
            0 => Poll::Pending,
            told if told == GoOn::Flush as u8 => Poll::Ready(GoOn::Flush),
            told if told == GoOn::InPlace as u8 => Poll::Ready(GoOn::InPlace),
            _ => Poll::Ready(GoOn::Logged),
        }
    }

    /// A write stops to wait of its own accord. What it has been told counts, if it has. `None`: it can't, for a flush has
    /// it in hand, which will tell it.
    pub(super) fn stop_waiting(&self, at: Place) -> Option<GoOn> {
        let mut thread = self.threads[at.thread].lock();
        let is_it = |waiting: &Waiting| waiting.request == at.request;
        let go_on = if let Some(i) = thread.held.iter().position(is_it) {
            thread.remove_held(i);
            thread.on_their_way += 1;
            GoOn::InPlace
        } else if let Some(i) = thread.parked.iter().position(is_it) {
            thread.parked.remove(i);
            GoOn::Logged
        } else {
            return match self.told(at.request) {
                Poll::Ready(told) => Some(told),
                Poll::Pending => None,
            };
        };
        self.count.fetch_sub(1, Ordering::SeqCst);
        Some(go_on)
    }

    /// A write that was to be carried goes in place all the same.
    pub(super) fn sets_out(&self, thread: usize) {
        if self.is_lazy() {
            self.threads[thread].lock().on_their_way += 1;
        }
    }

    /// A write that was on its way in place has ended.
    pub(super) fn arrives(&self, thread: usize) {
        if self.is_lazy() {
            self.threads[thread].lock().on_their_way -= 1;
        }
    }

    /// A flush waits for all writes below this number: those that are held, or will be, go on. Each that is held is put
    /// into the hands of `log` first. If that keeps it (`true`) it is to be [told](Self::tell_one) or parked later.
    pub(super) fn flush(&self, below: u64, mut log: impl FnMut(Place) -> bool) {
        self.flushed_below.fetch_max(below, Ordering::SeqCst);
        for thread in 0..self.threads.len() {
            while let Some(Waiting { request, since, .. }) = self.take_held(thread, below) {
                if !log(Place { thread, request, since }) {
                    self.tell_one(request, GoOn::Flush);
                }
            }
        }
    }

    fn take_held(&self, thread: usize, below: u64) -> Option<Waiting> {
        let mut writes = self.threads[thread].lock();
        let i = writes.held.iter().position(|waiting| waiting.since < below)?;
        self.count.fetch_sub(1, Ordering::SeqCst);
        Some(writes.remove_held(i))
    }

    /// Tells one that is in hand.
    pub(super) fn tell_one(&self, request: usize, go_on: GoOn) {
        self.told[request].go_on.store(go_on as u8, Ordering::SeqCst);
        self.wake(request);
    }

    /// Has a write that waits look around.
    pub(super) fn wake(&self, request: usize) {
        let waker = self.told[request].waker.lock().take();
        waker.into_iter().for_each(Waker::wake);
    }

    /// All parked writes go on: an epoch has ended.
    pub(super) fn hurry_parked(&self) {
        (0..self.threads.len()).for_each(|thread| self.tell_parked(thread, u64::MAX));
    }

    /// No more writes of the thread come, so none waits any more.
    pub(super) fn end(&self, thread: usize) {
        self.threads[thread].lock().ended = true;
        self.tell_held(thread, u64::MAX);
        self.tell_parked(thread, u64::MAX);
    }

    /// Whether a tick is due. If not, the waker is called when one is.
    pub(super) fn poll_tick(&self, waker: &Waker) -> Poll<()> {
        if self.count.load(Ordering::SeqCst) == 0 {
            *self.ticker.lock() = Some(waker.clone());
        }
        if self.count.load(Ordering::SeqCst) == 0 { Poll::Pending } else { Poll::Ready(()) }
    }

    fn wake_ticker(&self) {
        let waker = self.ticker.lock().take();
        waker.into_iter().for_each(Waker::wake);
    }

    /// Time has passed: those that have waited long enough go on. `next` is the number that the next
    /// write will have.
    pub(super) fn tick(&self, next: u64) {
        let (held_below, parked_below) = {
            let mut ticks = self.ticks.lock();
            let below = (ticks[0], ticks[PARKED_TICKS - 1]);
            ticks.rotate_right(1);
            ticks[0] = next;
            below
        };
        self.due_below.store(held_below, Ordering::SeqCst);
        for thread in 0..self.threads.len() {
            self.tell_held(thread, held_below);
            self.tell_parked(thread, parked_below);
        }
    }

    /// Those that are held go in place.
    fn tell_held(&self, thread: usize, below: u64) {
        self.tell(thread, GoOn::InPlace, |writes| {
            let i = writes.held.iter().position(|waiting| waiting.since < below)?;
            writes.on_their_way += 1;
            Some(writes.remove_held(i))
        });
    }

    fn tell_parked(&self, thread: usize, below: u64) {
        self.tell(thread, GoOn::Logged, |writes| {
            let i = writes.parked.iter().position(|waiting| waiting.since < below)?;
            Some(writes.parked.remove(i))
        });
    }

    /// Tells each that `take` takes out. One at a time, so that no waker is called under the mutex.
    fn tell(&self, thread: usize, go_on: GoOn, mut take: impl FnMut(&mut ThreadWrites) -> Option<Waiting>) {
        let next = || {
            let mut writes = self.threads[thread].lock();
            let waiting = take(&mut writes)?;
            let told = &self.told[waiting.request];
            told.go_on.store(go_on as u8, Ordering::SeqCst);
            self.count.fetch_sub(1, Ordering::SeqCst);
            Some(told.waker.lock().take())
        };
        std::iter::from_fn(next).flatten().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: usize = 4096;

    fn at(thread: usize, request: usize, since: u64) -> Place {
        Place { thread, request, since }
    }

    fn hold(lazy: &LazyWrites, at: Place, bytes: usize) -> Option<GoOn> {
        lazy.hold(at, bytes, || {})
    }

    fn told(lazy: &LazyWrites, request: usize) -> Option<GoOn> {
        match lazy.poll_told(request, Waker::noop()) {
            Poll::Ready(told) => Some(told),
            Poll::Pending => None,
        }
    }

    #[test]
    fn a_flush_tells_those_that_are_held_and_those_that_will_be() {
        let lazy = LazyWrites::new(2, 8, 8);
        assert_eq!(hold(&lazy, at(0, 1, 1), BYTES), None);
        assert_eq!(hold(&lazy, at(1, 2, 2), BYTES), None);
        assert_eq!(hold(&lazy, at(0, 3, 5), BYTES), None);
        lazy.flush(4, |_| false);
        assert_eq!([1, 2, 3].map(|request| told(&lazy, request)), [Some(GoOn::Flush), Some(GoOn::Flush), None]);
        assert_eq!(hold(&lazy, at(1, 4, 3), BYTES), Some(GoOn::Flush), "it was admitted before the flush came");
        assert_eq!(hold(&lazy, at(1, 5, 4), BYTES), None);
    }

    #[test]
    fn what_a_flush_has_in_hand_hears_from_nobody_else() {
        let lazy = LazyWrites::new(1, 4, 8);
        (1..=2).for_each(|n| assert_eq!(hold(&lazy, at(0, n, n as u64), BYTES), None));
        lazy.flush(3, |place| place.request == 1);
        assert_eq!([1, 2].map(|n| told(&lazy, n)), [None, Some(GoOn::Flush)]);
        (0..2).for_each(|_| lazy.tick(3));
        assert_eq!((told(&lazy, 1), lazy.stop_waiting(at(0, 1, 1))), (None, None));
        assert!(lazy.park(at(0, 1, 1), || true));
        assert_eq!(lazy.stop_waiting(at(0, 1, 1)), Some(GoOn::Logged));
        assert!(lazy.poll_tick(Waker::noop()).is_pending(), "none waits any more");
        lazy.tell_one(1, GoOn::Logged);
        assert_eq!(told(&lazy, 1), Some(GoOn::Logged));
    }

    #[test]
    fn none_is_held_beside_one_that_is_on_its_way() {
        let lazy = LazyWrites::new(2, 8, 8);
        assert_eq!(hold(&lazy, at(0, 1, 1), BYTES), None);
        assert_eq!(lazy.stop_waiting(at(0, 1, 1)), Some(GoOn::InPlace), "somebody waits for its range");
        assert_eq!(hold(&lazy, at(0, 2, 2), BYTES), Some(GoOn::InPlace));
        assert_eq!(hold(&lazy, at(1, 3, 3), BYTES), None, "that is another thread");
        lazy.arrives(0);
        lazy.arrives(0);
        assert_eq!(hold(&lazy, at(0, 4, 4), BYTES), None);
        lazy.sets_out(0);
        assert_eq!(hold(&lazy, at(0, 5, 5), BYTES), Some(GoOn::InPlace), "there was no room to carry one");
        assert_eq!(told(&lazy, 4), Some(GoOn::InPlace));
    }

    #[test]
    fn many_that_wait_go_on_together() {
        let lazy = LazyWrites::new(1, 16, 4);
        let held = [1, 2, 3].map(|n| hold(&lazy, at(0, n, n as u64), BYTES));
        assert_eq!((held, [1, 2, 3].map(|n| told(&lazy, n))), ([None; 3], [Some(GoOn::InPlace); 3]));
        (0..3).for_each(|_| lazy.arrives(0));
        assert_eq!(hold(&lazy, at(0, 4, 4), MOST_HELD_BYTES), None);
        assert_eq!(hold(&lazy, at(0, 5, 5), BYTES), Some(GoOn::InPlace), "one record would not carry both");
        assert_eq!(told(&lazy, 4), Some(GoOn::InPlace));
        assert!(lazy.park(at(0, 6, 6), || true));
        assert_eq!(told(&lazy, 6), None);
        assert!(lazy.park(at(0, 7, 7), || true));
        assert_eq!([6, 7].map(|n| told(&lazy, n)), [Some(GoOn::Logged); 2]);
        assert!(!lazy.park(at(0, 8, 8), || false), "its epoch has ended");
    }

    #[test]
    fn those_that_have_waited_long_enough_go_on() {
        let lazy = LazyWrites::new(1, 8, 16);
        assert!(lazy.poll_tick(Waker::noop()).is_pending(), "nobody waits");
        hold(&lazy, at(0, 1, 1), BYTES);
        lazy.park(at(0, 2, 2), || true);
        assert!(lazy.poll_tick(Waker::noop()).is_ready());
        lazy.tick(3);
        assert_eq!([1, 2].map(|n| told(&lazy, n)), [None; 2], "it may have been a moment");
        lazy.tick(3);
        assert_eq!([1, 2].map(|n| told(&lazy, n)), [Some(GoOn::InPlace), None]);
        lazy.arrives(0);
        assert_eq!(hold(&lazy, at(0, 4, 2), BYTES), Some(GoOn::InPlace), "an heir is as old as what it is written for");
        (0..PARKED_TICKS - 2).for_each(|_| lazy.tick(3));
        assert_eq!(told(&lazy, 2), None);
        lazy.tick(3);
        assert_eq!(told(&lazy, 2), Some(GoOn::Logged));
        assert!(lazy.poll_tick(Waker::noop()).is_pending());
    }

    #[test]
    fn at_the_end_none_waits() {
        let lazy = LazyWrites::new(2, 8, 8);
        hold(&lazy, at(0, 1, 1), BYTES);
        lazy.park(at(0, 2, 2), || true);
        lazy.park(at(1, 3, 3), || true);
        lazy.end(0);
        assert_eq!([1, 2, 3].map(|n| told(&lazy, n)), [Some(GoOn::InPlace), Some(GoOn::Logged), None]);
        assert_eq!(hold(&lazy, at(0, 4, 4), BYTES), Some(GoOn::InPlace));
        assert!(!lazy.park(at(0, 5, 5), || true));
        lazy.hurry_parked();
        assert_eq!(told(&lazy, 3), Some(GoOn::Logged));
    }
}

//! The gate in front of all requests. While it is closed they wait as they were fetched, and soon
//! nothing is under way: then the device can be left to another daemon, or served on.
//!
//! No request slips by: a thread first counts one, then looks at the gate. Who closes that first
//! notes it, then looks at the counts. In any order of these four steps one of the two sees the
//! other.

use super::load::{Load, UnderWay};
use crate::sync::{AtomicBool, Mutex, MutexGuard, Ordering};
use std::{
    future::{Future, poll_fn},
    task::{Poll, Waker},
    thread,
    time::{Duration, Instant},
};

/// Between two looks at what is under way.
const PAUSE: Duration = Duration::from_millis(1);

/// The gate of a device.
pub struct Gate {
    closed: AtomicBool,
    under_way: Vec<UnderWay>,
    /// The tasks that wait for it to open. Memory is taken once.
    waiting: Mutex<Vec<Waker>>,
}

/// A gate that is closed as long as this lives.
#[must_use = "the gate opens when this is dropped"]
pub struct Closed<'g>(&'g Gate);

impl Gate {
    /// An open one, for so many threads and so many requests at a time.
    pub fn new(threads: usize, requests: usize) -> Self {
        Self {
            closed: AtomicBool::new(false),
            under_way: (0..threads).map(|_| UnderWay::default()).collect(),
            waiting: Mutex::new(Vec::with_capacity(requests)),
        }
    }

    /// What a thread has under way.
    pub(super) fn of_thread(&self, thread: usize) -> &UnderWay {
        &self.under_way[thread]
    }

    /// Lets a request in that has been fetched, as soon as the gate is open. From then on it counts
    /// as under way.
    pub(super) fn enter(&self, load: &Load<'_>) -> impl Future<Output = ()> {
        poll_fn(|cx| {
            load.fetched();
            if !self.closed.load(Ordering::SeqCst) {
                return Poll::Ready(());
            }
            load.turned_back();
            let mut waiting = self.waiting();
            match self.closed.load(Ordering::SeqCst) {
                true => waiting.push(cx.waker().clone()),
                // It was opened in between: nobody would wake us.
                false => cx.waker().wake_by_ref(),
            }
            Poll::Pending
        })
    }

    /// Closes it, and waits until nothing is under way, `limit` at most: then so much was, and it is
    /// open again. One caller at a time.
    pub fn close(&self, limit: Duration) -> Result<Closed<'_>, u64> {
        let begun = Instant::now();
        self.close_while(|| {
            thread::sleep(PAUSE);
            begun.elapsed() < limit
        })
    }

    /// The same as long as `has_patience`, which lets a moment pass.
    fn close_while(&self, mut has_patience: impl FnMut() -> bool) -> Result<Closed<'_>, u64> {
        self.closed.store(true, Ordering::SeqCst);
        let closed = Closed(self);
        loop {
            let under_way = self.under_way.iter().map(UnderWay::now).sum();
            if under_way == 0 {
                return Ok(closed);
            }
            if !has_patience() {
                return Err(under_way);
            }
        }
    }

    /// For tests: one more request of the first thread is under way, or one less.
    #[cfg(test)]
    pub fn of_test(&self, more: bool) {
        if more { self.under_way[0].begin() } else { self.under_way[0].end() }
    }

    #[cfg(test)]
    pub(super) fn waiting_count(&self) -> usize {
        self.waiting().len()
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<Waker>> {
        self.waiting.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.0.closed.store(false, Ordering::SeqCst);
        let waiting: Vec<_> = self.0.waiting().drain(..).collect();
        waiting.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::{FutureExt, task::noop_waker_ref};
    use std::{
        pin::pin,
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
        task::{Context, Wake},
    };

    const SOON: Duration = Duration::from_millis(20);

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn requests_wait_while_it_is_closed_and_are_let_in_afterwards() {
        let gate = Gate::new(2, 4);
        let load = Load::of(gate.of_thread(1));
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(Arc::clone(&woken));
        let mut cx = Context::from_waker(&waker);
        assert!(gate.enter(&load).now_or_never().is_some(), "it is open");
        load.answered();

        let closed = gate.close(SOON).ok().unwrap();
        let (mut one, mut other) = (pin!(gate.enter(&load)), pin!(gate.enter(&load)));
        assert!(one.as_mut().poll(&mut cx).is_pending() && other.as_mut().poll(&mut cx).is_pending());
        assert_eq!((gate.of_thread(1).get(), woken.0.load(Ordering::SeqCst)), (0, 0), "they are not under way");
        drop(closed);
        assert_eq!(woken.0.load(Ordering::SeqCst), 2, "both are told");
        assert!(one.as_mut().poll(&mut cx).is_ready() && other.as_mut().poll(&mut cx).is_ready());
        assert_eq!(gate.of_thread(1).get(), 2);
        assert_eq!(gate.close(SOON).err(), Some(2));
    }

    #[test]
    fn it_is_not_closed_while_a_request_or_an_early_write_is_under_way() {
        let gate = Gate::new(2, 4);
        let load = Load::of(gate.of_thread(0));
        let enter = || gate.enter(&load).poll_unpin(&mut Context::from_waker(noop_waker_ref())).is_ready();
        assert!(enter());
        assert_eq!(gate.close(SOON).err(), Some(1));
        assert!(enter(), "it was busy, and is open again");
        // Answered early: one in place, one not.
        load.admitted();
        load.answered();
        load.answered();
        assert_eq!(gate.close(SOON).err(), Some(1), "what was answered early is not in place");
        load.written_back();
        assert!(gate.close(SOON).is_ok());
    }
}

/// Real threads under a model checker: see `sync.rs`.
#[cfg(all(test, shuttle))]
mod interleavings {
    use super::*;
    use crate::{shared::check, sync::AtomicU64};
    use shuttle::{future::block_on, thread};
    use std::sync::Arc;

    #[test]
    fn nothing_is_under_way_while_it_is_closed_and_nobody_is_left_behind() {
        check(|| {
            let gate = Arc::new(Gate::new(2, 2));
            // Not what the gate counts: what is really being served.
            let served = Arc::new(AtomicU64::new(0));
            let threads = [0, 1].map(|thread| {
                let (gate, served) = (Arc::clone(&gate), Arc::clone(&served));
                thread::spawn(move || {
                    let load = Load::of(gate.of_thread(thread));
                    for _ in 0..2 {
                        block_on(gate.enter(&load));
                        served.fetch_add(1, Ordering::SeqCst);
                        thread::yield_now();
                        served.fetch_sub(1, Ordering::SeqCst);
                        load.answered();
                    }
                })
            });
            for patience in [3, 100] {
                let mut left = patience;
                let closed = gate.close_while(|| {
                    thread::yield_now();
                    left -= 1;
                    left > 0
                });
                if let Ok(closed) = closed {
                    for _ in 0..2 {
                        assert_eq!(served.load(Ordering::SeqCst), 0, "served while the gate was closed");
                        thread::yield_now();
                    }
                    drop(closed);
                }
            }
            threads.into_iter().for_each(|thread| thread.join().unwrap());
        });
    }
}

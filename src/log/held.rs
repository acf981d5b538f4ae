//! Flushes that the anchor holds back: where a volume answers none that its anchor does not cover.
//!
//! They go by rounds, as syncs of the data device do: a flush is done when a round that began after its arrival is, so
//! many flushes share one, and who comes meanwhile joins the next. Who tells the anchor is the one to begin and end rounds,
//! and waits for no flush.

use super::{Log, state::Waiting};
use crate::{Latched, sync::Ordering};
use std::{
    future::poll_fn,
    task::{Poll, Waker},
};

impl Log {
    /// From now on flushes wait for the anchor.
    pub(crate) fn hold_flushes(&self) {
        self.holds_flushes.store(true, Ordering::SeqCst);
    }

    /// Whether they do: each flush of each volume asks.
    pub(crate) fn holds_flushes(&self) -> bool {
        self.holds_flushes.load(Ordering::SeqCst)
    }

    /// Waits until the anchor covers all that was answered before.
    pub(crate) async fn covered(&self, request: usize) -> Result<(), Latched> {
        let mut wanted = None;
        poll_fn(|cx| self.poll_covered(request, &mut wanted, cx.waker())).await
    }

    fn poll_covered(&self, request: usize, wanted: &mut Option<u64>, waker: &Waker) -> Poll<Result<(), Latched>> {
        let mut guard = self.state.lock();
        let s = &mut *guard;
        let rounds = &mut s.anchor_rounds;
        // What a round covers that has begun is known: this flush may speak of more.
        let wanted = *wanted.get_or_insert(rounds.started + 1);
        let answer = match s.latched {
            Some(why) => Err(why),
            None if rounds.done >= wanted => Ok(()),
            None => {
                rounds.wanted = rounds.wanted.max(wanted);
                s.waiters.wait(request, Waiting::Anchored(wanted), waker);
                let keeper = s.waiters.find(0, |why| why == Waiting::HeldFlush);
                let wake = keeper.and_then(|keeper| s.waiters.take_waker(keeper));
                drop(guard);
                wake.into_iter().for_each(Waker::wake);
                return Poll::Pending;
            }
        };
        s.waiters.remove(request);
        Poll::Ready(answer)
    }

    /// Whether a flush waits for a round that is not done.
    pub(crate) fn holds_a_flush(&self) -> bool {
        self.state.lock().anchor_rounds.is_wanted()
    }

    /// Waits until [one does](Self::holds_a_flush), or the volume is latched: then none waits any more.
    pub(crate) async fn flush_held(&self, request: usize) {
        poll_fn(|cx| {
            let mut s = self.state.lock();
            if s.latched.is_some() || s.anchor_rounds.is_wanted() {
                s.waiters.remove(request);
                return Poll::Ready(());
            }
            s.waiters.wait(request, Waiting::HeldFlush, cx.waker());
            Poll::Pending
        })
        .await;
    }

    /// A round begins: it will cover all that was answered before. Its number.
    pub(crate) fn begin_round(&self) -> u64 {
        let rounds = &mut self.state.lock().anchor_rounds;
        rounds.started += 1;
        rounds.started
    }

    /// The anchor covers what it was to in that round, durable.
    pub(crate) fn end_round(&self, round: u64) {
        self.state.lock().anchor_rounds.done = round;
        self.wake_all(|_, why| matches!(why, Waiting::Anchored(wanted) if wanted <= round));
    }
}

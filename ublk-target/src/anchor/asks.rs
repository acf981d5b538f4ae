//! What the anchor thread is asked while a volume is served. It alone tells the anchor, so that no two write to it.

use crate::{
    failure::Failure,
    sync::{AtomicWaker, Mutex, MutexGuard},
};
use std::{collections::VecDeque, future::poll_fn, task::Poll};
use ublk_integrity::anchor::{KeyAreaMark, KeyAreaStep};

/// A step of a change of the key slots; and who hears of it: the generation of the anchor's body, or why not.
pub struct Ask {
    /// What lies there.
    pub found: KeyAreaMark,
    /// What the anchor is asked for.
    pub step: KeyAreaStep,
    /// Called once.
    pub answer: Box<dyn FnOnce(Result<u64, Failure>) + Send>,
}

/// What was asked and not answered yet.
#[derive(Default)]
pub(super) struct Asks {
    waiting: Mutex<Waiting>,
    /// The thread.
    waker: AtomicWaker,
}

#[derive(Default)]
struct Waiting {
    asks: VecDeque<Ask>,
    /// Why nobody answers any more.
    closed: Option<Failure>,
}

impl Asks {
    /// One more. Where nobody answers any more it is answered here.
    pub(super) fn put(&self, ask: Ask) {
        let mut waiting = self.waiting();
        match &waiting.closed {
            None => waiting.asks.push_back(ask),
            Some(why) => {
                let why = why.clone();
                drop(waiting);
                return (ask.answer)(Err(why));
            }
        }
        drop(waiting);
        self.waker.wake();
    }

    /// Waits for one. One waiter only.
    pub(super) async fn next(&self) -> Ask {
        poll_fn(|cx| {
            self.waker.register(cx.waker());
            self.waiting().asks.pop_front().map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }

    /// From now on, and of what waits, this is the answer.
    pub(super) fn close(&self, why: &Failure) {
        let mut waiting = self.waiting();
        waiting.closed.get_or_insert_with(|| why.clone());
        let left = std::mem::take(&mut waiting.asks);
        drop(waiting);
        left.into_iter().for_each(|ask| (ask.answer)(Err(why.clone())));
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

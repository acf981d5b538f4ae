//! Range guards: who may touch which blocks. First come, first served; a whole range is taken in one step.
//!
//! A request waits here only for requests that came before it and overlap it, and each of those
//! either has its range or waits for still earlier ones: no cycle.

use crate::{BlockRange, sync::Mutex};
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

struct Claim {
    ticket: u64,
    range: BlockRange,
    mode: Mode,
    /// `None` while it waits.
    granted: bool,
    waker: Option<Waker>,
}

impl Claim {
    fn conflicts(&self, other: &Self) -> bool {
        (self.mode == Mode::Exclusive || other.mode == Mode::Exclusive) && self.range.overlaps(other.range)
    }
}

struct Claims {
    next_ticket: u64,
    claims: Vec<Claim>,
    waiting: usize,
}

pub(crate) struct Ranges(Mutex<Claims>);

/// A range that is held or waited for; released when dropped.
pub(crate) struct RangeGuard<'a> {
    ranges: &'a Ranges,
    ticket: u64,
}

impl Ranges {
    /// Room for `max` requests at a time; memory is taken here.
    pub(crate) fn new(max: usize) -> Self {
        Self(Mutex::new(Claims { next_ticket: 0, claims: Vec::with_capacity(max), waiting: 0 }))
    }

    /// Waits until the range is ours.
    pub(crate) async fn acquire(&self, range: BlockRange, mode: Mode) -> RangeGuard<'_> {
        let guard = self.enqueue(range, mode);
        poll_fn(|cx| guard.poll_granted(cx)).await;
        guard
    }

    fn enqueue(&self, range: BlockRange, mode: Mode) -> RangeGuard<'_> {
        let mut c = self.0.lock();
        let ticket = c.next_ticket;
        c.next_ticket += 1;
        let mut claim = Claim { ticket, range, mode, granted: false, waker: None };
        claim.granted = !c.claims.iter().any(|earlier| earlier.conflicts(&claim));
        c.waiting += usize::from(!claim.granted);
        debug_assert!(c.claims.len() < c.claims.capacity(), "more claims than slots");
        c.claims.push(claim);
        RangeGuard { ranges: self, ticket }
    }

    /// Grants what one release made possible; one waker at a time, so that none is called under the lock.
    fn grant_next(&self, released: &Claim) -> Option<Waker> {
        let mut c = self.0.lock();
        if c.waiting == 0 {
            return None;
        }
        let free = |claim: &Claim, all: &[Claim]| {
            !claim.granted
                && claim.conflicts(released)
                && !all.iter().any(|o| o.ticket < claim.ticket && o.conflicts(claim))
        };
        while let Some(i) = c.claims.iter().position(|claim| free(claim, &c.claims)) {
            c.claims[i].granted = true;
            c.waiting -= 1;
            // Without a waker its task has not been polled yet and will see the grant then.
            if let Some(waker) = c.claims[i].waker.take() {
                return Some(waker);
            }
        }
        None
    }
}

impl RangeGuard<'_> {
    fn poll_granted(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut c = self.ranges.0.lock();
        let claim = c.claims.iter_mut().find(|c| c.ticket == self.ticket).expect("a claim lives as long as its guard");
        if claim.granted {
            return Poll::Ready(());
        }
        claim.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let released = {
            let mut c = self.ranges.0.lock();
            let i = c.claims.iter().position(|c| c.ticket == self.ticket).expect("released once");
            let claim = c.claims.swap_remove(i);
            c.waiting -= usize::from(!claim.granted);
            claim
        };
        while let Some(waker) = self.ranges.grant_next(&released) {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BlockIndex;

    fn range(first: u64, count: u64) -> BlockRange {
        BlockRange::new(BlockIndex(first), count)
    }
    fn held(g: &RangeGuard<'_>) -> bool {
        g.poll_granted(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    #[test]
    fn readers_share_writers_do_not_and_order_is_kept() {
        let r = Ranges::new(8);
        let a = r.enqueue(range(0, 4), Mode::Shared);
        let b = r.enqueue(range(2, 4), Mode::Shared);
        let w = r.enqueue(range(3, 1), Mode::Exclusive);
        let late = r.enqueue(range(3, 1), Mode::Shared);
        let far = r.enqueue(range(100, 1), Mode::Exclusive);
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
        let r = Ranges::new(4);
        let a = r.enqueue(range(0, 4), Mode::Shared);
        let w = r.enqueue(range(0, 4), Mode::Exclusive);
        let b = r.enqueue(range(0, 4), Mode::Shared);
        assert!(held(&a) && !held(&b));
        drop(w);
        assert!(held(&b));
    }
}

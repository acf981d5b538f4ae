//! The requests that wait for something of the log.

use crate::Seq;
use std::task::Waker;

/// What a request waits for: one thing at a time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Waiting {
    Space,
    Commit(Seq),
    Flush,
}

/// By request. Of many requests few wait: a bit for each says whether it does, and only those are searched.
pub(super) struct Waiters {
    waiting: Vec<Option<(Waiting, Option<Waker>)>>,
    occupied: Vec<u64>,
}

impl Waiters {
    /// For so many requests, none of which waits.
    pub(super) fn new(requests: usize) -> Self {
        Self { waiting: (0..requests).map(|_| None).collect(), occupied: vec![0; requests.div_ceil(64)] }
    }

    /// Notes a waiter; keeps its waker fresh.
    pub(super) fn wait(&mut self, request: usize, why: Waiting, waker: &Waker) {
        self.occupied[request / 64] |= 1 << (request % 64);
        match &mut self.waiting[request] {
            Some((w, Some(known))) if *w == why && known.will_wake(waker) => {}
            waiter => *waiter = Some((why, Some(waker.clone()))),
        }
    }

    /// The request waits no more.
    pub(super) fn remove(&mut self, request: usize) {
        self.occupied[request / 64] &= !(1 << (request % 64));
        self.waiting[request] = None;
    }

    /// The first request from `from` on whose waker is here and which waits for what is `wanted`.
    pub(super) fn find(&self, from: usize, wanted: impl Fn(Waiting) -> bool) -> Option<usize> {
        let mut from = from;
        loop {
            let request = self.next(from)?;
            if matches!(self.waiting[request], Some((why, Some(_))) if wanted(why)) {
                return Some(request);
            }
            from = request + 1;
        }
    }

    /// The first request from `from` on that waits.
    fn next(&self, from: usize) -> Option<usize> {
        let (first, passed) = (from / 64, from % 64);
        let words = self.occupied.iter().enumerate().skip(first);
        words
            .map(|(i, word)| (i, if i == first { word >> passed << passed } else { *word }))
            .find(|(_, word)| *word != 0)
            .map(|(i, word)| i * 64 + word.trailing_zeros() as usize)
    }

    /// The waker of a request that waits.
    pub(super) fn take_waker(&mut self, request: usize) -> Option<Waker> {
        self.waiting[request].as_mut()?.1.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Seq;

    #[test]
    fn a_waiter_is_found_until_it_is_removed_or_woken() {
        let mut w = Waiters::new(200);
        let flush = |why| why == Waiting::Flush;
        let all = |w: &Waiters, wanted: fn(Waiting) -> bool| {
            std::iter::successors(w.find(0, wanted), |request| w.find(request + 1, wanted)).collect::<Vec<_>>()
        };
        for request in [199, 63, 64, 0] {
            w.wait(request, Waiting::Flush, Waker::noop());
        }
        w.wait(65, Waiting::Commit(Seq(7)), Waker::noop());
        w.wait(0, Waiting::Space, Waker::noop());
        assert_eq!(all(&w, flush), [63, 64, 199]);
        assert_eq!(all(&w, |why| why == Waiting::Commit(Seq(7))), [65]);
        assert!(w.take_waker(64).is_some() && w.take_waker(64).is_none() && w.take_waker(1).is_none());
        w.remove(199);
        assert_eq!(all(&w, flush), [63]);
        w.wait(64, Waiting::Flush, Waker::noop());
        assert_eq!(all(&w, |_| true), [0, 63, 64, 65]);
    }
}

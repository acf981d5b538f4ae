//! The requests that wait for something, each for one thing (a `W`) at a time.
//!
//! The owner has it behind a lock. A request enters the list before it asks for the last time
//! whether it must wait, and wakers are called without the lock.

use std::task::Waker;

/// By request, which is the index of its [context](crate::RequestContext). Of many requests few
/// wait: a bit for each says whether it does, and only those are searched.
pub(crate) struct WaitList<W> {
    waiting: Vec<Option<(W, Option<Waker>)>>,
    occupied: Vec<u64>,
}

impl<W: Copy + PartialEq> WaitList<W> {
    /// For so many requests, none of which waits.
    pub(crate) fn new(requests: usize) -> Self {
        Self { waiting: (0..requests).map(|_| None).collect(), occupied: vec![0; requests.div_ceil(64)] }
    }

    /// The memory for so many requests.
    pub(crate) fn memory_bytes_for(requests: usize) -> u64 {
        (requests as u64).saturating_mul(size_of::<Option<(W, Option<Waker>)>>() as u64 + 1)
    }

    /// How many wait.
    pub(crate) fn len(&self) -> usize {
        self.occupied.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Notes a waiter; keeps its waker fresh.
    pub(crate) fn wait(&mut self, request: usize, why: W, waker: &Waker) {
        self.occupied[request / 64] |= 1 << (request % 64);
        match &mut self.waiting[request] {
            Some((w, Some(known))) if *w == why && known.will_wake(waker) => {}
            waiter => *waiter = Some((why, Some(waker.clone()))),
        }
    }

    /// The request waits no more.
    pub(crate) fn remove(&mut self, request: usize) {
        self.occupied[request / 64] &= !(1 << (request % 64));
        self.waiting[request] = None;
    }

    /// The first request from `from` on whose waker is here and which waits for what is `wanted`.
    pub(crate) fn find(&self, from: usize, wanted: impl Fn(W) -> bool) -> Option<usize> {
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
    pub(crate) fn take_waker(&mut self, request: usize) -> Option<Waker> {
        self.waiting[request].as_mut()?.1.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy, PartialEq, Debug)]
    enum Waiting {
        Space,
        Commit(u64),
        Sync,
    }

    #[test]
    fn a_waiter_is_found_until_it_is_removed_or_woken() {
        let mut w = WaitList::new(200);
        let sync = |why| why == Waiting::Sync;
        let all = |w: &WaitList<Waiting>, wanted: fn(Waiting) -> bool| {
            std::iter::successors(w.find(0, wanted), |request| w.find(request + 1, wanted)).collect::<Vec<_>>()
        };
        for request in [199, 63, 64, 0] {
            w.wait(request, Waiting::Sync, Waker::noop());
        }
        w.wait(65, Waiting::Commit(7), Waker::noop());
        w.wait(0, Waiting::Space, Waker::noop());
        assert_eq!(all(&w, sync), [63, 64, 199]);
        assert_eq!(all(&w, |why| why == Waiting::Commit(7)), [65]);
        assert!(w.take_waker(64).is_some() && w.take_waker(64).is_none() && w.take_waker(1).is_none());
        w.remove(199);
        assert_eq!(all(&w, sync), [63]);
        w.wait(64, Waiting::Sync, Waker::noop());
        assert_eq!(all(&w, |_| true), [0, 63, 64, 65]);
    }
}

//! Loads of tag pages that are under way, of the requests of one thread: a read whose pages another one
//! brings waits for that, once, and looks into the cache again.
//!
//! Who waits here loads nothing meanwhile, and who loads waits for its own I/O alone, which is under way on
//! the same ring. So nobody waits for somebody who waits here. Nothing is handed over either: a load that
//! has failed, was dropped, was of an older root or has found no frame ends like any other. Who has waited
//! for it finds nothing then, and loads by itself. One whose read fails ends before it tries again.
//!
//! Loads of other threads are not waited for: when their pages come, those may have something else to do.
//! Nor are hints. Nor are the pages above: with those the tag page is read at once, and would be read later.

use crate::sync::Mutex;
use std::{
    future::poll_fn,
    ops::Range,
    sync::Arc,
    task::{Poll, Waker},
};

/// What a request of the thread does here: one thing at a time.
enum Doing {
    Nothing,
    /// It brings these tag pages.
    Loads(Range<u64>),
    /// It waits for the load of this request of the thread.
    Waits(usize, Waker),
}

/// By request of the thread.
type Loads = Arc<Mutex<Vec<Doing>>>;

/// A request's handle on the loads of its thread.
pub(crate) struct LoadsHandle {
    loads: Loads,
    index: usize,
}

/// A load under way, or the wait before it. It ends when dropped, however that comes about, if it has not
/// [before](LoadsHandle::end).
pub(crate) struct Load(LoadsHandle);

impl LoadsHandle {
    /// Bytes that each request takes.
    pub(crate) const MEMORY_BYTES: usize = size_of::<Doing>();

    /// The handles of so many requests of one thread.
    pub(crate) fn several(count: usize) -> impl Iterator<Item = Self> {
        let loads = Arc::new(Mutex::new((0..count).map(|_| Doing::Nothing).collect()));
        (0..count).map(move |index| Self { loads: Arc::clone(&loads), index })
    }

    /// Begins to load these pages. Where another request of the thread brings all of them it comes after
    /// that: what is in the cache by then is not to be loaded again.
    pub(crate) async fn begin(&self, pages: Range<u64>) -> Load {
        let load = Load(Self { loads: Arc::clone(&self.loads), index: self.index });
        let mut may_wait = true;
        poll_fn(|cx| self.poll_begun(&pages, &mut may_wait, cx.waker())).await;
        load
    }

    /// Ends the load of this request, or its wait, if there is one. Nobody waits for it any more.
    pub(crate) fn end(&self) {
        let done = std::mem::replace(&mut self.loads.lock()[self.index], Doing::Nothing);
        // Wakers are called without the lock.
        if matches!(done, Doing::Loads(_)) {
            std::iter::from_fn(|| self.next_waiter()).for_each(Waker::wake);
        }
    }

    /// The look at the others and the entry are one step.
    fn poll_begun(&self, pages: &Range<u64>, may_wait: &mut bool, waker: &Waker) -> Poll<()> {
        let mut loads = self.loads.lock();
        if let Doing::Waits(_, known) = &mut loads[self.index] {
            known.clone_from(waker);
            return Poll::Pending;
        }
        let brings_all = |other: &Doing| match other {
            Doing::Loads(others) => others.start <= pages.start && pages.end <= others.end,
            Doing::Nothing | Doing::Waits(..) => false,
        };
        let other = std::mem::take(may_wait).then(|| loads.iter().position(brings_all)).flatten();
        match other {
            Some(other) => {
                loads[self.index] = Doing::Waits(other, waker.clone());
                Poll::Pending
            }
            None => {
                loads[self.index] = Doing::Loads(pages.clone());
                Poll::Ready(())
            }
        }
    }

    /// One of those that wait for this load, which waits no more.
    fn next_waiter(&self) -> Option<Waker> {
        let mut loads = self.loads.lock();
        let waits = loads.iter_mut().find(|doing| matches!(doing, Doing::Waits(other, _) if *other == self.index))?;
        match std::mem::replace(waits, Doing::Nothing) {
            Doing::Waits(_, waker) => Some(waker),
            Doing::Nothing | Doing::Loads(_) => None,
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.0.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{future::Future, pin::pin, task::Context};

    fn poll<T>(future: std::pin::Pin<&mut impl Future<Output = T>>) -> Poll<T> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn only_who_finds_all_its_pages_on_the_way_waits_and_only_once() {
        let [a, b, c, d] = LoadsHandle::several(4).collect::<Vec<_>>().try_into().ok().unwrap();
        let Poll::Ready(first) = poll(pin!(a.begin(3..5))) else { panic!("nobody is there") };
        assert!(poll(pin!(b.begin(2..4))).is_ready() && poll(pin!(b.begin(5..6))).is_ready(), "a part has no use");
        let (mut waits, mut given_up) = (pin!(b.begin(4..5)), Box::pin(c.begin(3..5)));
        assert!(poll(waits.as_mut()).is_pending() && poll(given_up.as_mut()).is_pending());
        drop(given_up);
        assert!(poll(pin!(c.begin(6..7))).is_ready(), "who has given up waits for nothing any more");
        assert!(poll(waits.as_mut()).is_pending(), "the load goes on");
        drop(first);
        // The page is on its way again, but this one has waited.
        let Poll::Ready(_again) = poll(pin!(d.begin(4..5))) else { panic!("who waits loads nothing") };
        assert!(poll(waits.as_mut()).is_ready());
    }
}

#[cfg(all(test, shuttle))]
mod interleavings {
    use super::*;
    use crate::sync::check;
    use shuttle::{future::block_on, thread};

    /// Though those of one thread alone meet here, nothing hangs on that.
    #[test]
    fn whoever_waits_for_a_load_is_told_that_it_has_ended() {
        let test = || {
            let threads: Vec<_> = LoadsHandle::several(4)
                .map(|handle| thread::spawn(move || (0..2).for_each(|_| drop(block_on(handle.begin(0..1))))))
                .collect();
            threads.into_iter().for_each(|thread| thread.join().unwrap());
        };
        check(test, 5000, 4);
    }
}

//! Small writes of one thread that are answered before they are in place: tasks of their own put them there.

use super::{
    queue::{Load, Memory, Shared},
    request::Request,
};
use crate::{
    daemon::log::Event,
    kept::{MOST_BYTES, Part},
    ring::RingStorage,
};
use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    task::{Poll, Waker},
};
use ublk_integrity::{Accepted, Buf, Durability};

/// A thread's writers, and what they have been given. With none every write is answered when it is in place.
pub(super) struct Early<'v> {
    places: Vec<RefCell<Place<'v>>>,
    /// Writers that have nothing to do.
    idle: RefCell<Vec<usize>>,
    /// The copies that outlive this process.
    part: RefCell<Option<Part>>,
    /// Tags that may still bring writes.
    tags: Cell<usize>,
}

/// Where a writer is given what to write.
struct Place<'v> {
    /// Of a writer that is idle or about to take it.
    memory: Option<Memory>,
    accepted: Option<Accepted<'v>>,
    waker: Waker,
}

impl<'v> Early<'v> {
    /// For so many tags of a thread; without writers where nothing can be kept.
    pub(super) fn new(shared: &Shared, thread: usize, tags: usize) -> Self {
        let writers = shared.kept.as_ref().map_or(0, |kept| kept.each);
        let part = shared.kept.as_ref().and_then(|kept| kept.take(thread));
        let memories = Buf::several(writers, MOST_BYTES).into_iter();
        let places = memories.map(|buf| Place {
            memory: Some(Memory { slot: shared.volume.slot(thread), buf }),
            accepted: None,
            waker: Waker::noop().clone(),
        });
        Self {
            places: places.map(RefCell::new).collect(),
            idle: RefCell::new((0..writers).rev().collect()),
            part: RefCell::new(part),
            tags: Cell::new(tags),
        }
    }

    /// How many writers there are.
    pub(super) fn writers(&self) -> usize {
        self.places.len()
    }

    /// The memory of all writers, before they begin.
    pub(super) fn memories(&mut self) -> impl Iterator<Item = &mut Memory> {
        self.places.iter_mut().filter_map(|place| place.get_mut().memory.as_mut())
    }

    /// Takes on a write from the front of `buf`, if it is one that can wait: then it may be answered.
    pub(super) fn takes_on(&self, shared: &'v Shared, request: Request, buf: &[u8], load: &Load) -> bool {
        let Request::Write { range, durability: Durability::MayBeLost } = request else { return false };
        let bytes = &buf[..request.success(shared.shift) as usize];
        let Some(&writer) = self.idle.borrow().last().filter(|_| bytes.len() <= MOST_BYTES) else { return false };
        let mut place = self.places[writer].borrow_mut();
        let memory = place.memory.as_mut().expect("an idle writer's memory is here");
        let Some(accepted) = shared.volume.accept(&memory.slot, range) else { return false };
        memory.buf[..bytes.len()].copy_from_slice(bytes);
        self.part.borrow_mut().as_mut().expect("there are writers").keep(writer, range, accepted.after(), bytes);
        place.accepted = Some(accepted);
        place.waker.wake_by_ref();
        self.idle.borrow_mut().pop();
        load.goes_on();
        true
    }

    /// The task of a writer.
    pub(super) async fn write(&self, writer: usize, io: &RingStorage, shared: &Shared, load: &Load) {
        while let Some((accepted, Memory { mut slot, buf })) = self.next(writer).await {
            let range = accepted.range();
            let forget = || self.part.borrow_mut().as_mut().expect("there are writers").forget(writer);
            let (result, buf) = shared.volume.write_accepted(io, &mut slot, accepted, buf, forget).await;
            load.in_place();
            if let Err(e) = result {
                shared.log.tell(Event::Write(Request::Write { range, durability: Durability::MayBeLost }, e));
                // Its place stays as it is: what it holds is for the next daemon.
                return;
            }
            self.places[writer].borrow_mut().memory = Some(Memory { slot, buf });
            self.idle.borrow_mut().push(writer);
        }
    }

    /// What the writer is given next; `None` once nothing more can come.
    async fn next(&self, writer: usize) -> Option<(Accepted<'v>, Memory)> {
        poll_fn(|cx| {
            let mut place = self.places[writer].borrow_mut();
            if let Some(accepted) = place.accepted.take() {
                return Poll::Ready(place.memory.take().map(|memory| (accepted, memory)));
            }
            if self.tags.get() == 0 {
                return Poll::Ready(None);
            }
            if !place.waker.will_wake(cx.waker()) {
                place.waker = cx.waker().clone();
            }
            Poll::Pending
        })
        .await
    }

    /// A tag brings nothing more. With the last of them the writers end, each when it is done.
    pub(super) fn tag_ends(&self) {
        self.tags.set(self.tags.get() - 1);
        if self.tags.get() == 0 {
            self.places.iter().for_each(|place| place.borrow().waker.wake_by_ref());
        }
    }
}

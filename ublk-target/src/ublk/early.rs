//! Small writes of one thread that are answered before they are in place: tasks of their own put them there, from where they
//! were fetched to.

use super::{
    load::Load,
    request::Request,
    shared::{Memory, Shared},
    transfer::Transfer,
};
use crate::{
    daemon::log::Event,
    kept::{Heads, MOST_BYTES, Part},
};
use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    task::{Poll, Waker},
};
use ublk_integrity::{AdmittedWrite, BlockTarget, Durability, Errno, Io};

/// A thread's writers, and what they have been given. With none every write is answered when it is in place.
pub(super) struct Early<'t, T: BlockTarget + 't> {
    places: Vec<RefCell<Place<'t, T>>>,
    /// Writers that have nothing to do.
    idle: RefCell<Vec<usize>>,
    /// Of the writers' memory, which outlives this process.
    heads: RefCell<Option<Heads>>,
    /// Tags that may still bring writes.
    tags: Cell<usize>,
}

/// Where a writer is given what to write.
struct Place<'t, T: BlockTarget + 't> {
    /// Of a writer that is idle or about to take it.
    memory: Option<Memory<T>>,
    admitted: Option<T::Admitted<'t>>,
    waker: Waker,
}

impl<'t, T: BlockTarget + 't> Early<'t, T> {
    /// For so many tags of a thread, with what it keeps, if anything.
    pub(super) fn new(shared: &'t Shared<T>, thread: usize, tags: usize, part: Option<Part>) -> Self {
        let (heads, bufs) = part.map_or((None, Vec::new()), |part| (Some(part.heads), part.bufs));
        let idle = (0..bufs.len()).rev().collect();
        let place = |buf| Place {
            memory: Some(Memory { context: shared.target.context(thread), buf }),
            admitted: None,
            waker: Waker::noop().clone(),
        };
        Self {
            places: bufs.into_iter().map(place).map(RefCell::new).collect(),
            idle: RefCell::new(idle),
            heads: RefCell::new(heads),
            tags: Cell::new(tags),
        }
    }

    /// How many writers there are.
    pub(super) fn writers(&self) -> usize {
        self.places.len()
    }

    /// The memory of all writers, before they begin.
    pub(super) fn memories(&mut self) -> impl Iterator<Item = &mut Memory<T>> {
        self.places.iter_mut().filter_map(|place| place.get_mut().memory.as_mut())
    }

    /// Takes on a write, if it is one that can wait: once its bytes have come it may be answered. `None`: it is not, and is
    /// where it was.
    pub(super) fn takes_on(
        &self,
        shared: &'t Shared<T>,
        request: Request,
        transfer: Transfer,
        load: &Load,
    ) -> Option<Result<(), Errno>> {
        let Request::Write { range, durability: Durability::MayBeLost } = request else { return None };
        let bytes = request.success(shared.shift) as usize;
        let writer = *self.idle.borrow().last().filter(|_| bytes <= MOST_BYTES)?;
        let mut place = self.places[writer].borrow_mut();
        let memory = place.memory.as_mut().expect("an idle writer's memory is here");
        let admitted = shared.target.admit(&memory.context, range)?;
        if let Err(e) = transfer.fetch(&mut memory.buf, bytes) {
            admitted.withdraw();
            return Some(Err(shared.not_copied(request, e)));
        }
        self.heads.borrow_mut().as_mut().expect("there are writers").keep(writer, range, admitted.after());
        place.admitted = Some(admitted);
        place.waker.wake_by_ref();
        self.idle.borrow_mut().pop();
        load.goes_on();
        Some(Ok(()))
    }

    /// The task of a writer.
    pub(super) async fn write(&self, writer: usize, io: &impl Io, shared: &'t Shared<T>, load: &Load) {
        while let Some((admitted, Memory { mut context, buf })) = self.next(writer).await {
            let range = admitted.range();
            let forget = || self.heads.borrow_mut().as_mut().expect("there are writers").forget(writer);
            let (result, buf) = shared.target.write_back(io, &mut context, admitted, buf, forget).await;
            load.in_place();
            if let Err(e) = result {
                shared.log.tell(Event::Write(Request::Write { range, durability: Durability::MayBeLost }, e));
                // Its place stays as it is: what it holds is for the next daemon.
                return;
            }
            self.places[writer].borrow_mut().memory = Some(Memory { context, buf });
            self.idle.borrow_mut().push(writer);
        }
    }

    /// What the writer is given next; `None` once nothing more can come.
    async fn next(&self, writer: usize) -> Option<(T::Admitted<'t>, Memory<T>)> {
        poll_fn(|cx| {
            let mut place = self.places[writer].borrow_mut();
            if let Some(admitted) = place.admitted.take() {
                return Poll::Ready(place.memory.take().map(|memory| (admitted, memory)));
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

#[cfg(test)]
mod tests {
    use super::{super::request::BlockShift, *};
    use crate::{
        daemon::log::{Log, Sink},
        event_loop::HashPool,
        kept,
        offline::{Opening, scratch},
    };
    use std::{
        fs::File,
        io::Write,
        os::fd::{AsRawFd, RawFd},
        sync::Arc,
    };
    use ublk_integrity::{Access, BlockIndex, BlockRange, Buf};

    fn request(first: u64, count: u64, durability: Durability) -> Request {
        Request::Write { range: BlockRange::new(BlockIndex(first), count), durability }
    }

    #[test]
    fn a_write_is_kept_where_it_is_fetched_to_until_it_is_in_place() {
        let (_volume, offline, key) = scratch();
        let volume = Arc::new(offline.open_volume(&key, Opening::new(Access::ReadWrite, None)).unwrap());
        let (_, files) = offline.handles();
        let log = Log::start(Sink::Stderr, Vec::new(), str::to_owned).unwrap();
        let shared = Shared {
            target: volume,
            files,
            shift: BlockShift::of(4096),
            discard: false,
            kept: None,
            hashing: HashPool::new(0),
            log,
        };
        let folder = tempfile::tempdir().unwrap();
        let (kept, part) = kept::of_test(folder.path(), 2);
        let early = Early::new(&shared, 0, 1, Some(part));
        let load = Load::default();
        // In the place of a character device: a file with the bytes of three requests.
        let mut device = tempfile::tempfile().unwrap();
        (1..=3).for_each(|i| device.write_all(&[i; MOST_BYTES]).unwrap());
        let from = |device: RawFd, i: u64| Transfer::Asked { device, at: i * MOST_BYTES as u64 };
        let takes_on = |request, from| early.takes_on(&shared, request, from, &load);

        let (soon, now) = (Durability::MayBeLost, Durability::Durable);
        let device = device.as_raw_fd();
        assert_eq!(takes_on(request(0, 1, now), from(device, 0)), None, "it must be in place first");
        assert_eq!(takes_on(request(0, 5, soon), from(device, 0)), None, "it is too large");
        assert_eq!(takes_on(Request::Flush, from(device, 0)), None);
        let unreadable = File::options().write(true).open("/dev/null").unwrap();
        let unfetched = takes_on(request(0, 4, soon), from(unreadable.as_raw_fd(), 0));
        assert_eq!((unfetched, kept.count().unwrap()), (Some(Err(Errno(libc::EBADF))), 0));
        assert!(shared.target.latched().is_none(), "nobody was promised anything");

        assert_eq!(takes_on(request(0, 4, soon), from(device, 0)), Some(Ok(())));
        assert_eq!(takes_on(request(3, 2, soon), from(device, 1)), None, "the first holds one of its blocks");
        assert_eq!(takes_on(request(9, 2, soon), from(device, 1)), Some(Ok(())));
        assert_eq!(takes_on(request(20, 1, soon), from(device, 2)), None, "all writers are busy");
        assert_eq!(kept.count().unwrap(), 2);
        early.tag_ends();
        let io = offline.io();
        (0..2).for_each(|writer| offline.run(early.write(writer, &io, &shared, &load)).unwrap());
        assert_eq!(kept.count().unwrap(), 0);
        let mut slot = shared.target.context(0);
        for (first, count, byte) in [(0, 4, 1), (9, 2, 2), (20, 1, 0)] {
            let range = BlockRange::new(BlockIndex(first), count);
            let (result, buf) = offline.run(shared.target.read(&io, &mut slot, range, Buf::new(MOST_BYTES))).unwrap();
            result.unwrap();
            assert!(buf[..count as usize * 4096].iter().all(|&b| b == byte), "block {first}");
        }
    }
}

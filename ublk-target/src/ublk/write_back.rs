//! Write-back of one thread: small writes are answered once their bytes are in the thread's
//! part of the write-back file; those that must be durable, once they are. A task for each of its
//! slots, a *writer*, writes them in place from there.

use super::{
    load::Load,
    request::Request,
    shared::{Memory, Shared},
    transfer::Transfer,
};
use crate::{
    daemon::log::Event,
    write_back_file::{Heads, KeptWrite, MOST_BYTES, MappedPart},
};
use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    task::{Poll, Waker},
};
use ublk_integrity::{AdmittedWrite, BlockTarget, Durability, Errno, Io, WriteBackId};

/// A thread's writers, and the writes that they have been given. Without any, each write is
/// answered when it is in place.
pub(super) struct WriteBack<'t, T: BlockTarget + 't> {
    writers: Vec<RefCell<Writer<'t, T>>>,
    /// The writers that have nothing to do.
    idle: RefCell<Vec<usize>>,
    /// The heads of the slots, which outlive this process.
    heads: RefCell<Option<Heads>>,
    /// Request tags that may still bring writes.
    tags: Cell<usize>,
    thread: usize,
}

/// When a write that was admitted is answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Answer {
    /// At once.
    Now,
    /// When it is safe.
    Safe(WriteBackId),
}

/// What a writer is given to write.
struct Writer<'t, T: BlockTarget + 't> {
    /// Here while the writer is idle or about to take it.
    memory: Option<Memory<T>>,
    admitted: Option<T::Admitted<'t>>,
    waker: Waker,
}

impl<'t, T: BlockTarget + 't> WriteBack<'t, T> {
    /// For so many request tags of a thread, with its part of the write-back file, if there is one.
    pub(super) fn new(shared: &'t Shared<T>, thread: usize, tags: usize, part: Option<MappedPart>) -> Self {
        let (heads, bufs) = part.map_or((None, Vec::new()), |part| (Some(part.heads), part.bufs));
        let idle = (0..bufs.len()).rev().collect();
        let writer = |buf| Writer {
            memory: Some(Memory { context: shared.target.context(thread), buf }),
            admitted: None,
            waker: Waker::noop().clone(),
        };
        Self {
            writers: bufs.into_iter().map(writer).map(RefCell::new).collect(),
            idle: RefCell::new(idle),
            heads: RefCell::new(heads),
            tags: Cell::new(tags),
            thread,
        }
    }

    /// How many writers there are.
    pub(super) fn writer_count(&self) -> usize {
        self.writers.len()
    }

    /// The memory of all writers, before they begin.
    pub(super) fn memories(&mut self) -> impl Iterator<Item = &mut Memory<T>> {
        self.writers.iter_mut().filter_map(|writer| writer.get_mut().memory.as_mut())
    }

    /// Admits a write if it is small: its bytes are fetched, and it may be
    /// answered at once or when it is safe. `None`: it is to be served as usual, and nothing has been
    /// fetched.
    pub(super) fn admit(
        &self,
        shared: &'t Shared<T>,
        request: Request,
        transfer: Transfer,
        load: &Load<'_>,
    ) -> Option<Result<Answer, Errno>> {
        let Request::Write { range, durability } = request else { return None };
        let bytes = request.success(shared.shift) as usize;
        let slot = *self.idle.borrow().last().filter(|_| bytes <= MOST_BYTES)?;
        let mut writer = self.writers[slot].borrow_mut();
        let memory = writer.memory.as_mut().expect("an idle writer's memory is here");
        let mut admitted = shared.target.admit(&memory.context, range, durability)?;
        if let Err(e) = transfer.fetch(&mut memory.buf, bytes) {
            admitted.withdraw();
            return Some(Err(shared.not_copied(request, e)));
        }
        let answer = match durability {
            Durability::MayBeLost => Answer::Now,
            Durability::Durable => Answer::Safe(admitted.id()),
        };
        let first_not_durable = admitted.first_not_durable();
        let kept = KeptWrite { range, first_not_durable, number: admitted.id().number };
        self.heads.borrow_mut().as_mut().expect("there are writers").keep(slot, kept);
        if let Some(mapped) = &shared.write_back_file {
            admitted.kept_at(mapped.file.bytes_at(self.thread, slot));
        }
        writer.admitted = Some(admitted);
        writer.waker.wake_by_ref();
        self.idle.borrow_mut().pop();
        load.admitted();
        Some(Ok(answer))
    }

    /// The task of the writer of a slot.
    pub(super) async fn write(&self, slot: usize, io: &impl Io, shared: &'t Shared<T>, load: &Load<'_>) {
        while let Some((admitted, Memory { mut context, buf })) = self.next(slot).await {
            let range = admitted.range();
            let clear = || self.heads.borrow_mut().as_mut().expect("there are writers").clear(slot);
            let (result, buf) = shared.target.write_back(io, &mut context, admitted, buf, clear).await;
            load.written_back();
            if let Err(e) = result {
                shared.log.tell(Event::Write(Request::Write { range, durability: Durability::MayBeLost }, e));
                // The slot stays as it is: the next daemon replays what it holds.
                return;
            }
            self.writers[slot].borrow_mut().memory = Some(Memory { context, buf });
            self.idle.borrow_mut().push(slot);
        }
    }

    /// The next write that the writer of a slot is given. `None`: there will be no more.
    async fn next(&self, slot: usize) -> Option<(T::Admitted<'t>, Memory<T>)> {
        poll_fn(|cx| {
            let mut writer = self.writers[slot].borrow_mut();
            if let Some(admitted) = writer.admitted.take() {
                return Poll::Ready(writer.memory.take().map(|memory| (admitted, memory)));
            }
            if self.tags.get() == 0 {
                return Poll::Ready(None);
            }
            if !writer.waker.will_wake(cx.waker()) {
                writer.waker = cx.waker().clone();
            }
            Poll::Pending
        })
        .await
    }

    /// A request tag brings no more writes. After the last of them each writer ends once it is done.
    pub(super) fn tag_ends(&self, shared: &Shared<T>) {
        self.tags.set(self.tags.get() - 1);
        if self.tags.get() == 0 {
            shared.target.end_write_back(self.thread);
            self.writers.iter().for_each(|writer| writer.borrow().waker.wake_by_ref());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        offline::{Opening, scratch},
        write_back_file,
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
    fn a_write_is_kept_where_it_is_fetched_to_until_it_is_written_back() {
        let (_volume, offline, key) = scratch();
        let volume = Arc::new(offline.open_volume(&key, Opening::new(Access::ReadWrite, None)).unwrap());
        let (_, files) = offline.handles();
        let shared = Shared::of_test(volume, files);
        let folder = tempfile::tempdir().unwrap();
        let (kept, part) = write_back_file::of_test(folder.path(), 2);
        let write_back = WriteBack::new(&shared, 0, 1, Some(part));
        let load = Load::of(shared.gate.of_thread(0));
        // In the place of a character device: a file with the bytes of three requests.
        let mut device = tempfile::tempfile().unwrap();
        (1..=3).for_each(|i| device.write_all(&[i; MOST_BYTES]).unwrap());
        let from = |device: RawFd, i: u64| Transfer::Asked { device, at: i * MOST_BYTES as u64 };
        let admit = |request, from| write_back.admit(&shared, request, from, &load);

        let (soon, durable) = (Durability::MayBeLost, Durability::Durable);
        let device = device.as_raw_fd();
        assert_eq!(admit(request(0, 1, durable), from(device, 0)), None, "it must be in place first");
        assert_eq!(admit(request(0, 5, soon), from(device, 0)), None, "it is too large");
        assert_eq!(admit(Request::Flush, from(device, 0)), None);
        let unreadable = File::options().write(true).open("/dev/null").unwrap();
        let unfetched = admit(request(0, 4, soon), from(unreadable.as_raw_fd(), 0));
        assert_eq!((unfetched, kept.count().unwrap()), (Some(Err(Errno(libc::EBADF))), 0));
        assert!(shared.target.latched().is_none(), "nobody was promised anything");

        assert_eq!(admit(request(0, 4, soon), from(device, 0)), Some(Ok(Answer::Now)));
        assert_eq!(admit(request(3, 2, soon), from(device, 1)), Some(Ok(Answer::Now)), "in line behind the first");
        assert_eq!(admit(request(20, 1, soon), from(device, 2)), None, "all writers are busy");
        assert_eq!(kept.count().unwrap(), 2);
        write_back.tag_ends(&shared);
        let io = offline.io();
        (0..2).for_each(|writer| offline.run(write_back.write(writer, &io, &shared, &load)).unwrap());
        assert_eq!(kept.count().unwrap(), 0);
        let mut context = shared.target.context(0);
        for (first, count, byte) in [(0, 3, 1), (3, 2, 2), (20, 1, 0)] {
            let range = BlockRange::new(BlockIndex(first), count);
            let (result, buf) =
                offline.run(shared.target.read(&io, &mut context, range, Buf::new(MOST_BYTES))).unwrap();
            result.unwrap();
            assert!(buf[..count as usize * 4096].iter().all(|&b| b == byte), "block {first}");
        }
    }
}

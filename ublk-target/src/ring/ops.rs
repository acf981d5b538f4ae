//! The table of operations under way: memory, continuation of short transfers, fallbacks.

use super::{Port, TARGET_BIT};
use io_uring::{opcode, squeue, types};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::Future,
    io,
    ops::Range,
    os::fd::{AsFd, AsRawFd},
    pin::Pin,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};
use ublk_integrity::{Buf, ByteOffset, Durability, Errno};

/// The user data of the poll on the doorbell, which has no slot.
const DOORBELL: u64 = TARGET_BIT | u32::MAX as u64;

/// Index of a file in the ring's table of registered files.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileIndex(pub u32);

/// What an operation does.
pub enum Work {
    Read { buf: Buf, part: Range<usize>, at: ByteOffset },
    Write { buf: Buf, part: Range<usize>, at: ByteOffset, durability: Durability },
    Sync,
    Discard { at: ByteOffset, len: u64 },
    Sleep(Duration),
}

impl Work {
    /// What it counts among the operations under way.
    fn weight(&self) -> usize {
        usize::from(!matches!(self, Self::Sleep(_)))
    }

    /// A log record or a sync: many requests wait for one.
    fn is_urgent(&self) -> bool {
        matches!(self, Self::Write { durability: Durability::Durable, .. } | Self::Sync)
    }
}

/// Where a discard stands: each way is tried until the device has refused it once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum DiscardWay {
    /// Reads as zeros afterwards. A block device that would have to write zeros refuses.
    PunchHole,
    /// Reads as anything afterwards, which is all we ask for.
    Forget,
    Unsupported,
}

const FALLOC_FL_KEEP_SIZE: i32 = 0x01;
const FALLOC_FL_PUNCH_HOLE: i32 = 0x02;
const FALLOC_FL_NO_HIDE_STALE: i32 = 0x04;

enum State {
    Free,
    UnderWay(Option<Waker>),
    /// The future is gone; the memory stays until the kernel is done with it.
    Orphan,
    Done(Result<(), Errno>),
}

struct Op {
    state: State,
    file: FileIndex,
    work: Work,
    /// Bytes of a transfer that are done.
    moved: usize,
    /// The data of a durable write is out; its fdatasync is under way.
    syncing: bool,
    /// Boxed: its address must hold until the kernel has read it.
    timeout: Box<types::Timespec>,
}

/// All operations of one thread's ring.
pub struct Ops {
    table: RefCell<Vec<Op>>,
    free: RefCell<Vec<u32>>,
    /// Slots to be submitted again (short transfer, fallback).
    again: RefCell<VecDeque<u32>>,
    /// Operations that the kernel has not ended yet, sleeps excepted: those have no memory and change nothing.
    under_way: Cell<usize>,
    /// Something has been pushed that others may wait for.
    urgent: Cell<bool>,
    discard: [Cell<DiscardWay>; MAX_FILES],
    /// RWF_DSYNC was refused: write, then fdatasync.
    no_dsync: [Cell<bool>; MAX_FILES],
    /// Rung by other threads; see [`Executor`](crate::executor::Executor).
    doorbell: Arc<EventFd>,
    doorbell_armed: Cell<bool>,
    /// Tells this ring from all others of the process.
    number: u32,
    port: Port,
}

static NEXT_NUMBER: AtomicU32 = AtomicU32::new(0);

/// The most files a ring can have registered: the ublk character device, data, meta.
const MAX_FILES: usize = 3;

impl Ops {
    /// A table with room for `capacity` operations at a time. It grows beyond, which is harmless but allocates.
    pub fn new(port: Port, capacity: usize) -> io::Result<Rc<Self>> {
        let doorbell = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        let ops = Self {
            table: RefCell::new(Vec::with_capacity(capacity)),
            free: RefCell::new(Vec::with_capacity(capacity)),
            again: RefCell::new(VecDeque::with_capacity(capacity)),
            under_way: Cell::new(0),
            urgent: Cell::new(false),
            discard: [const { Cell::new(DiscardWay::PunchHole) }; MAX_FILES],
            no_dsync: [const { Cell::new(false) }; MAX_FILES],
            doorbell: Arc::new(doorbell),
            doorbell_armed: Cell::new(false),
            number: NEXT_NUMBER.fetch_add(1, Ordering::Relaxed),
            port,
        };
        for _ in 0..capacity {
            ops.add_slot();
        }
        Ok(Rc::new(ops))
    }

    /// What other threads ring to end this ring's sleep.
    pub fn doorbell(&self) -> &Arc<EventFd> {
        &self.doorbell
    }

    pub(super) fn number(&self) -> u32 {
        self.number
    }

    pub(super) fn port(&self) -> &Port {
        &self.port
    }

    fn add_slot(&self) {
        let mut table = self.table.borrow_mut();
        self.free.borrow_mut().push(table.len() as u32);
        table.push(Op {
            state: State::Free,
            file: FileIndex(0),
            work: Work::Sync,
            moved: 0,
            syncing: false,
            timeout: Box::new(types::Timespec::new()),
        });
    }

    /// Starts an operation: it is in the submission queue when this returns.
    pub fn start(self: &Rc<Self>, file: FileIndex, work: Work) -> Running {
        if self.free.borrow().is_empty() {
            self.add_slot();
        }
        let key = self.free.borrow_mut().pop().expect("a slot was just added");
        self.under_way.set(self.under_way.get() + work.weight());
        self.urgent.set(self.urgent.get() || work.is_urgent());
        {
            let op = &mut self.table.borrow_mut()[key as usize];
            op.file = file;
            op.work = work;
            op.moved = 0;
            op.syncing = false;
            op.state = State::UnderWay(None);
        }
        self.submit(key);
        Running { ops: Rc::clone(self), key: Some(key) }
    }

    fn submit(&self, key: u32) {
        let entry = {
            let op = &mut self.table.borrow_mut()[key as usize];
            let i = op.file.0 as usize;
            op.entry(self.number, self.discard[i].get(), self.no_dsync[i].get())
        };
        match entry {
            Some(entry) => self.port.push(&entry.user_data(TARGET_BIT | u64::from(key))),
            None => self.finish(key, Err(Errno::EOPNOTSUPP)),
        }
    }

    /// Takes a completion; wakes the task that waits for it.
    ///
    /// Does not touch the ring, which the caller has borrowed: what must be submitted again waits for
    /// [`resubmit`](Self::resubmit).
    pub fn complete(&self, user_data: u64, result: i32) {
        if user_data == DOORBELL {
            let _ = self.doorbell.read(); // EAGAIN: rung and read already
            self.doorbell_armed.set(false);
            return;
        }
        let key = (user_data & !TARGET_BIT) as u32;
        let next = {
            let op = &mut self.table.borrow_mut()[key as usize];
            let i = op.file.0 as usize;
            op.judge(result, &self.discard[i], &self.no_dsync[i])
        };
        match next {
            Some(result) => self.finish(key, result),
            None => self.again.borrow_mut().push_back(key),
        }
    }

    /// Whether something has been started that should not wait until all tasks have run.
    pub fn is_urgent(&self) -> bool {
        self.urgent.get()
    }

    /// Pushes what completions left unfinished, and the poll on the doorbell; the caller then submits all.
    pub fn resubmit(&self) {
        self.urgent.set(false);
        if !self.doorbell_armed.replace(true) {
            let fd = types::Fd(self.doorbell.as_fd().as_raw_fd());
            self.port.push(&opcode::PollAdd::new(fd, libc::POLLIN as u32).build().user_data(DOORBELL));
        }
        loop {
            let Some(key) = self.again.borrow_mut().pop_front() else { return };
            self.submit(key);
        }
    }

    fn finish(&self, key: u32, result: Result<(), Errno>) {
        let old = {
            let op = &mut self.table.borrow_mut()[key as usize];
            self.under_way.set(self.under_way.get() - op.work.weight());
            std::mem::replace(&mut op.state, State::Done(result))
        };
        match old {
            State::UnderWay(Some(waker)) => waker.wake(),
            State::Orphan => drop(self.release(key)),
            _ => {}
        }
    }

    fn release(&self, key: u32) -> Work {
        let op = &mut self.table.borrow_mut()[key as usize];
        op.state = State::Free;
        self.free.borrow_mut().push(key);
        std::mem::replace(&mut op.work, Work::Sync)
    }

    /// How many operations the kernel has not ended yet, sleeps excepted.
    pub fn under_way(&self) -> usize {
        self.under_way.get()
    }
}

impl Drop for Ops {
    fn drop(&mut self) {
        // Nobody will wait for these any more, but the kernel may still write to their memory.
        if self.under_way.get() > 0 {
            std::mem::forget(std::mem::take(self.table.get_mut()));
        }
    }
}

fn write_flags(durability: Durability, no_dsync: bool) -> i32 {
    if durability == Durability::Durable && !no_dsync { libc::RWF_DSYNC } else { 0 }
}

impl Op {
    /// The submission for what remains to be done; `None` where the device can't.
    fn entry(&mut self, ring: u32, discard: DiscardWay, no_dsync: bool) -> Option<squeue::Entry> {
        let file = types::Fixed(self.file.0);
        let data_sync = || opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build();
        Some(match &mut self.work {
            Work::Read { buf, part, at } => {
                let registered = registered(buf, ring);
                let rest = &mut buf[part.clone()][self.moved..];
                let (at, len, memory) = (at.0 + self.moved as u64, rest.len() as u32, rest.as_mut_ptr());
                match registered {
                    Some(index) => opcode::ReadFixed::new(file, memory, len, index).offset(at).build(),
                    None => opcode::Read::new(file, memory, len).offset(at).build(),
                }
            }
            Work::Write { .. } if self.syncing => data_sync(),
            Work::Write { buf, part, at, durability } => {
                let rest = &buf[part.clone()][self.moved..];
                let (at, len, memory) = (at.0 + self.moved as u64, rest.len() as u32, rest.as_ptr());
                let flags = write_flags(*durability, no_dsync);
                match registered(buf, ring) {
                    Some(index) => opcode::WriteFixed::new(file, memory, len, index).offset(at).rw_flags(flags).build(),
                    None => opcode::Write::new(file, memory, len).offset(at).rw_flags(flags).build(),
                }
            }
            Work::Sync => data_sync(),
            Work::Discard { at, len } => {
                let mode = match discard {
                    DiscardWay::PunchHole => FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                    DiscardWay::Forget => FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE | FALLOC_FL_NO_HIDE_STALE,
                    DiscardWay::Unsupported => return None,
                };
                opcode::Fallocate::new(file, *len).offset(at.0).mode(mode).build()
            }
            Work::Sleep(time) => {
                *self.timeout = (*time).into();
                opcode::Timeout::new(&*self.timeout).build()
            }
        })
    }

    /// What a completion means: the operation's result, or `None` where it goes on.
    fn judge(&mut self, result: i32, discard: &Cell<DiscardWay>, no_dsync: &Cell<bool>) -> Option<Result<(), Errno>> {
        if result == -libc::EINTR || result == -libc::EAGAIN {
            return None;
        }
        let refused = result == -libc::EOPNOTSUPP;
        match &self.work {
            Work::Read { part, .. } | Work::Write { part, .. } if !self.syncing => {
                let durable = matches!(self.work, Work::Write { durability: Durability::Durable, .. });
                if refused && durable && !no_dsync.get() {
                    no_dsync.set(true);
                    return None;
                }
                match result {
                    ..0 => return Some(Err(Errno(-result))),
                    // The end of the file, or of the device, lies inside the range.
                    0 if !part.is_empty() => return Some(Err(Errno::EIO)),
                    _ => self.moved += result as usize,
                }
                if self.moved < part.len() {
                    return None;
                }
                if durable && no_dsync.get() {
                    self.syncing = true;
                    return None;
                }
                Some(Ok(()))
            }
            Work::Discard { .. } if refused => match discard.get() {
                DiscardWay::PunchHole => {
                    discard.set(DiscardWay::Forget);
                    None
                }
                _ => {
                    discard.set(DiscardWay::Unsupported);
                    Some(Err(Errno::EOPNOTSUPP))
                }
            },
            Work::Sleep(_) if result == -libc::ETIME => Some(Ok(())),
            _ if result < 0 => Some(Err(Errno(-result))),
            _ => Some(Ok(())),
        }
    }
}

/// The number by which a ring knows this buffer.
fn registered(buf: &Buf, ring: u32) -> Option<u16> {
    buf.mark().filter(|mark| mark.ring == ring).map(|mark| mark.index)
}

/// An operation under way.
pub struct Running {
    ops: Rc<Ops>,
    key: Option<u32>,
}

impl Future for Running {
    /// The work comes back with its buffer.
    type Output = (Result<(), Errno>, Work);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let key = self.key.expect("polled after it was ready");
        let result = {
            let op = &mut self.ops.table.borrow_mut()[key as usize];
            match &mut op.state {
                State::Done(result) => *result,
                State::UnderWay(waker) => {
                    match waker {
                        Some(w) => w.clone_from(cx.waker()),
                        None => *waker = Some(cx.waker().clone()),
                    }
                    return Poll::Pending;
                }
                State::Free | State::Orphan => unreachable!("a named slot is in use"),
            }
        };
        self.key = None;
        let work = self.ops.release(key);
        Poll::Ready((result, work))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let Some(key) = self.key else { return };
        let done = {
            let op = &mut self.ops.table.borrow_mut()[key as usize];
            match op.state {
                State::Done(_) => true,
                _ => {
                    op.state = State::Orphan;
                    false
                }
            }
        };
        if done {
            drop(self.ops.release(key));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(durability: Durability) -> Op {
        Op {
            state: State::UnderWay(None),
            file: FileIndex(0),
            work: Work::Write { buf: Buf::new(8192), part: 0..8192, at: ByteOffset(0), durability },
            moved: 0,
            syncing: false,
            timeout: Box::new(types::Timespec::new()),
        }
    }

    fn submits(op: &mut Op, no_dsync: bool) -> u8 {
        op.entry(0, DiscardWay::PunchHole, no_dsync).unwrap().get_opcode() as u8
    }

    #[test]
    fn a_device_without_rwf_dsync_gets_an_fdatasync_after_each_durable_write() {
        let (discard, no_dsync) = (Cell::new(DiscardWay::PunchHole), Cell::new(false));
        let mut op = write(Durability::Durable);
        let judge = |op: &mut Op, result| op.judge(result, &discard, &no_dsync);
        assert_eq!(submits(&mut op, false), opcode::Write::CODE);
        assert_eq!(judge(&mut op, -libc::EOPNOTSUPP), None, "it goes on");
        assert!(no_dsync.get(), "and all later ones know");
        // The whole of it once more, without the flag; in two parts.
        assert_eq!((submits(&mut op, true), op.moved), (opcode::Write::CODE, 0));
        assert_eq!(write_flags(Durability::Durable, true), 0);
        assert_eq!(judge(&mut op, 4096), None);
        assert_eq!(submits(&mut op, true), opcode::Write::CODE);
        assert_eq!(judge(&mut op, 4096), None, "written is not durable");
        assert_eq!(submits(&mut op, true), opcode::Fsync::CODE);
        assert_eq!(judge(&mut op, -libc::EINTR), None);
        assert_eq!(submits(&mut op, true), opcode::Fsync::CODE);
        assert_eq!(judge(&mut op, 0), Some(Ok(())));
    }

    #[test]
    fn a_failed_fdatasync_fails_the_durable_write() {
        let (discard, no_dsync) = (Cell::new(DiscardWay::PunchHole), Cell::new(true));
        let mut op = write(Durability::Durable);
        assert_eq!(op.judge(8192, &discard, &no_dsync), None);
        assert_eq!(op.judge(-libc::EIO, &discard, &no_dsync), Some(Err(Errno::EIO)));
        let mut refused = write(Durability::Durable);
        let twice = refused.judge(-libc::EOPNOTSUPP, &discard, &no_dsync);
        assert_eq!(twice, Some(Err(Errno::EOPNOTSUPP)), "without the flag it is an error like any other");
    }

    #[test]
    fn other_writes_need_neither() {
        let (discard, no_dsync) = (Cell::new(DiscardWay::PunchHole), Cell::new(true));
        assert_eq!(write(Durability::MayBeLost).judge(8192, &discard, &no_dsync), Some(Ok(())));
        assert_eq!(write_flags(Durability::MayBeLost, false), 0);
        assert_eq!(write_flags(Durability::Durable, false), libc::RWF_DSYNC);
        no_dsync.set(false);
        let refused = write(Durability::MayBeLost).judge(-libc::EOPNOTSUPP, &discard, &no_dsync);
        assert_eq!((refused, no_dsync.get()), (Some(Err(Errno::EOPNOTSUPP)), false));
    }
}

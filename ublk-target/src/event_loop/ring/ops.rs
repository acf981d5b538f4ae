//! The table of operations in flight: their memory, their wakers, what must be submitted again.

use super::{
    TARGET_BIT,
    op::{DiscardWay, FileIndex, FileName, Op, State, Work},
    port::{EnterWait, Port},
};
use io_uring::{opcode, squeue, types};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::Future,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    pin::Pin,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    task::{Context, Poll},
};
use ublk_integrity::Errno;

/// The user data of the poll on the doorbell, which is not in the table.
const DOORBELL: u64 = TARGET_BIT | u32::MAX as u64;

/// All operations of one thread's ring.
pub struct Ops {
    table: RefCell<Vec<Op>>,
    free: RefCell<Vec<u32>>,
    /// Operations to be submitted: new ones, and once more those of a short transfer or a fallback.
    outbox: RefCell<VecDeque<u32>>,
    /// Operations that the kernel has not ended yet, sleeps excepted: those have no memory and
    /// change nothing.
    in_flight: Cell<usize>,
    /// An operation has been started that many requests may wait for.
    urgent: Cell<bool>,
    discard: [Cell<DiscardWay>; MAX_FILES],
    /// RWF_DSYNC was refused: write, then fdatasync.
    no_dsync: [Cell<bool>; MAX_FILES],
    /// Written by other threads; see [`Executor`](crate::event_loop::Executor).
    doorbell: Arc<EventFd>,
    doorbell_armed: Cell<bool>,
    /// Tells this ring from all others of the process.
    number: u32,
    port: Port,
    /// The files that file indices refer to; `None`: those registered with the ring.
    ///
    /// The kernel closes registered files only some time after the ring was closed or its
    /// process has ended. Files that are not registered are closed as soon as the
    /// operations on them have ended.
    files: Option<Vec<OwnedFd>>,
}

static NEXT_NUMBER: AtomicU32 = AtomicU32::new(0);

/// The most files a ring can have: the ublk character device, data, meta.
const MAX_FILES: usize = 3;

impl Ops {
    /// A table with room for `capacity` operations at a time, on files that are registered with the
    /// ring. It grows beyond, which is harmless but allocates.
    pub fn new(port: Port, capacity: usize) -> io::Result<Rc<Self>> {
        Self::on_files(port, capacity, None)
    }

    /// The same on files that are its own, or registered where `None`.
    pub fn on_files(port: Port, capacity: usize, files: Option<Vec<OwnedFd>>) -> io::Result<Rc<Self>> {
        let doorbell = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        let ops = Self {
            table: RefCell::new(Vec::with_capacity(capacity)),
            free: RefCell::new(Vec::with_capacity(capacity)),
            outbox: RefCell::new(VecDeque::with_capacity(capacity)),
            in_flight: Cell::new(0),
            urgent: Cell::new(false),
            discard: [const { Cell::new(DiscardWay::PunchHole) }; MAX_FILES],
            no_dsync: [const { Cell::new(false) }; MAX_FILES],
            doorbell: Arc::new(doorbell),
            doorbell_armed: Cell::new(false),
            number: NEXT_NUMBER.fetch_add(1, Ordering::Relaxed),
            port,
            files,
        };
        for _ in 0..capacity {
            ops.add_op();
        }
        Ok(Rc::new(ops))
    }

    /// The eventfd that other threads write to end this ring's sleep.
    pub fn doorbell(&self) -> &Arc<EventFd> {
        &self.doorbell
    }

    pub(super) fn number(&self) -> u32 {
        self.number
    }

    /// Its ring.
    pub fn port(&self) -> &Port {
        &self.port
    }

    fn add_op(&self) {
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

    /// Starts an operation: it goes out with the next [`enter`](Self::enter).
    pub fn start(self: &Rc<Self>, file: FileIndex, work: Work) -> Running {
        if self.free.borrow().is_empty() {
            self.add_op();
        }
        let key = self.free.borrow_mut().pop().expect("one was just added");
        self.in_flight.set(self.in_flight.get() + work.weight());
        self.urgent.set(self.urgent.get() || work.is_urgent());
        {
            let op = &mut self.table.borrow_mut()[key as usize];
            op.file = file;
            op.work = work;
            op.moved = 0;
            op.syncing = false;
            op.state = State::InFlight(None);
        }
        self.outbox.borrow_mut().push_back(key);
        Running { ops: Rc::clone(self), key: Some(key) }
    }

    /// Takes a completion; wakes the task that waits for it.
    ///
    /// Does not touch the ring, which the caller has borrowed: what must be submitted again waits
    /// for the next [`push`](Self::push).
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
            None => self.outbox.borrow_mut().push_back(key),
        }
    }

    /// Whether an operation has been started that should not wait until all tasks have run.
    pub fn is_urgent(&self) -> bool {
        self.urgent.get()
    }

    /// Submits what has been started or is unfinished, and the poll on the doorbell; then waits.
    pub fn enter(&self, wait: EnterWait) -> io::Result<()> {
        self.push();
        self.port.enter(wait)
    }

    /// Takes all completions of a ring on which nobody else has operations.
    pub fn reap(&self) {
        self.port.with(|ring| ring.completion().for_each(|entry| self.complete(entry.user_data(), entry.result())));
    }

    fn push(&self) {
        self.urgent.set(false);
        let doorbell = (!self.doorbell_armed.replace(true)).then(|| {
            let fd = types::Fd(self.doorbell.as_fd().as_raw_fd());
            opcode::PollAdd::new(fd, libc::POLLIN as u32).build().user_data(DOORBELL)
        });
        self.port.push(doorbell.into_iter().chain(std::iter::from_fn(|| self.next_entry())));
    }

    fn file_name(&self, file: FileIndex) -> FileName {
        match &self.files {
            Some(own) => FileName::Descriptor(own[file.0 as usize].as_raw_fd()),
            None => FileName::Registered(file.0),
        }
    }

    /// The entry of the next operation in the outbox. Operations that the device does not support end
    /// with EOPNOTSUPP on the way, and are passed over.
    fn next_entry(&self) -> Option<squeue::Entry> {
        loop {
            let key = self.outbox.borrow_mut().pop_front()?;
            let entry = {
                let op = &mut self.table.borrow_mut()[key as usize];
                let i = op.file.0 as usize;
                op.entry(self.file_name(op.file), self.number, self.discard[i].get(), self.no_dsync[i].get())
            };
            match entry {
                Some(entry) => return Some(entry.user_data(TARGET_BIT | u64::from(key))),
                None => self.finish(key, Err(Errno::EOPNOTSUPP)),
            }
        }
    }

    fn finish(&self, key: u32, result: Result<(), Errno>) {
        let old = {
            let op = &mut self.table.borrow_mut()[key as usize];
            self.in_flight.set(self.in_flight.get() - op.work.weight());
            std::mem::replace(&mut op.state, State::Done(result))
        };
        match old {
            State::InFlight(Some(waker)) => waker.wake(),
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

    /// Whether something has been started that has not gone out.
    pub fn has_started(&self) -> bool {
        !self.outbox.borrow().is_empty()
    }

    /// How many operations the kernel has not ended yet, sleeps excepted.
    pub fn in_flight(&self) -> usize {
        self.in_flight.get()
    }
}

impl Drop for Ops {
    fn drop(&mut self) {
        // Nobody will wait for these any more, but the kernel may still write to their memory.
        if self.in_flight.get() > 0 {
            std::mem::forget(std::mem::take(self.table.get_mut()));
        }
    }
}

/// An operation in flight.
pub struct Running {
    ops: Rc<Ops>,
    key: Option<u32>,
}

impl Future for Running {
    /// The result, and the work with its buffer.
    type Output = (Result<(), Errno>, Work);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let key = self.key.expect("polled after it was ready");
        let result = {
            let op = &mut self.ops.table.borrow_mut()[key as usize];
            match &mut op.state {
                State::Done(result) => *result,
                State::InFlight(waker) => {
                    match waker {
                        Some(w) => w.clone_from(cx.waker()),
                        None => *waker = Some(cx.waker().clone()),
                    }
                    return Poll::Pending;
                }
                State::Free | State::Orphan => unreachable!("an operation that is named is in use"),
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

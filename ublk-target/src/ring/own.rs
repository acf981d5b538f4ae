//! A ring of our own with a run loop: the checkpoint and prefetch threads, and the commands that
//! work without ublk.

use super::{DeviceFiles, Ops, Port, RingStorage};
use crate::{
    executor::{Executor, Turn},
    hash_queue::HashQueue,
};
use io_uring::types::{SubmitArgs, Timespec};
use std::{
    cell::{Cell, RefCell},
    future::Future,
    io,
    os::fd::OwnedFd,
    rc::Rc,
    time::{Duration, Instant},
};
use ublk_integrity::{Buf, HashJob};

/// Submission entries of such a ring.
const ENTRIES: u32 = 256;
/// Operations under way at a time before the table grows.
const OPS: usize = 256;

/// Rounds of ready tasks between two looks at the ring.
const ROUNDS: usize = 8;

/// How long tasks run before what they have to submit goes out: whoever waits for the first of many requests need not
/// wait until all of them are hashed.
pub(super) const TURN: Duration = Duration::from_micros(500);

/// Tasks between two looks at the clock where none says that it has taken time.
const UNSEEN: u32 = 8;

/// The part of the time of a turn that the first request of the next may wait for the others: one in so many.
const COMPANY: u32 = 4;

/// A ring and the loop that drives it.
pub struct OwnRing {
    pub(super) ops: Rc<Ops>,
}

impl OwnRing {
    /// A ring for `files`, which are closed with it.
    pub fn new(files: Vec<OwnedFd>) -> io::Result<Self> {
        Ok(Self { ops: Ops::on_files(Port::own(ENTRIES)?, OPS, Some(files))? })
    }

    /// Makes the kernel know buffers beforehand; see [`register`](super::register).
    pub fn register<'a>(&self, bufs: impl IntoIterator<Item = &'a mut Buf>) -> io::Result<()> {
        super::register(&self.ops, bufs)
    }

    /// A handle on the devices for use inside [`block_on`](Self::block_on).
    pub fn storage(&self, files: DeviceFiles) -> RingStorage {
        RingStorage::new(Rc::clone(&self.ops), files)
    }

    /// Runs `future` to its end. Wakes from other threads reach it.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> io::Result<T> {
        self.block_on_expecting(future, || 1)
    }

    /// The same, with so many completions [expected](drive) at once.
    pub(super) fn block_on_expecting<T>(
        &self,
        future: impl Future<Output = T>,
        expected: impl Fn() -> usize,
    ) -> io::Result<T> {
        let result = RefCell::new(None);
        let mut exec = Executor::new(1, self.ops.doorbell(), self.ops.turn());
        exec.spawn(async { *result.borrow_mut() = Some(future.await) });
        drive(&exec, &self.ops, |port| reap(port, &self.ops), expected, None)?;
        drop(exec);
        Ok(result.into_inner().expect("the only task has ended"))
    }

    /// Runs all futures to their ends, each as a task of its own, and before it sleeps what is left to hash.
    ///
    /// # Panics
    /// When there are more than [`OPS`].
    pub fn run_together(
        &self,
        futures: impl IntoIterator<Item = impl Future<Output = ()>>,
        hashing: Option<&HashQueue>,
    ) -> io::Result<()> {
        let futures: Vec<_> = futures.into_iter().collect();
        let mut exec = Executor::new(futures.len(), self.ops.doorbell(), self.ops.turn());
        futures.into_iter().for_each(|future| exec.spawn(future));
        drive(&exec, &self.ops, |port| reap(port, &self.ops), || 1, hashing)
    }
}

impl Drop for OwnRing {
    fn drop(&mut self) {
        // A sleep's time is read when it is submitted; the ring's end cancels it.
        self.ops.push();
        let _ = self.ops.port().with(|ring| ring.submit());
        // Operations whose futures were dropped: let them end, so that their memory can be freed.
        while self.ops.under_way() > 0 {
            let waited = self.ops.port().with(|ring| ring.submit_and_wait(1));
            if waited.is_err_and(|e| e.kind() != io::ErrorKind::Interrupted) {
                return; // `Ops` leaks them
            }
            reap(self.ops.port(), &self.ops);
            self.ops.push();
        }
    }
}

fn reap(port: &Port, ops: &Ops) {
    port.with(|ring| {
        for cqe in ring.completion() {
            ops.complete(cqe.user_data(), cqe.result());
        }
    });
}

/// The loop of every thread with a ring: take a turn, submit, wait, take completions (`reap`).
///
/// After each turn it asks how many completions are `expected` at once. If it sleeps it waits for so many, for they cost less
/// together; but where that is more than one, for a fraction of the time at most that the turn took, and of the longest turn.
///
/// It sleeps only when nothing is left in `hashing` for it.
pub fn drive(
    exec: &Executor<'_>,
    ops: &Ops,
    reap: impl Fn(&Port),
    expected: impl Fn() -> usize,
    hashing: Option<&HashQueue>,
) -> io::Result<()> {
    loop {
        let begin = Instant::now();
        take_turn(exec, ops, &reap, begin)?;
        if exec.is_done() {
            return Ok(());
        }
        let idle = exec.may_sleep();
        let left = hashing.filter(|hashing| idle && hashing.has_left());
        let wait = match (idle && left.is_none(), expected()) {
            (true, many @ 2..) => Wait::Many(many, (begin.elapsed() / COMPANY).min(TURN)),
            (true, _) => Wait::One,
            (false, _) => Wait::No,
        };
        let entered = enter(ops, wait);
        exec.awake();
        entered?;
        reap(ops.port());
        // Others may wait for what has become ready.
        if !exec.has_ready() {
            left.and_then(HashQueue::take).into_iter().for_each(HashJob::run);
        }
    }
}

/// Runs what is ready, then ends the turn. Where those who wait for that gain by company, what has come in is taken before, and
/// what others wait for goes out; until the time is up. Where they take long, all that has been started goes out.
fn take_turn(exec: &Executor<'_>, ops: &Ops, reap: impl Fn(&Port), begin: Instant) -> io::Result<()> {
    let clock = Clock::new(begin, ops.turn());
    loop {
        // Tasks that wake each other get a few rounds, so that what they submit goes out together; not more, for what
        // they wait for may be in the ring.
        for _ in 0..ROUNDS {
            if exec.run_until(|| ops.is_urgent() || clock.is_up_after_a_task()) || !exec.has_ready() {
                break;
            }
        }
        let worth_a_look = exec.gains_by_company() && (ops.is_urgent() || ops.port().has_completions())
            || exec.has_tags_to_make() && ops.has_started();
        if !worth_a_look || clock.is_up() {
            break;
        }
        enter(ops, Wait::No)?;
        reap(ops.port());
    }
    exec.end_turn(|| clock.is_up_after_a_task());
    Ok(())
}

/// The time of a turn. To look at it takes as long as most tasks do: only after one that says that it has taken time, and after
/// some of the others.
struct Clock<'a> {
    begin: Instant,
    turn: &'a Turn,
    /// Tasks since the last look.
    unseen: Cell<u32>,
}

impl<'a> Clock<'a> {
    fn new(begin: Instant, turn: &'a Turn) -> Self {
        Self { begin, turn, unseen: Cell::new(0) }
    }

    fn is_up(&self) -> bool {
        self.begin.elapsed() >= TURN
    }

    fn is_up_after_a_task(&self) -> bool {
        self.unseen.set(self.unseen.get() + 1);
        if !self.turn.has_taken_time() && self.unseen.get() < UNSEEN {
            return false;
        }
        self.unseen.set(0);
        self.is_up()
    }
}

/// What to wait for in the kernel.
enum Wait {
    No,
    One,
    /// So many completions, but only so long.
    Many(usize, Duration),
}

/// Submits, waits, and has completions made ready.
fn enter(ops: &Ops, wait: Wait) -> io::Result<()> {
    ops.push();
    let entered = ops.port().with(|ring| match wait {
        // Has completions made ready, too, where the ring's memory shows that there are some.
        Wait::No => ring.submit(),
        Wait::One => ring.submit_and_wait(1),
        Wait::Many(many, time) => {
            let time = Timespec::from(time);
            ring.submitter().submit_with_args(many, &SubmitArgs::new().timespec(&time))
        }
    });
    match entered {
        // EBUSY: completions must be taken first, which is what follows. ETIME: there are none yet.
        Err(e) if !matches!(e.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN | libc::ETIME)) => Err(e),
        _ => Ok(()),
    }
}

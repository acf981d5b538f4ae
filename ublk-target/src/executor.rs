//! A single-threaded executor that allocates nothing once its tasks are spawned.
//!
//! Each task has one waker for its whole life, and the ready queue has one place for each task, so
//! waking can neither allocate nor fail. A wake may come from any thread. The owner sleeps in
//! `io_uring_enter`, which only a completion can end: so whoever wakes a task of a *sleeping* owner
//! also writes the owner's eventfd, on which the owner's ring has a poll under way.
//!
//! No wake is lost: the owner first says that it sleeps, then looks at the ready queue; a waker first
//! fills the ready queue, then looks whether the owner sleeps. In whatever order these four happen,
//! one of the two sees the other.

use crate::sync::{AtomicBool, Ordering};
use crossbeam_queue::ArrayQueue;
use nix::sys::eventfd::EventFd;
use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::{Future, poll_fn},
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Wake, Waker},
};

type TaskIndex = usize;

/// How often a task may wait for the end of the same turn, one after the other.
const ENDS: usize = 2;

/// What wakers share with the owner.
struct Ready {
    tasks: ArrayQueue<TaskIndex>,
    owner_sleeps: AtomicBool,
    doorbell: Arc<EventFd>,
}

struct TaskWaker {
    index: TaskIndex,
    /// Keeps a task at most once in the ready queue, which is why the queue can't overflow.
    queued: AtomicBool,
    ready: Arc<Ready>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.queued.swap(true, Ordering::SeqCst) {
            return;
        }
        let pushed = self.ready.tasks.push(self.index);
        debug_assert!(pushed.is_ok(), "one place for each task");
        if self.ready.owner_sleeps.swap(false, Ordering::SeqCst) {
            // Only fails where the counter would overflow, and then the owner is being woken already.
            let _ = self.ready.doorbell.write(1);
        }
    }
}

/// A thread's turn, as its tasks see it: its end, to wait for, and how many others are ready; shared by the executor
/// and what the tasks do I/O with.
pub struct Turn {
    waiting: RefCell<Vec<Waker>>,
    others_ready: Cell<usize>,
    /// What the last of those who wait said.
    gains: Cell<bool>,
}

impl Turn {
    /// With room for so many tasks; it grows beyond, which is harmless but allocates.
    pub fn new(capacity: usize) -> Rc<Self> {
        Rc::new(Self {
            waiting: RefCell::new(Vec::with_capacity(capacity)),
            others_ready: Cell::new(0),
            gains: Cell::new(false),
        })
    }

    /// How many other tasks were ready when the one that runs began to.
    pub fn others_ready(&self) -> usize {
        self.others_ready.get()
    }

    /// Completes when the executor next [ends the turn](Executor::end_turn). `gains`: whether those who wait for that gain
    /// by more company, so that it is better put off while there may be some.
    pub fn end(&self, gains: bool) -> impl Future<Output = ()> {
        let mut waits = false;
        poll_fn(move |cx| {
            if std::mem::replace(&mut waits, true) {
                return Poll::Ready(());
            }
            self.gains.set(gains);
            self.waiting.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
    }

    fn is_awaited(&self) -> bool {
        !self.waiting.borrow().is_empty()
    }
}

struct Task<'a> {
    future: RefCell<Option<Pin<Box<dyn Future<Output = ()> + 'a>>>>,
    state: Arc<TaskWaker>,
    waker: Waker,
}

/// The tasks of one thread.
pub struct Executor<'a> {
    tasks: Vec<Task<'a>>,
    ready: Arc<Ready>,
    /// Ready too, and set aside while others ran: they are the next.
    aside: RefCell<VecDeque<TaskIndex>>,
    turn: Rc<Turn>,
    alive: Cell<usize>,
}

impl<'a> Executor<'a> {
    /// An executor for at most `capacity` tasks, whose owner sleeps until `doorbell` is readable and ends each `turn`.
    pub fn new(capacity: usize, doorbell: &Arc<EventFd>, turn: &Rc<Turn>) -> Self {
        Self {
            tasks: Vec::with_capacity(capacity),
            ready: Arc::new(Ready {
                tasks: ArrayQueue::new(capacity.max(1)),
                owner_sleeps: AtomicBool::new(false),
                doorbell: Arc::clone(doorbell),
            }),
            aside: RefCell::new(VecDeque::with_capacity(capacity)),
            turn: Rc::clone(turn),
            alive: Cell::new(0),
        }
    }

    /// Adds a task; it first runs at the next [`run_ready`](Self::run_ready).
    ///
    /// # Panics
    /// When there are `capacity` tasks already.
    pub fn spawn(&mut self, future: impl Future<Output = ()> + 'a) {
        assert!(self.tasks.len() < self.ready.tasks.capacity(), "more tasks than announced");
        let state = Arc::new(TaskWaker {
            index: self.tasks.len(),
            queued: AtomicBool::new(false),
            ready: Arc::clone(&self.ready),
        });
        let waker = Waker::from(Arc::clone(&state));
        waker.wake_by_ref();
        self.tasks.push(Task { future: RefCell::new(Some(Box::pin(future))), state, waker });
        self.alive.set(self.alive.get() + 1);
    }

    /// Runs once each task that is ready now. Those that become ready meanwhile wait for the next
    /// call: between the two the owner looks at its ring, and what a task wakes itself for may be there.
    pub fn run_ready(&self) {
        self.run_until(|| false);
    }

    /// The same, but leaves the rest for the next call once `enough` says so; returns whether it did.
    pub fn run_until(&self, enough: impl Fn() -> bool) -> bool {
        for _ in 0..self.ready() {
            let aside = self.aside.borrow_mut().pop_front();
            let Some(index) = aside.or_else(|| self.ready.tasks.pop()) else { return false };
            self.run(index);
            if enough() {
                return true;
            }
        }
        false
    }

    /// Ends the turn: those who wait for that run before all others. What they then wait for the end of has ended too: a
    /// block is hashed at the first end and logged at the second. Another thread may wake a task just then that runs as well,
    /// and still waits after both: that is the next turn's, before which the owner must not sleep.
    pub fn end_turn(&self) {
        for _ in 0..ENDS {
            if !self.turn.is_awaited() {
                return;
            }
            while let Some(index) = self.ready.tasks.pop() {
                self.aside.borrow_mut().push_back(index);
            }
            self.turn.waiting.borrow_mut().drain(..).for_each(Waker::wake);
            for _ in 0..self.ready.tasks.len() {
                self.ready.tasks.pop().into_iter().for_each(|index| self.run(index));
            }
        }
    }

    fn run(&self, index: TaskIndex) {
        let task = &self.tasks[index];
        // Before the poll: a wake that comes during it must queue the task again.
        task.state.queued.store(false, Ordering::SeqCst);
        self.turn.others_ready.set(self.ready());
        let mut slot = task.future.borrow_mut();
        let Some(future) = slot.as_mut() else { return };
        if future.as_mut().poll(&mut Context::from_waker(&task.waker)).is_ready() {
            *slot = None;
            self.alive.set(self.alive.get() - 1);
        }
    }

    /// Whether those who wait for the end of the turn gain by more company.
    pub fn gains_by_company(&self) -> bool {
        self.turn.is_awaited() && self.turn.gains.get()
    }

    /// Whether a task is ready.
    pub fn has_ready(&self) -> bool {
        self.ready() > 0
    }

    /// How many tasks are.
    fn ready(&self) -> usize {
        self.aside.borrow().len() + self.ready.tasks.len()
    }

    /// Whether every task has ended.
    pub fn is_done(&self) -> bool {
        self.alive.get() == 0
    }

    /// Says that the owner is about to sleep; `false` if a task has become ready, or waits for the end of the turn, so that it
    /// must not.
    pub fn may_sleep(&self) -> bool {
        self.ready.owner_sleeps.store(true, Ordering::SeqCst);
        let idle = !self.has_ready() && !self.turn.is_awaited();
        if !idle {
            self.ready.owner_sleeps.store(false, Ordering::SeqCst);
        }
        idle
    }

    /// Says that the owner is awake: other threads need not ring.
    pub fn awake(&self) {
        self.ready.owner_sleeps.store(false, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::eventfd::EfdFlags;

    fn doorbell() -> Arc<EventFd> {
        Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap())
    }

    #[test]
    fn wakes_from_another_thread_ring_a_sleeping_owner_once() {
        let (tx, rx) = std::sync::mpsc::channel::<Waker>();
        let bell = doorbell();
        let mut exec = Executor::new(1, &bell, &Turn::new(1));
        let mut polls = 0;
        exec.spawn(poll_fn(move |cx| {
            polls += 1;
            if polls == 2 {
                return Poll::Ready(());
            }
            tx.send(cx.waker().clone()).unwrap();
            Poll::Pending
        }));
        exec.run_ready();
        assert!(exec.may_sleep());
        std::thread::spawn(move || {
            let waker = rx.recv().unwrap();
            waker.wake_by_ref();
            waker.wake();
        })
        .join()
        .unwrap();
        assert_eq!(bell.read(), Ok(1));
        exec.awake();
        assert!(!exec.may_sleep());
        exec.run_ready();
        assert!(exec.is_done());
    }

    #[test]
    fn a_task_that_wakes_itself_lets_the_owner_look_at_its_ring() {
        let bell = doorbell();
        let mut exec = Executor::new(1, &bell, &Turn::new(1));
        exec.spawn(poll_fn(|cx| {
            cx.waker().wake_by_ref();
            Poll::<()>::Pending
        }));
        exec.run_ready();
        assert!(!exec.may_sleep(), "it is ready again");
    }

    #[test]
    fn what_has_had_enough_leaves_the_rest_for_the_next_turn() {
        let bell = doorbell();
        let mut exec = Executor::new(3, &bell, &Turn::new(3));
        (0..3).for_each(|_| exec.spawn(async {}));
        assert!(exec.run_until(|| true));
        assert!(exec.has_ready() && !exec.is_done() && !exec.may_sleep());
        assert!(!exec.run_until(|| false));
        assert!(exec.is_done());
    }

    #[test]
    fn at_the_end_of_the_turn_those_who_wait_for_it_come_first() {
        let bell = doorbell();
        let (order, turn) = (RefCell::new(Vec::new()), Turn::new(4));
        let say = |n: usize| order.borrow_mut().push(n);
        let mut exec = Executor::new(4, &bell, &turn);
        exec.spawn(async {
            say(0);
            turn.end(true).await;
            say(4);
        });
        (1..4).for_each(|n| exec.spawn(async move { say(n) }));
        exec.run_until(|| true);
        assert!(exec.run_until(|| true));
        exec.end_turn();
        assert_eq!(*order.borrow(), [0, 1, 4]);
        assert!(exec.has_ready() && !exec.may_sleep());
        exec.run_ready();
        assert_eq!(*order.borrow(), [0, 1, 4, 2, 3]);
        assert!(exec.is_done() && exec.may_sleep());
    }

    #[test]
    fn a_task_knows_how_many_others_are_ready() {
        let (bell, turn, seen) = (doorbell(), Turn::new(3), RefCell::new(Vec::new()));
        let mut exec = Executor::new(3, &bell, &turn);
        for ends in [true, true, false] {
            let (turn, seen) = (&turn, &seen);
            exec.spawn(async move {
                seen.borrow_mut().push(turn.others_ready());
                if ends {
                    turn.end(true).await;
                    seen.borrow_mut().push(turn.others_ready());
                }
            });
        }
        exec.run_until(|| seen.borrow().len() == 2);
        exec.end_turn();
        assert_eq!(*seen.borrow(), [2, 1, 2, 1], "the third was set aside and counts at the end of the turn");
        exec.run_ready();
        assert_eq!(seen.borrow()[4..], [0]);
    }

    #[test]
    fn a_turn_has_two_ends_and_a_third_is_the_next_ones() {
        let (bell, ended, turn) = (doorbell(), Cell::new(0), Turn::new(1));
        let mut exec = Executor::new(1, &bell, &turn);
        exec.spawn(async {
            for _ in 0..3 {
                turn.end(true).await;
                ended.set(ended.get() + 1);
            }
        });
        exec.run_ready();
        exec.end_turn();
        assert_eq!(ended.get(), 2);
        assert!(!exec.may_sleep());
        exec.end_turn();
        assert!(ended.get() == 3 && exec.is_done());
    }

    #[test]
    fn who_comes_last_says_whether_company_is_welcome() {
        let (bell, turn) = (doorbell(), Turn::new(2));
        let mut exec = Executor::new(2, &bell, &turn);
        assert!(!exec.gains_by_company());
        exec.spawn(turn.end(true));
        exec.spawn(turn.end(false));
        assert!(!exec.gains_by_company(), "nobody waits yet");
        exec.run_until(|| true);
        assert!(exec.gains_by_company());
        exec.run_ready();
        assert!(!exec.gains_by_company());
        exec.end_turn();
        assert!(exec.is_done());
    }

    #[test]
    fn nobody_sleeps_before_the_end_of_a_turn_that_is_waited_for() {
        let (bell, turn) = (doorbell(), Turn::new(1));
        let mut exec = Executor::new(1, &bell, &turn);
        exec.spawn(turn.end(true));
        exec.run_ready();
        assert!(!exec.has_ready() && !exec.may_sleep());
        exec.end_turn();
        assert!(exec.is_done() && exec.may_sleep());
    }

    #[test]
    fn a_wake_of_an_awake_owner_does_not_ring() {
        let bell = doorbell();
        let mut exec = Executor::new(1, &bell, &Turn::new(1));
        exec.spawn(async {});
        assert!(bell.read().is_err());
        exec.run_ready();
        assert!(exec.is_done() && exec.may_sleep());
    }
}

/// Real threads under a model checker: see `sync.rs`.
#[cfg(all(test, shuttle))]
mod interleavings {
    use super::*;
    use crate::{
        checkpoints::Stop,
        shared::{BLOCK, check, formatted, opened, range, read},
    };
    use nix::sys::eventfd::EfdFlags;
    use shuttle::thread;
    use ublk_integrity::{BlockRange, Buf, Durability, Storage, Volume};

    fn doorbell() -> Arc<EventFd> {
        Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap())
    }

    /// The owner's loop. Its sleep is modelled: it looks at the doorbell over and over, and a wake that
    /// never comes runs into the checker's limit of steps.
    fn drive(exec: &Executor<'_>, bell: &EventFd) {
        loop {
            exec.run_ready();
            exec.end_turn();
            if exec.is_done() {
                return;
            }
            if exec.may_sleep() {
                while bell.read().is_err() {
                    thread::yield_now();
                }
            }
            exec.awake();
        }
    }

    #[test]
    fn an_owner_that_goes_to_sleep_hears_every_wake() {
        check(|| {
            let stops = [(); 2].map(|()| Arc::new(Stop::default()));
            let others = stops.clone().map(|stop| thread::spawn(move || stop.set()));
            let (bell, turn) = (doorbell(), Turn::new(2));
            let mut exec = Executor::new(2, &bell, &turn);
            // A wake may come while the turn is ended: who is woken then waits for the end of the next.
            stops.iter().for_each(|stop| {
                exec.spawn(async {
                    turn.end(true).await;
                    stop.wait().await;
                    turn.end(true).await;
                });
            });
            drive(&exec, &bell);
            others.into_iter().for_each(|other| other.join().unwrap());
        });
    }

    async fn write_and_flush(volume: &Volume, io: &impl Storage, blocks: BlockRange, fill: u8) {
        let (mut slot, mut buf) = (volume.slot(0), Buf::new(2 * BLOCK));
        buf.fill(fill);
        volume.write(io, &mut slot, blocks, buf, Durability::MayBeLost).await.0.unwrap();
        volume.flush(io, &mut slot).await.unwrap();
    }

    /// Each waits for ranges that the other's tasks hold, and for log writes and syncs on the other's ring.
    #[test]
    fn two_queues_wake_each_other() {
        check(|| {
            let io = formatted();
            let volume = opened(&io, 1);
            let queues = [1, 2].map(|fill| {
                let (io, volume) = (io.clone(), volume.clone());
                thread::spawn(move || {
                    let bell = doorbell();
                    let mut exec = Executor::new(2, &bell, &Turn::new(2));
                    exec.spawn(write_and_flush(&volume, &io, range(3, 2), fill));
                    exec.spawn(write_and_flush(&volume, &io, range(u64::from(fill), 1), 7));
                    drive(&exec, &bell);
                })
            });
            queues.into_iter().for_each(|queue| queue.join().unwrap());
            assert!([1, 2].contains(&read(&volume, &io, range(3, 2))));
            assert!([1, 2].iter().all(|block| read(&volume, &io, range(*block, 1)) == 7));
        });
    }
}

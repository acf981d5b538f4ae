//! A single-threaded executor that allocates nothing once its tasks are spawned.
//!
//! Each task has one waker for its whole life and a bit among those that are woken, so waking can neither allocate nor
//! fail. A wake may come from any thread. The owner sleeps in `io_uring_enter`, which only a completion can end: so
//! whoever wakes a task of a *sleeping* owner also writes the owner's eventfd, on which the owner's ring has a poll under
//! way.
//!
//! No wake is lost: the owner first says that it sleeps, then looks who is woken; a waker first sets its bit, then looks
//! whether the owner sleeps. In whatever order these four happen, one of the two sees the other.

use crate::{
    sync::{AtomicBool, AtomicU64, Ordering},
    tasks::{TaskIndex, TaskSet, place},
};
use nix::sys::eventfd::EventFd;
use std::{
    cell::{Cell, RefCell},
    future::{Future, poll_fn},
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Wake, Waker},
};
use ublk_integrity::Phase;

/// What wakers share with the owner.
struct Ready {
    /// Tasks that have been woken, a bit for each.
    woken: Vec<AtomicU64>,
    owner_sleeps: AtomicBool,
    doorbell: Arc<EventFd>,
}

struct TaskWaker {
    index: TaskIndex,
    ready: Arc<Ready>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let (word, bit) = place(self.index);
        if self.ready.woken[word].fetch_or(bit, Ordering::SeqCst) & bit != 0 {
            // Whoever set it rings if need be.
            return;
        }
        let sleeps = &self.ready.owner_sleeps;
        if sleeps.load(Ordering::SeqCst) && sleeps.swap(false, Ordering::SeqCst) {
            // Only fails where the counter would overflow, and then the owner is being woken already.
            let _ = self.ready.doorbell.write(1);
        }
    }
}

/// A thread's turn, as its tasks see it: its end, to wait for, and how many others are ready; shared by the executor
/// and what the tasks do I/O with.
pub struct Turn {
    /// Those who wait for its end, by what they do then.
    waiting: [TaskSet; 2],
    /// The task that runs, and what its waker is known by.
    task: Cell<TaskIndex>,
    own_waker: Cell<*const ()>,
    /// Of futures that wait inside of tasks and are not polled with the task.
    inner: RefCell<Vec<Waker>>,
    others_ready: Cell<usize>,
    took_time: Cell<bool>,
    /// Somebody has come to wait for company since a task has last taken time.
    gains: Cell<bool>,
}

impl Turn {
    /// For at most so many tasks.
    pub fn new(tasks: usize) -> Rc<Self> {
        Rc::new(Self {
            waiting: [(); 2].map(|()| TaskSet::new(tasks)),
            task: Cell::new(0),
            own_waker: Cell::new(std::ptr::null()),
            inner: RefCell::default(),
            others_ready: Cell::new(0),
            took_time: Cell::new(false),
            gains: Cell::new(false),
        })
    }

    /// How many other tasks were still to run when the one that runs began to: of those that were ready together, wait to make
    /// tags, or write the log with it.
    pub fn others_ready(&self) -> usize {
        self.others_ready.get()
    }

    /// Completes when the executor next [ends the turn](Executor::end_turn), or, where others take long to make tags before, a
    /// later one.
    pub fn end(&self, what: Phase) -> impl Future<Output = ()> {
        let waiting = self.waiting_for(what);
        let mut waits = false;
        poll_fn(move |cx| {
            let task = self.task.get();
            if !std::mem::replace(&mut waits, true) {
                waiting.insert(task);
                self.gains.set(self.gains.get() || what == Phase::Hash);
            }
            // A task may be woken for something else meanwhile.
            if !waiting.contains(task) {
                return Poll::Ready(());
            }
            if cx.waker().data() != self.own_waker.get() {
                self.inner.borrow_mut().push(cx.waker().clone());
            }
            Poll::Pending
        })
    }

    /// Says that the task that runs has taken time, to hash. Those who waited for company have had it, as a rule.
    pub fn took_time(&self) {
        self.took_time.set(true);
        self.gains.set(false);
    }

    /// Whether a task has taken time since this was last asked.
    pub fn has_taken_time(&self) -> bool {
        self.took_time.take()
    }

    fn waiting_for(&self, what: Phase) -> &TaskSet {
        match what {
            Phase::Hash => &self.waiting[0],
            Phase::Commit => &self.waiting[1],
        }
    }

    /// Those who wait for this may run, and are in `into`.
    fn release(&self, what: Phase, into: &TaskSet) {
        self.waiting_for(what).move_to(into);
        self.inner.borrow_mut().drain(..).for_each(Waker::wake);
    }

    fn is_awaited(&self) -> bool {
        self.waiting.iter().any(|waiting| waiting.len() > 0)
    }
}

struct Task<'a> {
    future: RefCell<Option<Pin<Box<dyn Future<Output = ()> + 'a>>>>,
    waker: Waker,
}

/// The tasks of one thread.
pub struct Executor<'a> {
    tasks: Vec<Task<'a>>,
    capacity: usize,
    ready: Arc<Ready>,
    /// Those that were ready together and have not run yet.
    round: TaskSet,
    /// Those that have waited for the end of a turn to make tags and have not run yet.
    hashing: TaskSet,
    /// The same of those that write the log.
    logging: TaskSet,
    turn: Rc<Turn>,
    alive: Cell<usize>,
}

impl<'a> Executor<'a> {
    /// An executor for at most `capacity` tasks, whose owner sleeps until `doorbell` is readable and ends each `turn`.
    ///
    /// # Panics
    /// When the turn is for fewer.
    pub fn new(capacity: usize, doorbell: &Arc<EventFd>, turn: &Rc<Turn>) -> Self {
        let round = TaskSet::new(capacity);
        assert!(turn.waiting[0].words() >= round.words(), "a turn for fewer tasks");
        // Of an executor before, dropped with tasks that waited.
        turn.waiting.iter().for_each(TaskSet::clear);
        Self {
            tasks: Vec::with_capacity(capacity),
            capacity,
            ready: Arc::new(Ready {
                woken: (0..round.words()).map(|_| AtomicU64::new(0)).collect(),
                owner_sleeps: AtomicBool::new(false),
                doorbell: Arc::clone(doorbell),
            }),
            round,
            hashing: TaskSet::new(capacity),
            logging: TaskSet::new(capacity),
            turn: Rc::clone(turn),
            alive: Cell::new(0),
        }
    }

    /// Adds a task; it first runs at the next [`run_ready`](Self::run_ready).
    ///
    /// # Panics
    /// When there are `capacity` tasks already.
    pub fn spawn(&mut self, future: impl Future<Output = ()> + 'a) {
        assert!(self.tasks.len() < self.capacity, "more tasks than announced");
        let waker = Waker::from(Arc::new(TaskWaker { index: self.tasks.len(), ready: Arc::clone(&self.ready) }));
        waker.wake_by_ref();
        self.tasks.push(Task { future: RefCell::new(Some(Box::pin(future))), waker });
        self.alive.set(self.alive.get() + 1);
    }

    /// Runs once each task that is ready now. Those that become ready meanwhile wait for the next
    /// call: between the two the owner looks at its ring, and what a task wakes itself for may be there.
    pub fn run_ready(&self) {
        self.run_until(|| false);
    }

    /// The same, but leaves the rest for the next call, which begins with it, once `enough` says so; returns whether it did.
    pub fn run_until(&self, enough: impl Fn() -> bool) -> bool {
        self.run_of(&self.round, &enough) || {
            self.begin_round();
            self.run_of(&self.round, &enough)
        }
    }

    fn begin_round(&self) {
        for (word, woken) in self.ready.woken.iter().enumerate() {
            // A look is cheaper than the exchange.
            if woken.load(Ordering::SeqCst) != 0 {
                self.round.insert_all(word, woken.swap(0, Ordering::SeqCst));
            }
        }
    }

    /// Runs these once each, until `enough` says so after one; returns whether it did.
    fn run_of(&self, tasks: &TaskSet, enough: impl Fn() -> bool) -> bool {
        while let Some(index) = tasks.pop() {
            self.run(index);
            if enough() {
                return true;
            }
        }
        false
    }

    /// Ends the turn: those who wait to make tags run first, in rounds, so that nobody waits for ever. Once `enough` says so, but
    /// never before the first, the rest is left for the next turn's end: what is ready by then comes before it. Then those who
    /// write the log: who has made tags may do so at once. Who waits for what has been done already waits for the next turn's
    /// end, before which the owner must not sleep.
    pub fn end_turn(&self, enough: impl Fn() -> bool) {
        if !self.has_tags_to_make() {
            self.turn.release(Phase::Hash, &self.hashing);
        }
        self.run_of(&self.hashing, enough);
        self.turn.release(Phase::Commit, &self.logging);
        self.run_of(&self.logging, || false);
    }

    fn run(&self, index: TaskIndex) {
        let task = &self.tasks[index];
        self.turn.task.set(index);
        self.turn.own_waker.set(task.waker.data());
        let others = [&self.round, &self.hashing, &self.logging, self.turn.waiting_for(Phase::Hash)].map(TaskSet::len);
        self.turn.others_ready.set(others.iter().sum());
        let mut slot = task.future.borrow_mut();
        let Some(future) = slot.as_mut() else { return };
        if future.as_mut().poll(&mut Context::from_waker(&task.waker)).is_ready() {
            *slot = None;
            self.alive.set(self.alive.get() - 1);
        }
    }

    /// Whether some wait for the end of the turn who gain by more company.
    pub fn gains_by_company(&self) -> bool {
        self.turn.gains.get() && self.turn.waiting_for(Phase::Hash).len() > 0
    }

    /// Whether some are left that could not make their tags in the turn before: it takes them long.
    pub fn has_tags_to_make(&self) -> bool {
        self.hashing.len() > 0
    }

    /// Whether a task is ready.
    pub fn has_ready(&self) -> bool {
        self.round.len() > 0 || self.ready.woken.iter().any(|woken| woken.load(Ordering::SeqCst) != 0)
    }

    /// Whether every task has ended.
    pub fn is_done(&self) -> bool {
        self.alive.get() == 0
    }

    /// Says that the owner is about to sleep; `false` if a task has become ready, or waits for the end of the turn, so that it
    /// must not.
    pub fn may_sleep(&self) -> bool {
        self.ready.owner_sleeps.store(true, Ordering::SeqCst);
        let idle = !self.has_ready() && !self.has_tags_to_make() && !self.turn.is_awaited();
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
    use futures_util::future::join_all;
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
            turn.end(Phase::Hash).await;
            say(4);
        });
        (1..4).for_each(|n| exec.spawn(async move { say(n) }));
        exec.run_until(|| true);
        assert!(exec.run_until(|| true));
        exec.end_turn(|| false);
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
                    turn.end(Phase::Hash).await;
                    seen.borrow_mut().push(turn.others_ready());
                }
            });
        }
        exec.run_until(|| seen.borrow().len() == 2);
        exec.end_turn(|| false);
        assert_eq!(*seen.borrow(), [2, 2, 2, 1], "the first waits to make tags, the third was set aside: both count");
        exec.run_ready();
        assert_eq!(seen.borrow()[4..], [0]);
    }

    #[test]
    fn the_log_is_written_after_all_tags_are_made_and_more_tags_in_the_next_turn() {
        let (bell, done, turn) = (doorbell(), RefCell::new(Vec::new()), Turn::new(2));
        let say = |what| done.borrow_mut().push(what);
        let mut exec = Executor::new(2, &bell, &turn);
        exec.spawn(async {
            turn.end(Phase::Commit).await;
            say("log of the first");
            turn.end(Phase::Hash).await;
            say("its tags");
        });
        exec.spawn(async {
            turn.end(Phase::Hash).await;
            say("tags");
            turn.end(Phase::Commit).await;
            say("log");
        });
        exec.run_ready();
        exec.end_turn(|| false);
        assert_eq!(*done.borrow(), ["tags", "log of the first", "log"]);
        assert!(!exec.may_sleep());
        exec.end_turn(|| false);
        assert!(done.borrow()[3] == "its tags" && exec.is_done());
    }

    #[test]
    fn who_takes_long_to_make_tags_is_left_for_the_next_turn_behind_all_that_does_not() {
        let (bell, order, turn) = (doorbell(), RefCell::new(Vec::new()), Turn::new(4));
        let say = |n: usize| order.borrow_mut().push(n);
        let mut exec = Executor::new(4, &bell, &turn);
        for n in 0..3 {
            let (turn, say) = (&turn, &say);
            exec.spawn(async move {
                for _ in 0..2 {
                    turn.end(Phase::Hash).await;
                    say(n);
                }
            });
        }
        exec.spawn(async {
            turn.end(Phase::Commit).await;
            say(3);
        });
        exec.run_ready();
        assert!(!exec.has_tags_to_make());
        exec.end_turn(|| true);
        assert_eq!(*order.borrow(), [0, 3], "one at least, and then the log");
        assert!(exec.has_tags_to_make() && !exec.has_ready() && !exec.may_sleep());
        // The first waits again, behind those that have not had their turn.
        (0..3).for_each(|_| exec.end_turn(|| true));
        assert_eq!(order.borrow()[2..], [1, 2, 0]);
        assert!(!exec.may_sleep(), "two are left, though nobody waits any more");
        exec.end_turn(|| false);
        assert!(exec.is_done() && exec.may_sleep());
    }

    #[test]
    fn who_is_woken_before_the_end_still_waits_for_it() {
        let (bell, turn, waker) = (doorbell(), Turn::new(1), RefCell::new(None::<Waker>));
        let mut exec = Executor::new(1, &bell, &turn);
        exec.spawn(async {
            let own = poll_fn(|cx| Poll::Ready(cx.waker().clone())).await;
            waker.replace(Some(own));
            turn.end(Phase::Hash).await;
        });
        exec.run_ready();
        waker.take().unwrap().wake();
        exec.run_ready();
        assert!(!exec.is_done());
        exec.end_turn(|| false);
        assert!(exec.is_done());
    }

    #[test]
    fn company_is_welcome_while_tags_are_to_be_made() {
        let (bell, turn) = (doorbell(), Turn::new(2));
        let mut exec = Executor::new(2, &bell, &turn);
        exec.spawn(turn.end(Phase::Commit));
        exec.spawn(turn.end(Phase::Hash));
        exec.run_until(|| true);
        assert!(!exec.gains_by_company(), "only the log waits");
        exec.run_ready();
        assert!(exec.gains_by_company());
        exec.end_turn(|| false);
        assert!(!exec.gains_by_company() && exec.is_done());
    }

    #[test]
    fn company_that_has_been_had_is_not_waited_for() {
        let (bell, turn) = (doorbell(), Turn::new(2));
        let mut exec = Executor::new(2, &bell, &turn);
        exec.spawn(turn.end(Phase::Hash));
        exec.spawn(async { turn.took_time() });
        exec.run_ready();
        assert!(!exec.gains_by_company() && !exec.may_sleep());
    }

    #[test]
    fn the_end_reaches_futures_that_are_not_polled_with_their_task() {
        // More than a joined few, which are.
        const MANY: usize = 100;
        let (bell, turn) = (doorbell(), Turn::new(1));
        let mut exec = Executor::new(1, &bell, &turn);
        exec.spawn(async { drop(join_all((0..MANY).map(|_| turn.end(Phase::Commit))).await) });
        exec.run_ready();
        exec.end_turn(|| false);
        exec.run_ready();
        assert!(exec.is_done());
    }

    #[test]
    fn an_executor_does_not_run_what_waited_in_one_before() {
        let (bell, turn) = (doorbell(), Turn::new(2));
        let mut before = Executor::new(2, &bell, &turn);
        (0..2).for_each(|_| before.spawn(turn.end(Phase::Hash)));
        before.run_ready();
        drop(before);
        let exec = Executor::new(1, &bell, &turn);
        assert!(exec.may_sleep());
        exec.end_turn(|| false);
    }

    #[test]
    fn nobody_sleeps_before_the_end_of_a_turn_that_is_waited_for() {
        let (bell, turn) = (doorbell(), Turn::new(1));
        let mut exec = Executor::new(1, &bell, &turn);
        exec.spawn(turn.end(Phase::Hash));
        exec.run_ready();
        assert!(!exec.has_ready() && !exec.may_sleep());
        exec.end_turn(|| false);
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
    use ublk_integrity::{BlockRange, Buf, Durability, Volume};

    fn doorbell() -> Arc<EventFd> {
        Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap())
    }

    /// The owner's loop. Its sleep is modelled: it looks at the doorbell over and over, and a wake that
    /// never comes runs into the checker's limit of steps.
    fn drive(exec: &Executor<'_>, bell: &EventFd) {
        loop {
            exec.run_ready();
            exec.end_turn(|| true);
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
                    turn.end(Phase::Commit).await;
                    stop.wait().await;
                    // One of both is left for the turn after that.
                    turn.end(Phase::Hash).await;
                });
            });
            drive(&exec, &bell);
            others.into_iter().for_each(|other| other.join().unwrap());
        });
    }

    async fn write_and_flush(volume: &Volume, io: &impl ublk_integrity::Io, blocks: BlockRange, fill: u8) {
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

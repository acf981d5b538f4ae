//! A poll batch as the tasks of its thread see it: its boundary, to wait for, and how
//! many others can go on.
//!
//! The executor and what the tasks do I/O with share one of these. The library asks for it through
//! [`Scheduler`](ublk_integrity::Scheduler).

use super::tasks::{TaskIndex, TaskSet};
use std::{
    cell::{Cell, RefCell},
    future::{Future, poll_fn},
    rc::Rc,
    task::{Poll, Waker},
    time::Instant,
};
use ublk_integrity::Phase;

/// What a thread's tasks know of the batch that runs.
pub struct Batch {
    /// Tasks that wait for the batch boundary, by what they do then.
    waiting: [TaskSet; 2],
    /// The task that runs, and its waker.
    task: Cell<TaskIndex>,
    own_waker: Cell<*const ()>,
    /// The wakers of futures that wait inside of tasks and are not polled with the task.
    inner: RefCell<Vec<Waker>>,
    runnable: Cell<usize>,
    charged: Cell<bool>,
    looked: Cell<Instant>,
}

impl Batch {
    /// For at most so many tasks.
    pub fn new(tasks: usize) -> Rc<Self> {
        Rc::new(Self {
            waiting: [(); 2].map(|()| TaskSet::new(tasks)),
            task: Cell::new(0),
            own_waker: Cell::new(std::ptr::null()),
            inner: RefCell::default(),
            runnable: Cell::new(0),
            charged: Cell::new(false),
            looked: Cell::new(Instant::now()),
        })
    }

    /// How many other tasks could go on when the one that runs began to: those that were ready with
    /// it, wait to hash, or write the log with it.
    pub fn runnable(&self) -> usize {
        self.runnable.get()
    }

    /// Completes when `phase` is next due: at the end of this batch or, where the hash jobs of
    /// others take long before it, of a later one.
    pub fn boundary(&self, phase: Phase) -> impl Future<Output = ()> {
        let waiting = self.waiting_for(phase);
        let mut waits = false;
        poll_fn(move |cx| {
            let task = self.task.get();
            if !std::mem::replace(&mut waits, true) {
                waiting.insert(task);
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

    /// When the thread last looked at the clock: in this batch, once it has begun.
    pub fn looked(&self) -> Instant {
        self.looked.get()
    }

    /// Looks at the clock.
    pub fn look(&self) -> Instant {
        self.looked.set(Instant::now());
        self.looked()
    }

    /// Notes that the task that runs has hashed, which takes long.
    pub fn charge(&self) {
        self.charged.set(true);
    }

    /// Whether a task has been charged since this was last asked.
    pub(super) fn take_charge(&self) -> bool {
        self.charged.take()
    }

    /// Whether hash jobs wait, which gain from more beside them.
    pub(super) fn benefits_from_batching(&self) -> bool {
        self.waiting_for(Phase::Hash).len() > 0
    }

    /// Notes which task runs, its waker, and how many other tasks could run.
    pub(super) fn begin_task(&self, task: TaskIndex, waker: &Waker, runnable: usize) {
        self.task.set(task);
        self.own_waker.set(waker.data());
        self.runnable.set(runnable);
    }

    pub(super) fn waiting_for(&self, phase: Phase) -> &TaskSet {
        match phase {
            Phase::Hash => &self.waiting[0],
            Phase::Commit => &self.waiting[1],
        }
    }

    /// The phase has begun: the tasks that wait for it are moved to `into`.
    pub(super) fn release(&self, phase: Phase, into: &TaskSet) {
        self.waiting_for(phase).move_to(into);
        self.inner.borrow_mut().drain(..).for_each(Waker::wake);
    }

    /// Whether a task waits for the batch boundary.
    pub(super) fn is_awaited(&self) -> bool {
        self.waiting.iter().any(|waiting| waiting.len() > 0)
    }

    /// Removes the tasks of an executor that was dropped while they waited.
    ///
    /// # Panics
    /// When the batch is for fewer words of tasks.
    pub(super) fn begin_executor(&self, words: usize) {
        assert!(self.waiting[0].words() >= words, "a batch for fewer tasks");
        self.waiting.iter().for_each(TaskSet::clear);
    }
}

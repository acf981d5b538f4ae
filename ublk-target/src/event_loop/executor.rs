//! A single-threaded executor that allocates nothing once its tasks are spawned.
//!
//! Each task has one waker for its whole life and a bit among those that are woken, so waking can
//! neither allocate nor fail. A wake may come from any thread. The owner sleeps in
//! `io_uring_enter`, which only a completion can end. So a thread that wakes a task of a *sleeping*
//! owner also writes the owner's eventfd, which the owner's ring polls.
//!
//! No wake is lost: the owner first notes that it sleeps, then checks which tasks are woken. A
//! waker first sets its bit, then checks whether the owner sleeps. In any order of these four steps
//! one of the two sees the other.

use super::{
    batch::Batch,
    tasks::{TaskIndex, TaskSet, bit_of},
};
use crate::sync::{AtomicBool, AtomicU64, Ordering};
use nix::sys::eventfd::EventFd;
use std::{
    cell::{Cell, RefCell},
    future::Future,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Wake, Waker},
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
        let (word, bit) = bit_of(self.index);
        if self.ready.woken[word].fetch_or(bit, Ordering::SeqCst) & bit != 0 {
            // The thread that set the bit writes the eventfd if need be.
            return;
        }
        let sleeps = &self.ready.owner_sleeps;
        if sleeps.load(Ordering::SeqCst) && sleeps.swap(false, Ordering::SeqCst) {
            // Only fails where the counter would overflow, and then the owner is being woken already.
            let _ = self.ready.doorbell.write(1);
        }
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
    /// The scheduling pass: tasks that were ready together and have not run yet.
    pass: TaskSet,
    /// Tasks that waited for the hash batch and have not run yet.
    hashing: TaskSet,
    /// Tasks that waited for the record to be sealed and have not run yet.
    committing: TaskSet,
    batch: Rc<Batch>,
    alive: Cell<usize>,
}

impl<'a> Executor<'a> {
    /// An executor for at most `capacity` tasks, which see `batch`; its owner sleeps until
    /// `doorbell` is readable.
    ///
    /// # Panics
    /// When the batch is for fewer.
    pub fn new(capacity: usize, doorbell: &Arc<EventFd>, batch: &Rc<Batch>) -> Self {
        let pass = TaskSet::new(capacity);
        batch.begin_executor(pass.words());
        Self {
            tasks: Vec::with_capacity(capacity),
            capacity,
            ready: Arc::new(Ready {
                woken: (0..pass.words()).map(|_| AtomicU64::new(0)).collect(),
                owner_sleeps: AtomicBool::new(false),
                doorbell: Arc::clone(doorbell),
            }),
            pass,
            hashing: TaskSet::new(capacity),
            committing: TaskSet::new(capacity),
            batch: Rc::clone(batch),
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

    /// Runs once each task that is ready now. Those that become ready meanwhile wait for the
    /// next call: between the two the owner reaps completions, and a task may have woken
    /// itself to wait for one.
    pub fn run_ready(&self) {
        self.run_until(|| false);
    }

    /// The same, but leaves the rest for the next call, which begins with it, once `enough` says
    /// so; returns whether it did.
    pub fn run_until(&self, enough: impl Fn() -> bool) -> bool {
        self.run_all_of(&self.pass, &enough) || {
            self.begin_pass();
            self.run_all_of(&self.pass, &enough)
        }
    }

    fn begin_pass(&self) {
        for (word, woken) in self.ready.woken.iter().enumerate() {
            // A load is cheaper than the exchange.
            if woken.load(Ordering::SeqCst) != 0 {
                self.pass.insert_all(word, woken.swap(0, Ordering::SeqCst));
            }
        }
    }

    /// Runs these once each, until `enough` says so after one; returns whether it did.
    fn run_all_of(&self, tasks: &TaskSet, enough: impl Fn() -> bool) -> bool {
        while let Some(index) = tasks.pop() {
            self.run(index);
            if enough() {
                return true;
            }
        }
        false
    }

    /// Runs the tasks that wait to hash, at the end of a batch, those of earlier batches first, so
    /// that none waits for ever. Once `enough` says so, but never before the first, the rest is
    /// left for the next hash batch: what is ready by then runs before it.
    pub fn hash_batch(&self, enough: impl Fn() -> bool) {
        if !self.has_hash_jobs() {
            self.batch.release(Phase::Hash, &self.hashing);
        }
        self.run_all_of(&self.hashing, enough);
    }

    /// Runs the tasks that wait to write the log. It comes after the [hash batch](Self::hash_batch),
    /// so a task that has hashed there may log in the same batch. A task that asks for either phase
    /// only now has missed it and waits for the next batch: the owner must not sleep before that.
    pub fn seal_record(&self) {
        self.batch.release(Phase::Commit, &self.committing);
        self.run_all_of(&self.committing, || false);
    }

    fn run(&self, index: TaskIndex) {
        let task = &self.tasks[index];
        let others = [&self.pass, &self.hashing, &self.committing, self.batch.waiting_for(Phase::Hash)];
        self.batch.begin_task(index, &task.waker, others.map(TaskSet::len).iter().sum());
        let mut future = task.future.borrow_mut();
        let Some(running) = future.as_mut() else { return };
        if running.as_mut().poll(&mut Context::from_waker(&task.waker)).is_ready() {
            *future = None;
            self.alive.set(self.alive.get() - 1);
        }
    }

    /// The batch that its tasks see.
    pub fn batch(&self) -> &Batch {
        &self.batch
    }

    /// Whether the last [hash batch](Self::hash_batch) has left jobs: large ones, as a rule.
    pub fn has_hash_jobs(&self) -> bool {
        self.hashing.len() > 0
    }

    /// Whether a task is ready.
    pub fn has_ready(&self) -> bool {
        self.pass.len() > 0 || self.ready.woken.iter().any(|woken| woken.load(Ordering::SeqCst) != 0)
    }

    /// Whether every task has ended.
    pub fn is_done(&self) -> bool {
        self.alive.get() == 0
    }

    /// Notes that the owner is about to sleep. `false`: it must not, for a task is ready or waits
    /// for a batch boundary.
    pub fn may_sleep(&self) -> bool {
        self.ready.owner_sleeps.store(true, Ordering::SeqCst);
        let idle = !self.has_ready() && !self.has_hash_jobs() && !self.batch.is_awaited();
        if !idle {
            self.ready.owner_sleeps.store(false, Ordering::SeqCst);
        }
        idle
    }

    /// Notes that the owner is awake: other threads need not write its eventfd.
    pub fn awake(&self) {
        self.ready.owner_sleeps.store(false, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::future::join_all;
    use nix::sys::eventfd::EfdFlags;
    use std::{future::poll_fn, task::Poll};

    fn doorbell() -> Arc<EventFd> {
        Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap())
    }

    fn end_batch(exec: &Executor<'_>, enough: impl Fn() -> bool) {
        exec.hash_batch(enough);
        exec.seal_record();
    }

    #[test]
    fn wakes_from_another_thread_ring_a_sleeping_owner_once() {
        let (tx, rx) = std::sync::mpsc::channel::<Waker>();
        let bell = doorbell();
        let mut exec = Executor::new(1, &bell, &Batch::new(1));
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
        let mut exec = Executor::new(1, &bell, &Batch::new(1));
        exec.spawn(poll_fn(|cx| {
            cx.waker().wake_by_ref();
            Poll::<()>::Pending
        }));
        exec.run_ready();
        assert!(!exec.may_sleep(), "it is ready again");
    }

    #[test]
    fn a_batch_that_has_had_enough_leaves_the_rest_for_the_next() {
        let bell = doorbell();
        let mut exec = Executor::new(3, &bell, &Batch::new(3));
        (0..3).for_each(|_| exec.spawn(async {}));
        assert!(exec.run_until(|| true));
        assert!(exec.has_ready() && !exec.is_done() && !exec.may_sleep());
        assert!(!exec.run_until(|| false));
        assert!(exec.is_done());
    }

    #[test]
    fn at_the_batch_boundary_tasks_that_wait_for_it_run_first() {
        let bell = doorbell();
        let (order, batch) = (RefCell::new(Vec::new()), Batch::new(4));
        let say = |n: usize| order.borrow_mut().push(n);
        let mut exec = Executor::new(4, &bell, &batch);
        exec.spawn(async {
            say(0);
            batch.boundary(Phase::Hash).await;
            say(4);
        });
        (1..4).for_each(|n| exec.spawn(async move { say(n) }));
        exec.run_until(|| true);
        assert!(exec.run_until(|| true));
        end_batch(&exec, || false);
        assert_eq!(*order.borrow(), [0, 1, 4]);
        assert!(exec.has_ready() && !exec.may_sleep());
        exec.run_ready();
        assert_eq!(*order.borrow(), [0, 1, 4, 2, 3]);
        assert!(exec.is_done() && exec.may_sleep());
    }

    #[test]
    fn a_task_knows_how_many_others_are_runnable() {
        let (bell, batch, seen) = (doorbell(), Batch::new(3), RefCell::new(Vec::new()));
        let mut exec = Executor::new(3, &bell, &batch);
        for ends in [true, true, false] {
            let (batch, seen) = (&batch, &seen);
            exec.spawn(async move {
                seen.borrow_mut().push(batch.runnable());
                if ends {
                    batch.boundary(Phase::Hash).await;
                    seen.borrow_mut().push(batch.runnable());
                }
            });
        }
        exec.run_until(|| seen.borrow().len() == 2);
        end_batch(&exec, || false);
        assert_eq!(*seen.borrow(), [2, 2, 2, 1], "the first waits to hash, the third was set aside: both count");
        exec.run_ready();
        assert_eq!(seen.borrow()[4..], [0]);
    }

    #[test]
    fn the_record_is_sealed_after_the_hash_batch_and_later_jobs_are_hashed_in_the_next() {
        let (bell, done, batch) = (doorbell(), RefCell::new(Vec::new()), Batch::new(2));
        let say = |what| done.borrow_mut().push(what);
        let mut exec = Executor::new(2, &bell, &batch);
        exec.spawn(async {
            batch.boundary(Phase::Commit).await;
            say("record of the first");
            batch.boundary(Phase::Hash).await;
            say("its hash");
        });
        exec.spawn(async {
            batch.boundary(Phase::Hash).await;
            say("hash");
            batch.boundary(Phase::Commit).await;
            say("record");
        });
        exec.run_ready();
        end_batch(&exec, || false);
        assert_eq!(*done.borrow(), ["hash", "record of the first", "record"]);
        assert!(!exec.may_sleep());
        end_batch(&exec, || false);
        assert!(done.borrow()[3] == "its hash" && exec.is_done());
    }

    #[test]
    fn large_hash_jobs_are_left_for_the_next_batch_behind_all_else() {
        let (bell, order, batch) = (doorbell(), RefCell::new(Vec::new()), Batch::new(4));
        let say = |n: usize| order.borrow_mut().push(n);
        let mut exec = Executor::new(4, &bell, &batch);
        for n in 0..3 {
            let (batch, say) = (&batch, &say);
            exec.spawn(async move {
                for _ in 0..2 {
                    batch.boundary(Phase::Hash).await;
                    say(n);
                }
            });
        }
        exec.spawn(async {
            batch.boundary(Phase::Commit).await;
            say(3);
        });
        exec.run_ready();
        assert!(!exec.has_hash_jobs());
        end_batch(&exec, || true);
        assert_eq!(*order.borrow(), [0, 3], "one at least, and then the record");
        assert!(exec.has_hash_jobs() && !exec.has_ready() && !exec.may_sleep());
        // The first waits again, behind those that have not hashed yet.
        (0..3).for_each(|_| end_batch(&exec, || true));
        assert_eq!(order.borrow()[2..], [1, 2, 0]);
        assert!(!exec.may_sleep(), "two are left, though nobody waits any more");
        end_batch(&exec, || false);
        assert!(exec.is_done() && exec.may_sleep());
    }

    #[test]
    fn a_task_woken_before_the_batch_boundary_still_waits_for_it() {
        let (bell, batch, waker) = (doorbell(), Batch::new(1), RefCell::new(None::<Waker>));
        let mut exec = Executor::new(1, &bell, &batch);
        exec.spawn(async {
            let own = poll_fn(|cx| Poll::Ready(cx.waker().clone())).await;
            waker.replace(Some(own));
            batch.boundary(Phase::Hash).await;
        });
        exec.run_ready();
        waker.take().unwrap().wake();
        exec.run_ready();
        assert!(!exec.is_done());
        end_batch(&exec, || false);
        assert!(exec.is_done());
    }

    #[test]
    fn a_waiting_hash_job_benefits_from_batching() {
        let (bell, batch) = (doorbell(), Batch::new(2));
        let mut exec = Executor::new(2, &bell, &batch);
        exec.spawn(batch.boundary(Phase::Commit));
        exec.spawn(batch.boundary(Phase::Hash));
        exec.run_until(|| true);
        assert!(!batch.benefits_from_batching(), "only the record waits");
        exec.run_ready();
        assert!(batch.benefits_from_batching());
        end_batch(&exec, || false);
        assert!(!batch.benefits_from_batching() && exec.is_done());
    }

    #[test]
    fn the_batch_boundary_reaches_futures_that_are_not_polled_with_their_task() {
        // More than a joined few, which are.
        const MANY: usize = 100;
        let (bell, batch) = (doorbell(), Batch::new(1));
        let mut exec = Executor::new(1, &bell, &batch);
        exec.spawn(async { drop(join_all((0..MANY).map(|_| batch.boundary(Phase::Commit))).await) });
        exec.run_ready();
        end_batch(&exec, || false);
        exec.run_ready();
        assert!(exec.is_done());
    }

    #[test]
    fn an_executor_does_not_run_what_waited_in_one_before() {
        let (bell, batch) = (doorbell(), Batch::new(2));
        let mut before = Executor::new(2, &bell, &batch);
        (0..2).for_each(|_| before.spawn(batch.boundary(Phase::Hash)));
        before.run_ready();
        drop(before);
        let exec = Executor::new(1, &bell, &batch);
        assert!(exec.may_sleep());
        end_batch(&exec, || false);
    }

    #[test]
    fn the_owner_does_not_sleep_before_a_batch_boundary_that_is_awaited() {
        let (bell, batch) = (doorbell(), Batch::new(1));
        let mut exec = Executor::new(1, &bell, &batch);
        exec.spawn(batch.boundary(Phase::Hash));
        exec.run_ready();
        assert!(!exec.has_ready() && !exec.may_sleep());
        end_batch(&exec, || false);
        assert!(exec.is_done() && exec.may_sleep());
    }

    #[test]
    fn a_wake_of_an_awake_owner_does_not_ring() {
        let bell = doorbell();
        let mut exec = Executor::new(1, &bell, &Batch::new(1));
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
    use ublk_integrity::{BlockRange, Buf, Durability, Io, Volume};

    fn doorbell() -> Arc<EventFd> {
        Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap())
    }

    /// The owner's loop. Its sleep is modelled: it looks at the doorbell over and over, and a wake
    /// that never comes runs into the checker's limit of steps.
    fn drive(exec: &Executor<'_>, bell: &EventFd) {
        loop {
            exec.run_ready();
            exec.hash_batch(|| true);
            exec.seal_record();
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
            let (bell, batch) = (doorbell(), Batch::new(2));
            let mut exec = Executor::new(2, &bell, &batch);
            // A wake may come while the batch ends: its task then waits for the end of the next.
            stops.iter().for_each(|stop| {
                exec.spawn(async {
                    batch.boundary(Phase::Commit).await;
                    stop.wait().await;
                    // One of both is left for the batch after that.
                    batch.boundary(Phase::Hash).await;
                });
            });
            drive(&exec, &bell);
            others.into_iter().for_each(|other| other.join().unwrap());
        });
    }

    async fn write_and_flush(volume: &Volume, io: &impl Io, blocks: BlockRange, fill: u8) {
        let (mut slot, mut buf) = (volume.context(0), Buf::new(2 * BLOCK));
        buf.fill(fill);
        volume.write(io, &mut slot, blocks, buf, Durability::MayBeLost).await.0.unwrap();
        volume.flush(io, &mut slot).await.unwrap();
    }

    /// Each waits for ranges that the other's tasks hold, and for log writes and syncs on the
    /// other's ring.
    #[test]
    fn two_queues_wake_each_other() {
        check(|| {
            let io = formatted();
            let volume = opened(&io, 1);
            let queues = [1, 2].map(|fill| {
                let (io, volume) = (io.clone(), volume.clone());
                thread::spawn(move || {
                    let bell = doorbell();
                    let mut exec = Executor::new(2, &bell, &Batch::new(2));
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

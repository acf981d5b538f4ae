//! One thread, any number of tasks; what runs next is drawn from the seed.

use super::{Rng, SimStorage, elsewhere};
use std::{
    collections::BTreeSet,
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::{Arc, Mutex},
    task::{Context, Poll, Wake, Waker},
};

/// The tasks that were woken, by number.
pub type Ready = Arc<Mutex<BTreeSet<usize>>>;

struct TaskWaker {
    id: usize,
    ready: Ready,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.ready.lock().unwrap().insert(self.id);
    }
}

/// Puts a task into `ready`.
pub fn waker_of(id: usize, ready: &Ready) -> Waker {
    Waker::from(Arc::new(TaskWaker { id, ready: ready.clone() }))
}

/// Runs tasks and completes device operations, in an order drawn from the seed.
pub struct Executor<'a> {
    tasks: Vec<Option<Pin<Box<dyn Future<Output = ()> + 'a>>>>,
    ready: Ready,
    pub rng: Rng,
}

/// What a step found to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    Ran,
    /// Every task has ended.
    Done,
    /// Tasks are left, none can run and no operation is under way: a deadlock.
    Stuck,
}

impl<'a> Executor<'a> {
    pub fn new(seed: u64) -> Self {
        Self { tasks: Vec::new(), ready: Ready::default(), rng: Rng::new(seed) }
    }

    pub fn spawn(&mut self, task: impl Future<Output = ()> + 'a) {
        let free = self.tasks.iter().position(Option::is_none).unwrap_or_else(|| {
            self.tasks.push(None);
            self.tasks.len() - 1
        });
        self.tasks[free] = Some(Box::pin(task));
        self.ready.lock().unwrap().insert(free);
    }

    pub fn running(&self) -> usize {
        self.tasks.iter().flatten().count()
    }

    /// Polls one ready task, completes one operation, or ends one job of another thread.
    pub fn step(&mut self, io: &SimStorage) -> Step {
        let ready: Vec<usize> = self.ready.lock().unwrap().iter().copied().collect();
        let (ops, jobs) = (io.in_flight(), elsewhere::at_work());
        if self.running() == 0 {
            return Step::Done;
        }
        if ready.len() + ops + jobs == 0 {
            return Step::Stuck;
        }
        let choice = self.rng.index(ready.len() + ops + jobs);
        match ready.get(choice) {
            None if choice < ready.len() + ops => io.complete(choice - ready.len()),
            None => elsewhere::end(choice - ready.len() - ops),
            Some(&id) => {
                self.ready.lock().unwrap().remove(&id);
                let waker = waker_of(id, &self.ready);
                if let Some(task) = &mut self.tasks[id] {
                    if task.as_mut().poll(&mut Context::from_waker(&waker)).is_ready() {
                        self.tasks[id] = None;
                    }
                }
            }
        }
        Step::Ran
    }
}

/// Lets others run first.
pub async fn yield_now() {
    let mut yielded = false;
    poll_fn(|cx| {
        cx.waker().wake_by_ref();
        if std::mem::replace(&mut yielded, true) { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

/// Runs one future to its end; nothing else happens meanwhile.
pub fn block_on<T>(io: &SimStorage, future: impl Future<Output = T>) -> T {
    match block_on_steps(io, future, u64::MAX) {
        Some(value) => value,
        None => unreachable!("no limit"),
    }
}

/// The same for at most so many completed operations; `None` where that was not enough.
pub fn block_on_steps<T>(io: &SimStorage, future: impl Future<Output = T>, mut steps: u64) -> Option<T> {
    let mut future = std::pin::pin!(future);
    let woken = Ready::default();
    let waker = waker_of(0, &woken);
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return Some(value);
        }
        if woken.lock().unwrap().take(&0).is_some() {
            continue;
        }
        steps = steps.checked_sub(1)?;
        assert!(io.in_flight() > 0, "deadlock: the future waits and no operation is under way");
        io.complete_any();
    }
}

/// Runs both to their ends.
pub async fn join<A, B>(a: impl Future<Output = A>, b: impl Future<Output = B>) -> (A, B) {
    let (mut a, mut b) = (pin!(a), pin!(b));
    let mut results = (None, None);
    std::future::poll_fn(|cx| {
        if results.0.is_none() {
            results.0 = ready(a.as_mut().poll(cx));
        }
        if results.1.is_none() {
            results.1 = ready(b.as_mut().poll(cx));
        }
        match results.0.is_some() && results.1.is_some() {
            true => Poll::Ready(results.0.take().zip(results.1.take()).expect("just seen")),
            false => Poll::Pending,
        }
    })
    .await
}

fn ready<T>(poll: Poll<T>) -> Option<T> {
    match poll {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

//! The event loop of every thread with a ring, in poll batches. Each batch has six phases:
//!
//! ```text
//!   ┌─> reap ──> run ──> hash batch ──> seal record ──> submit ──> sleep ─┐
//!   │             └ ─ ─ ─ submit, reap ─ ─ ┘                               │
//!   └──────────────────────────────────────────────────────────────────────┘
//!
//!   phase        what                                            delays a request by at most
//!   reap         completions wake their tasks                    the time of a look at memory
//!   run          ready tasks run, until none is                  500 µs (BATCH), or one task
//!   hash batch   waiting hash jobs run: small ones side by       the rest of the 500 µs, and one job
//!                side, then large ones until the time is up
//!   seal record  the first writer seals one log record for all   what one record takes to seal
//!   submit       all that was started goes out                   one io_uring_enter
//!   sleep        adaptive batching delay, or until something     a quarter of this batch, 500 µs; none
//!                completes; a stranded hash job instead          while a request is in flight
//! ```
//!
//! No phase waits for another thread. While hash jobs wait that gain from more beside them, the run
//! phase submits, reaps and goes on, within its time. `executor.rs` has the tasks and their wakers,
//! `batch.rs` what a task knows of its batch, `hash_pool.rs` the way to the hash workers, [`ring`]
//! the operations.

mod batch;
mod executor;
mod hash_pool;
mod own_ring;
pub mod ring;
mod tasks;
#[cfg(test)]
mod tests;

pub use batch::Batch;
pub use executor::Executor;
pub use hash_pool::HashPool;
pub use own_ring::OwnRing;

use ring::{EnterWait, Ops};
use std::{
    cell::Cell,
    io,
    time::{Duration, Instant},
};
use ublk_integrity::HashJob;

/// How long a batch runs tasks and hash jobs before what they have started goes out: a task that
/// waits for the first of many requests need not wait until all of them are hashed.
const BATCH: Duration = Duration::from_micros(500);

/// Tasks between two looks at the clock where none was charged.
const TASKS_A_LOOK: u32 = 8;

/// The adaptive batching delay is at most one in so many parts of the batch before it.
const DELAY_DIVISOR: u32 = 4;

/// A thread's tasks and its ring, and how the two are driven.
pub struct EventLoop<'a, 't, Reap: Fn(), Expected: Fn() -> usize> {
    /// The tasks.
    pub executor: &'a Executor<'t>,
    /// The operations of the thread's ring.
    pub ops: &'a Ops,
    /// Takes completions without waiting: those of `ops` go to it.
    pub reap: Reap,
    /// Asked once a batch: how many completions are worth a delay, as they cost less together. From
    /// two on the thread waits for so many, but no longer than the adaptive batching delay.
    pub expected: Expected,
    /// Called before what was started goes out.
    pub sending: &'a dyn Fn(),
    /// What other threads hash; it does not sleep while jobs are stranded there.
    pub hash_pool: Option<&'a HashPool>,
}

impl<Reap: Fn(), Expected: Fn() -> usize> EventLoop<'_, '_, Reap, Expected> {
    /// Runs batches until all tasks have ended.
    pub fn drive(&self) -> io::Result<()> {
        loop {
            let clock = Clock::start(self.executor.batch());
            self.run(&clock)?;
            self.hash_batch(&clock);
            self.seal_record();
            if self.executor.is_done() {
                return Ok(());
            }
            let sleep = self.choose_sleep(&clock);
            self.submit_and_sleep(&sleep)?;
            self.reap();
            if matches!(sleep, Sleep::HashInstead) {
                self.hash_stranded();
            }
        }
    }

    /// Runs what is ready. Where a hash job waits that gains from others beside it, completions are
    /// reaped meanwhile, and what many wait for goes out; until the time is up. Where hash jobs are
    /// left, all that has been started goes out.
    fn run(&self, clock: &Clock<'_>) -> io::Result<()> {
        loop {
            let enough = || self.ops.is_urgent() || clock.is_up_after_a_task();
            while !self.executor.run_until(enough) && self.executor.has_ready() {}
            if !self.should_poll() || clock.is_up() {
                return Ok(());
            }
            self.enter(EnterWait::No)?;
            self.reap();
            // The flag that says there are completions may be a stale one, which the next
            // completion clears (Linux 6.18 sets it after its queue of them, which may be empty
            // by then). So a look that brings nothing is the batch's last.
            if !self.executor.has_ready() {
                return Ok(());
            }
        }
    }

    /// Whether the ring is worth a look before the batch ends.
    fn should_poll(&self) -> bool {
        let something_new = || self.ops.is_urgent() || self.ops.port().has_completions();
        self.executor.batch().benefits_from_batching() && something_new()
            || self.executor.has_hash_jobs() && self.ops.has_started()
    }

    fn hash_batch(&self, clock: &Clock<'_>) {
        self.executor.hash_batch(|| clock.is_up_after_a_task());
    }

    fn seal_record(&self) {
        self.executor.seal_record();
    }

    /// From here on until [awake](Executor::awake) wakes from other threads ring the doorbell,
    /// unless it does not sleep.
    fn choose_sleep(&self, clock: &Clock<'_>) -> Sleep {
        let expected = (self.expected)();
        let idle = self.executor.may_sleep();
        match expected {
            _ if !idle => Sleep::No,
            _ if self.hash_pool.is_some_and(HashPool::has_stranded) => Sleep::HashInstead,
            completions @ 2.. => Sleep::For(EnterWait::Many { completions, at_most: clock.batching_delay() }),
            _ => Sleep::For(EnterWait::One),
        }
    }

    /// Submits all that has been started, and sleeps: one system call does both.
    fn submit_and_sleep(&self, sleep: &Sleep) -> io::Result<()> {
        let entered = self.enter(match sleep {
            Sleep::No | Sleep::HashInstead => EnterWait::No,
            Sleep::For(wait) => *wait,
        });
        self.executor.awake();
        entered
    }

    fn enter(&self, wait: EnterWait) -> io::Result<()> {
        (self.sending)();
        self.ops.enter(wait)
    }

    fn reap(&self) {
        (self.reap)();
    }

    /// Hashes one stranded job, whose request may be of any thread. If a task has become ready
    /// others may wait for that one.
    fn hash_stranded(&self) {
        if !self.executor.has_ready() {
            self.hash_pool.and_then(HashPool::steal).into_iter().for_each(HashJob::run);
        }
    }
}

/// What a thread does at the end of a batch.
enum Sleep {
    /// Tasks are ready, or wait for a batch boundary.
    No,
    /// Hash jobs are stranded.
    HashInstead,
    /// It sleeps.
    For(EnterWait),
}

/// The time of a batch. To look at it takes as long as most tasks do: only after a task that was
/// charged, and after some of the others.
struct Clock<'a> {
    begin: Instant,
    batch: &'a Batch,
    /// Tasks since the last look.
    unseen: Cell<u32>,
}

impl<'a> Clock<'a> {
    fn start(batch: &'a Batch) -> Self {
        Self { begin: batch.look(), batch, unseen: Cell::new(0) }
    }

    fn is_up(&self) -> bool {
        self.elapsed() >= BATCH
    }

    fn is_up_after_a_task(&self) -> bool {
        self.unseen.set(self.unseen.get() + 1);
        if !self.batch.take_charge() && self.unseen.get() < TASKS_A_LOOK {
            return false;
        }
        self.unseen.set(0);
        self.is_up()
    }

    /// For the batch that ends now.
    fn batching_delay(&self) -> Duration {
        (self.elapsed() / DELAY_DIVISOR).min(BATCH)
    }

    fn elapsed(&self) -> Duration {
        self.batch.look().duration_since(self.begin)
    }
}

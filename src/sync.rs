//! The primitives that threads share, in one place, so that a model checker can stand in for them.
//!
//! With `--cfg shuttle` locks and atomics are shuttle's, which tries many interleavings (all of
//! them sequentially consistent). The hint channel is not instrumented; the program has a
//! `sync.rs` of its own.

#[cfg(shuttle)]
use shuttle::sync;
#[cfg(shuttle)]
pub(crate) use shuttle::thread::yield_now as spin_loop;
#[cfg(not(shuttle))]
pub(crate) use std::hint::spin_loop;
#[cfg(not(shuttle))]
use std::sync;

pub(crate) use sync::{
    MutexGuard,
    atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering, fence},
};

/// A lock for short critical sections that do no I/O and contain no `await`.
pub(crate) struct Mutex<T>(sync::Mutex<T>);

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(sync::Mutex::new(value))
    }
    /// Poisoning is passed over: a thread that panicked inside has latched the volume
    /// or ends the process.
    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Tries so many interleavings of a test at random, and as many in which one thread runs far ahead of another, with so many
/// changes of who does (Burckhardt and others 2010).
#[cfg(all(test, shuttle))]
pub(crate) fn check(test: impl Fn() + Send + Sync + Copy + 'static, schedules: usize, changes: usize) {
    shuttle::check_random(test, schedules);
    shuttle::check_pct(test, schedules, changes);
}

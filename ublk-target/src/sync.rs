//! What wakes the program's threads, in one place, so that a model checker can stand in for it.
//!
//! With `--cfg shuttle` the atomics and the place for a waker are shuttle's, which tries many
//! interleavings. Eventfds are not instrumented: each of their operations is one step.

#[cfg(not(shuttle))]
pub use {
    futures_util::task::AtomicWaker,
    std::sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};
#[cfg(shuttle)]
pub use {
    shuttle::sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    waker::AtomicWaker,
};

#[cfg(shuttle)]
mod waker {
    use shuttle::sync::Mutex;
    use std::task::Waker;

    /// The same under a lock.
    #[derive(Default)]
    pub struct AtomicWaker(Mutex<Option<Waker>>);

    impl AtomicWaker {
        pub fn register(&self, waker: &Waker) {
            *self.0.lock().unwrap() = Some(waker.clone());
        }
        pub fn wake(&self) {
            let waker = self.0.lock().unwrap().take();
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }
}

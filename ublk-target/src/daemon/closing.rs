//! The end of a volume, which comes once: with its device, or when that is handed over.

use crate::checkpoints::Stop;
use std::{
    process,
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
};
use ublk_integrity::Latched;

/// The checkpoint thread, until somebody ends it.
pub(super) struct Closing {
    stop: Arc<Stop>,
    checkpoints: Mutex<Option<JoinHandle<Result<(), Latched>>>>,
}

impl Closing {
    pub(super) fn of(stop: Arc<Stop>, checkpoints: JoinHandle<Result<(), Latched>>) -> Self {
        Self { stop, checkpoints: Mutex::new(Some(checkpoints)) }
    }

    /// Makes the last checkpoint. Where somebody else makes it this never returns: that one ends the
    /// process.
    pub(super) fn close(&self) -> Result<(), Latched> {
        // Held to the end: whoever comes second must not overtake the first.
        let mut checkpoints = self.checkpoints.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(last) = checkpoints.take() else {
            loop {
                thread::park();
            }
        };
        self.stop.set();
        last.join().unwrap_or_else(|_| process::abort())
    }
}

//! The end of a volume, which comes once: with its device, or when that is handed over.

use super::scrub::Scrubs;
use crate::checkpoints::Stop;
use std::{
    process,
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
};
use ublk_integrity::Latched;

/// The pass over the volume and the checkpoint thread, until somebody ends them.
pub(super) struct Closing {
    scrubs: Arc<Scrubs>,
    stop: Arc<Stop>,
    checkpoints: Mutex<Option<JoinHandle<Result<(), Latched>>>>,
}

impl Closing {
    pub(super) fn of(scrubs: Arc<Scrubs>, stop: Arc<Stop>, checkpoints: JoinHandle<Result<(), Latched>>) -> Self {
        Self { scrubs, stop, checkpoints: Mutex::new(Some(checkpoints)) }
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
        // Before the last checkpoint, which writes what the pass has to mend.
        self.scrubs.close();
        self.stop.set();
        last.join().unwrap_or_else(|_| process::abort())
    }
}

//! The end of a volume, which comes once: with its device, or when that is handed over.

use super::scrub::Scrubs;
use crate::{anchor::Keeping, checkpoints::Stop};
use std::{
    process,
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
};
use ublk_integrity::Latched;

/// The checkpoint thread, which makes a last checkpoint when it is stopped.
type Checkpoints = JoinHandle<Result<(), Latched>>;

/// The pass over the volume, the anchor thread and the checkpoint thread, until somebody ends them.
pub(super) struct Closing {
    scrubs: Arc<Scrubs>,
    stop: Arc<Stop>,
    threads: Mutex<Option<(Checkpoints, Option<Keeping>)>>,
}

impl Closing {
    pub(super) fn of(
        scrubs: Arc<Scrubs>,
        (stop, checkpoints): (Arc<Stop>, Checkpoints),
        keeping: Option<Keeping>,
    ) -> Self {
        Self { scrubs, stop, threads: Mutex::new(Some((checkpoints, keeping))) }
    }

    /// Makes the last checkpoint, and tells the anchor. Where somebody else does it this never returns: that one
    /// ends the process.
    pub(super) fn close(&self) -> Result<(), Latched> {
        // Held to the end: whoever comes second must not overtake the first.
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((checkpoints, keeping)) = threads.take() else {
            loop {
                thread::park();
            }
        };
        // Before the last checkpoint, which writes what the pass has to mend.
        self.scrubs.close();
        // A tick may wait for a checkpoint.
        let last = keeping.map(Keeping::end);
        self.stop.set();
        let closed = checkpoints.join().unwrap_or_else(|_| process::abort());
        if closed.is_ok() {
            last.into_iter().for_each(|last| last.tell());
        }
        closed
    }
}

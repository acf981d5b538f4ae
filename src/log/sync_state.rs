//! The syncs of the data device: which sequence numbers they have made durable, and whether the log
//! says so yet.

use crate::{Seq, format::RecordBuilder};

/// Most failed numbers before the volume is latched: more means that the data device is gone.
pub(super) const MAX_FAILED: usize = 1024;

/// What a flush entry says: all numbers up to the highest are durable but those listed. These were
/// in flight or failed when the sync began.
pub(super) struct DurableNumbers {
    pub(super) highest: Seq,
    pub(super) except: Vec<Seq>,
}

impl DurableNumbers {
    pub(super) fn nothing(max_requests: usize) -> Self {
        Self { highest: Seq(0), except: Vec::with_capacity(max_requests + MAX_FAILED) }
    }

    pub(super) fn is_all_up_to(&self, highest: Seq) -> bool {
        self.highest == highest && self.except.is_empty()
    }

    /// Lists no more than so many numbers, by lowering the highest. What is cut off is newer than
    /// what is left, and no entry is cut at another length: so a later entry says no less than one
    /// before it, and recovery can go by the last alone.
    pub(super) fn cut(&mut self, most: usize) {
        if self.except.len() > most {
            self.except.sort_unstable();
            self.highest = Seq(self.except[most].0 - 1);
            self.except.truncate(most);
        }
    }

    /// Bytes of the entry.
    pub(super) fn bytes(&self) -> usize {
        RecordBuilder::flush_bytes(self.except.len())
    }

    /// Bytes in the ring of a record with the entry alone.
    pub(super) fn alone(&self, physical_block: usize) -> u64 {
        RecordBuilder::padded_alone(self.bytes(), physical_block) as u64
    }
}

/// The syncs of the data device, and what they have made durable.
pub(super) struct SyncState {
    /// How many syncs have started, and how many are done: there is one at a time, and each begins
    /// with a snapshot. A flush is done when a sync that started after its arrival is.
    pub(super) started: u64,
    pub(super) done: u64,
    /// The last snapshot: durable once its sync is done.
    pub(super) snapshot: DurableNumbers,
    /// What the last sync that is done has made durable.
    pub(super) durable: DurableNumbers,
    /// Whether no record says so yet. Only the newest is logged, since it says all that those
    /// before it did.
    pub(super) unlogged: bool,
}

impl SyncState {
    pub(super) fn new(max_requests: usize) -> Self {
        let nothing = || DurableNumbers::nothing(max_requests);
        Self { started: 0, done: 0, snapshot: nothing(), durable: nothing(), unlogged: false }
    }

    pub(super) fn is_running(&self) -> bool {
        self.started > self.done
    }
}

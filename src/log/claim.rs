//! What a sync of the data device finds out, and what of it the log is still to be told.

use crate::{Seq, format::RecordBuilder};

/// Most abandoned numbers before the volume is latched: more means that the data device is gone.
pub(super) const MAX_ABANDONED: usize = 1024;

/// What a sync finds out, once it has ended: all numbers up to the highest are durable but those listed, which were in flight
/// or abandoned when it began.
pub(super) struct Claim {
    pub(super) highest: Seq,
    pub(super) except: Vec<Seq>,
}

impl Claim {
    pub(super) fn nothing(max_requests: usize) -> Self {
        Self { highest: Seq(0), except: Vec::with_capacity(max_requests + MAX_ABANDONED) }
    }

    pub(super) fn is_all_up_to(&self, highest: Seq) -> bool {
        self.highest == highest && self.except.is_empty()
    }

    /// Lists no more than so many numbers, by claiming less. What is cut off is newer than what is left, and no entry is cut
    /// at another length: so a later one claims no less than one before, and recovery can go by the last alone.
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

pub(super) struct FlushState {
    /// Snapshots taken, and how many of their syncs have ended: a flush is done when one taken after its arrival has been
    /// synced. There is one at a time.
    pub(super) started: u64,
    pub(super) done: u64,
    /// The last snapshot, while its sync is under way.
    pub(super) snapshot: Claim,
    /// What the last sync that has ended found out.
    pub(super) found: Claim,
    /// No record says so yet. Only the newest is ever owed, since it says what those before it did.
    pub(super) owed: bool,
}

impl FlushState {
    pub(super) fn new(max_requests: usize) -> Self {
        let nothing = || Claim::nothing(max_requests);
        Self { started: 0, done: 0, snapshot: nothing(), found: nothing(), owed: false }
    }

    pub(super) fn is_running(&self) -> bool {
        self.started > self.done
    }
}

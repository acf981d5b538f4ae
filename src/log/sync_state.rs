//! The syncs of the data device: which sequence numbers they have made durable, and whether the log
//! says so yet. And the rounds of the anchor.

use crate::{Seq, format::RecordBuilder};

/// Most failed numbers before the volume is latched: more means that the data device is gone.
pub(super) const MAX_FAILED: usize = 1024;

/// What a flush entry says: all numbers up to the highest are durable but those listed. These were
/// in flight or failed when the sync began.
pub(super) struct DurableNumbers {
    pub(super) highest: Seq,
    pub(super) except: Vec<Seq>,
    /// When it was taken: a later one says no less.
    pub(super) taken: u64,
}

impl DurableNumbers {
    pub(super) fn nothing(max_requests: usize) -> Self {
        Self { highest: Seq(0), except: Vec::with_capacity(max_requests + MAX_FAILED), taken: 0 }
    }

    /// All up to `highest` but `except`, as of now.
    fn take(&mut self, highest: Seq, except: impl Iterator<Item = Seq>, taken: u64) {
        (self.highest, self.taken) = (highest, taken);
        self.except.clear();
        self.except.extend(except);
    }

    pub(super) fn is_all_up_to(&self, highest: Seq) -> bool {
        self.highest == highest && self.except.is_empty()
    }

    /// Lists no more than so many numbers, by lowering the highest. What is cut off is newer than
    /// what is left, and no entry is cut at another length: so a later entry says no less than one
    /// before it, and recovery can go by the last alone.
    fn cut(&mut self, most: usize) {
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

/// Which data writes must have been synced.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Unsynced {
    /// Those that no record carries: what a flush promises.
    NotCarried,
    /// All that have ended: what a checkpoint needs, which frees the records that carry others.
    Ended,
    /// One that is not counted, too, since it has just failed or has no number: there is always a sync.
    Uncounted,
}

/// The syncs of the data device, and what they have made durable.
pub(super) struct SyncState {
    /// Data writes that have ended: counted in the step in which their number leaves the in-flight
    /// list.
    ended: u64,
    /// `ended` after the last of them that no record carries.
    ended_not_carried: u64,
    /// `ended` as it was when the last sync that succeeded began, and when the one that runs did.
    synced: u64,
    syncing: u64,
    /// Snapshots taken.
    snapshots: u64,
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
    /// The newest snapshot that a durable record has, with all records before it.
    pub(super) recorded: u64,
}

impl SyncState {
    pub(super) fn new(max_requests: usize) -> Self {
        let nothing = || DurableNumbers::nothing(max_requests);
        Self {
            ended: 0,
            ended_not_carried: 0,
            synced: 0,
            syncing: 0,
            snapshots: 0,
            started: 0,
            done: 0,
            snapshot: nothing(),
            durable: nothing(),
            unlogged: false,
            recorded: 0,
        }
    }

    /// A data write has ended.
    pub(super) fn data_write_ended(&mut self, carried: bool) {
        self.ended += 1;
        if !carried {
            self.ended_not_carried = self.ended;
        }
    }

    /// Whether there is nothing to sync.
    pub(super) fn is_synced(&self, unsynced: Unsynced) -> bool {
        match unsynced {
            Unsynced::NotCarried => self.ended_not_carried <= self.synced,
            Unsynced::Ended => self.ended <= self.synced,
            Unsynced::Uncounted => false,
        }
    }

    /// A sync begins, which will make all up to `highest` durable, but `except`.
    pub(super) fn begin(&mut self, highest: Seq, except: impl Iterator<Item = Seq>) {
        self.started += 1;
        self.syncing = self.ended;
        self.snapshots += 1;
        self.snapshot.take(highest, except, self.snapshots);
    }

    /// It has succeeded. A flush entry lists at most so many numbers.
    pub(super) fn succeed(&mut self, most_listed: usize) {
        self.done = self.started;
        self.synced = self.syncing;
        // What was durable without a sync meanwhile says more.
        if self.snapshot.taken > self.durable.taken {
            std::mem::swap(&mut self.snapshot, &mut self.durable);
            self.durable.cut(most_listed);
        }
    }

    /// All up to `highest` is durable, but `except`, without a sync. Whether that is news.
    pub(super) fn durable_already(
        &mut self,
        highest: Seq,
        except: impl Iterator<Item = Seq>,
        most_listed: usize,
    ) -> bool {
        if self.durable.is_all_up_to(highest) {
            return false;
        }
        self.snapshots += 1;
        self.durable.take(highest, except, self.snapshots);
        self.durable.cut(most_listed);
        true
    }

    pub(super) fn is_running(&self) -> bool {
        self.started > self.done
    }
}

/// The rounds of the anchor, where flushes wait for that.
#[derive(Default)]
pub(super) struct AnchorRounds {
    pub(super) started: u64,
    pub(super) done: u64,
    /// The last one that a flush waits for.
    pub(super) wanted: u64,
}

impl AnchorRounds {
    /// Whether a flush waits for one that is not done.
    pub(super) fn is_wanted(&self) -> bool {
        self.wanted > self.done
    }
}

//! Ranges that are looked at without a lock on them: whether anybody who may change them comes meanwhile.
//!
//! Nobody waits for a watch, and a watch waits for nobody: who looks may take as long as it likes. What
//! has been seen counts if the watch was *quiet* from before the look until after it.

use crate::{
    BlockRange,
    sync::{AtomicUsize, Mutex, Ordering},
};
use arrayvec::ArrayVec;

/// Most ranges that are watched at a time; one more is never quiet.
const MOST_WATCHED: usize = 32;

struct Watched {
    id: u64,
    range: BlockRange,
    disturbed: bool,
}

struct List {
    next: u64,
    watched: ArrayVec<Watched, MOST_WATCHED>,
}

/// The ranges that are watched.
pub(crate) struct Watches {
    /// Length of the list, to be read without the lock: it is empty but for moments.
    count: AtomicUsize,
    list: Mutex<List>,
}

/// A range that is watched until this is dropped.
pub(crate) struct RangeWatch<'a> {
    watches: &'a Watches,
    id: u64,
}

impl Watches {
    pub(crate) fn new() -> Self {
        Self { count: AtomicUsize::new(0), list: Mutex::new(List { next: 0, watched: ArrayVec::new() }) }
    }

    pub(crate) fn begin(&self, range: BlockRange) -> RangeWatch<'_> {
        let mut list = self.list.lock();
        let id = list.next;
        list.next += 1;
        let _ = list.watched.try_push(Watched { id, range, disturbed: false });
        self.count.store(list.watched.len(), Ordering::SeqCst);
        RangeWatch { watches: self, id }
    }

    /// Somebody who may change this range has come. A watch that is not seen here begins later, and looks
    /// for whoever is there by then.
    pub(crate) fn disturb(&self, range: BlockRange) {
        if self.count.load(Ordering::SeqCst) > 0 {
            self.mark(|watched| watched.range.overlaps(range));
        }
    }

    fn mark(&self, which: impl Fn(&Watched) -> bool) {
        self.list
            .lock()
            .watched
            .iter_mut()
            .filter(|watched| which(watched))
            .for_each(|watched| watched.disturbed = true);
    }
}

impl RangeWatch<'_> {
    /// Somebody was there before it began.
    pub(crate) fn disturb(&self) {
        self.watches.mark(|watched| watched.id == self.id);
    }

    /// Whether nobody who may change the range was there from the beginning of this watch until now.
    pub(crate) fn is_quiet(&self) -> bool {
        self.watches.list.lock().watched.iter().any(|watched| watched.id == self.id && !watched.disturbed)
    }
}

impl Drop for RangeWatch<'_> {
    fn drop(&mut self) {
        let mut list = self.watches.list.lock();
        list.watched.retain(|watched| watched.id != self.id);
        self.watches.count.store(list.watched.len(), Ordering::SeqCst);
    }
}

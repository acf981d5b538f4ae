//! What a thread has in flight, and how many requests it may expect: the ground of the adaptive
//! batching delay.

use crate::sync::{AtomicU64, Ordering};
use std::cell::Cell;

/// What one thread has under way: requests, and writes that were answered early and are not in
/// place. That thread alone changes it.
#[derive(Default)]
#[repr(align(128))]
pub(super) struct UnderWay(AtomicU64);

impl UnderWay {
    /// For its own thread.
    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// For others, in one order with all that begins.
    pub(super) fn now(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }

    pub(super) fn begin(&self) {
        self.0.store(self.get() + 1, Ordering::SeqCst);
    }

    pub(super) fn end(&self) {
        self.0.store(self.get() - 1, Ordering::Release);
    }
}

/// The requests of one thread, counted: as many as it has answered in this batch are expected next.
pub(super) struct Load<'g> {
    /// Fetched and not answered, or answered and not in place.
    under_way: &'g UnderWay,
    /// Answered, and not followed by others yet.
    answered: Cell<usize>,
}

impl<'g> Load<'g> {
    /// Of a thread that has this under way.
    pub(super) fn of(under_way: &'g UnderWay) -> Self {
        Self { under_way, answered: Cell::new(0) }
    }

    pub(super) fn fetched(&self) {
        self.under_way.begin();
        self.answered.set(self.answered.get().saturating_sub(1));
    }

    /// A request that was fetched is not served yet after all.
    pub(super) fn turned_back(&self) {
        self.under_way.end();
    }

    pub(super) fn answered(&self) {
        self.under_way.end();
        self.answered.set(self.answered.get() + 1);
    }

    /// A write that is about to be answered stays under way until it is written back.
    pub(super) fn admitted(&self) {
        self.under_way.begin();
    }

    pub(super) fn written_back(&self) {
        self.under_way.end();
    }

    /// How many completions to wait for now, with so many `operations` in flight. A program that
    /// keeps many requests going sends others for nearly all that were answered in this batch; if
    /// it does not, the guess was wrong once.
    pub(super) fn expected(&self, operations: usize) -> usize {
        let answered = self.answered.take();
        match self.under_way.get() as usize + operations {
            0 => answered * 3 / 4,
            // A completion or a wake that a request waits for must not be delayed for others.
            _ => 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_as_were_answered_are_expected_once_and_only_while_nothing_is_in_flight() {
        let under_way = UnderWay::default();
        let load = Load::of(&under_way);
        let batch = |requests| {
            (0..requests).for_each(|_| load.fetched());
            (0..requests).for_each(|_| load.answered());
        };
        assert_eq!(load.expected(0), 0, "nobody has come yet");
        batch(8);
        assert_eq!(load.expected(0), 6);
        assert_eq!(load.expected(0), 0, "they did not come");
        batch(1);
        assert_eq!(load.expected(0), 0, "one at a time never waits");
        (0..3).for_each(|_| batch(4));
        assert_eq!(load.expected(0), 3, "the same four, three times");
        batch(8);
        assert_eq!(load.expected(1), 1, "an operation is waited for");
        load.fetched();
        batch(8);
        assert_eq!(load.expected(0), 1, "one may wait for another thread");
    }
}

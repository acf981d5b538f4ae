//! What a thread has in flight, and how many requests it may expect: the ground of the adaptive
//! batching delay.

use std::cell::Cell;

/// The requests of one thread, counted: as many as it has answered in this batch are expected next.
#[derive(Default)]
pub(super) struct Load {
    /// Fetched and not answered, or answered and not in place.
    in_flight: Cell<usize>,
    /// Answered, and not followed by others yet.
    answered: Cell<usize>,
}

impl Load {
    pub(super) fn fetched(&self) {
        self.in_flight.set(self.in_flight.get() + 1);
        self.answered.set(self.answered.get().saturating_sub(1));
    }

    pub(super) fn answered(&self) {
        self.in_flight.set(self.in_flight.get() - 1);
        self.answered.set(self.answered.get() + 1);
    }

    /// A write that is about to be answered stays in flight until it is written back.
    pub(super) fn admitted(&self) {
        self.in_flight.set(self.in_flight.get() + 1);
    }

    pub(super) fn written_back(&self) {
        self.in_flight.set(self.in_flight.get() - 1);
    }

    /// How many completions to wait for now, with so many `operations` in flight. A program that
    /// keeps many requests going sends others for nearly all that were answered in this batch; if
    /// it does not, the guess was wrong once.
    pub(super) fn expected(&self, operations: usize) -> usize {
        let answered = self.answered.take();
        match self.in_flight.get() + operations {
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
        let load = Load::default();
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

//! Carrying: a record holds the data of a small write beside its tags, so that it is durable with the record.
//!
//! Whoever flushes may log such a write in the place of its request, which goes on with it later.

use super::{Appended, Change, Log, Logged, Requester, state::State};
use crate::format::RecordBuilder;
use std::task::Waker;

impl Log {
    /// Whether a record may carry the data of this change: it has room for it, and the log is empty
    /// enough. Tags, which everybody needs, keep a quarter of the ring. So data never waits for space
    /// there.
    pub(super) fn may_carry(&self, s: &State, change: &Change<'_>) -> bool {
        let Change::Payload { tags, blocks, .. } = change else { return false };
        let alone = change.alone(self.config.physical_block) + self.config.max_record as u64;
        self.config.sync_log
            && RecordBuilder::can_carry(self.config.max_record, tags.len(), blocks.len())
            && (s.used() + alone) * 4 <= self.config.size * 3
    }

    /// Logs a change that a record is to carry in the place of the request that it is of, if that can be done at once. Until
    /// that request [takes it over](Self::take_over) its epoch is not checkpointed. `of.thread` is the thread that this is
    /// called on, which commits the record. And a waker that is to be called.
    pub(crate) fn try_carry(&self, of: Requester, change: &Change<'_>) -> (Option<Logged>, Option<Waker>) {
        let mut s = self.state.lock();
        if s.latched.is_some() || !s.space_queue.is_empty() || !self.may_carry(&s, change) {
            return (None, None);
        }
        let alone = change.alone(self.config.physical_block);
        let appended = self.has_room(&mut s, change, alone).then(|| self.take_step(&mut s, of, change, alone));
        (appended.map(Appended::leave), self.ask_for_checkpoint(&mut s))
    }

    /// A request that is no more waits for nothing.
    pub(crate) fn leave_waiters(&self, request: usize) {
        self.state.lock().waiters.remove(request);
    }

    /// The request goes on with what was logged in its place.
    pub(crate) fn take_over(&self, logged: Logged) -> Appended<'_> {
        Appended { log: self, logged, ended: false }
    }
}

impl Appended<'_> {
    /// Leaves the change to its request.
    fn leave(mut self) -> Logged {
        self.ended = true;
        self.logged
    }
}

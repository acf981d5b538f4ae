//! Flush: which numbers are durable on the data device, who may share the sync, and what the log is still to be told.

use super::{
    Log,
    claim::Claim,
    state::{CheckpointerWaits, State, Unfinished},
    waiters::Waiting,
};
use crate::{Device, DeviceError, Errno, Latched, Seq, Storage, format::RecordBuilder};
use std::{
    future::poll_fn,
    task::{Poll, Waker},
};

enum Role {
    Done,
    Lead,
}

impl Log {
    /// Makes everything that completed before durable on the data device, and sees to it that the log says so, which is not
    /// waited for. Nothing to do costs nothing.
    ///
    /// Every sync of the data device goes through here, one at a time: Linux reports a write-back error to one
    /// sync only, and whoever comes after that one must find the volume latched.
    pub(crate) async fn flush<S: Storage>(&self, io: &S, request: usize) -> Result<(), Latched> {
        let mut wanted = None;
        let role = poll_fn(|cx| match self.flush_role(request, &mut wanted, cx.waker()) {
            Some(role) => Poll::Ready(role),
            None => Poll::Pending,
        })
        .await?;
        let Role::Lead = role else { return Ok(()) };
        let unfinished = Unfinished::new(self);
        let result = io.sync(Device::Data).await;
        unfinished.complete();
        self.flushed(result)?;
        self.wake_all(|_, why| why == Waiting::Flush);
        Ok(())
    }

    fn flush_role(&self, request: usize, wanted: &mut Option<u64>, waker: &Waker) -> Option<Result<Role, Latched>> {
        let mut guard = self.state.lock();
        let s = &mut *guard;
        let highest = Seq(s.next_seq.0 - 1);
        let idle = s.flush.found.is_all_up_to(highest);
        // A flush may join only one whose snapshot is not yet taken.
        let wanted = *wanted.get_or_insert(s.flush.started + 1);
        let role = if let Some(why) = s.latched {
            Err(why)
        } else if s.flush.done >= wanted || idle {
            Ok(Role::Done)
        } else if s.flush.is_running() {
            s.waiters.wait(request, Waiting::Flush, waker);
            return None;
        } else {
            s.flush.started += 1;
            let Claim { highest: claimed, except } = &mut s.flush.snapshot;
            *claimed = highest;
            except.clear();
            except.extend(s.in_flight.iter().flatten().chain(&s.abandoned).map(|(seq, _)| *seq));
            Ok(Role::Lead)
        };
        s.waiters.leave(request);
        Some(role)
    }

    fn flushed(&self, result: Result<(), Errno>) -> Result<(), Latched> {
        if let Err(errno) = result {
            let why = Latched::Device(DeviceError::sync(Device::Data, errno));
            self.latch(why);
            return Err(why);
        }
        let wake = {
            let mut guard = self.state.lock();
            let s = &mut *guard;
            // Linux reports a write-back error to one sync only: it may have been somebody else's.
            if let Some(why) = s.latched {
                return Err(why);
            }
            let flush = &mut s.flush;
            flush.done = flush.started;
            std::mem::swap(&mut flush.snapshot, &mut flush.found);
            flush.found.cut(RecordBuilder::max_listed(self.config.max_record));
            // Where nothing in the log is still to be checkpointed, there is nobody to tell.
            flush.owed |= s.of_epoch.iter().any(|of| of.appended > 0);
            self.wants_flush_record(s).then(|| s.checkpointer_that(CheckpointerWaits::Work)).flatten()
        };
        wake.into_iter().for_each(Waker::wake);
        Ok(())
    }

    /// Puts what flushes have found out into the record that gathers, if it has room for that beside so many bytes of others.
    /// Where it has none, the next record is asked.
    pub(super) fn tell(&self, s: &mut State, others: usize) {
        if self.has_room_to_tell(s, others) {
            let Claim { highest, except } = &s.flush.found;
            s.gather.reserved += s.flush.found.alone(self.config.physical_block);
            s.gather.builder.push_flush(*highest, except.iter().copied());
            s.flush.owed = false;
        }
    }

    fn has_room_to_tell(&self, s: &State, others: usize) -> bool {
        let alone = s.flush.found.alone(self.config.physical_block);
        let in_ring = s.used() + alone + self.config.max_record as u64 <= self.config.size;
        s.flush.owed && s.gather.builder.fits(s.flush.found.bytes() + others) && in_ring
    }

    /// Whether the checkpoint thread is to write a record that only says what flushes have found out.
    pub(super) fn wants_flush_record(&self, s: &State) -> bool {
        s.gather.builder.is_empty() && s.may_lead() && self.has_room_to_tell(s, 0)
    }
}

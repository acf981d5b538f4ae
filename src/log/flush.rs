//! Syncs of the data device: which requests share one, which numbers it makes durable, and the
//! flush entry that logs them.

use super::{
    Log,
    state::{CheckpointerWaits, State, Unfinished, Waiting},
    sync_state::DurableNumbers,
};
use crate::{Device, DeviceError, Errno, Latched, Seq, Storage, format::RecordBuilder};
use std::{
    future::poll_fn,
    task::{Poll, Waker},
};

enum SyncRole {
    Done,
    Lead,
}

impl Log {
    /// Syncs the data device, so that every change that was completed before is durable on it. A
    /// flush entry that says so goes into a later record, which is not waited for. Where all is
    /// durable already it does nothing.
    ///
    /// Every sync of the data device of an open volume goes through here, one at a time.
    /// Linux reports a page-cache write error to one sync only, and every later caller must
    /// find the volume latched.
    pub(crate) async fn sync_data<S: Storage>(&self, io: &S, request: usize) -> Result<(), Latched> {
        let mut wanted = None;
        let role = poll_fn(|cx| match self.sync_role(request, &mut wanted, cx.waker()) {
            Some(role) => Poll::Ready(role),
            None => Poll::Pending,
        })
        .await?;
        let SyncRole::Lead = role else { return Ok(()) };
        let unfinished = Unfinished::new(self);
        let result = io.sync(Device::Data).await;
        unfinished.complete();
        self.data_synced(result)?;
        self.wake_all(|_, why| why == Waiting::Sync);
        Ok(())
    }

    fn sync_role(&self, request: usize, wanted: &mut Option<u64>, waker: &Waker) -> Option<Result<SyncRole, Latched>> {
        let mut guard = self.state.lock();
        let s = &mut *guard;
        let highest = Seq(s.next_seq.0 - 1);
        let idle = s.sync.durable.is_all_up_to(highest);
        // A flush may join only one whose snapshot is not yet taken.
        let wanted = *wanted.get_or_insert(s.sync.started + 1);
        let role = if let Some(why) = s.latched {
            Err(why)
        } else if s.sync.done >= wanted || idle {
            Ok(SyncRole::Done)
        } else if s.sync.is_running() {
            s.waiters.wait(request, Waiting::Sync, waker);
            return None;
        } else {
            s.sync.started += 1;
            let DurableNumbers { highest: up_to, except } = &mut s.sync.snapshot;
            *up_to = highest;
            except.clear();
            except.extend(s.in_flight.iter().flatten().chain(&s.failed).map(|(seq, _)| *seq));
            Ok(SyncRole::Lead)
        };
        s.waiters.remove(request);
        Some(role)
    }

    fn data_synced(&self, result: Result<(), Errno>) -> Result<(), Latched> {
        if let Err(errno) = result {
            let why = Latched::Device(DeviceError::sync(Device::Data, errno));
            self.latch(why);
            return Err(why);
        }
        let wake = {
            let mut guard = self.state.lock();
            let s = &mut *guard;
            // Linux reports a page-cache write error to one sync only. That may have been another
            // one, which latched the volume.
            if let Some(why) = s.latched {
                return Err(why);
            }
            let sync = &mut s.sync;
            sync.done = sync.started;
            std::mem::swap(&mut sync.snapshot, &mut sync.durable);
            sync.durable.cut(RecordBuilder::max_listed(self.config.max_record));
            // Where the log has nothing that is still to be checkpointed, recovery has no use for it.
            sync.unlogged |= s.of_epoch.iter().any(|of| of.appended > 0);
            self.wants_flush_record(s).then(|| s.checkpointer_waker(CheckpointerWaits::Work)).flatten()
        };
        wake.into_iter().for_each(Waker::wake);
        Ok(())
    }

    /// Puts the unlogged flush entry into the record that gathers, if there is one and it fits
    /// beside so many bytes of `others`. Where it does not fit, the next record is tried.
    pub(super) fn push_flush_entry(&self, s: &mut State, others: usize) {
        if self.fits_flush_entry(s, others) {
            let DurableNumbers { highest, except } = &s.sync.durable;
            s.gather.reserved += s.sync.durable.alone(self.config.physical_block);
            s.gather.builder.push_flush(*highest, except.iter().copied());
            s.sync.unlogged = false;
        }
    }

    fn fits_flush_entry(&self, s: &State, others: usize) -> bool {
        let alone = s.sync.durable.alone(self.config.physical_block);
        let in_ring = s.used() + alone + self.config.max_record as u64 <= self.config.size;
        s.sync.unlogged && s.gather.builder.fits(s.sync.durable.bytes() + others) && in_ring
    }

    /// Whether the checkpoint thread is to write a record with nothing but a flush entry.
    pub(super) fn wants_flush_record(&self, s: &State) -> bool {
        s.gather.builder.is_empty() && s.may_lead() && self.fits_flush_entry(s, 0)
    }
}

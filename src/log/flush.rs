//! Syncs of the data device: which requests share one, which numbers it makes durable, and the
//! flush entry that logs them.

use super::{
    Log,
    state::{CheckpointerWaits, State, Unfinished, Waiting},
    sync_state::{DurableNumbers, Unsynced},
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
    /// Syncs the data device, so that every change that was completed before is durable: on it, or
    /// carried by a durable record. A flush entry that says so goes into a later record, which is
    /// not waited for. Where nothing is `unsynced` there is no sync, but the entry all the same.
    ///
    /// The entry claims: every number up to the highest that is not listed is durable if its own
    /// record and those before it are. Without a sync that holds at the instant at which nothing is
    /// unsynced that no record carries. Numbers that are carried are not listed: what carries them
    /// comes before the entry in the chain.
    ///
    /// Every sync of the data device of an open volume goes through here, one at a time.
    /// Linux reports a page-cache write error to one sync only, and every later caller must
    /// find the volume latched.
    pub(crate) async fn sync_data<S: Storage>(
        &self,
        io: &S,
        request: usize,
        unsynced: Unsynced,
    ) -> Result<(), Latched> {
        let mut wanted = None;
        let role = poll_fn(|cx| match self.sync_role(request, unsynced, &mut wanted, cx.waker()) {
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

    fn sync_role(
        &self,
        request: usize,
        unsynced: Unsynced,
        wanted: &mut Option<u64>,
        waker: &Waker,
    ) -> Option<Result<SyncRole, Latched>> {
        let mut guard = self.state.lock();
        let s = &mut *guard;
        let highest = Seq(s.next_seq.0 - 1);
        let not_carried = s.in_flight.iter().flatten().filter(|change| !change.carried).map(|change| change.seq);
        let except = not_carried.chain(s.failed.iter().map(|(seq, _)| *seq));
        // A flush may join only one whose snapshot is not yet taken.
        let wanted = *wanted.get_or_insert(s.sync.started + 1);
        let mut wake = None;
        let role = if let Some(why) = s.latched {
            Err(why)
        } else if s.sync.done >= wanted {
            Ok(SyncRole::Done)
        } else if s.sync.is_synced(unsynced) {
            if s.sync.durable_already(highest, except, RecordBuilder::max_listed(self.config.max_record)) {
                wake = self.durable_is_news(s);
            }
            Ok(SyncRole::Done)
        } else if s.sync.is_running() {
            s.waiters.wait(request, Waiting::Sync, waker);
            return None;
        } else {
            s.sync.begin(highest, except);
            Ok(SyncRole::Lead)
        };
        s.waiters.remove(request);
        drop(guard);
        wake.into_iter().for_each(Waker::wake);
        Some(role)
    }

    /// The newest flush entry says more than the log does: it is to be logged. The checkpoint
    /// thread's waker, if it is for that thread to do.
    fn durable_is_news(&self, s: &mut State) -> Option<Waker> {
        // Where the log has nothing that is still to be checkpointed, recovery has no use for it.
        s.sync.unlogged |= s.of_epoch.iter().any(|of| of.appended > 0);
        self.wants_flush_record(s).then(|| s.checkpointer_waker(CheckpointerWaits::Work)).flatten()
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
            s.sync.succeed(RecordBuilder::max_listed(self.config.max_record));
            self.durable_is_news(s)
        };
        wake.into_iter().for_each(Waker::wake);
        Ok(())
    }

    /// The newest flush entry is to be logged once more: an epoch that changes nothing gets a record by that, and
    /// can be checkpointed.
    pub(crate) fn say_durable_again(&self) {
        self.state.lock().sync.unlogged = true;
    }

    /// Puts the unlogged flush entry into the record that gathers, if there is one and it fits
    /// beside so many bytes of `others`. Where it does not fit, the next record is tried.
    pub(super) fn push_flush_entry(&self, s: &mut State, others: usize) {
        if self.fits_flush_entry(s, others) {
            let DurableNumbers { highest, except, .. } = &s.sync.durable;
            s.gather.reserved += s.sync.durable.alone(self.config.physical_block);
            s.gather.builder.push_flush(*highest, except.iter().copied());
            s.gather.says = s.sync.durable.taken;
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

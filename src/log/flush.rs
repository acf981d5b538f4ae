//! Flush: which numbers are durable on the data device, and who may share the sync.

use super::{
    Log,
    commit::Unfinished,
    state::{MAX_ABANDONED, Waiting, WorkerWaits},
};
use crate::{
    Device, DeviceError, Errno, Latched, Seq, Storage,
    format::{ENTRY_BYTES, RecordBuilder},
};
use std::{
    future::poll_fn,
    task::{Poll, Waker},
};

pub(super) struct FlushState {
    running: bool,
    /// Snapshots taken; a flush is done when one taken after its arrival has been synced.
    started: u64,
    done: u64,
    /// Highest number at the snapshot of the last completed flush, and whether anything was listed.
    last_highest: Seq,
    last_listed: bool,
    /// Its entry was dropped: the log does not know of it.
    last_dropped: bool,
    /// Numbers listed at the snapshot of the running flush.
    listed: Vec<Seq>,
}

impl FlushState {
    pub(super) fn new(max_slots: usize) -> Self {
        Self {
            running: false,
            started: 0,
            done: 0,
            last_highest: Seq(0),
            last_listed: false,
            last_dropped: false,
            listed: Vec::with_capacity(max_slots + MAX_ABANDONED),
        }
    }
}

impl FlushState {
    /// The log does not hold what the last flush had to say: the next one is not idle.
    pub(super) fn entry_dropped(&mut self) {
        self.last_dropped = true;
    }
}

enum Turn {
    Done,
    Lead { highest: Seq },
}

impl Log {
    /// Makes everything that completed before durable on the data device, and notes in the log that it is.
    /// Nothing to do costs nothing.
    ///
    /// Every sync of the data device goes through here, one at a time: Linux reports a write-back error to one
    /// sync only, and whoever comes after that one must find the volume latched.
    pub(crate) async fn flush<S: Storage>(&self, io: &S, slot: usize) -> Result<(), Latched> {
        let mut wanted = None;
        let turn = poll_fn(|cx| match self.flush_turn(slot, &mut wanted, cx.waker()) {
            Some(turn) => Poll::Ready(turn),
            None => Poll::Pending,
        })
        .await?;
        let Turn::Lead { highest } = turn else { return Ok(()) };
        let unfinished = Unfinished(self);
        let result = io.sync(Device::Data).await;
        std::mem::forget(unfinished);
        self.flushed(highest, result)?;
        self.wake_all(|_, why| why == Waiting::Flush);
        Ok(())
    }

    fn flush_turn(&self, slot: usize, wanted: &mut Option<u64>, waker: &Waker) -> Option<Result<Turn, Latched>> {
        let mut guard = self.state.lock();
        let s = &mut *guard;
        let highest = Seq(s.next_seq.0 - 1);
        let idle = highest == s.flush.last_highest && !s.flush.last_listed && !s.flush.last_dropped;
        // A flush may join only one whose snapshot is not yet taken.
        let wanted = *wanted.get_or_insert(s.flush.started + 1);
        let turn = if let Some(why) = s.latched {
            Err(why)
        } else if s.flush.done >= wanted || idle {
            Ok(Turn::Done)
        } else if s.flush.running {
            s.waiters.wait(slot, Waiting::Flush, waker);
            return None;
        } else {
            s.flush.running = true;
            s.flush.started += 1;
            s.flush.listed.clear();
            s.flush.listed.extend(s.in_flight.iter().flatten().chain(&s.abandoned).map(|(seq, _)| *seq));
            Ok(Turn::Lead { highest })
        };
        s.waiters.leave(slot);
        Some(turn)
    }

    fn flushed(&self, highest: Seq, result: Result<(), Errno>) -> Result<(), Latched> {
        if let Err(errno) = result {
            let offset = crate::ByteOffset(0);
            let why = Latched::Device(DeviceError { op: "sync", device: Device::Data, offset, len: 0, errno });
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
            s.flush.running = false;
            s.flush.done = s.flush.started;
            s.flush.last_highest = highest;
            s.flush.last_listed = !s.flush.listed.is_empty();
            s.flush.last_dropped = false;
            // The entry is not waited for, and dropped where it does not fit: harmless, recovery
            // then only believes less to be durable.
            let bytes = ENTRY_BYTES + 8 * s.flush.listed.len();
            let alone = RecordBuilder::padded_alone(bytes, self.config.physical_block) as u64;
            let fits = (s.gather.is_empty() || s.gather_epoch == s.epoch)
                && s.gather.fits(bytes)
                && s.used() + alone + self.config.max_record as u64 <= self.config.size;
            // Where nothing in the log is still to be checkpointed, there is nobody to tell.
            if fits && s.of_epoch.iter().any(|of| of.appended > 0) {
                s.gather.push_flush(highest, s.flush.listed.iter().copied());
                s.gather_epoch = s.epoch;
                s.gather_reserved += alone;
                s.reserved += alone;
                s.want_flush_record |= !s.gather_owned && s.may_lead();
            }
            let wanted = s.want_flush_record;
            wanted.then(|| s.worker_that(WorkerWaits::Work)).flatten()
        };
        wake.into_iter().for_each(Waker::wake);
        Ok(())
    }
}

//! Append: the indivisible step by which a change enters the log, and the end of the change.

use super::{
    CheckpointerWork, Log, LogPoint,
    state::{CheckpointerWaits, InFlight, State, Waiting},
    sync_state::MAX_FAILED,
};
use crate::{
    BlockIndex, BlockRange, Epoch, Latched, Seq,
    format::{ENTRY_BYTES, RecordBuilder, TAG_BYTES, Tag},
};
use std::{
    future::poll_fn,
    ops::Deref,
    task::{Poll, Waker},
};

/// The request that logs a change: its context's index, and the I/O thread that runs it.
#[derive(Clone, Copy)]
pub(crate) struct Requester {
    pub(crate) id: usize,
    pub(crate) thread: usize,
}

/// Something to log.
#[derive(Clone, Copy)]
pub(crate) enum Change<'a> {
    Tags {
        first: BlockIndex,
        tags: &'a [Tag],
    },
    /// Tags and the blocks that they are of. Where the log is too full for these it takes the tags
    /// alone.
    Payload {
        first: BlockIndex,
        tags: &'a [Tag],
        blocks: &'a [u8],
    },
    Zeros(BlockRange),
}

impl<'a> Change<'a> {
    fn bytes(&self) -> usize {
        match self {
            Change::Tags { tags, .. } | Change::Payload { tags, .. } => ENTRY_BYTES + tags.len() * TAG_BYTES,
            Change::Zeros(_) => ENTRY_BYTES,
        }
    }
    /// Bytes of the ring for a record with this entry alone.
    pub(super) fn alone(&self, physical_block: usize) -> u64 {
        let bytes = match self {
            Change::Payload { tags, blocks, .. } => {
                RecordBuilder::padded_alone_payload(tags.len(), blocks.len(), physical_block)
            }
            _ => RecordBuilder::padded_alone(self.bytes(), physical_block),
        };
        bytes as u64
    }
    fn fits(&self, builder: &RecordBuilder) -> bool {
        match self {
            Change::Payload { tags, blocks, .. } => builder.fits_payload(tags.len(), blocks.len()),
            _ => builder.fits(self.bytes()),
        }
    }
    /// The same without the blocks.
    fn without_payload(self) -> Change<'a> {
        match self {
            Change::Payload { first, tags, .. } => Change::Tags { first, tags },
            other => other,
        }
    }
    fn reserved(&self) -> Reserved {
        match self {
            Change::Tags { tags, .. } | Change::Payload { tags, .. } => Reserved { tags: tags.len(), runs: 0 },
            // A run that falls into another splits it: one more on each side.
            Change::Zeros(_) => Reserved { tags: 0, runs: 2 },
        }
    }
}

/// Room in the set of pending tags, reserved for a change until it ends.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(crate) struct Reserved {
    pub(crate) tags: usize,
    pub(crate) runs: usize,
}

/// A change that has its number.
#[derive(Clone, Copy)]
pub(crate) struct Logged {
    pub(super) requester: Requester,
    pub(crate) seq: Seq,
    pub(crate) epoch: Epoch,
    /// Whether its record carries the data: that is durable with the record, before it is in place.
    pub(crate) carried: bool,
    reserved: Reserved,
    /// Whether it is the first of its thread in the record that gathers: at the batch boundary it
    /// alone checks whether the record can go out, and may then lead.
    pub(crate) checks_at_boundary: bool,
}

/// What becomes of a change that is logged: it must be completed or failed. Dropped before that, it latches
/// the volume: the log says something that may never come true.
pub(crate) struct Appended<'a> {
    pub(super) log: &'a Log,
    pub(super) logged: Logged,
    pub(super) ended: bool,
}

impl Deref for Appended<'_> {
    type Target = Logged;

    fn deref(&self) -> &Logged {
        &self.logged
    }
}

/// What has become of a change's data.
#[derive(Clone, Copy, PartialEq, Eq)]
enum DataWrite {
    /// It has none, or need not be written.
    None,
    InPlace,
    Failed,
}

/// A request in the queue for space: it leaves when the append is over, also when its future is
/// dropped.
struct QueuedForSpace<'a>(&'a Log, usize);

impl Drop for QueuedForSpace<'_> {
    fn drop(&mut self) {
        {
            let mut s = self.0.state.lock();
            s.waiters.remove(self.1);
            s.space_queue.retain(|request| *request != self.1);
        }
        self.0.wake_front();
    }
}

impl Log {
    /// Waits for space, then takes the indivisible step. Nothing has been logged while this waits.
    pub(crate) async fn append(&self, request: Requester, change: Change<'_>) -> Result<Appended<'_>, Latched> {
        if let Some(done) = self.try_append(request, &change, None) {
            return done;
        }
        let queued = QueuedForSpace(self, request.id);
        let appended = poll_fn(|cx| match self.try_append(request, &change, Some(cx.waker())) {
            Some(done) => Poll::Ready(done),
            None => Poll::Pending,
        })
        .await;
        drop(queued);
        appended
    }

    /// With a waker it enters the queue where there is no space. Without, it takes the step only
    /// where the queue is empty.
    fn try_append(
        &self,
        request: Requester,
        change: &Change<'_>,
        waker: Option<&Waker>,
    ) -> Option<Result<Appended<'_>, Latched>> {
        let (result, wake) = {
            let mut s = self.state.lock();
            if let Some(why) = s.latched {
                return Some(Err(why));
            }
            let first = s.space_queue.front().is_none_or(|front| *front == request.id);
            let change = if self.may_carry(&s, change) { *change } else { change.without_payload() };
            // Room for a record of its own, though it will share one.
            let alone = change.alone(self.config.physical_block);
            let result = if first && self.has_room(&mut s, &change, alone) {
                Some(Ok(self.take_step(&mut s, request, &change, alone)))
            } else {
                if let Some(waker) = waker {
                    if !s.space_queue.contains(&request.id) {
                        s.space_queue.push_back(request.id);
                    }
                    s.waiters.wait(request.id, Waiting::Space, waker);
                }
                None
            };
            (result, self.ask_for_checkpoint(&mut s))
        };
        wake.into_iter().for_each(Waker::wake);
        result
    }

    pub(super) fn has_room(&self, s: &mut State, change: &Change<'_>, alone: u64) -> bool {
        let epoch = s.epoch;
        // Up to one record's worth is skipped at the ring's end.
        let ring = s.used() + alone + self.config.max_record as u64 <= self.config.size;
        let gathers = change.fits(&s.gather.builder) && (s.gather.builder.is_empty() || s.gather.epoch == epoch);
        let reserved = change.reserved();
        let of = s.of(epoch);
        let pending =
            of.tags + reserved.tags <= self.config.max_tags && of.runs + reserved.runs <= self.config.max_runs;
        if !(ring && pending) {
            s.want_checkpoint = true;
        }
        gathers && ring && pending
    }

    pub(super) fn take_step(&self, s: &mut State, request: Requester, change: &Change<'_>, alone: u64) -> Appended<'_> {
        let (seq, epoch, reserved) = (s.next_seq, s.epoch, change.reserved());
        s.next_seq = Seq(seq.0 + 1);
        debug_assert!(s.in_flight[request.id].is_none(), "one change a request at a time");
        let carried = matches!(change, Change::Payload { .. });
        s.in_flight[request.id] = Some(InFlight { seq, carried });
        let of = s.of(epoch);
        of.in_flight += 1;
        of.appended += 1;
        of.tags += reserved.tags;
        of.runs += reserved.runs;
        s.gather.reserved += alone;
        let first_in_record = s.gather.builder.is_empty();
        if first_in_record {
            s.gather.epoch = epoch;
            // First in the record, so that it finds room however much is to follow.
            if !carried {
                self.push_flush_entry(s, change.bytes());
            }
        }
        match change {
            Change::Tags { first, tags } => s.gather.builder.push_tags(seq, *first, tags),
            Change::Payload { first, tags, blocks } => s.gather.builder.push_payload(seq, *first, tags, blocks),
            Change::Zeros(range) => s.gather.builder.push_zeros(seq, *range),
        }
        if first_in_record && carried {
            // Behind the first payload, which says how much room there is for entries.
            self.push_flush_entry(s, 0);
        }
        s.gather.last = seq;
        let checks_at_boundary = !std::mem::replace(&mut s.gather.has_boundary_check[request.thread], true);
        let logged = Logged { requester: request, seq, epoch, carried, reserved, checks_at_boundary };
        Appended { log: self, logged, ended: false }
    }

    /// Asks for a checkpoint where it is time for one. The checkpoint thread's waker, if it is wanted.
    pub(super) fn ask_for_checkpoint(&self, s: &mut State) -> Option<Waker> {
        let epoch = s.epoch;
        let used = s.used();
        let of = s.of(epoch);
        // The set of pending tags may be nearly full, for the next epoch has a set of its own to
        // fill meanwhile: the more tags go into pages together, the fewer pages are written for
        // each. The ring is shared by both epochs.
        let enough =
            used * 2 > self.config.size || of.tags * 4 > self.config.max_tags * 3 || of.runs * 2 > self.config.max_runs;
        s.want_checkpoint |= enough;
        s.want_checkpoint.then(|| s.checkpointer_waker(CheckpointerWaits::Work)).flatten()
    }

    /// Waits until there is work for the checkpoint thread.
    pub(crate) async fn wanted(&self) -> CheckpointerWork {
        poll_fn(|cx| {
            let mut s = self.state.lock();
            // After a latch there is no more work: this waits until it is dropped.
            if s.latched.is_none() && s.want_checkpoint {
                return Poll::Ready(CheckpointerWork::Checkpoint);
            }
            if s.latched.is_none() && self.wants_flush_record(&s) {
                return Poll::Ready(CheckpointerWork::FlushRecord);
            }
            s.checkpointer = Some((CheckpointerWaits::Work, cx.waker().clone()));
            Poll::Pending
        })
        .await
    }

    /// Ends the epoch in one step. `None` where it changed nothing. A flush entry that is not
    /// logged yet goes to the next epoch.
    pub(crate) fn switch_epoch(&self) -> Option<Epoch> {
        let ended = {
            let mut s = self.state.lock();
            s.want_checkpoint = false;
            let ended = s.epoch;
            let of = s.of(ended);
            // A record with nothing but a flush entry counts, too: an orderly end
            // leaves nothing in the log.
            if of.appended == 0 && of.end.is_none() {
                return None;
            }
            s.epoch = ended.next();
            ended
        };
        self.wake_front();
        Some(ended)
    }

    /// Waits until nothing of the epoch is in flight: every change logged in it has ended, and every
    /// record of it is durable. One that became so later would lie behind the end that the superblock
    /// names, and be of an epoch that is over: the next open would take it for a forgery.
    pub(crate) async fn drained(&self, epoch: Epoch) {
        poll_fn(|cx| {
            let mut s = self.state.lock();
            if s.of(epoch).is_drained() || s.latched.is_some() {
                return Poll::Ready(());
            }
            s.checkpointer = Some((CheckpointerWaits::Drained, cx.waker().clone()));
            Poll::Pending
        })
        .await
    }

    /// Where the log begins once `epoch` is in the tree: after its last record.
    pub(crate) fn end_of(&self, epoch: Epoch) -> LogPoint {
        let mut s = self.state.lock();
        // It is drained.
        debug_assert!(s.sealed.iter().all(|record| record.epoch != epoch));
        s.of(epoch).end.expect("an epoch that changed something has a record")
    }

    /// Both superblock copies name the epoch after this one: its log space and failed numbers are
    /// free.
    pub(crate) fn release(&self, epoch: Epoch) {
        let wake = {
            let mut s = self.state.lock();
            let end = s.of(epoch).end.expect("released once");
            s.tail = end.position;
            *s.of(epoch) = Default::default();
            s.failed.retain(|(_, e)| *e != epoch);
            // A checkpoint was asked for because of space that is free now.
            s.want_checkpoint = false;
            self.ask_for_checkpoint(&mut s)
        };
        wake.into_iter().for_each(Waker::wake);
        self.wake_front();
    }
}

impl Appended<'_> {
    /// The data is in place and its tags are published. `kept` is the pending space that they
    /// really take.
    pub(crate) fn complete(mut self, kept: Reserved) {
        self.end(kept.tags as isize, 0, DataWrite::InPlace);
    }
    /// A run of zeros is published; the set of runs has grown by so many, or shrunk.
    pub(crate) fn complete_zeros(mut self, grown: isize) {
        self.end(0, grown, DataWrite::None);
    }
    /// A later write of the same blocks is in a durable record that carries it: this one need not go
    /// to its place.
    pub(crate) fn supersede(mut self) {
        debug_assert!(self.carried);
        self.end(0, 0, DataWrite::None);
    }
    /// The data may not be what the log says. The number has *failed*: every flush entry lists it
    /// until its epoch is checkpointed.
    pub(crate) fn fail(mut self, kept: Reserved) {
        self.end(kept.tags as isize, 0, DataWrite::Failed);
    }

    fn end(&mut self, tags: isize, runs: isize, data: DataWrite) {
        self.ended = true;
        let Logged { requester, seq, epoch, carried, reserved, .. } = self.logged;
        let failed = data == DataWrite::Failed;
        let (wake, full) = {
            let mut s = self.log.state.lock();
            if data != DataWrite::None {
                // What may be on the medium, too.
                s.sync.data_write_ended(carried);
            }
            let full = failed && s.failed.len() == MAX_FAILED;
            if full {
                // Under the same lock as leaving `in_flight`: no flush may see the number neither
                // in flight nor listed, and the volume not latched.
                s.latched.get_or_insert(Latched::Abandoned);
            } else if failed {
                s.failed.push((seq, epoch));
            }
            s.in_flight[requester.id] = None;
            let of = s.of(epoch);
            of.in_flight -= 1;
            of.tags = (of.tags - reserved.tags).saturating_add_signed(tags);
            of.runs = (of.runs - reserved.runs).saturating_add_signed(runs);
            let drained = of.is_drained() && epoch != s.epoch;
            (drained.then(|| s.checkpointer_waker(CheckpointerWaits::Drained)).flatten(), full)
        };
        wake.into_iter().for_each(Waker::wake);
        if full {
            self.log.latch(Latched::Abandoned);
        }
    }
}

impl Drop for Appended<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.log.latch(Latched::Abandoned);
        }
    }
}

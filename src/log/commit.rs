//! Group commit: each log write carries all that has gathered, and few are in flight at a time.
//!
//! Records are sealed one after the other, for each carries the MAC of the one before.
//! Their writes may overlap and end in any order, but a number is durable only once every
//! record up to its own is.

use super::{
    Log, LogPoint, Logged, Requester,
    state::{CheckpointerWaits, SealedRecord, State, Unfinished, Waiting},
};
use crate::{
    Buf, ByteOffset, Device, DeviceError, Durability, Io, Latched, Phase, RecordNumber, Seq, Storage,
    format::{RecordBuilder, RecordHead},
};
use std::{
    future::poll_fn,
    task::{Poll, Waker},
};

/// What had gathered, taken to be sealed and written; its buffer is back in the log when
/// the write has ended.
struct Outgoing {
    builder: RecordBuilder,
    head: RecordHead,
    last: Seq,
    /// Which snapshot its flush entry is of; 0: it has none.
    says: u64,
}

/// What a request that wants its record durable finds.
enum CommitRole {
    Durable,
    /// No record is being sealed, and one more may be in flight: this request leads.
    Lead(Outgoing),
}

/// The next to be woken: a request that leads, and the checkpoint thread where there is work for it.
type Next = [Option<Waker>; 2];

impl Log {
    /// Waits until the record of a change is durable, and writes it where no other request does. `request` is the one that
    /// waits.
    pub(crate) async fn commit<S: Io>(&self, io: &S, request: usize, change: &Logged) -> Result<(), Latched> {
        let mut at_boundary = change.checks_at_boundary;
        if at_boundary {
            // Until the batch boundary, so that one record carries all that this thread has to log.
            io.batch_boundary(Phase::Commit).await;
        }
        loop {
            let role = poll_fn(|cx| match self.role((request, change), std::mem::take(&mut at_boundary), cx.waker()) {
                Some(role) => Poll::Ready(role),
                None => Poll::Pending,
            })
            .await?;
            match role {
                CommitRole::Durable => return Ok(()),
                CommitRole::Lead(record) => self.write(io, record).await?,
            }
        }
    }

    /// The checkpoint thread's part: a record with nothing but the flush entry, which no other
    /// record has carried.
    pub(crate) async fn write_flush_record<S: Storage>(&self, io: &S) -> Result<(), Latched> {
        let record = {
            let mut s = self.state.lock();
            if s.latched.is_some() || !self.wants_flush_record(&s) {
                return Ok(());
            }
            self.take_gathered(&mut s)
        };
        self.write(io, record).await
    }

    /// `at_boundary`: this is the check that the others of its thread rely on.
    fn role(
        &self,
        (request, change): (usize, &Logged),
        at_boundary: bool,
        waker: &Waker,
    ) -> Option<Result<CommitRole, Latched>> {
        let Logged { requester: Requester { thread, .. }, seq, .. } = *change;
        let mut s = self.state.lock();
        s.gather.has_boundary_check[thread] &= !at_boundary;
        // The latch first: a page-cache write error is reported to one sync only, so beside one
        // that failed a success means nothing.
        let role = if let Some(why) = s.latched {
            Err(why)
        } else if s.durable >= seq {
            Ok(CommitRole::Durable)
        } else if s.taken < seq && !s.gather.has_boundary_check[thread] && s.may_lead() {
            Ok(CommitRole::Lead(self.take_gathered(&mut s)))
        } else {
            s.waiters.wait(request, Waiting::Commit(seq), waker);
            return None;
        };
        s.waiters.remove(request);
        Some(role)
    }

    /// Takes what has gathered, with the flush entry, and its position in the ring. Leaves another
    /// buffer to gather in.
    fn take_gathered(&self, s: &mut State) -> Outgoing {
        // Nothing more is added: what was reserved for a record of each entry is free.
        s.gather.reserved = s.gather.builder.padded(self.config.physical_block) as u64;
        if s.gather.builder.is_empty() {
            s.gather.epoch = s.epoch;
            // Nothing has gathered, so nothing is reserved. Otherwise the flush entry, for which
            // there was room, might not fit.
            s.gather.reserved = 0;
        }
        s.of(s.gather.epoch).records += 1;
        self.push_flush_entry(s, 0);
        let spare = s.spares.pop().expect("as many as records may be in flight");
        let builder = std::mem::replace(&mut s.gather.builder, RecordBuilder::new(spare));
        let size = builder.padded(self.config.physical_block) as u64;
        debug_assert!(size <= s.gather.reserved);
        // A record never straddles the ring's end: where the largest might not fit, all go on at
        // its start. Recovery follows the same rule, so the log need not say it.
        let position = next_position(s.head.position, self.config.size, self.config.max_record as u64);
        let number = s.head.number;
        let under_way = s.sealed.len() as u16;
        let head = RecordHead { epoch: s.gather.epoch, number, position, under_way, link: s.head.link };
        s.head.position = position + size;
        s.sealing = true;
        s.taken = s.gather.last;
        s.gather.reserved = 0;
        let says = std::mem::take(&mut s.gather.says);
        // The first of each thread to append to the next record checks at the boundary. One that
        // was to check for this record may still do so, which does no harm.
        s.gather.has_boundary_check.fill(false);
        Outgoing { builder, head, last: s.gather.last, says }
    }

    async fn write<S: Storage>(&self, io: &S, record: Outgoing) -> Result<(), Latched> {
        // The gathering buffer is empty now: a request that found it full may go on.
        self.wake_front();
        let Outgoing { builder, head, last, says } = record;
        let unfinished = Unfinished::new(self);
        let (content, carries) = (builder.content(), builder.has_payload());
        let (buf, part, link) = builder.seal(&head, self.config.physical_block, &self.config.key);
        let bytes = part.len();
        let offset = ByteOffset(self.config.offset + head.position % self.config.size);
        let write = io.write(Device::Meta, offset, buf, part, Durability::Durable);
        let end = LogPoint { position: head.position + bytes as u64, number: RecordNumber(head.number.0 + 1), link };
        let wake = self.sealed(SealedRecord {
            epoch: head.epoch,
            last,
            end,
            bytes: bytes as u64,
            content,
            carries,
            says,
            done: false,
        });
        wake.into_iter().flatten().for_each(Waker::wake);
        let (result, buf) = write.await;
        let result =
            result.map_err(|errno| Latched::Device(DeviceError::new("write", Device::Meta, offset, bytes, errno)));
        let wake = self.written(end, buf, result);
        unfinished.complete();
        wake.into_iter().flatten().for_each(Waker::wake);
        match result {
            Ok(()) => self.wake_all(|s, why| match why {
                Waiting::Commit(seq) => seq <= s.durable,
                // Or it may write the record itself now.
                Waiting::Recorded(snapshot) => snapshot <= s.sync.recorded || self.wants_flush_record(s),
                Waiting::Space | Waiting::Sync | Waiting::Anchored(_) | Waiting::HeldFlush => false,
            }),
            Err(_) => self.wake_all(|_, _| true),
        }
        result
    }

    /// The record's MAC is known: the next may be sealed.
    fn sealed(&self, record: SealedRecord) -> Next {
        let mut s = self.state.lock();
        s.sealing = false;
        debug_assert!(s.sealed.len() < s.sealed.capacity());
        s.head = record.end;
        s.sealed.push_back(record);
        self.hand_on(&mut s)
    }

    /// Notes that a log write has ended. `end` is where the chain goes on after its record.
    fn written(&self, end: LogPoint, buf: Buf, result: Result<(), Latched>) -> Next {
        let mut s = self.state.lock();
        s.spares.push(buf);
        if let Err(why) = result {
            // It stays in flight for ever, and so does every record after it.
            s.latched.get_or_insert(why);
            return [None, None];
        }
        s.sealed.iter_mut().filter(|record| record.end == end).for_each(|record| record.done = true);
        let mut drained = false;
        while s.sealed.front().is_some_and(|record| record.done) {
            let record = s.sealed.pop_front().expect("just seen");
            s.durable = record.last;
            s.durable_end = record.end;
            s.sync.recorded = s.sync.recorded.max(record.says);
            // Damage to the last record of all looks as if a crash had torn it. Where it carries data
            // one follows that is sealed from now on, be it with what an earlier one has said.
            s.sync.unlogged |= record.carries;
            let of = s.of(record.epoch);
            of.end = Some(record.end);
            of.records -= 1;
            let is_drained = of.is_drained();
            drained |= is_drained && record.epoch != s.epoch;
            s.records += 1;
            s.record_bytes += record.bytes;
        }
        let [lead, flush_record] = self.hand_on(&mut s);
        let drained = drained.then(|| s.checkpointer_waker(CheckpointerWaits::Drained)).flatten();
        [lead, flush_record.or(drained)]
    }

    /// Hands the lead on to one of those whose entries have gathered meanwhile.
    fn hand_on(&self, s: &mut State) -> Next {
        if !s.may_lead() {
            return [None, None];
        }
        let next = s.waiters.find(0, |why| matches!(why, Waiting::Commit(seq) if seq > s.taken));
        let lead = next.and_then(|request| s.waiters.take_waker(request));
        let flush_record = self.wants_flush_record(s).then(|| s.checkpointer_waker(CheckpointerWaits::Work));
        [lead, flush_record.flatten()]
    }
}

/// Where a record goes that follows `position`: there, or at the ring's next start where the
/// largest might not fit.
pub(crate) fn next_position(position: u64, ring: u64, max_record: u64) -> u64 {
    let left = ring - position % ring;
    if left < max_record { position + left } else { position }
}

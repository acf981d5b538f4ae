//! Group commit: one log write at a time, carrying all that has gathered.

use super::{
    Log, LogPoint,
    state::{State, Waiting, WorkerWaits},
};
use crate::{
    Buf, ByteOffset, Device, DeviceError, Durability, Latched, RecordNumber, Seq, Storage,
    format::{Link, RecordBuilder, RecordHead},
};
use std::{
    future::poll_fn,
    task::{Poll, Waker},
};

/// A record on its way to the device; its buffer is back in the log when it has ended.
struct Outgoing {
    builder: RecordBuilder,
    head: RecordHead,
    last: Seq,
    reserved: u64,
}

/// What a slot that wants its record durable finds.
enum Turn {
    Durable,
    /// No log write is in flight: it is up to us.
    Lead(Outgoing),
}

impl Log {
    /// Waits until the record with `seq` is durable, writing it ourselves where nobody does.
    pub(crate) async fn commit<S: Storage>(&self, io: &S, slot: usize, seq: Seq) -> Result<(), Latched> {
        // One record for all that this thread has to log.
        io.end_of_turn().await;
        loop {
            let turn = poll_fn(|cx| match self.turn(slot, seq, cx.waker()) {
                Some(turn) => Poll::Ready(turn),
                None => Poll::Pending,
            })
            .await?;
            match turn {
                Turn::Durable => return Ok(()),
                Turn::Lead(record) => self.write(io, record).await?,
            }
        }
    }

    /// The checkpoint thread's part: flush entries that nobody has carried along.
    pub(crate) async fn write_flush_record<S: Storage>(&self, io: &S) -> Result<(), Latched> {
        let record = {
            let mut s = self.state.lock();
            s.want_flush_record = false;
            if s.latched.is_some() || s.gather.is_empty() || s.gather_owned || s.spare.is_none() {
                return Ok(());
            }
            self.take_gathered(&mut s)
        };
        self.write(io, record).await
    }

    fn turn(&self, slot: usize, seq: Seq, waker: &Waker) -> Option<Result<Turn, Latched>> {
        let mut s = self.state.lock();
        let turn = if s.durable >= seq {
            Ok(Turn::Durable)
        } else if let Some(why) = s.latched {
            Err(why)
        } else if s.spare.is_some() {
            Ok(Turn::Lead(self.take_gathered(&mut s)))
        } else {
            s.wait(slot, Waiting::Commit(seq), waker);
            return None;
        };
        s.waiting[slot] = None;
        Some(turn)
    }

    /// Takes what has gathered, leaving the other buffer to gather in, and its place in the ring.
    fn take_gathered(&self, s: &mut State) -> Outgoing {
        let spare = s.spare.take().expect("looked at before");
        let builder = std::mem::replace(&mut s.gather, RecordBuilder::new(spare));
        let size = builder.padded(self.config.physical_block) as u64;
        // A record never straddles the ring's end: where the largest might not fit, all go on at
        // its start. Recovery follows the same rule, so nothing needs to be written about it.
        let position = next_position(s.head.position, self.config.size, self.config.max_record as u64);
        let head = RecordHead { epoch: s.gather_epoch, number: s.head.number, position, link: s.head.link };
        s.head.position = position + size;
        s.want_flush_record = false;
        s.gather_owned = false;
        let reserved = std::mem::take(&mut s.gather_reserved);
        s.reserved -= reserved;
        Outgoing { builder, head, last: s.gather_last, reserved }
    }

    async fn write<S: Storage>(&self, io: &S, record: Outgoing) -> Result<(), Latched> {
        // The gathering buffer is empty now: whoever found it full may go on.
        self.wake_front();
        let Outgoing { builder, head, last, reserved } = record;
        let unfinished = Unfinished(self);
        let (buf, bytes, link) = builder.seal(&head, self.config.physical_block, &self.config.key);
        debug_assert!(bytes as u64 <= reserved);
        let offset = ByteOffset(self.config.offset + head.position % self.config.size);
        let (result, buf) = io.write(Device::Meta, offset, buf, 0..bytes, Durability::Durable).await;
        let result = result.map_err(|errno| {
            Latched::Device(DeviceError { op: "write", device: Device::Meta, offset, len: bytes as u64, errno })
        });
        let wake = self.written(Written { buf, bytes: bytes as u64, head, last, link, result });
        std::mem::forget(unfinished);
        wake.into_iter().flatten().for_each(Waker::wake);
        match result {
            Ok(()) => self.wake_all(|s, why| matches!(why, Waiting::Commit(seq) if seq <= s.durable)),
            Err(_) => self.wake_all(|_, _| true),
        }
        result
    }

    /// Notes the end of a log write; returns who shall lead next, and the checkpoint thread if it is wanted.
    fn written(&self, w: Written) -> [Option<Waker>; 2] {
        let mut s = self.state.lock();
        if let Err(why) = w.result {
            // Latched in the same step that gives the buffer back: otherwise somebody could write
            // a second record with this number, and be believed.
            s.latched.get_or_insert(why);
        }
        s.spare = Some(w.buf);
        if w.result.is_err() {
            return [None, None];
        }
        s.durable = s.durable.max(w.last);
        s.head = LogPoint { position: s.head.position, number: RecordNumber(w.head.number.0 + 1), link: w.link };
        let end = s.head;
        s.of(w.head.epoch).end = Some(end);
        s.records += 1;
        s.record_bytes += w.bytes;
        // Hand the lead on to one of those whose entries have gathered meanwhile.
        let durable = s.durable;
        let next = s
            .waiting
            .iter_mut()
            .flatten()
            .find(|(why, waker)| matches!(why, Waiting::Commit(seq) if *seq > durable) && waker.is_some());
        let lead = next.and_then(|(_, waker)| waker.take());
        let flush_only = !s.gather.is_empty() && !s.gather_owned;
        s.want_flush_record |= flush_only;
        [lead, flush_only.then(|| s.worker_that(WorkerWaits::Work)).flatten()]
    }
}

/// A log write that has ended.
struct Written {
    buf: Buf,
    bytes: u64,
    head: RecordHead,
    last: Seq,
    link: Link,
    result: Result<(), Latched>,
}

/// Dropping a log write or a flush half done would keep everybody waiting: the volume is latched instead.
pub(super) struct Unfinished<'a>(pub(super) &'a Log);

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        self.0.latch(Latched::Abandoned);
    }
}

/// Where a record goes that follows `position`: there, or at the ring's next start where the largest might not fit.
pub(crate) fn next_position(position: u64, ring: u64, max_record: u64) -> u64 {
    let left = ring - position % ring;
    if left < max_record { position + left } else { position }
}

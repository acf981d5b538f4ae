//! What the log knows, behind one lock, and who is waiting for it.

use super::{
    claim::{FlushState, MAX_ABANDONED},
    waiters::{Waiters, Waiting},
};
use crate::{
    Buf, Epoch, Latched, RecordNumber, Seq,
    crypto::keys::MacKey,
    format::{Link, RecordBuilder},
    sync::Mutex,
};
use std::{collections::VecDeque, task::Waker};

/// Records that are written at a time: while one is on its way, the next is gathered, sealed and sent.
pub(crate) const RECORDS_IN_FLIGHT: usize = 2;

/// Fixed numbers of a log.
pub(crate) struct LogConfig {
    /// Where the ring begins on the metadata device, in bytes.
    pub(crate) offset: u64,
    /// Bytes of the ring.
    pub(crate) size: u64,
    /// Records are padded to this many bytes.
    pub(crate) physical_block: usize,
    /// Largest record in bytes.
    pub(crate) max_record: usize,
    pub(crate) key: MacKey,
    /// Most blocks with pending tags in one epoch.
    pub(crate) max_tags: usize,
    /// Most runs of zeros in one epoch, as split by overlaps.
    pub(crate) max_runs: usize,
    /// Requests that may wait.
    pub(crate) max_requests: usize,
    /// Queues that these are of.
    pub(crate) queues: usize,
}

/// A place in the chain: where the next record goes and what it must carry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct LogPoint {
    /// Bytes ever written to the ring; modulo its size, the place.
    pub(crate) position: u64,
    pub(crate) number: RecordNumber,
    pub(crate) link: Link,
}

/// What the checkpoint thread is wanted for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Work {
    /// The log is half full, or the pending tags nearly: checkpoint now.
    Checkpoint,
    /// Flushes have something to say, and nobody is about to write a record that would carry it to the log.
    FlushRecord,
}

/// What the checkpoint thread waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum CheckpointerWaits {
    Work,
    Drained,
}

/// One set of numbers for each of the two live epochs, by parity.
#[derive(Clone, Copy, Default)]
pub(super) struct EpochUse {
    /// Logged and not yet settled.
    pub(super) in_flight: usize,
    /// Blocks that pending space is reserved for or taken by.
    pub(super) tags: usize,
    /// The same for runs.
    pub(super) runs: usize,
    /// Entries appended, flush entries not counted.
    pub(super) appended: u64,
    /// End of the last record of this epoch.
    pub(super) end: Option<LogPoint>,
}

/// A record on its way to the device.
pub(super) struct SealedRecord {
    pub(super) epoch: Epoch,
    /// The last of the numbers in it.
    pub(super) last: Seq,
    /// Where the chain goes on.
    pub(super) end: LogPoint,
    /// Bytes, padding included, and without.
    pub(super) bytes: u64,
    pub(super) content: usize,
    /// It is durable, but one before it is not yet.
    pub(super) done: bool,
}

/// The record being gathered.
pub(super) struct Gather {
    pub(super) builder: RecordBuilder,
    /// The epoch of what is in it.
    pub(super) epoch: Epoch,
    /// The last of the numbers in it.
    pub(super) last: Seq,
    /// Bytes of the ring reserved for what is in it.
    pub(super) reserved: u64,
    /// By queue: a request whose entry is in it looks at it at the batch boundary of its thread, so the others of that queue
    /// need not (leader election, one leader a thread).
    pub(super) has_leader: Vec<bool>,
}

pub(super) struct State {
    pub(super) epoch: Epoch,
    pub(super) next_seq: Seq,
    pub(super) of_epoch: [EpochUse; 2],
    /// By request: what it has logged and not yet settled.
    pub(super) in_flight: Vec<Option<(Seq, Epoch)>>,
    /// Numbers whose data may not be what the log says: listed in every flush entry until checkpointed.
    pub(super) abandoned: Vec<(Seq, Epoch)>,

    pub(super) gather: Gather,
    /// The other buffers; none while as many records as may be are under way.
    pub(super) spares: Vec<Buf>,
    /// Somebody has taken what had gathered and computes its MAC, which the record after it must carry.
    pub(super) sealing: bool,
    /// Every number up to this one has left the gathering buffer.
    pub(super) taken: Seq,
    /// Records that are sealed and not known durable, oldest first.
    pub(super) sealed: VecDeque<SealedRecord>,

    /// Where the next record goes.
    pub(super) head: LogPoint,
    /// Everything before this position is free.
    pub(super) tail: u64,
    /// Every number up to this one is in a durable record.
    pub(super) durable: Seq,

    /// Requests that wait for space, first come first served.
    pub(super) queue: VecDeque<usize>,
    pub(super) waiters: Waiters,
    /// The checkpoint thread, and what it waits for: work that it does not wait for must not wake it.
    pub(super) checkpointer: Option<(CheckpointerWaits, Waker)>,
    pub(super) want_checkpoint: bool,

    pub(super) flush: FlushState,
    pub(super) latched: Option<Latched>,
    pub(super) records: u64,
    pub(super) record_bytes: u64,
}

impl State {
    /// What an epoch uses.
    pub(super) fn of(&mut self, epoch: Epoch) -> &mut EpochUse {
        &mut self.of_epoch[epoch.parity()]
    }
    /// Bytes of the ring in use or reserved.
    pub(super) fn used(&self) -> u64 {
        self.head.position - self.tail + self.gather.reserved
    }
    /// Whether what has gathered may be taken and written: alone, or beside records that are no larger together. Many small
    /// ones would cost more than the time they save.
    pub(super) fn may_lead(&self) -> bool {
        let in_flight: usize = self.sealed.iter().map(|record| record.content).sum();
        // One that is durable before its predecessor is counts too, though its buffer is back.
        let room = self.sealed.len() < RECORDS_IN_FLIGHT;
        !self.sealing && room && self.gather.builder.content() >= in_flight
    }
    /// The checkpoint thread's waker, if this is what it waits for.
    pub(super) fn checkpointer_that(&mut self, waits: CheckpointerWaits) -> Option<Waker> {
        self.checkpointer.take_if(|(why, _)| *why == waits).map(|(_, waker)| waker)
    }
    /// The waker of the first request in the queue for space.
    pub(super) fn front_waker(&mut self) -> Option<Waker> {
        let front = *self.queue.front()?;
        self.waiters.take_waker(front)
    }
}

/// The log of an open volume.
pub(crate) struct Log {
    pub(super) config: LogConfig,
    pub(super) state: Mutex<State>,
}

impl Log {
    /// A log that goes on at `head` in `epoch`; all memory is taken here.
    pub(crate) fn new(config: LogConfig, epoch: Epoch, head: LogPoint) -> Self {
        let n = config.max_requests;
        let state = State {
            epoch,
            next_seq: Seq(1),
            of_epoch: [EpochUse::default(); 2],
            in_flight: vec![None; n],
            abandoned: Vec::with_capacity(MAX_ABANDONED),
            gather: Gather {
                builder: RecordBuilder::new(Buf::new(config.max_record)),
                epoch,
                last: Seq(0),
                reserved: 0,
                has_leader: vec![false; config.queues],
            },
            spares: (0..RECORDS_IN_FLIGHT).map(|_| Buf::new(config.max_record)).collect(),
            sealing: false,
            taken: Seq(0),
            sealed: VecDeque::with_capacity(RECORDS_IN_FLIGHT),
            head,
            tail: head.position,
            durable: Seq(0),
            queue: VecDeque::with_capacity(n),
            waiters: Waiters::new(n),
            checkpointer: None,
            want_checkpoint: false,
            flush: FlushState::new(n),
            latched: None,
            records: 0,
            record_bytes: 0,
        };
        Self { config, state: Mutex::new(state) }
    }

    /// The memory of a log with records of at most `max_record` bytes.
    pub(crate) fn memory_bytes_for(max_record: usize, max_requests: usize) -> u64 {
        let per_slot = size_of::<(Seq, Epoch)>() + size_of::<(Waiting, Waker)>() + 40;
        ((1 + RECORDS_IN_FLIGHT) * max_record + max_requests * per_slot) as u64
    }

    pub(crate) fn memory_bytes(&self) -> u64 {
        Self::memory_bytes_for(self.config.max_record, self.config.max_requests)
    }

    /// The most tags that one entry can carry: one record's worth, and no more than a set of pending tags holds.
    pub(crate) fn max_entry_tags(&self) -> usize {
        RecordBuilder::max_tags(self.config.max_record).min(self.config.max_tags)
    }

    /// The number of the first record that is not known durable, if the volume is not latched.
    pub(crate) fn first_unsure(&self) -> Result<RecordNumber, Latched> {
        let s = self.state.lock();
        // Of one under way the number after it is known.
        let first = s.sealed.front().map(|record| RecordNumber(record.end.number.0 - 1));
        s.latched.map_or(Ok(first.unwrap_or(s.head.number)), Err)
    }

    pub(crate) fn latched(&self) -> Option<Latched> {
        self.state.lock().latched
    }

    /// The first failure wins; everybody who waits is woken and finds it.
    pub(crate) fn latch(&self, why: Latched) {
        self.state.lock().latched.get_or_insert(why);
        self.wake_all(|_, _| true);
    }

    /// Bytes of the ring in use, records and bytes written since the start.
    pub(crate) fn usage(&self) -> (u64, u64, u64) {
        let s = self.state.lock();
        (s.used(), s.records, s.record_bytes)
    }

    /// Wakes the waiting requests that `wanted` picks, and the checkpoint thread where the volume is latched.
    /// Wakers are called outside the lock, some at a time.
    pub(super) fn wake_all(&self, wanted: impl Fn(&State, Waiting) -> bool) {
        let mut from = 0;
        loop {
            let mut batch = [const { None::<Waker> }; 16];
            let mut n = 0;
            {
                let mut s = self.state.lock();
                if s.latched.is_some() {
                    batch[0] = s.checkpointer.take().map(|(_, waker)| waker);
                    n = 1;
                }
                while n < batch.len() {
                    let Some(request) = s.waiters.find(from, |why| wanted(&s, why)) else { break };
                    batch[n] = s.waiters.take_waker(request);
                    n += 1;
                    from = request + 1;
                }
            }
            batch.into_iter().flatten().for_each(Waker::wake);
            if n < 16 {
                return;
            }
        }
    }

    pub(super) fn wake_front(&self) {
        let waker = self.state.lock().front_waker();
        waker.into_iter().for_each(Waker::wake);
    }
}

/// Something that keeps everybody waiting if it is dropped half done, a log write, a flush or a checkpoint: then the volume
/// is latched instead.
pub(crate) struct Unfinished<'a>(Option<&'a Log>);

impl<'a> Unfinished<'a> {
    pub(crate) fn new(log: &'a Log) -> Self {
        Self(Some(log))
    }

    /// It has ended, well or not, and whoever waits will be told.
    pub(crate) fn complete(mut self) {
        self.0 = None;
    }
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if let Some(log) = self.0 {
            log.latch(Latched::Abandoned);
        }
    }
}

//! The state of the log, behind one mutex, and the requests that wait for it.

use super::sync_state::{AnchorRounds, MAX_FAILED, SyncState};
use crate::{
    Buf, ByteOffset, Epoch, Latched, RecordNumber, Seq,
    crypto::keys::MacKey,
    format::{Link, RecordBuilder},
    sync::{AtomicBool, Mutex},
    wait_list::WaitList,
};
use std::{collections::VecDeque, ops::Range, task::Waker};

/// Log writes in flight at a time: while one is being written, the next is gathered, sealed and sent.
pub(crate) const RECORDS_IN_FLIGHT: usize = 2;

/// Sizes and key of a log.
pub(crate) struct LogConfig {
    /// Where the ring begins on the metadata device, in bytes.
    pub(crate) offset: u64,
    /// Bytes of the ring.
    pub(crate) size: u64,
    /// Records are padded to this many bytes.
    pub(crate) physical_block: usize,
    /// Largest record in bytes.
    pub(crate) max_record: usize,
    /// Whether records may carry data: as the superblock says.
    pub(crate) sync_log: bool,
    pub(crate) key: MacKey,
    /// Most blocks with pending tags in one epoch.
    pub(crate) max_tags: usize,
    /// Most runs of zeros in one epoch, as split by overlaps.
    pub(crate) max_runs: usize,
    /// Requests that may use it.
    pub(crate) max_requests: usize,
    /// I/O threads that the requests belong to.
    pub(crate) threads: usize,
}

/// A point in the chain: where the next record goes and what it must carry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct LogPoint {
    /// Bytes ever written to the ring. Modulo its size: the offset in the ring.
    pub(crate) position: u64,
    pub(crate) number: RecordNumber,
    pub(crate) link: Link,
}

/// What the checkpoint thread is to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CheckpointerWork {
    /// The log is half full, or the pending tags nearly: checkpoint now.
    Checkpoint,
    /// There is a flush entry that no record has carried yet, and no record is about to
    /// be written: write one.
    FlushRecord,
    /// Admitted writes wait, so that a flush finds them or others go with them: after a moment some
    /// go on.
    WriteBack,
}

/// What a request waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Waiting {
    Space,
    Commit(Seq),
    Sync,
    /// Until a durable record has this snapshot, or a later one.
    Recorded(u64),
    /// Until this round of the anchor is done.
    Anchored(u64),
    /// Who tells the anchor: until a flush waits for that.
    HeldFlush,
}

/// What the checkpoint thread waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum CheckpointerWaits {
    Work,
    Drained,
}

impl EpochUse {
    /// Whether nothing more becomes of it once it has ended.
    pub(super) fn is_drained(&self) -> bool {
        self.in_flight == 0 && self.records == 0
    }
}

/// What an epoch uses. There is one for each of the two live epochs, by parity.
#[derive(Clone, Copy, Default)]
pub(super) struct EpochUse {
    /// Changes that are logged and have not ended.
    pub(super) in_flight: usize,
    /// Records that are sealed, or about to be, and not durable. One with nothing but a flush entry holds
    /// no change, and may be anybody's.
    pub(super) records: usize,
    /// Blocks that pending space is reserved for or taken by.
    pub(super) tags: usize,
    /// The same for runs.
    pub(super) runs: usize,
    /// Entries appended, flush entries not counted.
    pub(super) appended: u64,
    /// End of the last record of this epoch.
    pub(super) end: Option<LogPoint>,
}

/// A record that is being written.
pub(super) struct SealedRecord {
    pub(super) epoch: Epoch,
    /// The last of the numbers in it.
    pub(super) last: Seq,
    /// Where the chain goes on.
    pub(super) end: LogPoint,
    /// Bytes with the padding.
    pub(super) bytes: u64,
    /// Bytes without it.
    pub(super) content: usize,
    /// Whether it carries data.
    pub(super) carries: bool,
    /// Which snapshot its flush entry is of; 0: it has none.
    pub(super) says: u64,
    /// It is durable, but one before it is not yet.
    pub(super) done: bool,
}

/// A change that is logged and has not ended.
#[derive(Clone, Copy)]
pub(super) struct InFlight {
    pub(super) seq: Seq,
    /// Whether its record carries its data.
    pub(super) carried: bool,
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
    /// Which snapshot its flush entry is of; 0: it has none.
    pub(super) says: u64,
    /// By thread: one of its requests with an entry in this record is yet to check, at the batch
    /// boundary, whether the record can go out. The others need not.
    pub(super) has_boundary_check: Vec<bool>,
}

pub(super) struct State {
    pub(super) epoch: Epoch,
    pub(super) next_seq: Seq,
    pub(super) of_epoch: [EpochUse; 2],
    /// By request: the change that it has logged and that has not ended.
    pub(super) in_flight: Vec<Option<InFlight>>,
    /// Failed numbers: their data may not be what the log says. Every flush entry lists them until
    /// they are checkpointed.
    pub(super) failed: Vec<(Seq, Epoch)>,

    pub(super) gather: Gather,
    /// The buffers that are not in use; none while as many records as may be are in flight.
    pub(super) spares: Vec<Buf>,
    /// A record has been taken and its MAC is being computed, which the record after it must carry.
    pub(super) sealing: bool,
    /// Every number up to this one has left the gathering buffer.
    pub(super) taken: Seq,
    /// Records that are sealed and not known durable, oldest first.
    pub(super) sealed: VecDeque<SealedRecord>,

    /// Where the next record goes.
    pub(super) head: LogPoint,
    /// Behind the last record that is durable with all before it.
    pub(super) durable_end: LogPoint,
    /// Everything before this position is free.
    pub(super) tail: u64,
    /// Every number up to this one is in a durable record.
    pub(super) durable: Seq,

    /// The requests that wait for space, first come, first served.
    pub(super) space_queue: VecDeque<usize>,
    pub(super) waiters: WaitList<Waiting>,
    /// The checkpoint thread, and what it waits for: nothing else may wake it.
    pub(super) checkpointer: Option<(CheckpointerWaits, Waker)>,
    pub(super) want_checkpoint: bool,

    pub(super) sync: SyncState,
    pub(super) anchor_rounds: AnchorRounds,
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
    /// Whether what has gathered may be taken and written: when no record is in flight, or
    /// those in flight are together no larger than it. Many small records would cost more
    /// time than they save.
    pub(super) fn may_lead(&self) -> bool {
        let in_flight: usize = self.sealed.iter().map(|record| record.content).sum();
        // A record that is durable before its predecessor still counts, though its buffer is back.
        let room = self.sealed.len() < RECORDS_IN_FLIGHT;
        !self.sealing && room && self.gather.builder.content() >= in_flight
    }
    /// The checkpoint thread's waker, if this is what it waits for.
    pub(super) fn checkpointer_waker(&mut self, waits: CheckpointerWaits) -> Option<Waker> {
        self.checkpointer.take_if(|(why, _)| *why == waits).map(|(_, waker)| waker)
    }
    /// The waker of the first request in the queue for space.
    pub(super) fn front_waker(&mut self) -> Option<Waker> {
        let front = *self.space_queue.front()?;
        self.waiters.take_waker(front)
    }
}

/// The log of an open volume.
pub(crate) struct Log {
    pub(super) config: LogConfig,
    /// Whether flushes wait for the anchor.
    pub(super) holds_flushes: AtomicBool,
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
            failed: Vec::with_capacity(MAX_FAILED),
            gather: Gather {
                builder: RecordBuilder::new(Buf::new(config.max_record)),
                epoch,
                last: Seq(0),
                reserved: 0,
                says: 0,
                has_boundary_check: vec![false; config.threads],
            },
            spares: (0..RECORDS_IN_FLIGHT).map(|_| Buf::new(config.max_record)).collect(),
            sealing: false,
            taken: Seq(0),
            sealed: VecDeque::with_capacity(RECORDS_IN_FLIGHT),
            head,
            durable_end: head,
            tail: head.position,
            durable: Seq(0),
            space_queue: VecDeque::with_capacity(n),
            waiters: WaitList::new(n),
            checkpointer: None,
            want_checkpoint: false,
            sync: SyncState::new(n),
            anchor_rounds: AnchorRounds::default(),
            latched: None,
            records: 0,
            record_bytes: 0,
        };
        Self { config, holds_flushes: AtomicBool::new(false), state: Mutex::new(state) }
    }

    /// The memory of a log with records of at most `max_record` bytes.
    pub(crate) fn memory_bytes_for(max_record: usize, max_requests: usize) -> u64 {
        let per_request = size_of::<Option<InFlight>>() + 40;
        let own = (1 + RECORDS_IN_FLIGHT) * max_record + max_requests * per_request;
        own as u64 + WaitList::<Waiting>::memory_bytes_for(max_requests)
    }

    pub(crate) fn memory_bytes(&self) -> u64 {
        Self::memory_bytes_for(self.config.max_record, self.config.max_requests)
    }

    /// The most tags that one entry can carry: one record's worth, and no more than a set of
    /// pending tags holds.
    pub(crate) fn max_entry_tags(&self) -> usize {
        RecordBuilder::max_tags(self.config.max_record).min(self.config.max_tags)
    }

    /// Whether records may carry data.
    pub(crate) fn may_carry_data(&self) -> bool {
        self.config.sync_log
    }

    /// Whether the epoch is the one that changes are logged in.
    pub(crate) fn is_current(&self, epoch: Epoch) -> bool {
        self.state.lock().epoch == epoch
    }

    /// The record that is sealed next.
    pub(crate) fn next_record(&self) -> RecordNumber {
        self.state.lock().head.number
    }

    /// The first record that is not known durable, sealed or yet to come; if the volume is not
    /// latched.
    pub(crate) fn first_not_durable(&self) -> Result<RecordNumber, Latched> {
        let s = self.state.lock();
        // A record in flight is known by the number of the one after it.
        let first = s.sealed.front().map(|record| RecordNumber(record.end.number.0 - 1));
        s.latched.map_or(Ok(first.unwrap_or(s.head.number)), Err)
    }

    pub(crate) fn latched(&self) -> Option<Latched> {
        self.state.lock().latched
    }

    /// Makes the volume read-only. The first reason stays; all who wait are woken and find it.
    pub(crate) fn latch(&self, why: Latched) {
        self.state.lock().latched.get_or_insert(why);
        self.wake_all(|_, _| true);
    }

    /// Bytes of the ring in use, records and bytes written since the start.
    pub(crate) fn usage(&self) -> (u64, u64, u64) {
        let s = self.state.lock();
        (s.used(), s.records, s.record_bytes)
    }

    /// Wakes the waiting requests that `wanted` picks, and the checkpoint thread where the volume
    /// is latched. Wakers are called outside the lock, some at a time.
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

    /// The part of the ring in use, as positions: bytes ever written to it.
    pub(crate) fn live(&self) -> Range<u64> {
        let s = self.state.lock();
        s.tail..s.head.position
    }

    /// Where on the metadata device a position is, and how many bytes follow it up to the ring's end.
    pub(crate) fn place(&self, position: u64) -> (ByteOffset, u64) {
        let at = position % self.config.size;
        (ByteOffset(self.config.offset + at), self.config.size - at)
    }

    pub(super) fn wake_front(&self) {
        let waker = self.state.lock().front_waker();
        waker.into_iter().for_each(Waker::wake);
    }
}

/// A log write, a sync or a checkpoint that has begun. Dropped half done it would keep others
/// waiting for ever: so then the volume is latched.
pub(crate) struct Unfinished<'a>(Option<&'a Log>);

impl<'a> Unfinished<'a> {
    pub(crate) fn new(log: &'a Log) -> Self {
        Self(Some(log))
    }

    /// It has ended, well or not, and those that wait will be told.
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

//! A second pair of eyes on the wire: it sees every operation start and end, knows the format but not
//! the library, and panics when an order of `docs/crash-safety.md` is broken.

use super::{
    Disk, SimStorage,
    disk::Trace,
    image::{self, LOG_OFFSET, Logged, PAGE, SUPERBLOCKS, Superblock},
};
use std::collections::{HashMap, HashSet, VecDeque};
use ublk_integrity::Device;

/// First block and count of a logged or written run.
type Run = (u64, u64);

/// Where the checkpoint is, by what has been seen of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Idle,
    /// Pages are being written; not synced since.
    Pages,
    /// A sync of the metadata began after the last page write had ended.
    Syncing(u64),
    Synced,
    /// Copy A is durable and newer than B.
    CopyA,
}

/// A change of a run of blocks.
struct Change {
    epoch: u64,
    /// What its record carries: such a write may be superseded, and is never sent then.
    carried: Option<Vec<u8>>,
}

pub struct Watch {
    seen: usize,
    superblock: Superblock,
    /// Slots that a superblock copy on the disk names.
    named: HashSet<u64>,
    /// The older of the two copies' log beginnings.
    tail: u64,
    head: u64,
    /// Records sent and not all durable up to them, oldest first: place, and whether
    /// it is durable itself.
    records: VecDeque<(u64, bool)>,
    stage: Stage,
    page_writes: HashSet<u64>,
    /// Durable in the log, data not yet in place; oldest first.
    logged: HashMap<Run, Vec<Change>>,
    /// Data writes under way.
    writing: HashMap<u64, Run>,
    /// Data writes that have ended; how many had by the last one of each epoch, and by the last sync
    /// when it began.
    ended: u64,
    ended_of: HashMap<u64, u64>,
    synced: u64,
    /// The sync of the data device under way, and how many data writes had ended when it began.
    syncing: Option<(u64, u64)>,
    pub checkpoints: u64,
    pub data_writes: u64,
    /// Records that began while another was under way.
    pub beside: u64,
}

impl Watch {
    /// Begins to watch a volume that has just been opened, with its data on a device of its own.
    pub fn new(io: &SimStorage) -> Self {
        let mut disk = io.disk();
        disk.trace = Some(Vec::new());
        let superblock = Superblock::newest(&disk);
        assert!(superblock.separate_meta, "syncs of the two devices must be told apart");
        let mut watch = Self {
            seen: 0,
            superblock,
            named: HashSet::new(),
            tail: superblock.log_begin,
            head: superblock.log_begin,
            records: VecDeque::new(),
            stage: Stage::Idle,
            page_writes: HashSet::new(),
            logged: HashMap::new(),
            writing: HashMap::new(),
            ended: 0,
            ended_of: HashMap::new(),
            synced: 0,
            syncing: None,
            checkpoints: 0,
            data_writes: 0,
            beside: 0,
        };
        watch.look_at_superblocks(&disk);
        watch
    }

    /// Looks at what has happened since the last look; call it after every step.
    pub fn look(&mut self, io: &SimStorage) {
        let disk = io.disk();
        let trace = disk.trace.as_ref().unwrap();
        for (op, event) in &trace[self.seen..] {
            self.event(&disk, *op, *event);
        }
        self.seen = trace.len();
    }

    fn event(&mut self, disk: &Disk, op: u64, event: Trace) {
        let ring = LOG_OFFSET..LOG_OFFSET + self.superblock.log_size;
        match event {
            Trace::WriteStart { device: Device::Data, offset, len, .. } => self.data_starts(op, offset, len),
            Trace::WriteEnd { device: Device::Data, .. } | Trace::WriteFailed { device: Device::Data, .. } => {
                self.data_ends(disk, op);
            }
            Trace::WriteStart { offset, len, durable, .. } if SUPERBLOCKS.contains(&offset) => {
                assert!(durable && len == PAGE as usize, "a superblock write is durable");
                self.superblock_starts(offset);
            }
            Trace::WriteEnd { offset, .. } if SUPERBLOCKS.contains(&offset) => self.superblock_ends(disk, offset),
            Trace::WriteStart { offset, len, durable, .. } if ring.contains(&offset) => {
                assert!(durable, "a log write is durable");
                self.record_starts(offset, len as u64);
            }
            Trace::WriteEnd { offset, .. } if ring.contains(&offset) => self.record_ends(disk, offset),
            Trace::WriteStart { offset, .. } => self.page_starts(op, offset),
            Trace::WriteEnd { .. } => {
                self.page_writes.remove(&op);
            }
            Trace::Discard { offset, len } => {
                let run = self.run(offset, len);
                assert!(self.logged.contains_key(&run), "blocks {run:?} discarded before their zeros are durable");
            }
            Trace::SyncStart(device) => self.sync_starts(op, device),
            Trace::SyncEnd(device) => self.sync_ends(op, device),
            Trace::Read { .. } | Trace::WriteFailed { .. } => {}
        }
    }

    fn run(&self, offset: u64, len: u64) -> Run {
        ((offset - self.superblock.data_offset()) / self.superblock.block_size, len / self.superblock.block_size)
    }

    fn data_starts(&mut self, op: u64, offset: u64, len: usize) {
        let run = self.run(offset, len as u64);
        let beside = self.writing.values().filter(|other| **other == run).count();
        let logged = self.logged.get(&run).map_or(0, Vec::len);
        assert!(logged > beside, "data of blocks {run:?} sent before its record is durable");
        self.writing.insert(op, run);
        self.data_writes += 1;
    }

    fn data_ends(&mut self, disk: &Disk, op: u64) {
        let run = self.writing.remove(&op).expect("it has started");
        let (offset, len) = (self.superblock.block_offset(run.0), run.1 * self.superblock.block_size);
        let content = disk.peek(Device::Data, offset, len as usize);
        let changes = self.logged.get_mut(&run).expect("it was logged");
        let carried = changes.iter().position(|change| change.carried.as_ref() == Some(&content));
        let plain = || changes.iter().position(|change| change.carried.is_none());
        let which = carried.or_else(plain).unwrap_or(0);
        let epoch = changes[which].epoch;
        // Those before it have been superseded.
        changes.drain(..=which);
        self.ended += 1;
        self.ended_of.insert(epoch, self.ended);
    }

    fn record_starts(&mut self, offset: u64, bytes: u64) {
        let (size, at) = (self.superblock.log_size, offset - LOG_OFFSET);
        let position = self.head + (at + size - self.head % size) % size;
        self.head = position + bytes;
        assert!(
            self.head - self.tail <= size,
            "a record at {position} overwrites the live log, which begins at {}",
            self.tail
        );
        self.beside += u64::from(!self.records.is_empty());
        self.records.push_back((offset, false));
        assert!(self.records.len() <= 2, "more than two records not known to be durable");
    }

    /// A record counts once all before it are durable too.
    fn record_ends(&mut self, disk: &Disk, offset: u64) {
        self.records.iter_mut().filter(|(at, _)| *at == offset).for_each(|(_, durable)| *durable = true);
        while let Some((offset, true)) = self.records.front() {
            self.record_counts(disk, *offset);
            self.records.pop_front();
        }
    }

    fn record_counts(&mut self, disk: &Disk, offset: u64) {
        let record = image::record_at(disk, &self.superblock, offset).expect("what was written is a record");
        for entry in &record.entries {
            let run = match entry {
                Logged::Tags { first, tags, .. } | Logged::Payload { first, tags, .. } => (*first, tags.len() as u64),
                Logged::Zeros { first, count, .. } => (*first, *count),
                Logged::Flush { .. } => continue,
            };
            if record.epoch == self.superblock.epoch {
                assert_eq!(self.stage, Stage::Idle, "a change of an epoch that has been drained");
            }
            // Zeros have no data; a discard may follow, so they are only remembered.
            let changes = self.logged.entry(run).or_default();
            let carried = match entry {
                Logged::Payload { blocks, .. } => Some(blocks.clone()),
                Logged::Zeros { .. } => continue,
                _ => None,
            };
            changes.push(Change { epoch: record.epoch, carried });
        }
    }

    fn sync_starts(&mut self, op: u64, device: Device) {
        match device {
            Device::Data => {
                // A page-cache write error is told to one sync only: two at a time, and the
                // other would not know.
                let beside = self.syncing.replace((op, self.ended));
                assert!(beside.is_none(), "a sync of the data device beside another");
            }
            Device::Meta => {
                if self.stage == Stage::Pages && self.page_writes.is_empty() {
                    self.stage = Stage::Syncing(op);
                }
            }
        }
    }

    fn sync_ends(&mut self, op: u64, device: Device) {
        match device {
            Device::Data => {
                let (began, ended) = self.syncing.take().expect("it has started");
                assert_eq!(began, op);
                self.synced = ended;
            }
            Device::Meta if self.stage == Stage::Syncing(op) => self.stage = Stage::Synced,
            _ => {}
        }
    }

    fn page_starts(&mut self, op: u64, offset: u64) {
        assert!(!self.named.contains(&offset), "the slot at {offset} is named by a superblock on the disk");
        if self.stage == Stage::Idle {
            assert!(self.data_is_synced(), "a page is written before the data that it speaks of is synced");
        }
        self.stage = Stage::Pages;
        self.page_writes.insert(op);
    }

    /// Whether all data of the epoch that ends has been sent, has ended and was synced then.
    fn data_is_synced(&self) -> bool {
        let epoch = self.superblock.epoch;
        let mut plain = self.logged.values().flatten().filter(|change| change.carried.is_none());
        !plain.any(|change| change.epoch == epoch)
            && self.ended_of.get(&epoch).is_none_or(|ended| *ended <= self.synced)
    }

    fn superblock_starts(&mut self, offset: u64) {
        match (self.stage, offset == SUPERBLOCKS[0]) {
            // A checkpoint that leaves no page at all writes none.
            (Stage::Synced | Stage::Idle, true) | (Stage::CopyA, false) => {}
            (stage, _) => panic!("superblock copy at {offset} written while {stage:?}"),
        }
        assert!(self.stage != Stage::Idle || self.data_is_synced(), "a superblock before the data is synced");
    }

    fn superblock_ends(&mut self, disk: &Disk, offset: u64) {
        if offset == SUPERBLOCKS[0] {
            self.stage = Stage::CopyA;
        } else {
            self.stage = Stage::Idle;
            self.superblock = Superblock::newest(disk);
            self.checkpoints += 1;
        }
        self.look_at_superblocks(disk);
    }

    fn look_at_superblocks(&mut self, disk: &Disk) {
        let copies = SUPERBLOCKS.map(|at| Superblock::parse(&disk.peek(Device::Meta, at, 512)).expect("a whole copy"));
        self.named = copies.iter().flat_map(|s| s.pages(disk)).map(|page| page.offset).collect();
        self.tail = copies.iter().map(|s| s.log_begin).min().unwrap();
    }
}

//! An open volume: the state that all queues share.
//!
//! The operations live beside their subject: [`read`](Volume::read), [`write`](Volume::write) and
//! [`zero`](Volume::zero), [`flush`](Volume::flush), [`checkpoint`](Volume::checkpoint),
//! [`prefetch`](Volume::prefetch).

use crate::{
    Access, BlockIndex, CounterValues, Latched, OnMismatch, OpenOptions, Seq, Slot,
    counters::QueueCounters,
    crypto::{keys::Keys, tagger::Tagger},
    format::{Layout, Superblock},
    info::{RecoveryReport, Status, VolumeInfo},
    lifecycle::recovery::undecided::Undecided,
    log::{Log, LogConfig, LogPoint},
    metadata::{hints::Hints, page_cache::Cache, pending::PendingSet, tree::Tree, tree_update::Scratch},
    request::{hash_batch::HashThreads, range_lock::Ranges},
    sync::{AtomicUsize, Mutex, Ordering},
    write_back::Ledger,
};
use std::sync::Arc;

/// An open volume. Shared by all threads; each operation takes the calling thread's own
/// [`Storage`](crate::Storage) handle and a [`Slot`] of its own.
///
/// Operations are not meant to be cancelled: dropping the future of one that has begun latches the volume
/// read-only where it would leave others waiting or an epoch out, and costs the slot its buffers.
pub struct Volume {
    pub(crate) info: VolumeInfo,
    pub(crate) access: Access,
    pub(crate) on_mismatch: OnMismatch,
    pub(crate) max_request_bytes: usize,
    pub(crate) keys: Keys,
    /// As both copies have it; the checkpoint moves it on.
    pub(crate) superblock: Mutex<Superblock>,
    pub(crate) tagger: Arc<Tagger>,
    pub(crate) hash_threads: Option<HashThreads>,
    pub(crate) tree: Tree,
    /// By parity of the epoch.
    pub(crate) pending: [PendingSet; 2],
    pub(crate) log: Log,
    pub(crate) ranges: Ranges,
    pub(crate) accepted: Ledger,
    pub(crate) hints: Option<Hints>,
    /// Where the last hint led: the worker's alone.
    pub(crate) last_cluster: crate::sync::AtomicU64,
    /// Lookups that ask the next checkpoint to wait.
    pub(crate) holds: AtomicUsize,
    /// The checkpoint's memory, while none runs.
    pub(crate) scratch: Mutex<Option<Scratch>>,
    pub(crate) counters: Vec<QueueCounters>,
    pub(crate) recovery: RecoveryReport,
    pub(crate) warnings: Vec<String>,
    /// Read-only: blocks whose tags recovery found and did not write down, and those it could not find, sorted.
    pub(crate) overlay: Vec<BlockIndex>,
    pub(crate) undecided: Undecided,
    /// Rescue: what no change from this one on names may be older than what was last written.
    pub(crate) newer_from: Option<Seq>,
    slots_taken: AtomicUsize,
    max_slots: usize,
}

/// What opening has found, of which a [`Volume`] is made.
pub(crate) struct Parts {
    pub(crate) superblock: Superblock,
    pub(crate) keys: Keys,
    /// Where the log goes on.
    pub(crate) head: LogPoint,
    pub(crate) tree: Tree,
    pub(crate) tagger: Arc<Tagger>,
    pub(crate) report: RecoveryReport,
    pub(crate) warnings: Vec<String>,
    /// What is not written down: the volume is open read-only then.
    pub(crate) unsaved: Option<Unsaved>,
}

/// What recovery found and has not written down, so that it is served from memory.
pub(crate) struct Unsaved {
    pub(crate) set: PendingSet,
    /// The blocks of `set` and of `undecided`, sorted.
    pub(crate) blocks: Vec<BlockIndex>,
    pub(crate) undecided: Undecided,
    pub(crate) newer_from: Option<Seq>,
    /// Why it is not, unless nothing was to be written.
    pub(crate) why: Option<Latched>,
}

impl Unsaved {
    fn nothing(set: PendingSet) -> Self {
        Self { set, blocks: Vec::new(), undecided: Undecided::new(Vec::new()), newer_from: None, why: None }
    }
}

/// Most blocks with pending tags in one epoch: 64 Ki × 2 sets × 2 (half full) × 48 bytes = 12 MiB.
const MAX_PENDING_TAGS: u64 = 64 << 10;
/// Most runs of zeros in one epoch.
const MAX_PENDING_RUNS: usize = 4096;

impl Volume {
    /// A volume in the state that `parts` name, with a log that goes on at their head.
    pub(crate) fn new(parts: Parts, options: &OpenOptions) -> Self {
        let Parts { superblock, keys, head, tree, tagger, report, warnings, unsaved } = parts;
        let layout = superblock.layout;
        let max_tags = max_pending_tags(&layout);
        let queues = options.queues.max(1);
        // Slot 0 is the checkpoint's.
        let max_slots = options.max_slots + 1;
        let log = Log::new(log_config(&superblock, &keys, max_slots, queues), superblock.epoch, head);
        if let Some(why) = unsaved.as_ref().and_then(|unsaved| unsaved.why) {
            log.latch(why);
        }
        let access = if unsaved.is_some() { Access::ReadOnly } else { options.access };
        let empty = || PendingSet::new(max_tags, MAX_PENDING_RUNS);
        let unsaved = unsaved.unwrap_or_else(|| Unsaved::nothing(empty()));
        Self {
            info: VolumeInfo::of(&superblock),
            access,
            on_mismatch: options.on_mismatch,
            max_request_bytes: options.max_request_bytes,
            tagger,
            hash_threads: options.hash_threads.clone(),
            hints: options.hints.clone().map(|sender| Hints::new(sender, &layout, tree.cache.pages())),
            tree,
            pending: [unsaved.set, empty()],
            log,
            ranges: Ranges::new(max_slots, options.max_request_bytes / layout.block_size as usize),
            accepted: Ledger::new(max_slots),
            last_cluster: crate::sync::AtomicU64::new(u64::MAX),
            holds: AtomicUsize::new(0),
            scratch: Mutex::new(Some(Scratch::new(&layout, max_tags, MAX_PENDING_RUNS))),
            counters: (0..queues).map(|_| QueueCounters::default()).collect(),
            recovery: report,
            warnings,
            overlay: unsaved.blocks,
            undecided: unsaved.undecided,
            newer_from: unsaved.newer_from,
            slots_taken: AtomicUsize::new(1),
            max_slots,
            keys,
            superblock: Mutex::new(superblock),
        }
    }

    /// Sizes and identity.
    pub fn info(&self) -> &VolumeInfo {
        &self.info
    }
    /// Unit of integrity in bytes.
    pub fn block_size(&self) -> usize {
        self.tree.layout.block_size as usize
    }
    /// Usable size in blocks.
    pub fn blocks(&self) -> u64 {
        self.tree.layout.blocks
    }

    /// Memory taken by this volume in bytes: cache, log buffers, pending tags, checkpoint, and `max_slots` slots with their places
    /// in line.
    pub fn memory_bytes(&self) -> u64 {
        let max_blocks = self.max_request_bytes / self.block_size();
        let slot = Slot::memory_bytes(max_blocks, self.tree.layout.levels());
        let max_tags = max_pending_tags(&self.tree.layout);
        self.tree.cache.memory_bytes()
            + self.log.memory_bytes()
            + self.pending.iter().map(PendingSet::memory_bytes).sum::<u64>()
            + Scratch::memory_bytes(&self.tree.layout, max_tags, MAX_PENDING_RUNS)
            + self.max_slots as u64 * slot
            + Ranges::memory_bytes_for(self.max_slots)
            + Ledger::memory_bytes_for(self.max_slots)
    }

    /// Memory for one request; its counters go to `queue`'s.
    ///
    /// # Panics
    /// When more than `max_slots` are taken, or the queue does not exist.
    pub fn slot(&self, queue: usize) -> Slot {
        let id = self.slots_taken.fetch_add(1, Ordering::AcqRel);
        assert!(id < self.max_slots, "more slots than the volume was opened for");
        assert!(queue < self.counters.len(), "no such queue");
        let max_blocks = self.max_request_bytes / self.block_size();
        Slot::new(id, queue, max_blocks, self.tree.layout.levels())
    }

    /// Counters and state.
    pub fn status(&self) -> Status {
        let latched = self.log.latched();
        let (log_used, records, bytes) = self.log.usage();
        let mut counters = CounterValues::default();
        self.counters.iter().for_each(|queue| queue.add_to(&mut counters));
        counters.log_records = records;
        counters.log_bytes = bytes;
        Status {
            volume: self.info.clone(),
            read_only: self.access == Access::ReadOnly || latched.is_some(),
            latched: latched.map(|why| why.to_string()),
            on_mismatch: self.on_mismatch,
            log_used,
            pending_tags: self.pending.iter().map(|set| set.len() as u64).sum(),
            undecided_blocks: self.undecided.left() as u64,
            memory_bytes: self.memory_bytes(),
            counters,
            recovery: self.recovery.clone(),
        }
    }

    /// Where the devices, as they are now, do not promise what the volume was formatted for: one line each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// What recovery found when the volume was opened.
    pub fn recovery(&self) -> &RecoveryReport {
        &self.recovery
    }

    /// The first failure, if one has made the volume read-only.
    pub fn latched(&self) -> Option<Latched> {
        self.log.latched()
    }
}

/// The most memory that a volume of these sizes takes (of any sizes where `None`) when opened with this much of
/// `cache_bytes`, `max_slots` and `max_request_bytes` in its [`OpenOptions`]: for deciding before anything is taken. Too
/// much for 64 bits is `u64::MAX`.
pub fn most_memory_bytes(
    volume: Option<&VolumeInfo>,
    cache_bytes: u64,
    max_slots: usize,
    max_request_bytes: usize,
) -> u64 {
    let layout = volume.and_then(VolumeInfo::layout).unwrap_or_else(Layout::most_demanding);
    let max_tags = max_pending_tags(&layout);
    // And the slot of recovery.
    let slots = max_slots.saturating_add(1);
    let max_blocks = max_request_bytes / layout.block_size as usize;
    let slot = Slot::memory_bytes(max_blocks, layout.levels());
    (slots as u64)
        .saturating_mul(slot)
        .saturating_add(Log::memory_bytes_for(layout.max_record(), slots))
        .saturating_add(2 * PendingSet::memory_bytes_for(max_tags, MAX_PENDING_RUNS))
        .saturating_add(Scratch::memory_bytes(&layout, max_tags, MAX_PENDING_RUNS))
        .saturating_add(Ranges::memory_bytes_for(slots))
        .saturating_add(Ledger::memory_bytes_for(slots))
        .saturating_add(Cache::most_memory_bytes(cache_bytes))
}

fn max_pending_tags(layout: &Layout) -> usize {
    layout.blocks.min(MAX_PENDING_TAGS) as usize
}

fn log_config(superblock: &Superblock, keys: &Keys, max_slots: usize, queues: usize) -> LogConfig {
    let layout = &superblock.layout;
    LogConfig {
        offset: layout.log_offset().0,
        size: layout.log_size,
        physical_block: superblock.physical_block as usize,
        max_record: layout.max_record(),
        key: keys.log().clone(),
        max_tags: max_pending_tags(layout),
        max_runs: MAX_PENDING_RUNS,
        max_slots,
        queues,
    }
}

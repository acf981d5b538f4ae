//! An open volume: the components that all threads share, and what they are made of. `requests.rs`
//! has the operations.

mod requests;

use crate::{
    AnchorLoss, Epoch, Latched, RecordNumber, Seq,
    crypto::{keys::Keys, tagger::Tagger},
    format::{Layout, Scrub, Superblock},
    info::{RecoveryReport, Status, VolumeInfo},
    lifecycle::recovery::{in_log::InLog, undecided::Undecided},
    log::{Log, LogConfig, LogPoint},
    maintenance::checkpoint::Checkpoints,
    metadata::{
        Metadata, hints::Hints, page_cache::PageCache, pending::PendingSet, tree::Tree, update_scratch::Scratch,
    },
    options::{Access, OnMismatch, OpenOptions},
    request::{
        context::{RequestContext, RequestContexts},
        hash_batch::Hasher,
        range_lock::RangeLocks,
    },
    units::{BlockIndex, BlockRange, ByteOffset},
    write_back::AdmittedWrites,
};
use std::sync::Arc;

/// An open volume. Shared by all threads; each operation takes the calling thread's own
/// [`Io`](crate::Io) handle and a [`RequestContext`] of its own.
///
/// Operations are not meant to be cancelled: dropping the future of one that has begun latches
/// the volume read-only where it would leave others waiting or an epoch out, and costs the
/// context its buffers.
pub struct Volume {
    opened: Opened,
    contexts: RequestContexts,
    ranges: RangeLocks,
    hasher: Hasher,
    metadata: Metadata,
    log: Log,
    admitted: AdmittedWrites,
    checkpoints: Checkpoints,
}

/// What was decided at open, for as long as the volume is open.
struct Opened {
    info: VolumeInfo,
    access: Access,
    on_mismatch: OnMismatch,
    max_request_bytes: usize,
    recovery: RecoveryReport,
    warnings: Vec<String>,
    /// Read-only: blocks whose tags recovery found and did not write down, and those it could not
    /// find, sorted.
    overlay: Vec<BlockIndex>,
    undecided: Undecided,
    /// Read-only: blocks that are read from the log.
    in_log: InLog,
    /// Rescue: what no change from this one on names may be older than what was last written.
    newer_from: Option<Seq>,
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
    pub(crate) in_log: InLog,
    pub(crate) newer_from: Option<Seq>,
    /// Why it is not, unless nothing was to be written.
    pub(crate) why: Option<Latched>,
}

impl Unsaved {
    fn nothing(set: PendingSet) -> Self {
        let (undecided, in_log) = (Undecided::new(Vec::new()), InLog::with_capacity(0));
        Self { set, blocks: Vec::new(), undecided, in_log, newer_from: None, why: None }
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
        let max_blocks = options.max_request_bytes / layout.block_size as usize;
        let contexts = RequestContexts::new(options.max_requests, options.threads, max_blocks, layout.levels());
        let max_requests = contexts.max();
        let log = Log::new(log_config(&superblock, &keys, max_requests, options), superblock.epoch, head);
        if let Some(why) = unsaved.as_ref().and_then(|unsaved| unsaved.why) {
            log.latch(why);
        }
        let access = if unsaved.is_some() { Access::ReadOnly } else { options.access };
        let empty = || PendingSet::new(max_tags, MAX_PENDING_RUNS);
        let unsaved = unsaved.unwrap_or_else(|| Unsaved::nothing(empty()));
        let hints = options.hints.clone().map(|sender| Hints::new(sender, &layout, tree.cache.pages()));
        let scratch = Scratch::new(&layout, max_tags, MAX_PENDING_RUNS);
        Self {
            opened: Opened {
                info: VolumeInfo::of(&superblock),
                access,
                on_mismatch: options.on_mismatch,
                max_request_bytes: options.max_request_bytes,
                recovery: report,
                warnings,
                overlay: unsaved.blocks,
                undecided: unsaved.undecided,
                in_log: unsaved.in_log,
                newer_from: unsaved.newer_from,
            },
            contexts,
            ranges: RangeLocks::new(max_requests, max_blocks),
            hasher: Hasher::new(tagger, options.hash_threads.clone()),
            metadata: Metadata::new(tree, [unsaved.set, empty()], hints),
            log,
            admitted: AdmittedWrites::new(
                options.threads.max(1),
                max_requests,
                options.write_back_slots,
                superblock.has_sync_log(),
            ),
            checkpoints: Checkpoints::new(keys, superblock, scratch),
        }
    }

    /// Sizes and identity.
    pub fn info(&self) -> &VolumeInfo {
        &self.opened.info
    }
    /// Unit of integrity in bytes.
    pub fn block_size(&self) -> usize {
        self.metadata.block_size()
    }
    /// Where the first block lies on the data device, in bytes. The others follow.
    pub fn data_offset(&self) -> ByteOffset {
        self.metadata.layout().block_offset(BlockIndex(0))
    }
    /// Usable size in blocks.
    pub fn blocks(&self) -> u64 {
        self.metadata.layout().blocks
    }
    /// Bytes of the largest request.
    pub fn max_request_bytes(&self) -> usize {
        self.opened.max_request_bytes
    }

    /// Memory taken by this volume in bytes: cache, log buffers, pending tags, checkpoint, and
    /// `max_requests` contexts with their entries in the waiting lists.
    pub fn memory_bytes(&self) -> u64 {
        let max_tags = max_pending_tags(self.metadata.layout());
        self.metadata.memory_bytes()
            + self.log.memory_bytes()
            + Scratch::memory_bytes(self.metadata.layout(), max_tags, MAX_PENDING_RUNS)
            + self.contexts.memory_bytes()
            + RangeLocks::memory_bytes_for(self.contexts.max())
            + AdmittedWrites::memory_bytes_for(self.contexts.max())
    }

    /// Memory for one request; its counters go to `thread`'s.
    ///
    /// # Panics
    /// When more than `max_requests` are taken, or the thread does not exist.
    pub fn context(&self, thread: usize) -> RequestContext {
        self.contexts.take(thread)
    }

    /// Counters and state.
    pub fn status(&self) -> Status {
        let latched = self.log.latched();
        let (log_used, records, bytes) = self.log.usage();
        let mut counters = self.contexts.sum();
        counters.log_records = records;
        counters.log_bytes = bytes;
        Status {
            volume: self.opened.info.clone(),
            read_only: self.opened.access == Access::ReadOnly || latched.is_some(),
            latched: latched.map(|why| why.to_string()),
            sync_log: self.opened.access == Access::ReadWrite && self.log.may_carry_data(),
            on_mismatch: self.opened.on_mismatch,
            log_used,
            pending_tags: self.metadata.pending.iter().map(|set| set.len() as u64).sum(),
            undecided_blocks: self.opened.undecided.left() as u64,
            memory_bytes: self.memory_bytes(),
            counters,
            recovery: self.opened.recovery.clone(),
        }
    }

    /// Where the devices, as they are now, do not promise what the volume was
    /// formatted for: one line each.
    pub fn warnings(&self) -> &[String] {
        &self.opened.warnings
    }

    /// How many blocks of a range lie in the log and are not in place yet: read-only volumes have
    /// such blocks.
    pub(crate) fn blocks_in_log(&self, range: BlockRange) -> u64 {
        self.opened.in_log.within(range).count() as u64
    }

    /// What recovery found when the volume was opened.
    pub fn recovery(&self) -> &RecoveryReport {
        &self.opened.recovery
    }

    /// The record of the log that is not durable yet, the first of them: how far the log has got.
    pub fn next_record(&self) -> RecordNumber {
        self.log.durable_point().number
    }

    /// The log, for who tells an anchor how far that has got.
    pub(crate) fn log(&self) -> &Log {
        &self.log
    }

    /// That of the superblock on the devices.
    pub(crate) fn epoch(&self) -> Epoch {
        self.checkpoints.superblock().epoch
    }

    /// Makes the volume read-only for good: its anchor does not follow any more.
    pub fn latch_for_anchor(&self, loss: AnchorLoss) {
        self.log.latch(Latched::Anchor(loss));
    }

    /// The last pass over the volume that its superblock says something of. `None`: it is of format version 1,
    /// which has no place for that.
    pub fn last_scrub(&self) -> Option<Scrub> {
        self.checkpoints.superblock().scrub()
    }

    /// Says how a pass has ended, for the next superblock.
    pub fn note_scrub(&self, scrub: Scrub) {
        self.checkpoints.note_scrub(scrub);
    }

    /// The first failure, if one has made the volume read-only.
    pub fn latched(&self) -> Option<Latched> {
        self.log.latched()
    }
}

impl Opened {
    /// Whether a change that could not be read may be the newest of a block: any that is not named
    /// by what is newer for sure.
    fn may_be_older(&self, range: BlockRange, metadata: &Metadata) -> bool {
        let newest = |block| metadata.pending[0].lookup(block).map(|(seq, _)| seq);
        self.newer_from.is_some_and(|from| range.blocks().any(|block| newest(block).is_none_or(|seq| seq < from)))
    }
}

/// The most memory that a volume of these sizes takes (of any sizes where `None`) when opened with
/// this much of `cache_bytes`, `max_requests` and `max_request_bytes` in its [`OpenOptions`]: for
/// deciding before anything is taken. Too much for 64 bits is `u64::MAX`.
pub fn most_memory_bytes(
    volume: Option<&VolumeInfo>,
    cache_bytes: u64,
    max_requests: usize,
    max_request_bytes: usize,
) -> u64 {
    let layout = volume.and_then(VolumeInfo::layout).unwrap_or_else(Layout::most_demanding);
    let max_tags = max_pending_tags(&layout);
    // And the context of recovery.
    let contexts = max_requests.saturating_add(1);
    let max_blocks = max_request_bytes / layout.block_size as usize;
    let context = RequestContext::memory_bytes(max_blocks, layout.levels());
    (contexts as u64)
        .saturating_mul(context)
        .saturating_add(Log::memory_bytes_for(layout.max_record(), contexts))
        .saturating_add(2 * PendingSet::memory_bytes_for(max_tags, MAX_PENDING_RUNS))
        .saturating_add(Scratch::memory_bytes(&layout, max_tags, MAX_PENDING_RUNS))
        .saturating_add(RangeLocks::memory_bytes_for(contexts))
        .saturating_add(AdmittedWrites::memory_bytes_for(contexts))
        .saturating_add(PageCache::most_memory_bytes(cache_bytes))
}

fn max_pending_tags(layout: &Layout) -> usize {
    layout.blocks.min(MAX_PENDING_TAGS) as usize
}

fn log_config(superblock: &Superblock, keys: &Keys, max_requests: usize, options: &OpenOptions) -> LogConfig {
    let layout = &superblock.layout;
    LogConfig {
        offset: layout.log_offset().0,
        size: layout.log_size,
        physical_block: superblock.physical_block as usize,
        max_record: layout.max_record(),
        key: keys.log().clone(),
        max_tags: max_pending_tags(layout),
        max_runs: MAX_PENDING_RUNS,
        max_requests,
        threads: options.threads.max(1),
        sync_log: superblock.has_sync_log(),
    }
}

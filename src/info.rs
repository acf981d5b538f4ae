//! What a volume says of itself.

use crate::{
    CounterValues, OnMismatch, TagAlgorithm,
    format::{LEAST_SYNC_LOG, Label, Layout, RawSuperblock, Superblock, uuid_text},
};
use serde::{Deserialize, Serialize};
use zerocopy::FromBytes;

/// Sizes of a volume, for messages and for making backing files.
#[derive(Clone, Debug, Serialize)]
pub struct VolumeInfo {
    /// UUID in the usual text form.
    pub uuid: String,
    /// Unit of integrity in bytes.
    pub block_size: u32,
    /// Usable size in bytes.
    pub size: u64,
    /// The size in bytes that it can grow to, as far as its metadata has room.
    pub max_size: u64,
    /// The tag algorithm.
    pub tag: TagAlgorithm,
    /// Bytes used on the data device, payload and whatever metadata lies there.
    pub data_device_bytes: u64,
    /// Bytes used on the metadata device; `None` where there is one device.
    pub meta_device_bytes: Option<u64>,
    /// Size of the tag log in bytes.
    pub log_size: u64,
    /// Bytes of all metadata together.
    pub metadata_bytes: u64,
    /// Whether the metadata lives on a device of its own.
    pub separate_meta: bool,
    /// Bytes that the data device writes atomically as the user says, whatever it says itself.
    pub assumed_atomic_bytes: Option<u32>,
    /// The volume's name; empty where it has none.
    pub label: Label,
}

impl VolumeInfo {
    /// The sizes that the bytes of a superblock copy tell, if its checksum holds. Nothing of it is
    /// authenticated: good for choosing defaults, and for nothing else. A copy lies at the front of
    /// the device that holds the metadata.
    pub fn peek(superblock: &[u8]) -> Option<Self> {
        let (raw, _) = RawSuperblock::read_from_prefix(superblock).ok()?;
        raw.parse().ok().as_ref().map(Self::of)
    }

    /// The smallest tag log, in bytes, whose records can carry the data of small writes
    /// ([`OpenOptions::sync_log`](crate::OpenOptions::sync_log)).
    pub const LEAST_SYNC_LOG: u64 = LEAST_SYNC_LOG;

    /// Whether the tag log is large enough for that.
    pub fn fits_sync_log(&self) -> bool {
        self.log_size >= LEAST_SYNC_LOG
    }

    pub(crate) fn layout(&self) -> Option<Layout> {
        Layout::new(self.block_size, self.size, self.log_size, self.separate_meta).ok()
    }
    pub(crate) fn of(superblock: &Superblock) -> Self {
        let l = &superblock.layout;
        let shared = if l.separate_meta { 0 } else { l.size() };
        Self {
            uuid: uuid_text(&superblock.uuid),
            block_size: l.block_size,
            size: l.size(),
            max_size: l.capacity(),
            tag: superblock.tag,
            data_device_bytes: l.data_device_bytes(),
            meta_device_bytes: l.separate_meta.then(|| l.meta_device_bytes()),
            log_size: l.log_size,
            metadata_bytes: l.meta_device_bytes() - shared,
            separate_meta: l.separate_meta,
            assumed_atomic_bytes: superblock.assumed_atomic_bytes(),
            label: superblock.label(),
        }
    }
}

/// How many blocks of a kind a report lists.
pub const MAX_REPORTED_BLOCKS: usize = 1000;

/// What recovery found, for status and the daemon's log.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
pub struct RecoveryReport {
    /// Records followed in the log.
    pub records: u64,
    /// Records at the log's end that a power cut has torn: nobody was told that they are durable.
    #[serde(default)]
    pub torn_records: u64,
    /// Whether what such a record says lies on the medium: it was durable once, and has been damaged
    /// since. What was acknowledged by it may read as an older version.
    #[serde(default)]
    pub torn_was_durable: bool,
    /// Blocks that had log entries.
    pub blocks: u64,
    /// Blocks settled without reading or with the newest tag (rows A, P1 and B).
    pub settled: u64,
    /// Blocks whose newest writes never arrived: an older candidate (rows C and P2) or zeros (row D).
    pub older: u64,
    /// Blocks that match no candidate: corrupt, lost or rolled back (row E).
    pub corrupt: u64,
    /// Blocks that could not be read, or whose tag page could not: undecided (row F).
    pub unreadable: u64,
    /// Blocks whose content lay in the log, and that were put in place (rows P1 and P2).
    #[serde(default)]
    pub placed: u64,
    /// The first of the blocks of rows C, P2 and D.
    pub older_blocks: Vec<u64>,
    /// The first of the blocks of row E.
    pub corrupt_blocks: Vec<u64>,
    /// The first of the blocks of row F.
    pub unreadable_blocks: Vec<u64>,
    /// Metadata pages that did not verify when recovery had to change them.
    pub pages_lost: u64,
    /// A superblock copy was damaged and has been made good (or would be, were it not read-only).
    pub superblock_repaired: bool,
}

/// What `status` shows.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// The volume.
    #[serde(flatten)]
    pub volume: VolumeInfo,
    /// Whether it was opened read-only, or has become so.
    pub read_only: bool,
    /// The first failure, where one latched the volume read-only.
    pub latched: Option<String>,
    /// Whether small writes that must be durable at once may lie in the log with their data.
    pub sync_log: bool,
    /// What reads do with blocks that do not match.
    pub on_mismatch: OnMismatch,
    /// Bytes of the log in use.
    pub log_used: u64,
    /// Blocks whose tags wait for the next checkpoint.
    pub pending_tags: u64,
    /// Blocks that recovery could not decide about and that have not been read since: errors.
    pub undecided_blocks: u64,
    /// Memory of the volume in bytes.
    pub memory_bytes: u64,
    /// Counters since the volume was opened.
    #[serde(flatten)]
    pub counters: CounterValues,
    /// What recovery found at open.
    pub recovery: RecoveryReport,
}

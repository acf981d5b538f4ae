//! How to open a volume.

use crate::RecordNumber;
use serde::Serialize;

/// Whether anything may be written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// Reads and writes; recovery is written down.
    ReadWrite,
    /// Nothing is written, not even recovery's result.
    ReadOnly,
}

/// What a read does with a block that does not match its tag.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OnMismatch {
    /// The read fails (EILSEQ).
    Fail,
    /// The block reads as zeros; counted.
    Zero,
    /// What is there is accepted and signed anew; counted. Gives integrity up: for rescue only.
    Fix,
}

/// What becomes of a log that can't be read where it goes on: its newest records may lie there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum UnreadLog {
    /// The volume is not opened.
    #[default]
    Refuse,
    /// For rescue, read-only: what can be read of the log counts, and a block that the
    /// rest could name fails.
    FailOlder,
    /// For rescue, read-only: such a block reads as what is known of it, which may be older than
    /// what was last written.
    ServeOlder,
}

/// What becomes of a block with several candidates that can't be read while recovery
/// must choose (row F).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum UnreadableBlocks {
    /// Nothing is decided without evidence: the volume is open read-only, and the block an error
    /// until it can be read.
    #[default]
    KeepUndecided,
    /// The newest tag is taken and written down: if the write never arrived, the block is lost
    /// until it is written again.
    TakeNewest,
}

/// How large a volume is to be from now on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Grow {
    /// Of so many bytes: as many as it has, or more.
    To(u64),
    /// As large as its data device and its page areas have room for.
    AllThatFits,
}

/// How to open a volume. All limits are fixed for as long as it is open: memory is taken once.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Whether anything may be written.
    pub access: Access,
    /// Bytes of the cache of verified pages; 0 is allowed.
    pub cache_bytes: u64,
    /// How many [`RequestContext`](crate::RequestContext)s may be made: queues × depth, and one for
    /// each worker thread that reads or writes.
    pub max_requests: usize,
    /// I/O threads, for counters that do not share a cache line and for one check at the batch
    /// boundary of each.
    pub threads: usize,
    /// Largest request in bytes.
    pub max_request_bytes: usize,
    /// Most bytes of memory that the volume may take, and recovery before it: more is refused
    /// before it is taken.
    pub max_memory_bytes: u64,
    /// Whether the metadata was given as a device of its own.
    pub separate_meta: bool,
    /// Whether records of the log may carry the data of small writes that must be durable at once,
    /// if it is [large enough](crate::VolumeInfo::fits_sync_log). The superblock says so (format
    /// version 2) until the volume is [closed](crate::Volume::close): programs that know version 1
    /// alone open it again from then on.
    pub sync_log: bool,
    /// What a read does with a block that does not match its tag.
    pub on_mismatch: OnMismatch,
    /// The first record of the log that was not durable when the volume was last known
    /// ([`Admitted::first_not_durable`](crate::Admitted::first_not_durable)); 0 where nothing is
    /// known. A log that ends before it is of an older state of the volume, which is refused
    /// before anything is written ([`OlderState`](crate::open::OpenError::OlderState)).
    pub first_not_durable: RecordNumber,
    /// The UUID that the volume must have, where one is known: whole volumes under one key look
    /// alike otherwise.
    pub expected_uuid: Option<[u8; 16]>,
    /// What becomes of a log that can't be read.
    pub unread_log: UnreadLog,
    /// What becomes of blocks that can't be read.
    pub unreadable_blocks: UnreadableBlocks,
    /// Writes that each thread may have admitted at a time, as far as it is known: half of them may
    /// wait to be in place. 0: none waits.
    pub write_back_slots: usize,
    /// Whether a volume that has an anchor may be opened without it: read-only alone.
    pub without_anchor: bool,
    /// 32 fresh random bytes, drawn for this open.
    pub open_id: [u8; 32],
    /// How large the volume is to be from then on, where that is another size. It grows with what
    /// recovery writes down: a crash leaves the size that it had, or this one. Its info says whether
    /// it has, for nothing is written down where the volume can only be opened read-only.
    pub grow: Option<Grow>,
    /// Where prefetch hints go; none are made where `None`.
    pub hints: Option<crate::HintSender>,
    /// Threads that hash for those that serve requests, where there are any.
    pub hash_threads: Option<crate::HashThreads>,
}

impl OpenOptions {
    /// For one request of up to 1 MiB at a time, without a cache, on one device; what is
    /// in doubt is refused.
    pub fn new(access: Access, open_id: [u8; 32]) -> Self {
        Self {
            access,
            cache_bytes: 0,
            max_requests: 1,
            threads: 1,
            max_request_bytes: 1 << 20,
            max_memory_bytes: u64::MAX,
            separate_meta: false,
            sync_log: false,
            on_mismatch: OnMismatch::Fail,
            first_not_durable: RecordNumber(0),
            expected_uuid: None,
            unread_log: UnreadLog::default(),
            unreadable_blocks: UnreadableBlocks::default(),
            write_back_slots: 0,
            without_anchor: false,
            open_id,
            grow: None,
            hints: None,
            hash_threads: None,
        }
    }
}

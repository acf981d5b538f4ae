//! Opening a volume: how, what can go wrong, and what is found. The steps themselves are in `staged.rs`.

use crate::{
    BelowSector, Buf, ByteOffset, Device, DeviceError, MasterKey, OnMismatch, Storage, Volume,
    format::{Layout, PAGE_BYTES, RawIdentity, RawSuperblock, Superblock, SuperblockError, hex, uuid_text},
    lifecycle::{create::VolumeInfo, superblocks::read_copies},
};
pub use crate::{
    format::{Feature, Label, Scrub, ScrubState, Unknown, Version2},
    lifecycle::staged::VerifiedVolume,
};
use serde::{Deserialize, Serialize};
use zerocopy::FromBytes;

/// Whether anything may be written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// Reads and writes; recovery is written down.
    ReadWrite,
    /// Nothing is written, not even recovery's result.
    ReadOnly,
}

/// What becomes of a log that can't be read where it goes on: its newest records may lie there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum UnreadLog {
    /// The volume is not opened.
    #[default]
    Refuse,
    /// For rescue, read-only: what can be read of the log counts, and a block that the rest could name fails.
    FailOlder,
    /// For rescue, read-only: such a block reads as what is known of it, which may be older than what was last written.
    ServeOlder,
}

/// What becomes of a block with several candidates that can't be read while recovery must choose (row F).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum UnreadableBlocks {
    /// Nothing is decided without evidence: the volume is open read-only, and the block an error until it can be read.
    #[default]
    KeepUndecided,
    /// The newest tag is taken and written down: if the write never arrived, the block is lost until it is written again.
    TakeNewest,
}

/// How to open a volume. All limits are fixed for as long as it is open: memory is taken once.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Whether anything may be written.
    pub access: Access,
    /// Bytes of the cache of verified pages; 0 is allowed.
    pub cache_bytes: u64,
    /// How many [`Slot`](crate::Slot)s may be made: queues × depth, and one for each worker thread that reads or writes.
    pub max_slots: usize,
    /// Queues, for counters that do not share a cache line.
    pub queues: usize,
    /// Largest request in bytes.
    pub max_request_bytes: usize,
    /// Most bytes of memory that the volume may take, and recovery before it: more is refused before it is taken.
    pub max_memory_bytes: u64,
    /// Whether the metadata was given as a device of its own.
    pub separate_meta: bool,
    /// What a read does with a block that does not match its tag.
    pub on_mismatch: OnMismatch,
    /// The UUID that the volume must have, where one is known: whole volumes under one key look alike otherwise.
    pub expected_uuid: Option<[u8; 16]>,
    /// What becomes of a log that can't be read.
    pub unread_log: UnreadLog,
    /// What becomes of blocks that can't be read.
    pub unreadable_blocks: UnreadableBlocks,
    /// 32 fresh random bytes, drawn for this open.
    pub open_id: [u8; 32],
    /// Where prefetch hints go; none are made where `None`.
    pub hints: Option<crate::HintSender>,
    /// Threads that hash for those that serve requests, where there are any.
    pub hash_threads: Option<crate::HashThreads>,
}

impl OpenOptions {
    /// For one request of up to 1 MiB at a time, without a cache, on one device; what is in doubt is refused.
    pub fn new(access: Access, open_id: [u8; 32]) -> Self {
        Self {
            access,
            cache_bytes: 0,
            max_slots: 1,
            queues: 1,
            max_request_bytes: 1 << 20,
            max_memory_bytes: u64::MAX,
            separate_meta: false,
            on_mismatch: OnMismatch::Fail,
            expected_uuid: None,
            unread_log: UnreadLog::default(),
            unreadable_blocks: UnreadableBlocks::default(),
            open_id,
            hints: None,
            hash_threads: None,
        }
    }
}

/// What can be known without a key (`dump`).
#[derive(Clone, Debug, Serialize)]
pub struct Dump {
    /// One entry for each superblock copy, in order of place.
    pub copies: Vec<CopyDump>,
    /// The volume, from the newest copy whose checksum holds.
    pub volume: Option<VolumeInfo>,
    /// What format version 2 says of it besides.
    pub version2: Option<Version2>,
    /// UUID of the volume whose data device this is, where the metadata is elsewhere.
    pub identity: Option<String>,
    /// The first thing found that this program does not know, in words: no other than a newer program should touch it.
    pub unknown: Option<String>,
}

/// One superblock copy, unauthenticated.
#[derive(Clone, Debug, Serialize)]
pub struct CopyDump {
    /// Its place on the metadata device, in bytes.
    pub offset: u64,
    /// "checksum valid", "damaged", "absent", or "unknown".
    pub state: String,
    /// Format version, where readable.
    pub version: Option<u32>,
    /// What a program must know to use the volume; empty where not readable.
    pub features: Vec<Feature>,
    /// Where the state is "unknown": what this program does not know of it, in words.
    pub unknown: Option<String>,
    /// Epoch, where readable.
    pub epoch: Option<u64>,
    /// Key id (16 bytes, hexadecimal), where readable.
    pub key_id: Option<String>,
    /// The id (32 bytes, hexadecimal) that was drawn when the volume was last opened for writing, where readable.
    pub open_id: Option<String>,
}

/// How many blocks of a kind a report lists.
pub const MAX_REPORTED_BLOCKS: usize = 1000;

/// What recovery found, for status and the daemon's log.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
pub struct RecoveryReport {
    /// Records followed in the log.
    pub records: u64,
    /// Blocks that had log entries.
    pub blocks: u64,
    /// Blocks settled without reading or with the newest tag (rows A and B).
    pub settled: u64,
    /// Blocks whose newest writes never arrived: an older candidate (row C) or zeros (row D).
    pub older: u64,
    /// Blocks that match no candidate: corrupt, lost or rolled back (row E).
    pub corrupt: u64,
    /// Blocks that could not be read, or whose tag page could not: undecided (row F).
    pub unreadable: u64,
    /// The first of the blocks of rows C and D.
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

/// Why a volume can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No superblock anywhere.
    #[error("no ublk-integrity volume on the metadata device")]
    NotAVolume,
    /// Something on the devices is whole, and not what this program knows.
    #[error(transparent)]
    Unknown(#[from] Unknown),
    /// The volume is of a version that this program can show, but not serve.
    #[error("the volume is of format version 2 ({features}): this program shows it (`dump`), but can't open it")]
    NotServed {
        /// What it needs, in words.
        features: String,
    },
    /// Both copies fail their checksums.
    #[error("both superblock copies on the metadata device are damaged")]
    Damaged,
    /// The key is not this volume's.
    #[error("wrong key for volume {uuid}")]
    WrongKey {
        /// The volume.
        uuid: String,
    },
    /// Right key, but a MAC does not hold, or copies contradict each other, or the log is newer than the superblock.
    #[error("the {what} was tampered with")]
    Tampered {
        /// What.
        what: &'static str,
    },
    /// The data device is not the one that belongs to this metadata, or the other way round.
    #[error("{0}")]
    Foreign(String),
    /// The device is smaller than the volume.
    #[error("the {device} has {have} bytes, the volume needs {need}")]
    TooSmall {
        /// Which.
        device: crate::Device,
        /// Its size.
        have: u64,
        /// What the volume needs.
        need: u64,
    },
    /// The device transfers more at least than the volume reads and writes.
    #[error(transparent)]
    BelowSector(#[from] BelowSector),
    /// More memory than [`OpenOptions::max_memory_bytes`], or than there is.
    #[error("opening the volume takes {needed} bytes of memory at least, {available} can be had")]
    Memory {
        /// What it takes, as far as is known.
        needed: u64,
        /// What it may take.
        available: u64,
    },
    /// An option makes no sense.
    #[error("{0}")]
    Options(String),
    /// Another volume than the one that was asked for.
    #[error("this is volume {found}, not {expected}: nothing was done")]
    OtherVolume {
        /// The UUID that was asked for.
        expected: String,
        /// The one that is there.
        found: String,
    },
    /// A part of the log can't be read, and the newest changes may lie there.
    #[error("the tag log can't be read, the newest changes may be in it: {0}")]
    LogUnreadable(DeviceError),
    /// For ten seconds, or for many blocks, not one read of the device has succeeded.
    #[error("not one read succeeds any more, the device seems to be away; nothing was done: {0}")]
    Away(DeviceError),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Reads what can be known without a key. Writes nothing.
pub async fn dump<S: Storage>(io: &S) -> Result<Dump, OpenError> {
    let copies = read_copies(io).await?;
    let mut dump = Dump { copies: Vec::new(), volume: None, version2: None, identity: None, unknown: None };
    let mut newest = None;
    for (raw, offset) in copies.raw.iter().zip(Layout::superblock_offsets()) {
        let parsed = raw.parse();
        dump.copies.push(CopyDump::of(raw, offset, &parsed));
        if let Ok(superblock) = parsed {
            if newest.as_ref().is_none_or(|n: &Superblock| superblock.epoch > n.epoch) {
                newest = Some(superblock);
            }
        }
    }
    dump.volume = newest.as_ref().map(VolumeInfo::of);
    dump.version2 = newest.as_ref().and_then(|s| s.version2).map(|(_, fields)| fields);
    dump.unknown = dump.copies.iter().find_map(|copy| copy.unknown.clone());
    if newest.is_none() && dump.unknown.is_none() {
        match read_identity(io).await?.claim() {
            Ok(claim) => dump.identity = claim.map(|claim| uuid_text(&claim.uuid)),
            Err(unknown) => dump.unknown = Some(unknown.to_string()),
        }
    }
    let nothing = dump.copies.iter().all(|c| c.state == "absent") && dump.identity.is_none() && dump.unknown.is_none();
    if nothing { Err(OpenError::NotAVolume) } else { Ok(dump) }
}

impl CopyDump {
    fn of(raw: &RawSuperblock, offset: ByteOffset, parsed: &Result<Superblock, SuperblockError>) -> Self {
        let state = match parsed {
            Ok(_) => "checksum valid",
            Err(SuperblockError::Absent) => "absent",
            Err(SuperblockError::Unknown(_)) => "unknown",
            Err(_) => "damaged",
        };
        let unknown = parsed.as_ref().err().and_then(SuperblockError::unknown);
        // Of another version not even the places of the fields are known.
        let readable = raw.check().is_ok();
        Self {
            offset: offset.0,
            state: state.into(),
            version: (readable || unknown.is_some()).then(|| raw.version()),
            features: parsed.as_ref().map_or_else(|_| Vec::new(), |s| s.features().iter().collect()),
            unknown: unknown.map(|unknown| unknown.to_string()),
            epoch: readable.then(|| raw.epoch()),
            key_id: readable.then(|| hex(&raw.key_id())),
            open_id: readable.then(|| hex(&raw.open_id())),
        }
    }
}

pub(crate) async fn read_identity<S: Storage>(io: &S) -> Result<RawIdentity, DeviceError> {
    let buf = read_first_page(io, Device::Data).await?;
    Ok(RawIdentity::read_from_prefix(&buf).expect("a page is large enough").0)
}

async fn read_first_page<S: Storage>(io: &S, device: Device) -> Result<Buf, DeviceError> {
    let at = Layout::identity_offset();
    let (result, buf) = io.read(device, at, Buf::new(PAGE_BYTES), 0..PAGE_BYTES).await;
    let error = |errno| DeviceError::new("read", device, at, PAGE_BYTES, errno);
    result.map_err(error).map(|()| buf)
}

/// Whether the superblock is where the data should be, and the other way round.
pub(crate) async fn are_exchanged<S: Storage>(io: &S) -> Result<bool, DeviceError> {
    let (data, meta) = (read_first_page(io, Device::Data).await?, read_first_page(io, Device::Meta).await?);
    let superblock = RawSuperblock::read_from_prefix(&data).expect("a page is large enough").0;
    let identity = RawIdentity::read_from_prefix(&meta).expect("a page is large enough").0;
    Ok(superblock.check() != Err(SuperblockError::Absent) && identity.claim().is_ok_and(|claim| claim.is_some()))
}

/// Opens a volume: verifies the newest superblock, recovers from the log, and (unless read-only)
/// writes recovery's result down before anything is served.
///
/// The caller holds the locks on the devices and has waited for I/O of earlier holders.
pub async fn open<S: Storage>(io: &S, key: &MasterKey, options: &OpenOptions) -> Result<Volume, OpenError> {
    VerifiedVolume::read(io, key, options).await?.open(io, options).await
}

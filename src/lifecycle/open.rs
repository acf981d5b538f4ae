//! Opening a volume: how, what can go wrong, and what is found. The steps themselves are in
//! `staged.rs`.

use crate::{
    ByteOffset, MasterKey, Storage, Volume,
    format::{Layout, RawSuperblock, Superblock, SuperblockError, hex, uuid_text},
    info::VolumeInfo,
    lifecycle::{identity_block::read_identity, superblocks::read_copies},
};
pub use crate::{
    format::{BadLabel, Feature, KnownFormat, Label, Scrub, ScrubState, Unknown, Version2},
    info::{MAX_REPORTED_BLOCKS, RecoveryReport},
    lifecycle::grow_error::GrowError,
    lifecycle::open_error::OpenError,
    lifecycle::staged::VerifiedVolume,
    options::{Access, Grow, OpenOptions, UnreadLog, UnreadableBlocks},
};
use serde::Serialize;

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
    /// The first thing found that this program does not know, in words: no other than a newer
    /// program should touch it.
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
    /// The id (32 bytes, hexadecimal) that was drawn when the volume was last opened for writing,
    /// where readable.
    pub open_id: Option<String>,
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

/// Opens a volume: verifies the newest superblock, recovers from the log, and (unless read-only)
/// writes recovery's result down before anything is served.
///
/// The caller holds the locks on the devices and has waited for I/O of earlier holders.
pub async fn open<S: Storage>(io: &S, key: &MasterKey, options: &OpenOptions) -> Result<Volume, OpenError> {
    VerifiedVolume::read(io, key, options).await?.open(io, options).await
}

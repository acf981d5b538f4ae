//! The superblock: the one place that names the current state of everything.

use super::{
    Feature, Features, Layout, LayoutError, Link, TAG_BYTES, TreeEntry, Unknown,
    version2::{self, RawVersion2, Version2},
};
use crate::{
    Epoch, RecordNumber,
    keys::{Digest, Keys, Mac, TagAlgorithm},
};
use sha2::{Digest as _, Sha256};
use std::mem::offset_of;
use zerocopy::{
    FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout,
    little_endian::{U16, U32, U64},
};

/// Bytes of the struct; it is written at the front of a zeroed 4096-byte page.
pub(crate) const SUPERBLOCK_BYTES: usize = 512;
const MAGIC: [u8; 8] = *b"UBLKINTG";
/// Version 1 knows one flag, and has zeros where version 2 has more fields.
const VERSION_1: u32 = 1;
const VERSION_2: u32 = 2;

/// The bytes of a superblock copy; says nothing about their truth.
///
/// 8 magic, 4 version, 4 flags, 16 uuid, 4 block size, 2 tag algorithm, 2 tag size, 8 blocks, 8 log size,
/// 4 physical block, 4 reserved: 64 bytes. 8 epoch, 64 root, 8 log begin, 8 record number, 32 link, 32 open id,
/// 16 key id: 168. Then 216 of version 2, 32 checksum, 32 MAC: 512 bytes.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(crate) struct RawSuperblock {
    magic: [u8; 8],
    version: U32,
    flags: U32,
    uuid: [u8; 16],
    block_size: U32,
    tag_algorithm: U16,
    tag_size: U16,
    blocks: U64,
    log_size: U64,
    physical_block: U32,
    reserved0: U32,
    epoch: U64,
    root: TreeEntry,
    log_begin: U64,
    record_number: U64,
    link: Link,
    open_id: [u8; 32],
    key_id: [u8; 16],
    version2: RawVersion2,
    checksum: Digest,
    mac: Mac,
}
const _: () = assert!(size_of::<RawSuperblock>() == SUPERBLOCK_BYTES);
const _: () = assert!(offset_of!(RawSuperblock, epoch) == 64 && offset_of!(RawSuperblock, log_begin) == 136);
const _: () = assert!(offset_of!(RawSuperblock, version2) == version2::AT);
const _: () = assert!(offset_of!(RawSuperblock, checksum) == 448);

/// A superblock whose checksum, key id and MAC hold.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Superblock {
    pub(crate) uuid: [u8; 16],
    pub(crate) layout: Layout,
    pub(crate) tag: TagAlgorithm,
    /// What log records are padded to, in bytes.
    pub(crate) physical_block: u32,
    pub(crate) epoch: Epoch,
    /// Names the root page.
    pub(crate) root: TreeEntry,
    /// Where the live log begins, in bytes ever written to the ring; modulo its size, the place.
    pub(crate) log_begin: u64,
    /// Number of the record expected there.
    pub(crate) record_number: RecordNumber,
    /// Link expected in that record.
    pub(crate) link: Link,
    /// Drawn at every open.
    pub(crate) open_id: [u8; 32],
    /// What version 2 has besides; sealed as it was read.
    pub(crate) version2: Option<(Features, Version2)>,
}

/// Why a copy is no superblock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum SuperblockError {
    /// No magic number here.
    Absent,
    /// The checksum does not hold.
    Damaged,
    /// The checksum holds: it is what somebody wrote, but not what this program knows.
    Unknown(Unknown),
    WrongKey,
    /// Checksum and key id hold, the MAC does not.
    Tampered,
}

impl SuperblockError {
    pub(crate) fn unknown(&self) -> Option<Unknown> {
        if let Self::Unknown(unknown) = self { Some(*unknown) } else { None }
    }
}

impl RawSuperblock {
    /// What stands for a copy that the device can't read: right magic, wrong checksum.
    pub(crate) fn unreadable() -> Self {
        let mut raw = Self::new_zeroed();
        raw.magic = MAGIC;
        raw
    }

    /// Magic, version and checksum, without a key.
    pub(crate) fn check(&self) -> Result<(), SuperblockError> {
        if self.magic != MAGIC {
            return Err(SuperblockError::Absent);
        }
        if self.checksum != self.sum() {
            return Err(SuperblockError::Damaged);
        }
        match self.version.get() {
            VERSION_1 | VERSION_2 => Ok(()),
            v => Err(SuperblockError::Unknown(Unknown::Version(v))),
        }
    }

    /// What the fields say, not authenticated: for `dump`, and as the step before the MAC.
    pub(crate) fn parse(&self) -> Result<Superblock, SuperblockError> {
        self.check()?;
        self.fields().map_err(SuperblockError::Unknown)
    }

    /// All fields. Nothing is passed over: what is not understood here would be lost with the next superblock.
    fn fields(&self) -> Result<Superblock, Unknown> {
        let version = self.version.get();
        let known = if version == VERSION_1 { &[Feature::SeparateMeta][..] } else { &Feature::ALL };
        let features = Features::parse(self.flags.get(), known)?;
        let code = self.tag_algorithm.get();
        let tag = TagAlgorithm::from_code(code).ok_or(Unknown::TagAlgorithm(code))?;
        let physical = self.physical_block.get();
        match () {
            () if usize::from(self.tag_size.get()) != TAG_BYTES => return Err(odd("tag size")),
            () if !physical.is_power_of_two() || !(512..=4096).contains(&physical) => {
                return Err(odd("record padding"));
            }
            () if !self.root.known(version) => return Err(odd("root")),
            () => {}
        }
        Unknown::refuse_reserved(OF, offset_of!(Self, reserved0), self.reserved0.as_bytes())?;
        let version2 = match version {
            VERSION_1 => {
                Unknown::refuse_reserved(OF, version2::AT, self.version2.as_bytes())?;
                None
            }
            _ => Some((features, self.version2.parse(features)?)),
        };
        Ok(Superblock {
            uuid: self.uuid,
            layout: self.layout(features)?,
            tag,
            physical_block: physical,
            epoch: Epoch(self.epoch.get()),
            root: self.root,
            log_begin: self.log_begin.get(),
            record_number: RecordNumber(self.record_number.get()),
            link: self.link,
            open_id: self.open_id,
            version2,
        })
    }

    fn layout(&self, features: Features) -> Result<Layout, Unknown> {
        let field = |error: LayoutError| match error {
            LayoutError::BlockSize => odd("block size"),
            LayoutError::Size => odd("number of blocks"),
            LayoutError::LogSize => odd("log size"),
            LayoutError::Place(place) => odd(place),
        };
        let block_size = self.block_size.get();
        let size = self.blocks.get().checked_mul(block_size.into()).ok_or(field(LayoutError::Size))?;
        let separate = features.has(Feature::SeparateMeta);
        let computed = Layout::new(block_size, size, self.log_size.get(), separate).map_err(field)?;
        let places = self.version2.places(features, *computed.places())?;
        computed.with_places(places).map_err(field)
    }

    /// Everything: the only way to a [`Superblock`] that may be believed.
    pub(crate) fn verify(&self, keys: &Keys) -> Result<Superblock, SuperblockError> {
        self.check()?;
        if self.key_id != keys.id() {
            return Err(SuperblockError::WrongKey);
        }
        if !keys.superblock().verify(self.authenticated(), &self.mac) {
            return Err(SuperblockError::Tampered);
        }
        self.parse()
    }

    pub(crate) fn uuid(&self) -> [u8; 16] {
        self.uuid
    }
    pub(crate) fn key_id(&self) -> [u8; 16] {
        self.key_id
    }
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.get()
    }
    pub(crate) fn version(&self) -> u32 {
        self.version.get()
    }
    fn authenticated(&self) -> &[u8] {
        &self.as_bytes()[..SUPERBLOCK_BYTES - 64]
    }
    fn sum(&self) -> Digest {
        Sha256::digest(self.authenticated()).into()
    }
}

/// What [`Unknown`] calls this struct.
const OF: &str = "superblock";

fn odd(field: &'static str) -> Unknown {
    Unknown::Field { of: OF, field }
}

impl Superblock {
    /// What a reader must know to touch the volume.
    pub(crate) fn features(&self) -> Features {
        let separate =
            if self.layout.separate_meta { Features::of(&[Feature::SeparateMeta]) } else { Features::default() };
        self.version2.map_or(separate, |(features, _)| features)
    }

    /// The bytes, with checksum and MAC. A superblock of version 1 where nothing of version 2 was read or set.
    pub(crate) fn seal(&self, keys: &Keys) -> RawSuperblock {
        let places = self.layout.places();
        let version2 = self.version2.map(|(features, fields)| RawVersion2::new(&fields, features, places));
        let mut raw = RawSuperblock {
            magic: MAGIC,
            version: U32::new(if version2.is_some() { VERSION_2 } else { VERSION_1 }),
            flags: U32::new(self.features().bits()),
            uuid: self.uuid,
            block_size: U32::new(self.layout.block_size),
            tag_algorithm: U16::new(self.tag.code()),
            tag_size: U16::new(TAG_BYTES as u16),
            blocks: U64::new(self.layout.blocks),
            log_size: U64::new(self.layout.log_size),
            physical_block: U32::new(self.physical_block),
            reserved0: U32::ZERO,
            epoch: U64::new(self.epoch.0),
            root: self.root,
            log_begin: U64::new(self.log_begin),
            record_number: U64::new(self.record_number.0),
            link: self.link,
            open_id: self.open_id,
            key_id: keys.id(),
            version2: version2.unwrap_or(RawVersion2::ZERO),
            checksum: [0; 32],
            mac: [0; 32],
        };
        raw.checksum = raw.sum();
        raw.mac = keys.superblock().sign(raw.authenticated());
        raw
    }
}

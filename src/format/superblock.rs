//! The superblock: the one place that names the current state of everything.

use super::{Layout, LayoutError, Link, TreeEntry, VERSION};
use crate::{
    Epoch, RecordNumber,
    keys::{Digest, Keys, Mac, TagAlgorithm},
};
use sha2::{Digest as _, Sha256};
use zerocopy::{
    FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout,
    little_endian::{U16, U32, U64},
};

/// Bytes of the struct; it is written at the front of a zeroed 4096-byte page.
pub(crate) const SUPERBLOCK_BYTES: usize = 512;
const MAGIC: [u8; 8] = *b"UBLKINTG";
/// Set where the metadata is on a device of its own.
const FLAG_SEPARATE_META: u32 = 1;

/// The bytes of a superblock copy; says nothing about their truth.
///
/// 8 magic, 4 version, 4 flags, 16 uuid, 4 block size, 2 tag algorithm, 2 tag size, 8 blocks, 8 log size,
/// 4 physical block, 4 reserved: 64 bytes. 8 epoch, 64 root, 8 log begin, 8 record number, 32 link, 32 open id,
/// 16 key id: 168. Then 216 reserved, 32 checksum, 32 MAC: 512 bytes.
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
    reserved1: [u8; 216],
    checksum: Digest,
    mac: Mac,
}
const _: () = assert!(size_of::<RawSuperblock>() == SUPERBLOCK_BYTES);

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
}

/// Why a copy is no superblock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum SuperblockError {
    /// No magic number here.
    Absent,
    /// The checksum does not hold, or the fields contradict each other.
    Damaged,
    Version(u32),
    WrongKey,
    /// Checksum and key id hold, the MAC does not.
    Tampered,
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
            VERSION => Ok(()),
            v => Err(SuperblockError::Version(v)),
        }
    }

    /// What the fields say, not authenticated: for `dump`, and as the step before the MAC.
    pub(crate) fn parse(&self) -> Result<Superblock, SuperblockError> {
        self.check()?;
        let damaged = |_: LayoutError| SuperblockError::Damaged;
        let size = self.blocks.get().checked_mul(u64::from(self.block_size.get())).ok_or(SuperblockError::Damaged)?;
        let separate = self.flags.get() & FLAG_SEPARATE_META != 0;
        let physical = self.physical_block.get();
        if !physical.is_power_of_two() || !(512..=4096).contains(&physical) {
            return Err(SuperblockError::Damaged);
        }
        Ok(Superblock {
            uuid: self.uuid,
            layout: Layout::new(self.block_size.get(), size, self.log_size.get(), separate).map_err(damaged)?,
            tag: TagAlgorithm::from_code(self.tag_algorithm.get()).ok_or(SuperblockError::Damaged)?,
            physical_block: physical,
            epoch: Epoch(self.epoch.get()),
            root: self.root,
            log_begin: self.log_begin.get(),
            record_number: RecordNumber(self.record_number.get()),
            link: self.link,
            open_id: self.open_id,
        })
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
    fn authenticated(&self) -> &[u8] {
        &self.as_bytes()[..SUPERBLOCK_BYTES - 64]
    }
    fn sum(&self) -> Digest {
        Sha256::digest(self.authenticated()).into()
    }
}

impl Superblock {
    /// The bytes, with checksum and MAC.
    pub(crate) fn seal(&self, keys: &Keys) -> RawSuperblock {
        let mut raw = RawSuperblock {
            magic: MAGIC,
            version: U32::new(VERSION),
            flags: U32::new(if self.layout.separate_meta { FLAG_SEPARATE_META } else { 0 }),
            uuid: self.uuid,
            block_size: U32::new(self.layout.block_size),
            tag_algorithm: U16::new(self.tag.code()),
            tag_size: U16::new(super::TAG_BYTES as u16),
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
            reserved1: [0; 216],
            checksum: [0; 32],
            mac: [0; 32],
        };
        raw.checksum = raw.sum();
        raw.mac = keys.superblock().sign(raw.authenticated());
        raw
    }
}

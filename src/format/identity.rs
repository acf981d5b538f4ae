//! The identity block: binds a data device to its metadata.

use super::Unknown;
use crate::crypto::keys::{Digest, Keys, Mac};
use sha2::{Digest as _, Sha256};
use std::mem::offset_of;
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout,
    little_endian::{U32, U64},
};

const MAGIC: [u8; 8] = *b"UBLKIDNT";
/// Its own count: a superblock of version 2 comes with it too.
const VERSION: u32 = 1;
/// The only role so far: the data device of a volume whose metadata is elsewhere.
const ROLE_DATA: u32 = 1;
const BYTES: usize = 512;

/// 8 magic + 4 version + 4 role + 16 uuid + 8 size + 16 key id + 392 reserved + 32 checksum + 32
/// MAC = 512 bytes.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(crate) struct RawIdentity {
    magic: [u8; 8],
    version: U32,
    role: U32,
    uuid: [u8; 16],
    size: U64,
    key_id: [u8; 16],
    reserved: [u8; 392],
    checksum: Digest,
    mac: Mac,
}
const _: () = assert!(size_of::<RawIdentity>() == BYTES);
const _: () = assert!(offset_of!(RawIdentity, reserved) == 56 && offset_of!(RawIdentity, checksum) == 448);

/// What a data device says of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Identity {
    /// The volume it belongs to.
    pub(crate) uuid: [u8; 16],
    /// The volume's usable size in bytes.
    pub(crate) size: u64,
}

/// What [`Unknown`] calls this struct.
const OF: &str = "identity block";

impl RawIdentity {
    /// The volume that this device claims to belong to; `None` where there is no whole identity
    /// block.
    pub(crate) fn claim(&self) -> Result<Option<Identity>, Unknown> {
        if self.magic != MAGIC || self.checksum != self.sum() {
            return Ok(None);
        }
        if self.version.get() != VERSION {
            return Err(Unknown::IdentityVersion(self.version.get()));
        }
        if self.role.get() != ROLE_DATA {
            return Err(Unknown::Field { of: OF, field: "role" });
        }
        Unknown::refuse_reserved(OF, offset_of!(Self, reserved), &self.reserved)?;
        Ok(Some(Identity { uuid: self.uuid, size: self.size.get() }))
    }

    /// Whether this is what a write that was cut short may leave of a volume's: no writing of it
    /// changes anything but size, checksum and MAC.
    pub(crate) fn is_torn(&self, uuid: &[u8; 16], keys: &Keys) -> bool {
        let same = (self.version.get(), self.role.get()) == (VERSION, ROLE_DATA)
            && (self.magic, self.uuid, self.key_id) == (MAGIC, *uuid, keys.id());
        same && self.reserved.iter().all(|byte| *byte == 0) && self.checksum != self.sum()
    }

    /// Whether the claim says that it was made with the volume's key.
    pub(crate) fn names_key_of(&self, keys: &Keys) -> bool {
        self.key_id == keys.id()
    }

    /// Whether the claim was made with the volume's key.
    pub(crate) fn verify(&self, keys: &Keys) -> bool {
        self.names_key_of(keys) && keys.identity().verify(self.authenticated(), &self.mac)
    }

    fn authenticated(&self) -> &[u8] {
        &self.as_bytes()[..BYTES - 64]
    }
    fn sum(&self) -> Digest {
        Sha256::digest(self.authenticated()).into()
    }
}

impl Identity {
    pub(crate) fn seal(&self, keys: &Keys) -> RawIdentity {
        let mut raw = RawIdentity {
            magic: MAGIC,
            version: U32::new(VERSION),
            role: U32::new(ROLE_DATA),
            uuid: self.uuid,
            size: U64::new(self.size),
            key_id: keys.id(),
            reserved: [0; 392],
            checksum: [0; 32],
            mac: [0; 32],
        };
        raw.checksum = raw.sum();
        raw.mac = keys.identity().sign(raw.authenticated());
        raw
    }
}

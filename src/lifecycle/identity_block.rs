//! The block by which a data device says whose it is, where the metadata is on a device of its own.

use crate::{
    Buf, Device, DeviceError, Durability, Storage,
    crypto::keys::Keys,
    format::{
        Feature, Identity, Layout, PAGE_BYTES, RawIdentity, RawSuperblock, Superblock, SuperblockError, Unknown,
        uuid_text,
    },
    lifecycle::open_error::OpenError,
};
use zerocopy::{FromBytes, IntoBytes};

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

/// Writes it, durable.
pub(crate) async fn write_identity<S: Storage>(io: &S, keys: &Keys, identity: &Identity) -> Result<(), DeviceError> {
    let (at, mut buf) = (Layout::identity_offset(), Buf::new(PAGE_BYTES));
    let raw = identity.seal(keys);
    buf[..raw.as_bytes().len()].copy_from_slice(raw.as_bytes());
    let (result, _) = io.write(Device::Data, at, buf, 0..PAGE_BYTES, Durability::Durable).await;
    result.map_err(|errno| DeviceError::new("write", Device::Data, at, PAGE_BYTES, errno))
}

/// What a data device without metadata says of the size of its volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Claimed {
    /// So many bytes: as the superblock, or fewer.
    Size(u64),
    /// Nothing: its writing was cut short, as far as can be told.
    Torn,
}

/// What the block says, if it can be the volume's: where that can grow, the size before too, for the
/// superblock is written first. The MAC of a size is not verified.
pub(crate) fn claimed(raw: &RawIdentity, superblock: &Superblock, keys: &Keys) -> Result<Option<Claimed>, Unknown> {
    let size = superblock.layout.size();
    let can_grow = superblock.features().has(Feature::ExplicitPlaces);
    Ok(match raw.claim()? {
        Some(claim) if claim.uuid == superblock.uuid && (claim.size == size || can_grow && claim.size < size) => {
            Some(Claimed::Size(claim.size))
        }
        None if can_grow && raw.is_torn(&superblock.uuid, keys) => Some(Claimed::Torn),
        _ => None,
    })
}

/// The data device is the volume's, and what it says. Where the volume can grow the block may be one
/// that can't be read: its writing was cut short.
pub(crate) async fn check_identity<S: Storage>(
    io: &S,
    superblock: &Superblock,
    keys: &Keys,
) -> Result<Claimed, OpenError> {
    let raw = match read_identity(io).await {
        Err(_) if superblock.features().has(Feature::ExplicitPlaces) => return Ok(Claimed::Torn),
        raw => raw?,
    };
    match claimed(&raw, superblock, keys)? {
        Some(Claimed::Size(_)) if !raw.verify(keys) => {
            Err(OpenError::Tampered { what: "identity block of the data device" })
        }
        Some(claimed) => Ok(claimed),
        None => Err(OpenError::Foreign(whose_instead(raw.claim()?, superblock))),
    }
}

/// Why a block that is whole, or none, is not the volume's.
fn whose_instead(claim: Option<Identity>, superblock: &Superblock) -> String {
    let (uuid, size) = (uuid_text(&superblock.uuid), superblock.layout.size());
    match claim {
        Some(Identity { uuid: its, size: claimed }) if its == superblock.uuid => format!(
            "the data device says that volume {uuid} has {claimed} bytes, the metadata device says {size}: one of them is as it was before the volume grew"
        ),
        _ => {
            let what = claim.map_or("no volume".into(), |claim| format!("volume {}", uuid_text(&claim.uuid)));
            format!("the data device belongs to {what}, the metadata device to volume {uuid}")
        }
    }
}

//! Reading the block by which a data device says whose it is, where the metadata is on
//! a device of its own.

use crate::{
    Buf, Device, DeviceError, Storage,
    format::{Layout, PAGE_BYTES, RawIdentity, RawSuperblock, SuperblockError},
};
use zerocopy::FromBytes;

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

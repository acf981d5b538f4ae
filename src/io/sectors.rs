//! The least that a device transfers, and what a volume reads and writes.

use crate::{Device, Storage};

/// A unit of the volume's is smaller than what the device transfers: neither can it be
/// written, nor read alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{what} of {unit} bytes on the {device}, which reads and writes {logical} bytes at a time (its logical block)")]
pub struct BelowSector {
    /// Which.
    pub device: Device,
    /// What is too small.
    pub what: &'static str,
    /// Its size in bytes.
    pub unit: u32,
    /// The device's logical block size in bytes.
    pub logical: u32,
}

/// Refuses blocks that the data device can't transfer.
pub(crate) fn refuse_blocks_below_sector<S: Storage>(io: &S, block_size: u32) -> Result<(), BelowSector> {
    refuse_below(io, Device::Data, "blocks", block_size)
}

/// Refuses log records that the metadata device can't transfer. Pages and superblocks are never
/// smaller.
pub(crate) fn refuse_records_below_sector<S: Storage>(io: &S, padding: u32) -> Result<(), BelowSector> {
    refuse_below(io, Device::Meta, "log records padded to a multiple", padding)
}

/// Refuses a metadata device that can't transfer a page alone.
pub(crate) fn refuse_pages_below_sector<S: Storage>(io: &S) -> Result<(), BelowSector> {
    refuse_below(io, Device::Meta, "metadata pages", crate::format::PAGE_BYTES as u32)
}

fn refuse_below<S: Storage>(io: &S, device: Device, what: &'static str, unit: u32) -> Result<(), BelowSector> {
    let logical = io.geometry(device).logical_block;
    if unit < logical { Err(BelowSector { device, what, unit, logical }) } else { Ok(()) }
}

//! Whether the devices are those of the volume, and fit for it.

use crate::{
    Device, DeviceError, Storage,
    format::{Superblock, uuid_text},
    io::sectors::{refuse_blocks_below_sector, refuse_records_below_sector},
    lifecycle::{
        identity_block::{Claimed, are_exchanged, check_identity, read_identity},
        open_error::OpenError,
        superblocks::Newest,
    },
    options::OpenOptions,
};

/// The devices may not be those that the volume was formatted on: an image copied to another disk.
pub(super) fn atomicity_warnings<S: Storage>(io: &S, superblock: &Superblock) -> Vec<String> {
    let (data, meta) = (io.geometry(Device::Data).physical_block, io.geometry(Device::Meta).physical_block);
    let mut warnings = Vec::new();
    let block = superblock.layout.block_size;
    // The user's word counts for what the data device does not tear, and for what a write leaves
    // alone if that is less than the device says.
    let assumed = superblock.assumed_atomic_bytes();
    let atomic = assumed.unwrap_or(data);
    let data = assumed.map_or(data, |bytes| bytes.min(data));
    let meta = assumed.filter(|_| !superblock.layout.separate_meta).map_or(meta, |bytes| bytes.min(meta));
    if block > atomic {
        warnings.push(format!(
            "blocks of {block} bytes on a device that writes only {atomic} at once: a power cut may tear one, which then reads as an error"
        ));
    }
    if block < data {
        warnings.push(format!(
            "blocks of {block} bytes on a device that writes {data} at once: a power cut may damage the neighbours of a block under way, which then read as errors"
        ));
    }
    if meta > superblock.physical_block {
        warnings.push(format!(
            "the metadata device writes {meta} bytes at once, the volume was made for {}: a power cut may damage neighbouring metadata",
            superblock.physical_block
        ));
    }
    warnings
}

/// Nothing in this program does yet what the other features ask for.
pub(super) fn refuse_unserved(superblock: &Superblock) -> Result<(), OpenError> {
    let unserved = superblock.features().iter().filter(|feature| !feature.is_served());
    let mut names: Vec<_> = unserved.map(|feature| feature.to_string()).collect();
    // Nothing moves pages from one area to the other yet.
    names.extend(superblock.layout.has_second_area().then(|| "a second page area".into()));
    if names.is_empty() { Ok(()) } else { Err(OpenError::NotServed { features: names.join(", ") }) }
}

/// There is no superblock: perhaps this is the data device of a volume whose metadata is elsewhere.
pub(super) async fn explain_no_superblock<S: Storage>(io: &S) -> Result<OpenError, DeviceError> {
    if are_exchanged(io).await? {
        let exchanged = "the devices are the other way round: use --data the metadata device --meta the data device";
        return Ok(OpenError::Foreign(exchanged.into()));
    }
    Ok(match read_identity(io).await?.claim() {
        Err(unknown) => unknown.into(),
        Ok(Some(claim)) => OpenError::Foreign(format!(
            "the data device holds the data of volume {}: name its metadata device with --meta",
            uuid_text(&claim.uuid)
        )),
        Ok(None) => OpenError::NotAVolume,
    })
}

/// The devices are the volume's, and large enough. What the data device says of its size,
/// where it has no metadata.
pub(super) async fn check_devices<S: Storage>(
    io: &S,
    newest: &Newest,
    options: &OpenOptions,
) -> Result<Option<Claimed>, OpenError> {
    let superblock = &newest.superblock;
    let layout = &superblock.layout;
    let uuid = uuid_text(&superblock.uuid);
    match (layout.separate_meta, options.separate_meta) {
        (true, false) => {
            return Err(OpenError::Foreign(format!(
                "the metadata device holds the metadata of volume {uuid}: name it with --meta, and its data device with --data"
            )));
        }
        (false, true) => {
            return Err(OpenError::Foreign(format!(
                "volume {uuid} on the metadata device keeps data and metadata on one device: leave out --meta"
            )));
        }
        _ => {}
    }
    for (device, need) in [(Device::Meta, layout.meta_device_bytes()), (Device::Data, layout.data_device_bytes())] {
        let have = io.geometry(device).size;
        if have < need {
            return Err(OpenError::TooSmall { device, have, need });
        }
    }
    refuse_blocks_below_sector(io, layout.block_size)?;
    refuse_records_below_sector(io, superblock.physical_block)?;
    match layout.separate_meta {
        true => check_identity(io, superblock, &newest.keys).await.map(Some),
        false => Ok(None),
    }
}

//! Making a volume: superblocks only, whatever its size.

use crate::{
    BelowSector, Buf, ByteOffset, Device, DeviceError, Durability, Epoch, MasterKey, RecordNumber, Storage,
    crypto::keys::{Keys, TagAlgorithm},
    format::{
        Feature, Features, Identity, Layout, LayoutError, MAX_LOG, MIN_LOG, PAGE_BYTES, Superblock, TreeEntry,
        Version2, can_be_atomic,
    },
    io::sectors::{refuse_blocks_below_sector, refuse_records_below_sector},
    lifecycle::{
        identity_block::write_identity,
        key_slots::{SlotError, UnlockedSlots},
        superblocks::{SuperblockUpdate, publish},
    },
};
pub use crate::{
    format::{BadLabel, Label},
    info::VolumeInfo,
};

/// What a new volume shall be.
#[derive(Clone, Debug)]
pub struct FormatOptions {
    /// Unit of integrity in bytes: 512, 1024, 2048 or 4096.
    pub block_size: u32,
    /// Usable size in bytes; all that fits on the device(s) where `None`.
    pub size: Option<u64>,
    /// How far it shall be able to grow.
    pub capacity: Capacity,
    /// Size of the tag log in bytes; by the volume's size where `None`.
    pub log_size: Option<u64>,
    /// The tag algorithm.
    pub tag: TagAlgorithm,
    /// A fresh random (version 4) UUID.
    pub uuid: [u8; 16],
    /// Whether the metadata lives on a device of its own.
    pub separate_meta: bool,
    /// Bytes that the data device writes atomically whatever it says itself: 512, 1024, 2048 or
    /// 4096. Trusted, and recorded in the volume.
    pub assumed_atomic_bytes: Option<u32>,
    /// The volume's name, for people; may be empty.
    pub label: Label,
}

/// How far a volume can grow without moving its metadata. What is not used yet takes no room on a
/// device that is sparse.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Capacity {
    /// Not at all, as in format version 1.
    #[default]
    OfSize,
    /// Up to so many bytes.
    Bytes(u64),
    /// As far as a metadata device of its own holds the metadata: up to 64 TiB, and 16 times the
    /// size.
    OfMetaDevice,
}

/// Why a volume can't be made.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// Not one of the four sizes.
    #[error("a block size of {0} bytes: must be 512, 1024, 2048 or 4096")]
    BlockSize(u32),
    /// The block is larger than what the device says that it writes atomically.
    #[error(
        "block size {block} is larger than the {device} bytes that the data device says it writes atomically; use --block-size {device}, or --assume-atomic {block} if you know that it does"
    )]
    NotAtomic {
        /// What was asked for.
        block: u32,
        /// The device's physical block size.
        device: u32,
    },
    /// The block is larger than what the user says that the device writes atomically.
    #[error(
        "block size {block} is larger than the {assumed} bytes of --assume-atomic: lower the one or raise the other"
    )]
    NotAssumedAtomic {
        /// What was asked for.
        block: u32,
        /// What the user says.
        assumed: u32,
    },
    /// No device is said to write so many bytes atomically.
    #[error("--assume-atomic of {0} bytes: must be 512, 1024, 2048 or 4096")]
    AssumedAtomic(u32),
    /// Writing one page would put its neighbour at risk.
    #[error("the {device} writes {physical} bytes at a time; 4096 at most can be used safely")]
    PhysicalBlock {
        /// Which.
        device: Device,
        /// Its physical block size in bytes.
        physical: u32,
    },
    /// The device transfers more than a block at least.
    #[error("{0}: use --block-size {least}", least = .0.logical)]
    BelowSector(#[from] BelowSector),
    /// The device is too small.
    #[error("the {device} has {have} bytes, the volume needs {need}")]
    TooSmall {
        /// Which.
        device: crate::Device,
        /// Its size in bytes.
        have: u64,
        /// The least it must have.
        need: u64,
    },
    /// The usable size is not one a volume can have.
    #[error("a volume of {got} bytes: must be a multiple of the block size, {block} bytes, from 1 MiB to 64 TiB")]
    Size {
        /// What was asked for.
        got: u64,
        /// The block size in bytes.
        block: u32,
    },
    /// The volume can't grow so far.
    #[error(
        "a largest size of {got} bytes: must be a multiple of the block size, {block} bytes, from the volume's own size, {size} bytes, to 64 TiB"
    )]
    Capacity {
        /// What was asked for.
        got: u64,
        /// The volume's size in bytes.
        size: u64,
        /// The block size in bytes.
        block: u32,
    },
    /// The log size is not possible.
    #[error("a log of {got} bytes: must be a multiple of 4096 bytes, from {min} to {max}")]
    LogSize {
        /// What was asked for.
        got: u64,
        /// Least.
        min: u64,
        /// Most.
        max: u64,
    },
    /// The first key slot can't be filled.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// By what a device that is a volume's can be told without a key, also where both superblocks are
/// damaged: the offset, the bytes there, and what they begin.
pub const SIGNATURES: [(u64, [u8; 8], &str); 4] = [
    (0, *b"UBLKINTG", "superblock"),
    (512 << 10, *b"UBLKINTG", "superblock"),
    (0, *b"UBLKIDNT", "identity block"),
    // The ring's start has a record once anything has been written.
    (1 << 20, *b"UBLKILOG", "log record"),
];

impl FormatOptions {
    /// All that fits on one device.
    pub fn new(block_size: u32, uuid: [u8; 16]) -> Self {
        Self {
            block_size,
            size: None,
            capacity: Capacity::OfSize,
            log_size: None,
            tag: TagAlgorithm::default(),
            uuid,
            separate_meta: false,
            assumed_atomic_bytes: None,
            label: Label::default(),
        }
    }

    fn layout(&self, data: u64, meta: u64) -> Result<Layout, FormatError> {
        let layout = self.layout_that_fits(data, meta)?;
        let by_device = self.separate_meta && self.capacity == Capacity::OfMetaDevice;
        Ok(if by_device { layout.with_capacity_of(meta) } else { layout })
    }

    fn layout_that_fits(&self, data: u64, meta: u64) -> Result<Layout, FormatError> {
        // The smallest volume says how much is missing, or what else is wrong with the options.
        let layout = self.layout_of(self.size.unwrap_or(1 << 20))?;
        self.check_fits(&layout, data, meta)?;
        if self.size.is_some() {
            return Ok(layout);
        }
        let (block, least) = (self.block_size, if let Capacity::Bytes(least) = self.capacity { least } else { 0 });
        let devices = (data, self.separate_meta.then_some(meta));
        let largest = Layout::largest(block, self.log_size, devices, least);
        let largest = largest.ok_or(FormatError::Size { got: data, block })?;
        if least > 0 && largest.capacity() > least {
            return Err(FormatError::Capacity { got: least, size: largest.size(), block });
        }
        Ok(largest)
    }

    fn layout_of(&self, size: u64) -> Result<Layout, FormatError> {
        let log = self.log_size.unwrap_or_else(|| Layout::default_log_size(size));
        let capacity = if let Capacity::Bytes(bytes) = self.capacity { bytes } else { size };
        let computed = Layout::new(self.block_size, size, log, self.separate_meta);
        computed.and_then(|layout| layout.with_capacity(capacity)).map_err(|e| match e {
            LayoutError::BlockSize => FormatError::BlockSize(self.block_size),
            LayoutError::Size => FormatError::Size { got: size, block: self.block_size },
            LayoutError::Capacity => FormatError::Capacity { got: capacity, size, block: self.block_size },
            LayoutError::Place(place) => unreachable!("the computed {place} can be"),
            LayoutError::LogSize => FormatError::LogSize { got: log, min: MIN_LOG, max: MAX_LOG },
        })
    }

    /// Refuses blocks that the data device may tear, and a unit of either device that is larger
    /// than a page. Of the data device the user's word counts, and of the metadata device where
    /// that is the same.
    fn check_atomic(&self, data: u32, meta: u32) -> Result<(), FormatError> {
        if let Some(assumed) = self.assumed_atomic_bytes.filter(|bytes| !can_be_atomic(*bytes)) {
            return Err(FormatError::AssumedAtomic(assumed));
        }
        let of_meta = if self.separate_meta { None } else { self.assumed_atomic_bytes };
        let units =
            [(Device::Data, self.assumed_atomic_bytes.unwrap_or(data)), (Device::Meta, of_meta.unwrap_or(meta))];
        for (device, physical) in units {
            if physical > PAGE_BYTES as u32 {
                return Err(FormatError::PhysicalBlock { device, physical });
            }
        }
        let block = self.block_size;
        match self.assumed_atomic_bytes {
            Some(assumed) if block > assumed => Err(FormatError::NotAssumedAtomic { block, assumed }),
            None if block > data => Err(FormatError::NotAtomic { block, device: data }),
            _ => Ok(()),
        }
    }

    fn check_fits(&self, layout: &Layout, data: u64, meta: u64) -> Result<(), FormatError> {
        for (device, have, need) in
            [(Device::Data, data, layout.data_device_bytes()), (Device::Meta, meta, layout.meta_device_bytes())]
        {
            if have < need {
                return Err(FormatError::TooSmall { device, have, need });
            }
        }
        Ok(())
    }
}

/// What [`format()`] with these options will need, without touching a device: `data_device_bytes`
/// and `meta_device_bytes` are the sizes to give to backing files. `options.size` must be set.
pub fn plan(options: &FormatOptions) -> Result<VolumeInfo, FormatError> {
    let layout = options.layout_of(options.size.unwrap_or(0))?;
    Ok(VolumeInfo::of(&first_superblock(options, layout, PAGE_BYTES as u32)))
}

/// The state of an empty volume: everything absent, nothing in the log.
fn first_superblock(options: &FormatOptions, layout: Layout, physical_block: u32) -> Superblock {
    let said = [
        (options.separate_meta, Feature::SeparateMeta),
        // What version 1 computes need not be said.
        (layout.capacity() > layout.size(), Feature::ExplicitPlaces),
    ];
    let features: Vec<_> = said.into_iter().filter_map(|(is, feature)| is.then_some(feature)).collect();
    let features = Features::of(&features);
    let FormatOptions { assumed_atomic_bytes, label, .. } = *options;
    Superblock {
        uuid: options.uuid,
        layout,
        tag: options.tag,
        physical_block,
        epoch: Epoch(1),
        root: TreeEntry::ABSENT,
        log_begin: 0,
        record_number: RecordNumber(1),
        link: [0; 32],
        open_id: [0; 32],
        version2: Version2 { assumed_atomic_bytes, label, ..Version2::default() }.if_needed(features),
    }
}

/// What [`format()`] on these devices would make, or why it can't. Touches nothing.
pub fn plan_on<S: Storage>(io: &S, options: &FormatOptions) -> Result<VolumeInfo, FormatError> {
    possible(io, options).map(|superblock| VolumeInfo::of(&superblock))
}

fn possible<S: Storage>(io: &S, options: &FormatOptions) -> Result<Superblock, FormatError> {
    let (data, meta) = (io.geometry(Device::Data), io.geometry(Device::Meta));
    let layout = options.layout(data.size, meta.size)?;
    options.check_atomic(data.physical_block, meta.physical_block)?;
    refuse_blocks_below_sector(io, options.block_size)?;
    // By what the device says, whatever it is trusted to do: records take no more room for it.
    let padding = meta.physical_block.clamp(512, PAGE_BYTES as u32);
    refuse_records_below_sector(io, padding)?;
    Ok(first_superblock(options, layout, padding))
}

/// Writes the superblocks of a new, empty volume; destroys what was there. O(1).
///
/// The whole first MiB of each device is overwritten, so that no old superblock copy and no
/// signature of another format survives in it.
pub async fn format<S: Storage>(io: &S, key: &MasterKey, options: &FormatOptions) -> Result<VolumeInfo, FormatError> {
    write(io, key, possible(io, options)?, None).await
}

/// The same with the volume's key wrapped in [key slots](crate::key_slots::first), which were made for
/// the UUID that the volume gets. The device has nothing else that the key could be had from.
pub async fn format_with_slots<S: Storage>(
    io: &S,
    slots: UnlockedSlots,
    options: &FormatOptions,
) -> Result<VolumeInfo, FormatError> {
    let options = FormatOptions { uuid: slots.uuid(), ..options.clone() };
    let superblock = possible(io, &options)?.with_key_area();
    write(io, &slots.master_key(), superblock, Some(slots)).await
}

async fn write<S: Storage>(
    io: &S,
    key: &MasterKey,
    superblock: Superblock,
    slots: Option<UnlockedSlots>,
) -> Result<VolumeInfo, FormatError> {
    let keys = Keys::derive(key, &superblock.uuid);
    wipe(io, Device::Meta).await?;
    if superblock.layout.separate_meta {
        wipe(io, Device::Data).await?;
        write_identity(io, &keys, &Identity { uuid: superblock.uuid, size: superblock.layout.size() }).await?;
    }
    // It counts once a superblock says so.
    if let Some(slots) = slots {
        slots.write_copies(io).await?;
    }
    publish(io, &keys, SuperblockUpdate::First(&superblock), Buf::new(PAGE_BYTES)).await.0?;
    Ok(VolumeInfo::of(&superblock))
}

/// Zeroes the first MiB, durable: both old copies are gone before a new one is written.
async fn wipe<S: Storage>(io: &S, device: Device) -> Result<(), DeviceError> {
    let bytes = Layout::reserved_bytes() as usize;
    let at = ByteOffset(0);
    let (result, _) = io.write(device, at, Buf::new(bytes), 0..bytes, Durability::Durable).await;
    result.map_err(|errno| DeviceError::new("write", device, at, bytes, errno))
}

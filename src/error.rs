//! What can go wrong, one enum for each kind of operation, and the one place that maps it to errno.

use crate::{BlockIndex, BlockRange, ByteOffset, Device, Errno};

/// Which page of the metadata, for messages.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, serde::Serialize, serde::Deserialize)]
pub struct PageName {
    /// 0 for tag pages, 1 and up for the hash tree.
    pub level: u8,
    /// Index within the level.
    pub index: u64,
}

impl std::fmt::Display for PageName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.level {
            0 => write!(f, "tag page {}", self.index),
            l => write!(f, "tree page {} of level {l}", self.index),
        }
    }
}

/// A device refused an operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{op} of {len} bytes at {offset} on the {device}: {errno}")]
pub struct DeviceError {
    /// The operation: "read", "write", "sync" or "discard".
    pub op: &'static str,
    /// Which device.
    pub device: Device,
    /// Where, in bytes.
    pub offset: ByteOffset,
    /// How much, in bytes.
    pub len: u64,
    /// What it answered.
    pub errno: Errno,
}

impl DeviceError {
    /// `op` of `len` bytes at `offset`.
    pub fn new(op: &'static str, device: Device, offset: ByteOffset, len: usize, errno: Errno) -> Self {
        Self { op, device, offset, len: len as u64, errno }
    }

    /// A sync, which is of all bytes.
    pub fn sync(device: Device, errno: Errno) -> Self {
        Self::new("sync", device, ByteOffset(0), 0, errno)
    }
}

/// Why a read failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ReadError {
    /// The bytes on the medium are not what was last written there.
    #[error("block {block} does not match its tag")]
    Mismatch {
        /// The first such block of the request.
        block: BlockIndex,
    },
    /// The metadata that vouches for the block is damaged.
    #[error("block {block} can't be verified: {page} is damaged")]
    BadPage {
        /// The first block of the request that hangs on the page.
        block: BlockIndex,
        /// The page.
        page: PageName,
    },
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A part of the log can't be read, and what it says of the block may be newer than what is
    /// known.
    #[error("blocks {0} may be older than what was last written there: a part of the tag log can't be read")]
    MayBeOlder(BlockRange),
    /// A write of it was answered before it was in place, and failed then.
    #[error("blocks {0} are not what was last written there: that could not be put in place")]
    NotInPlace(BlockRange),
    /// The range is not inside the volume, or larger than a request may be.
    #[error("blocks {0} are outside the volume or too many for one request")]
    BadRange(BlockRange),
}

/// What is wrong with a run of blocks: a [`ReadError`] without the place.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error, serde::Serialize, serde::Deserialize)]
#[serde(tag = "reason", rename_all = "snake_case")]
pub enum BadReason {
    /// See [`ReadError::Mismatch`].
    #[error("mismatch")]
    Mismatch,
    /// See [`ReadError::BadPage`].
    #[error("damaged {page}")]
    BadPage {
        /// The page.
        page: PageName,
    },
    /// See [`ReadError::Device`].
    #[error("unreadable: {errno} on the {device}")]
    Unreadable {
        /// Which device.
        device: Device,
        /// What it answered.
        errno: Errno,
    },
    /// See [`ReadError::MayBeOlder`].
    #[error("may be older than what was last written")]
    MayBeOlder,
    /// See [`ReadError::NotInPlace`].
    #[error("not in place")]
    NotInPlace,
    /// See [`ReadError::BadRange`].
    #[error("outside the volume")]
    BadRange,
}

/// Why a write, zeroing or flush failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WriteError {
    /// The data device failed; what the blocks hold now has been found out.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// An earlier failure made the volume read-only.
    #[error("the volume is read-only since: {0}")]
    Latched(Latched),
    /// The volume was opened read-only.
    #[error("the volume is open read-only")]
    ReadOnly,
    /// The range is not inside the volume, or larger than a request may be.
    #[error("blocks {0} are outside the volume or too many for one request")]
    BadRange(BlockRange),
}

/// Why a volume goes on without its anchor, and so does not go on being written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AnchorLoss {
    /// Somebody else's body is there, or none.
    #[error("the anchor is somebody else's now: the volume was opened elsewhere, or the anchor reset")]
    Taken,
    /// It could not be asked for too long.
    #[error("the anchor could not be asked for too long")]
    Away,
}

/// The first failure after which nothing more may be written (fail-stop).
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Latched {
    /// A log, page, superblock write or a sync failed.
    #[error("{0}")]
    Device(DeviceError),
    /// A write that had been answered failed.
    #[error("a write that had been answered could not be put in place: {0}")]
    WriteBack(DeviceError),
    /// Opened so because a block can't be read, or its tag page can't, and recovery
    /// decides nothing without.
    #[error("what block {0} holds can't be decided while it, or the page with its tag, can't be read")]
    Undecided(BlockIndex),
    /// A block whose write failed could not be read back.
    #[error("block {0} can be neither written nor read")]
    UnknownBlock(BlockIndex),
    /// A logged write, a log write or a checkpoint was dropped half done (a bug, or a panic), or
    /// too many data writes have failed since the last checkpoint.
    #[error("a write was abandoned half done, or too many have failed")]
    Abandoned,
    /// The volume was closed in good order.
    #[error("the volume is closed")]
    Closed,
    /// The anchor holds nothing that this volume may go on from.
    #[error("{0}")]
    Anchor(AnchorLoss),
    /// Opened so because a superblock copy can't be written.
    #[error("a superblock copy can't be written: {0}")]
    Superblock(DeviceError),
}

impl ReadError {
    /// The reason alone, the same for all blocks that it holds for.
    pub fn reason(&self) -> BadReason {
        match *self {
            ReadError::Mismatch { .. } => BadReason::Mismatch,
            ReadError::BadPage { page, .. } => BadReason::BadPage { page },
            ReadError::Device(DeviceError { device, errno, .. }) => BadReason::Unreadable { device, errno },
            ReadError::MayBeOlder(_) => BadReason::MayBeOlder,
            ReadError::NotInPlace(_) => BadReason::NotInPlace,
            ReadError::BadRange(_) => BadReason::BadRange,
        }
    }
    /// The errno that the block layer gets.
    pub fn errno(&self) -> Errno {
        match self {
            ReadError::Mismatch { .. } | ReadError::BadPage { .. } => Errno::EILSEQ,
            ReadError::Device(e) => e.errno,
            ReadError::NotInPlace(_) | ReadError::MayBeOlder(_) => Errno::EIO,
            ReadError::BadRange(_) => Errno::EINVAL,
        }
    }
}

impl WriteError {
    /// The errno that the block layer gets.
    pub fn errno(&self) -> Errno {
        match self {
            WriteError::Device(e) => e.errno,
            WriteError::Latched(_) => Errno::EIO,
            WriteError::ReadOnly => Errno::EROFS,
            WriteError::BadRange(_) => Errno::EINVAL,
        }
    }
}

//! The seam between the library and the world: two devices, owned buffers, futures.
//!
//! Production implements it with io_uring, one handle for each thread's ring; the tests implement
//! it with a simulated disk. The library holds no thread, no ring and no clock of its own.

use crate::{Buf, ByteOffset};
use std::{fmt, future::Future, ops::Range, time::Duration};

/// Which of the volume's two backing devices. Where data and metadata live on one device,
/// both name it, at the same offsets.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Device {
    /// Holds the blocks.
    Data,
    /// Holds superblocks, log, tag pages and tree pages.
    Meta,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Device::Data => "data device",
            Device::Meta => "metadata device",
        })
    }
}

/// What a completed write promises: one to a device ([`Storage::write`]), or a request to a volume
/// ([`Volume::write`](crate::Volume::write)).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Durability {
    /// It survives a power cut only after a later [`Storage::sync`] of the device, or flush of the
    /// volume. A device's write is without RWF_DSYNC, a request without FUA.
    MayBeLost,
    /// It has reached stable storage: a device's write with RWF_DSYNC (`pwritev2(2)`), a request
    /// with FUA. The volume keeps that promise by a sync of the data device, not by writing the data
    /// so.
    Durable,
}

/// A Linux error number from a device, as in `errno(3)`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Errno(pub i32);

impl Errno {
    /// Input/output error.
    pub const EIO: Self = Self(5);
    /// Device or resource busy.
    pub const EBUSY: Self = Self(16);
    /// Invalid argument.
    pub const EINVAL: Self = Self(22);
    /// Read-only file system.
    pub const EROFS: Self = Self(30);
    /// Invalid or incomplete multibyte character: the block layer's word for a failed integrity
    /// check.
    pub const EILSEQ: Self = Self(84);
    /// Operation not supported.
    pub const EOPNOTSUPP: Self = Self(95);
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // "(os error 5)" tells nobody anything.
        let text = std::io::Error::from_raw_os_error(self.0).to_string();
        f.write_str(text.split(" (os error").next().unwrap_or(&text))
    }
}

impl std::error::Error for Errno {}

/// What a backing device says of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Size in bytes.
    pub size: u64,
    /// The unit that the device writes atomically, in bytes (Linux: physical block size).
    pub physical_block: u32,
    /// The least that the device transfers, in bytes (Linux: logical block size). Offsets and
    /// lengths that are no multiples of it fail with [`Errno::EINVAL`].
    pub logical_block: u32,
}

/// A handle on the volume's devices, bound to one thread's ring.
///
/// *Every operation starts when the method is called*, not when its future is first polled: to run
/// several together, call them all and await them afterwards. A future that is dropped does not
/// cancel its operation; the implementation keeps the buffer until the device is done with it.
///
/// `part` selects the bytes of `buf` that take part; the rest is left alone. An operation moves all
/// of them or fails: short transfers are the implementation's to continue. Offsets and lengths are
/// multiples of the device's logical block size.
pub trait Storage {
    /// A read or write in flight; gives the buffer back.
    type Transfer: Future<Output = (Result<(), Errno>, Buf)>;
    /// A sync, discard or sleep in flight.
    type Command: Future<Output = Result<(), Errno>>;

    /// Size, atomic write unit and least transfer of a device.
    fn geometry(&self, device: Device) -> Geometry;
    /// Reads `part.len()` bytes at `offset` into `buf[part]`.
    fn read(&self, device: Device, offset: ByteOffset, buf: Buf, part: Range<usize>) -> Self::Transfer;
    /// Writes `buf[part]` at `offset`.
    fn write(
        &self,
        device: Device,
        offset: ByteOffset,
        buf: Buf,
        part: Range<usize>,
        durability: Durability,
    ) -> Self::Transfer;
    /// Makes every write that completed before this call durable (`fdatasync(2)`).
    fn sync(&self, device: Device) -> Self::Command;
    /// Tells the device that the bytes are no longer needed. [`Errno::EOPNOTSUPP`] is no failure to
    /// the library.
    fn discard(&self, device: Device, offset: ByteOffset, len: u64) -> Self::Command;
    /// Waits so long. It is the only clock that the library has: for pauses between retries, for the
    /// time that an open gives a failing device, and for delays of the checkpoint thread.
    fn sleep(&self, time: Duration) -> Self::Command;
}

//! Why a volume can't grow.

/// Why a volume can't grow so.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum GrowError {
    /// It has more blocks than that.
    #[error("the volume on the metadata device has {now} bytes, which is more than {got}: volumes do not shrink")]
    Shrinks {
        /// What was asked for.
        got: u64,
        /// Its size in bytes.
        now: u64,
    },
    /// Half a block.
    #[error("a size of {got} bytes: must be a multiple of the block size, {block} bytes")]
    Size {
        /// What was asked for.
        got: u64,
        /// The block size in bytes.
        block: u32,
    },
    /// Its metadata has no place.
    #[error(
        "the volume on the metadata device can't grow to {got} bytes: its page areas hold {most}; `export`, and `import` to a new volume, go further"
    )]
    Beyond {
        /// What was asked for, or the data device has room for.
        got: u64,
        /// What they hold.
        most: u64,
    },
    /// The data device is too small.
    #[error("the data device has {have} bytes, a volume of {got} bytes needs {need}: make it larger first")]
    NoRoom {
        /// The size that was asked for.
        got: u64,
        /// The device's size in bytes.
        have: u64,
        /// The least it must have.
        need: u64,
    },
    /// Nothing may be written.
    #[error("a volume that is opened read-only can't grow")]
    ReadOnly,
}

//! What this program does not know: foreign, and never taken for damage.

/// Something whole that this program can't make sense of.
///
/// Its checksum or MAC holds, so it is what somebody wrote: a newer program, or another one. That
/// is no damage: it is named, the volume is not opened, and nothing of it is repaired away.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Unknown {
    /// A superblock of another format version.
    #[error("format version {0} is not known to this program")]
    Version(u32),
    /// A bit of the superblock's flags, by its number.
    #[error("format feature {0} is not known to this program")]
    Feature(u32),
    /// The code of a tag algorithm.
    #[error("tag algorithm {0} is not known to this program")]
    TagAlgorithm(u16),
    /// The kind of an entry in a log record whose MAC holds.
    #[error("log entry kind {0} is not known to this program")]
    EntryKind(u32),
    /// An identity block of another version.
    #[error("identity block version {0} is not known to this program")]
    IdentityVersion(u32),
    /// A key area of another version.
    #[error("key area version {0} is not known to this program")]
    KeyAreaVersion(u32),
    /// An anchor body of another version.
    #[error("anchor body version {0} is not known to this program")]
    AnchorVersion(u32),
    /// The kind of a key slot.
    #[error("key slot kind {0} is not known to this program")]
    SlotKind(u32),
    /// A reserved byte that is not zero.
    #[error("byte {at} of the {of} is in use, for what is not known to this program")]
    Reserved {
        /// Which struct.
        of: &'static str,
        /// Offset in it, in bytes.
        at: usize,
    },
    /// A field with a value that no known version allows.
    #[error("the {field} of the {of} is not one that this program knows")]
    Field {
        /// Which struct.
        of: &'static str,
        /// Which field.
        field: &'static str,
    },
}

impl Unknown {
    /// Refuses the first reserved byte that is in use; `bytes` lie at `from` in the struct.
    pub(crate) fn refuse_reserved(of: &'static str, from: usize, bytes: &[u8]) -> Result<(), Self> {
        match bytes.iter().position(|byte| *byte != 0) {
            Some(at) => Err(Self::Reserved { of, at: from + at }),
            None => Ok(()),
        }
    }
}

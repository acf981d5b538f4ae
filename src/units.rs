//! Units as types: no bare `u64` crosses a module.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! unit {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

unit! {
    /// Index of an integrity block of the volume, counted from 0.
    BlockIndex
}
unit! {
    /// Position in bytes from the start of a backing device, or of the volume where said so.
    ByteOffset
}
unit! {
    /// The time between two checkpoints; the superblock names the one that is current on disk.
    Epoch
}
unit! {
    /// Number of one logged change (tags or zeros) within the time that a volume is open; starts
    /// at 1.
    Seq
}
unit! {
    /// Number of a log record; runs through the volume's life and never restarts.
    RecordNumber
}

impl Epoch {
    /// The epoch that follows.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
    /// 0 or 1: which of the two pending sets and in-flight counts belongs to this epoch.
    pub(crate) fn parity(self) -> usize {
        (self.0 & 1) as usize
    }
}

/// A run of whole blocks: `first .. first + count`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BlockRange {
    /// First block.
    pub first: BlockIndex,
    /// Number of blocks.
    pub count: u64,
}

impl BlockRange {
    /// The run of `count` blocks that starts at `first`.
    pub fn new(first: BlockIndex, count: u64) -> Self {
        Self { first, count }
    }
    /// One past the last block.
    pub fn end(self) -> u64 {
        self.first.0 + self.count
    }
    /// Whether the two runs have a block in common.
    pub fn overlaps(self, other: Self) -> bool {
        self.first.0 < other.end() && other.first.0 < self.end()
    }
    /// Whether it has all blocks of the other.
    pub fn covers(self, other: Self) -> bool {
        self.first <= other.first && other.end() <= self.end()
    }
    /// The blocks, one by one.
    pub fn blocks(self) -> impl Iterator<Item = BlockIndex> {
        (self.first.0..self.end()).map(BlockIndex)
    }
}

impl fmt::Display for BlockRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.count {
            1 => write!(f, "{}", self.first),
            _ => write!(f, "{}-{}", self.first, self.end() - 1),
        }
    }
}

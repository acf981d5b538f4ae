//! Blocks whose content lies in the log, and not in its place yet: recovery puts it there, and a
//! volume that nothing is written to reads it from the log.

use crate::{
    BlockIndex, BlockRange, Buf, ByteOffset, Device, Errno, Storage,
    sync::{AtomicU64, Ordering},
};
use std::ops::Range;

/// No place of a log: it begins behind the superblock.
const NOWHERE: u64 = 0;

/// Where on the metadata device they lie. Memory for all is taken at once.
pub(crate) struct InLog {
    /// Ascending. A block of which nothing is decided may turn out to lie there later.
    blocks: Vec<(BlockIndex, AtomicU64)>,
}

impl InLog {
    /// None yet, of at most so many.
    pub(crate) fn with_capacity(blocks: usize) -> Self {
        Self { blocks: Vec::with_capacity(blocks) }
    }

    pub(crate) fn memory_bytes_for(blocks: usize) -> u64 {
        (blocks * size_of::<(BlockIndex, AtomicU64)>()) as u64
    }

    /// Adds a block, behind all others; `None`: it is not known yet whether it lies in the log.
    pub(crate) fn push(&mut self, block: BlockIndex, at: Option<ByteOffset>) {
        debug_assert!(self.blocks.last().is_none_or(|(last, _)| *last < block));
        self.blocks.push((block, AtomicU64::new(at.map_or(NOWHERE, |at| at.0))));
    }

    /// A block that was not decided is, and lies here. The caller holds it exclusively.
    pub(crate) fn decided(&self, block: BlockIndex, at: ByteOffset) {
        let place = self.blocks.binary_search_by_key(&block, |(block, _)| *block);
        self.blocks[place.expect("added while it was not decided")].1.store(at.0, Ordering::Release);
    }

    /// Those of a range that lie in the log, and where.
    pub(crate) fn within(&self, range: BlockRange) -> impl Iterator<Item = (BlockIndex, ByteOffset)> {
        let from = self.blocks.partition_point(|(block, _)| *block < range.first);
        let within = self.blocks[from..].iter().take_while(move |(block, _)| block.0 < range.end());
        within.map(|(block, at)| (*block, ByteOffset(at.load(Ordering::Acquire)))).filter(|(_, at)| at.0 != NOWHERE)
    }

    /// All of them.
    pub(crate) fn all(&self) -> impl Iterator<Item = (BlockIndex, ByteOffset)> {
        self.within(BlockRange::new(BlockIndex(0), u64::MAX))
    }
}

/// The sectors of the metadata device that hold a block in the log; they may be larger than it.
pub(crate) struct LogSectors {
    pub(crate) offset: ByteOffset,
    pub(crate) len: usize,
    /// The block among these bytes.
    pub(crate) block: Range<usize>,
}

impl LogSectors {
    /// Of a block that lies at `at`.
    pub(crate) fn of<S: Storage>(io: &S, at: ByteOffset, block_size: usize) -> Self {
        let sector = u64::from(io.geometry(Device::Meta).logical_block);
        let from = (at.0 % sector) as usize;
        Self {
            offset: ByteOffset(at.0 - from as u64),
            len: block_size.max(sector as usize),
            block: from..from + block_size,
        }
    }

    /// Reads them to the front of a buffer of a page.
    pub(crate) async fn read<S: Storage>(&self, io: &S, buf: Buf) -> (Result<(), Errno>, Buf) {
        io.read(Device::Meta, self.offset, buf, 0..self.len).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_lies_in_the_log_from_when_that_is_decided() {
        let mut in_log = InLog::with_capacity(3);
        in_log.push(BlockIndex(3), Some(ByteOffset(300)));
        in_log.push(BlockIndex(5), None);
        in_log.push(BlockIndex(6), Some(ByteOffset(600)));
        let within = |in_log: &InLog, first, count| -> Vec<_> {
            let range = BlockRange::new(BlockIndex(first), count);
            in_log.within(range).map(|(block, at)| (block.0, at.0)).collect()
        };
        assert_eq!(within(&in_log, 0, 9), [(3, 300), (6, 600)]);
        assert_eq!(within(&in_log, 4, 2), []);
        in_log.decided(BlockIndex(5), ByteOffset(500));
        assert_eq!(within(&in_log, 4, 2), [(5, 500)]);
        assert_eq!(in_log.all().count(), 3);
    }
}

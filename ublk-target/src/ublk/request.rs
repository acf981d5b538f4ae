//! What the kernel asks for, parsed once.

use crate::latency::Op;
use libublk::sys::{self, ublksrv_io_desc};
use std::fmt;
use ublk_integrity::{BlockIndex, BlockRange, Durability};

/// log2 of the size of a sector, the unit of the kernel's descriptors.
const SECTOR_SHIFT: u32 = 9;

/// One request of the block layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Request {
    /// Data into the request's buffer.
    Read(BlockRange),
    /// Data from the request's buffer.
    Write {
        /// Where.
        range: BlockRange,
        /// FUA or not.
        durability: Durability,
    },
    /// Make all completed writes durable; has no range.
    Flush,
    /// The blocks are no longer needed. They will read as zeros here.
    Discard(BlockRange),
    /// The blocks must read as zeros.
    WriteZeroes {
        /// Where.
        range: BlockRange,
        /// Whether the space may be given back.
        unmap: bool,
    },
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read(range) => write!(f, "read of blocks {range}"),
            Self::Write { range, .. } => write!(f, "write of blocks {range}"),
            Self::Flush => f.write_str("flush"),
            Self::Discard(range) => write!(f, "discard of blocks {range}"),
            Self::WriteZeroes { range, .. } => write!(f, "zeroing of blocks {range}"),
        }
    }
}

/// The descriptor makes no sense to us.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum UnknownRequest {
    /// An operation that was not offered.
    Operation(u8),
    /// Not a multiple of the block size.
    Misaligned,
}

/// log2 of the block size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockShift(pub u32);

impl BlockShift {
    /// For a block size that is a power of two.
    pub fn of(block_size: u32) -> Self {
        Self(block_size.trailing_zeros())
    }

    /// A run of sectors as blocks, if it is one.
    fn blocks(self, first_sector: u64, sectors: u32) -> Result<BlockRange, UnknownRequest> {
        let shift = self.0 - SECTOR_SHIFT;
        let range = BlockRange::new(BlockIndex(first_sector >> shift), u64::from(sectors) >> shift);
        let exact = range.first.0 << shift == first_sector && range.count << shift == u64::from(sectors);
        if exact { Ok(range) } else { Err(UnknownRequest::Misaligned) }
    }
}

impl Request {
    /// The blocks that it is about.
    pub fn range(&self) -> Option<BlockRange> {
        match self {
            Self::Read(range) | Self::Write { range, .. } | Self::Discard(range) | Self::WriteZeroes { range, .. } => {
                Some(*range)
            }
            Self::Flush => None,
        }
    }

    /// As what its time is measured, if it is.
    pub fn measured(&self) -> Option<Op> {
        match self {
            Self::Read(_) => Some(Op::Read),
            Self::Write { .. } => Some(Op::Write),
            Self::Flush => Some(Op::Flush),
            Self::Discard(_) | Self::WriteZeroes { .. } => None,
        }
    }

    /// Reads the kernel's descriptor of a request.
    pub fn parse(desc: &ublksrv_io_desc, shift: BlockShift) -> Result<Self, UnknownRequest> {
        let operation = (desc.op_flags & 0xff) as u8;
        let has = |flag: u32| desc.op_flags & flag != 0;
        let range = || shift.blocks(desc.start_sector, desc.nr_sectors);
        Ok(match u32::from(operation) {
            sys::UBLK_IO_OP_READ => Self::Read(range()?),
            sys::UBLK_IO_OP_WRITE => {
                let durability = if has(sys::UBLK_IO_F_FUA) { Durability::Durable } else { Durability::MayBeLost };
                Self::Write { range: range()?, durability }
            }
            sys::UBLK_IO_OP_FLUSH => Self::Flush,
            sys::UBLK_IO_OP_DISCARD => Self::Discard(range()?),
            sys::UBLK_IO_OP_WRITE_ZEROES => Self::WriteZeroes { range: range()?, unmap: !has(sys::UBLK_IO_F_NOUNMAP) },
            _ => return Err(UnknownRequest::Operation(operation)),
        })
    }

    /// What a request that succeeded answers: the bytes it moved.
    pub fn success(&self, shift: BlockShift) -> i32 {
        match self {
            Self::Read(range) | Self::Write { range, .. } => (range.count << shift.0) as i32,
            Self::Flush | Self::Discard(_) | Self::WriteZeroes { .. } => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn desc(op_flags: u32, start_sector: u64, nr_sectors: u32) -> ublksrv_io_desc {
        ublksrv_io_desc { op_flags, start_sector, nr_sectors, ..Default::default() }
    }

    #[test]
    fn sectors_become_blocks() {
        let shift = BlockShift::of(4096);
        let range = BlockRange::new(BlockIndex(2), 3);
        let parse = |op, first, n| Request::parse(&desc(op, first, n), shift);
        assert_eq!(parse(sys::UBLK_IO_OP_READ, 16, 24), Ok(Request::Read(range)));
        assert_eq!(
            parse(sys::UBLK_IO_OP_WRITE | sys::UBLK_IO_F_FUA, 16, 24),
            Ok(Request::Write { range, durability: Durability::Durable })
        );
        assert_eq!(
            parse(sys::UBLK_IO_OP_WRITE_ZEROES | sys::UBLK_IO_F_NOUNMAP, 16, 24),
            Ok(Request::WriteZeroes { range, unmap: false })
        );
        assert_eq!(parse(sys::UBLK_IO_OP_READ, 16, 24).unwrap().success(shift), 3 * 4096);
        assert_eq!(parse(sys::UBLK_IO_OP_FLUSH, 0, 0), Ok(Request::Flush));
        assert_eq!(parse(sys::UBLK_IO_OP_READ, 17, 24), Err(UnknownRequest::Misaligned));
        assert_eq!(parse(sys::UBLK_IO_OP_READ, 16, 23), Err(UnknownRequest::Misaligned));
        assert_eq!(parse(200, 16, 24), Err(UnknownRequest::Operation(200)));
    }
}

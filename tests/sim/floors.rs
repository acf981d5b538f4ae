//! What an image itself says may be read: worked out from its log and tree by the independent reader,
//! for tests in which somebody has changed the image, so that acknowledgements prove nothing.

use super::{
    Disk,
    image::{Logged, Superblock, records, tag},
    oracle::{Oracle, VersionId, fill},
};
use std::collections::HashMap;
use ublk_integrity::{BlockIndex, BlockRange, Buf, ReadError, Volume};

/// How far back a block may go.
#[derive(Clone, Copy, Debug)]
pub enum Since {
    /// The last checkpoint: where the log may have been cut short.
    Checkpoint,
    /// The last flush that the log records, or logged zeros.
    Flush,
}

/// For each block the versions it ever had, and the oldest that may be read.
pub struct Floors(HashMap<u64, (Vec<VersionId>, usize)>);

impl Floors {
    pub fn of(disk: &Disk, oracle: &Oracle, since: Since) -> Self {
        let superblock = Superblock::newest(disk);
        let entries: Vec<Logged> = records(disk).into_iter().flat_map(|r| r.entries).collect();
        let flushed = entries.iter().rev().find_map(|e| match e {
            Logged::Flush { highest, except } => Some((*highest, except.clone())),
            _ => None,
        });
        let covered = |seq: u64| flushed.as_ref().is_some_and(|(to, except)| seq <= *to && !except.contains(&seq));
        let floor = |block: BlockIndex| {
            let issued = oracle.issued(block).to_vec();
            let mut floor = place(&superblock, block, &issued, 0, &superblock.tag_of(disk, block.0));
            let logged = entries.iter().filter_map(|e| logged_tag(e, block.0, &covered));
            for t in logged.filter(|_| matches!(since, Since::Flush)) {
                floor = place(&superblock, block, &issued, floor, &t);
            }
            (block.0, (issued, floor))
        };
        Self(oracle.touched().into_iter().map(floor).collect())
    }

    pub fn blocks(&self) -> impl Iterator<Item = BlockIndex> {
        let mut blocks: Vec<_> = self.0.keys().copied().map(BlockIndex).collect();
        blocks.sort_unstable();
        blocks.into_iter()
    }

    /// Reads all blocks: each must be an allowed version or an error. Returns how many are errors.
    pub fn judge(&self, volume: &Volume, io: &super::SimStorage, what: &str) -> usize {
        let mut context = volume.context(0);
        let mut buf = Buf::new(volume.block_size());
        let mut bad = 0;
        for block in self.blocks() {
            let one = BlockRange::new(block, 1);
            let (result, b) = super::block_on(io, volume.read(io, &mut context, one, buf));
            buf = b;
            match result {
                Ok(()) => self.check(block, &buf[..volume.block_size()], what),
                Err(ReadError::BadRange(_)) => panic!("{one}"),
                Err(_) => bad += 1,
            }
        }
        bad
    }

    fn check(&self, block: BlockIndex, data: &[u8], what: &str) {
        let (issued, floor) = &self.0[&block.0];
        let mut want = vec![0; data.len()];
        let allowed = issued[*floor..].iter().any(|version| {
            fill(block, *version, &mut want);
            want == data
        });
        assert!(allowed, "{what}: block {block} reads as {:02x?}, allowed from {floor} of {issued:?}", &data[..16]);
    }
}

/// The tag that an entry surely leaves on a block, unless something newer is there.
fn logged_tag(entry: &Logged, block: u64, covered: &impl Fn(u64) -> bool) -> Option<[u8; 32]> {
    match entry {
        Logged::Tags { seq, first, tags } if covered(*seq) => tags.get(block.checked_sub(*first)? as usize).copied(),
        Logged::Payload { first, tags, .. } => tags.get(block.checked_sub(*first)? as usize).copied(),
        Logged::Zeros { first, count, .. } if (*first..first + count).contains(&block) => Some([0; 32]),
        _ => None,
    }
}

/// Which version, at or after `from`, carries this tag; `from` where none does.
fn place(superblock: &Superblock, block: BlockIndex, issued: &[VersionId], from: usize, t: &[u8; 32]) -> usize {
    let mut bytes = vec![0; superblock.block_size as usize];
    let carries = |version: &VersionId| match version {
        0 => *t == [0; 32],
        v => {
            fill(block, *v, &mut bytes);
            tag(superblock, block, &bytes) == *t
        }
    };
    issued[from..].iter().position(carries).map_or(from, |i| from + i)
}

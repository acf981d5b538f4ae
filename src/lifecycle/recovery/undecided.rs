//! Blocks whose tag recovery could not choose, since the device could not read what would have told: each is an error
//! until a read of it succeeds. Only a volume that nothing is written to has any.

use super::{candidates::BlockCandidates, judge::judge};
use crate::{
    BlockIndex, BlockRange, Buf, Device, DeviceError, ReadError, Storage,
    crypto::tagger::Tagger,
    metadata::{Metadata, tree::LoadError},
    request::context::Slot,
    sync::{AtomicUsize, Mutex, Ordering},
};
use std::collections::BTreeMap;

/// The candidates of each such block.
pub(crate) struct Undecided {
    blocks: Mutex<BTreeMap<BlockIndex, BlockCandidates<'static>>>,
    /// How many there are: most volumes have none, and their reads take no lock for it.
    left: AtomicUsize,
}

impl Undecided {
    pub(crate) fn new(blocks: Vec<BlockCandidates<'static>>) -> Self {
        let left = AtomicUsize::new(blocks.len());
        Self { blocks: Mutex::new(blocks.into_iter().map(|c| (c.block, c)).collect()), left }
    }

    /// How many are left.
    pub(crate) fn left(&self) -> usize {
        self.left.load(Ordering::Acquire)
    }

    /// The first of them in a range.
    pub(crate) fn first_in(&self, range: BlockRange) -> Option<BlockIndex> {
        if self.left() == 0 {
            return None;
        }
        self.blocks.lock().range(range.first..BlockIndex(range.end())).next().map(|(block, _)| *block)
    }

    fn take(&self, block: BlockIndex) -> Option<BlockCandidates<'static>> {
        self.blocks.lock().remove(&block)
    }
    fn put_back(&self, c: BlockCandidates<'static>) {
        self.blocks.lock().insert(c.block, c);
    }
    fn decided(&self) {
        self.left.fetch_sub(1, Ordering::AcqRel);
    }

    /// Reads each undecided block of a range, and chooses its tag by what is there. The caller holds the range
    /// exclusively, so that nobody looks for the tag meanwhile. Fails with the first that still can't be decided.
    pub(crate) async fn decide<S: Storage>(
        &self,
        io: &S,
        metadata: &Metadata,
        tagger: &Tagger,
        slot: &mut Slot,
        range: BlockRange,
        mut buf: Buf,
    ) -> (Result<(), ReadError>, Buf) {
        let bs = metadata.block_size();
        while let Some(block) = self.first_in(range) {
            let offset = metadata.layout().block_offset(block);
            let read;
            (read, buf) = io.read(Device::Data, offset, buf, 0..bs).await;
            if let Err(errno) = read {
                return (Err(DeviceError::new("read", Device::Data, offset, bs, errno).into()), buf);
            }
            let Some(c) = self.take(block) else { continue };
            match judge(io, &metadata.tree, tagger, &mut slot.pages, &c, &buf[..bs]).await {
                Ok(row) => {
                    let (seq, tag) = row.choice(&c);
                    metadata.pending[0].insert(block, seq, &tag);
                    self.decided();
                }
                Err(e) => {
                    self.put_back(c);
                    return (Err(undecidable(block, e)), buf);
                }
            }
        }
        (Ok(()), buf)
    }
}

fn undecidable(block: BlockIndex, why: LoadError) -> ReadError {
    match why {
        LoadError::Bad(page) => ReadError::BadPage { block, page: page.name() },
        LoadError::Device(e) => e.into(),
    }
}

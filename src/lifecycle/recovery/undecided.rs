//! Blocks whose tag recovery could not choose, since the device could not read what
//! would have told: each is an error until a read of it succeeds. Only a volume that
//! nothing is written to has any.

use super::{
    candidates::BlockCandidates,
    judge::{Row, judge},
};
use crate::{
    BlockIndex, BlockRange, Buf, Device, DeviceError, Errno, ReadError, Storage,
    metadata::{Metadata, tree::LoadError},
    request::{context::RequestContext, read::Reader},
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

    /// Its candidates. They stay here while they are judged: a request that comes meanwhile must
    /// find that nothing is decided.
    fn candidates(&self, block: BlockIndex) -> Option<BlockCandidates<'static>> {
        self.blocks.lock().get(&block).cloned()
    }

    /// Its tag can be looked up.
    fn decided(&self, block: BlockIndex) {
        if self.blocks.lock().remove(&block).is_some() {
            self.left.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Reads each undecided block of a range, and chooses its tag by what is there. The caller
    /// holds the range exclusively, so that nobody looks for the tag meanwhile. Fails with the
    /// first that still can't be decided.
    pub(crate) async fn decide<S: Storage>(
        &self,
        io: &S,
        reader: &Reader<'_>,
        context: &mut RequestContext,
        range: BlockRange,
        mut buf: Buf,
    ) -> (Result<(), ReadError>, Buf) {
        let Reader { metadata, hasher, in_log, .. } = reader;
        while let Some(c) = self.first_in(range).and_then(|block| self.candidates(block)) {
            let read;
            (read, buf) = read_block(io, metadata, c.block, buf).await;
            if let Err(e) = read {
                return (Err(e), buf);
            }
            let data = &buf[..metadata.block_size()];
            let judged = judge(io, &metadata.tree, hasher.tagger(), &mut context.pages, &c, data).await;
            let row = match judged {
                Ok(row) => row,
                Err(e) => return (Err(undecidable(c.block, e)), buf),
            };
            if let Err(e) = confirm(io, metadata, row, &c, context, data).await {
                return (Err(e), buf);
            }
            if let Some(at) = row.in_log(&c) {
                in_log.decided(c.block, at);
            }
            let (seq, tag) = row.choice(&c);
            metadata.pending[0].insert(c.block, seq, &tag);
            self.decided(c.block);
        }
        (Ok(()), buf)
    }
}

/// A block as it is on the medium, to the front of `buf`.
async fn read_block<S: Storage>(
    io: &S,
    metadata: &Metadata,
    block: BlockIndex,
    buf: Buf,
) -> (Result<(), ReadError>, Buf) {
    let (offset, bs) = (metadata.layout().block_offset(block), metadata.block_size());
    let (read, buf) = io.read(Device::Data, offset, buf, 0..bs).await;
    (read.map_err(|errno| DeviceError::new("read", Device::Data, offset, bs, errno).into()), buf)
}

/// Data that proves nothing is evidence only if it is what lies there: as while the volume was
/// opened, it is read once more.
async fn confirm<S: Storage>(
    io: &S,
    metadata: &Metadata,
    row: Row,
    c: &BlockCandidates<'_>,
    context: &mut RequestContext,
    data: &[u8],
) -> Result<(), ReadError> {
    if !row.proves_nothing() {
        return Ok(());
    }
    let (read, again) = read_block(io, metadata, c.block, context.pages.lend()).await;
    let same = again[..data.len()] == *data;
    context.pages.give_back(again);
    read?;
    // What differs from read to read says nothing of the medium: the device has failed, and the
    // block stays undecided.
    let (offset, bs) = (metadata.layout().block_offset(c.block), data.len());
    let failed = || DeviceError::new("read", Device::Data, offset, bs, Errno::EIO).into();
    if same { Ok(()) } else { Err(failed()) }
}

fn undecidable(block: BlockIndex, why: LoadError) -> ReadError {
    match why {
        LoadError::Bad(page) => ReadError::BadPage { block, page: page.name() },
        LoadError::Device(e) => e.into(),
    }
}

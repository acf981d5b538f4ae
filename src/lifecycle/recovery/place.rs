//! Putting blocks from the log to their places: the last thing before recovery's result is written
//! down, so that a recovery which is cut short finds log and superblock as they were.

use super::{
    in_log::{InLog, LogSectors},
    patience::{Effort, Patience},
};
use crate::{
    BlockIndex, Buf, ByteOffset, Device, DeviceError, Durability, Errno, Latched, Storage,
    crypto::tagger::Tagger,
    format::{LOST_TAG, PAGE_BYTES},
    io::retry::READ,
    lifecycle::{open_error::OpenError, superblocks::Newest},
    metadata::{pending::PendingSet, tree::Tree},
};
use std::ops::Range;

/// Blocks put in place at a time.
const BATCH: usize = 32;

/// What puts blocks in place.
pub(crate) struct Placer<'a, S: Storage> {
    io: &'a S,
    tree: &'a Tree,
    tagger: &'a Tagger,
    /// The tags that recovery has chosen.
    set: &'a PendingSet,
    log: Patience<S>,
}

impl<'a, S: Storage> Placer<'a, S> {
    pub(crate) fn new(io: &'a S, tree: &'a Tree, tagger: &'a Tagger, set: &'a PendingSet, newest: &Newest) -> Self {
        Self { io, tree, tagger, set, log: Patience::new(Device::Meta, newest, Effort::Bounded) }
    }

    /// Puts all of them in place, durably, and says how many. Where one can't be read from the log
    /// any more, or is not what its tag says, the log can't be read. One that can't be written stays
    /// in the log, and so does what came after it.
    pub(crate) async fn all(mut self, in_log: &InLog) -> Result<Result<u64, Latched>, OpenError> {
        let mut blocks = in_log.all().peekable();
        let mut bufs: Vec<_> = (0..BATCH).map(|_| Buf::new(PAGE_BYTES)).collect();
        let mut placed = 0;
        while blocks.peek().is_some() {
            let batch: Vec<_> = blocks.by_ref().take(BATCH).collect();
            let mut parts = Vec::with_capacity(batch.len());
            for ((block, at), buf) in batch.iter().zip(&mut bufs) {
                let part;
                (part, *buf) = self.read(*block, *at, std::mem::replace(buf, Buf::none())).await?;
                parts.push((self.tree.layout.block_offset(*block), part));
            }
            if let Err(why) = self.write(parts, &mut bufs).await {
                return Ok(Err(Latched::Device(why)));
            }
            placed += batch.len() as u64;
        }
        if placed > 0 {
            // A tag in the tree is the only candidate for its block.
            if let Err(errno) = self.io.sync(Device::Data).await {
                return Ok(Err(Latched::Device(DeviceError::sync(Device::Data, errno))));
            }
        }
        Ok(Ok(placed))
    }

    /// Reads one block from the log; it lies at this place of the buffer. What proves nothing now has
    /// been read wrongly.
    async fn read(&mut self, block: BlockIndex, at: ByteOffset, buf: Buf) -> Result<(Range<usize>, Buf), OpenError> {
        let Self { io, tagger, set, log, .. } = self;
        let tag = set.lookup(block).map_or(LOST_TAG, |(_, tag)| tag);
        let sectors = LogSectors::of(*io, at, tagger.block_size());
        let read = async |buf| {
            let (read, buf) = sectors.read(*io, buf).await;
            let proves = tagger.proves(&tag, block, &buf[sectors.block.clone()]);
            (read.and(if proves { Ok(()) } else { Err(Errno::EIO) }), buf)
        };
        let (read, buf) = log.tries(*io, (sectors.offset, sectors.len), READ.most, buf, read).await?;
        read.map_err(OpenError::LogUnreadable)?;
        Ok((sectors.block, buf))
    }

    /// Writes parts of the buffers, each at its place.
    async fn write(&self, parts: Vec<(ByteOffset, Range<usize>)>, bufs: &mut [Buf]) -> Result<(), DeviceError> {
        let mut writes = Vec::with_capacity(parts.len());
        for ((offset, part), buf) in parts.into_iter().zip(bufs.iter_mut()) {
            let buf = std::mem::replace(buf, Buf::none());
            writes.push((offset, self.io.write(Device::Data, offset, buf, part, Durability::MayBeLost)));
        }
        // All of them end before any failure is told: nothing may land later.
        let mut result = Ok(());
        for ((offset, write), buf) in writes.into_iter().zip(bufs) {
            let written;
            (written, *buf) = write.await;
            let failed = |errno| DeviceError::new("write", Device::Data, offset, self.tagger.block_size(), errno);
            result = result.and(written.map_err(failed));
        }
        result
    }
}

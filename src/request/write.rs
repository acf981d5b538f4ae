//! Writing and zeroing: the log knows before the data device does, and the data goes out once.
//!
//! It is never the case that new data is on the medium and its tag in no durable record: after a
//! crash every block's content is one that the log or the tree can name.

use super::{
    context::{RequestContext, TagSide},
    hash_batch::{HashWork, Hasher},
    range_lock::RangeGuard,
};
use crate::{
    Admitted, BlockIndex, BlockRange, Buf, Device, DeviceError, Durability, Errno, Io, Latched, WriteError,
    format::ZERO_TAG,
    io::retry::{READ_BACK, retry},
    log::{Appended, Change, Log, Reserved, Unsynced},
    metadata::Metadata,
    write_back::Next,
};

/// Most blocks of one zeros entry: its count has 32 bits.
const MAX_ZERO_RUN: u64 = u32::MAX as u64;

/// What a write needs of the volume.
pub(crate) struct Writer<'v> {
    pub(crate) metadata: &'v Metadata,
    pub(crate) hasher: &'v Hasher,
    pub(crate) log: &'v Log,
}

/// An admitted write, and what clears what is kept of it.
pub(crate) struct WriteBack<'w, 'v> {
    pub(crate) admitted: &'w mut Admitted<'v>,
    pub(crate) clear: &'w mut dyn FnMut(),
}

/// Who holds the range of a write.
pub(crate) enum Holder<'w, 'v> {
    /// A request that is answered when it is in place.
    Request(&'w RangeGuard<'v>),
    Admitted(WriteBack<'w, 'v>),
}

impl Holder<'_, '_> {
    fn guard(&self) -> &RangeGuard<'_> {
        match self {
            Self::Request(guard) => guard,
            Self::Admitted(WriteBack { admitted, .. }) => admitted.guard(),
        }
    }

    /// What becomes of the tagged blocks in `work`, `bytes` of them, which are `whole` or a part. An admitted write waits for a
    /// flush here.
    async fn go_on(&mut self, work: HashWork, bytes: usize, whole: bool) -> (Next, HashWork) {
        match self {
            Self::Request(_) => (Next::Log { carry: false }, work),
            // A record carries the whole of a write, or nothing of it.
            Self::Admitted(WriteBack { admitted, .. }) if whole => admitted.hold(work, bytes).await,
            Self::Admitted(WriteBack { admitted, .. }) => (admitted.begin(false), work),
        }
    }
}

impl Writer<'_> {
    /// Writes `range`, which is held, from the front of `buf`, which is as large at least.
    pub(crate) async fn write<S: Io>(
        &self,
        io: &S,
        context: &mut RequestContext,
        range: BlockRange,
        mut buf: Buf,
        mut holder: Holder<'_, '_>,
    ) -> (Result<(), WriteError>, Buf) {
        context.counters.count_write(range.count as usize * self.metadata.block_size());
        let most = self.log.max_entry_tags() as u64;
        let mut done = 0;
        while done < range.count {
            let part = BlockRange::new(BlockIndex(range.first.0 + done), most.min(range.count - done));
            let result;
            let at = done as usize * self.metadata.block_size();
            (result, buf) = self.write_part(io, context, part, buf, at, &mut holder).await;
            if result.is_err() {
                return (result, buf);
            }
            done += part.count;
        }
        (Ok(()), buf)
    }

    /// One log entry's worth of a write, from `at` in `buf`.
    pub(crate) async fn write_part<S: Io>(
        &self,
        io: &S,
        context: &mut RequestContext,
        part: BlockRange,
        buf: Buf,
        at: usize,
        holder: &mut Holder<'_, '_>,
    ) -> (Result<(), WriteError>, Buf) {
        let bytes = at..at + part.count as usize * self.metadata.block_size();
        let work = HashWork { first: part.first, buf, at, count: part.count as usize, tags: context.tags.lend() };
        let work = self.hasher.make_tags(io, context.batch.as_ref(), work).await;
        let whole = part == holder.guard().range();
        let (next, HashWork { buf, tags, .. }) = holder.go_on(work, bytes.len(), whole).await;
        context.tags.give_back(tags);
        let appended = match self.log_part(io, context, (part, &buf[bytes.clone()]), next, holder).await {
            Ok(Some(appended)) => appended,
            Ok(None) => return (Ok(()), buf),
            Err(why) => return (Err(WriteError::Latched(why)), buf),
        };
        if appended.carried {
            context.counters.carried_writes.add(1);
            if let Holder::Admitted(WriteBack { admitted, clear }) = holder {
                admitted.park(clear, || self.log.is_current(appended.epoch)).await;
            }
        }
        // Behind those before it that wait to be in place.
        holder.guard().exclusive().await;
        if appended.carried && holder.guard().is_superseded() {
            context.counters.superseded_writes.add(1);
            appended.supersede();
            return (Ok(()), buf);
        }
        let offset = self.metadata.layout().block_offset(part.first);
        let (result, buf) = io.write(Device::Data, offset, buf, bytes.clone(), Durability::MayBeLost).await;
        let device = |errno| DeviceError::new("write", Device::Data, offset, bytes.len(), errno);
        match result {
            // Published before the number leaves the in-flight list: a checkpoint that drains the
            // epoch finds the tags.
            Ok(()) => {
                let tags =
                    self.metadata.publish(appended.epoch, appended.seq, part.first, context.tags.tags(part.count));
                appended.complete(Reserved { tags, runs: 0 });
                (Ok(()), buf)
            }
            Err(errno) if appended.carried => {
                context.counters.failed_writes.add(1);
                // Its record must stay: the next open puts it in place. So nothing is checkpointed
                // from now on.
                self.log.latch(Latched::WriteBack(device(errno)));
                appended.fail(Reserved::default());
                (Err(WriteError::Device(device(errno))), buf)
            }
            Err(errno) => {
                context.counters.failed_writes.add(1);
                let resolved = self.resolve_failed(io, context, part, appended).await;
                (Err(resolved.err().map_or(WriteError::Device(device(errno)), WriteError::Latched)), buf)
            }
        }
    }

    /// Logs a part whose tags are made, and waits until its record is durable: if the data reached the medium before that, a crash
    /// in between would leave a block that nothing vouches for. `None`: it is not to be written.
    async fn log_part<S: Io>(
        &self,
        io: &S,
        context: &RequestContext,
        (part, blocks): (BlockRange, &[u8]),
        next: Next,
        holder: &mut Holder<'_, '_>,
    ) -> Result<Option<Appended<'_>>, Latched> {
        let (first, tags) = (part.first, context.tags.tags(part.count));
        let is_durable = matches!(next, Next::Logged { is_durable: true, .. });
        let appended = match next {
            Next::Inherited => return Ok(None),
            Next::Logged { logged, .. } => self.log.take_over(logged),
            Next::Log { carry: true } => {
                self.log.append(context.requester(), Change::Payload { first, tags, blocks }).await?
            }
            Next::Log { carry: false } => self.log.append(context.requester(), Change::Tags { first, tags }).await?,
        };
        if let Holder::Admitted(WriteBack { admitted, .. }) = holder {
            admitted.appended(&appended);
        }
        if !is_durable {
            self.log.commit(io, context.id, &appended).await?;
        }
        Ok(Some(appended))
    }

    /// A data write failed: finds out, block by block, what is on the medium now. The caller holds
    /// the range. Nothing of this appends to the log, so it can't wait for space. Nor does it touch
    /// the request's buffer: what was to be written stays there, for a caller that keeps it.
    async fn resolve_failed<S: Io>(
        &self,
        io: &S,
        context: &mut RequestContext,
        part: BlockRange,
        appended: Appended<'_>,
    ) -> Result<(), Latched> {
        self.log.sync_data(io, context.id, Unsynced::Uncounted).await?;
        let latch = |why: Latched| {
            self.log.latch(why);
            why
        };
        // Tags before this write. Without them nothing can be decided; damaged ones prove nothing.
        let looked_up = self.metadata.lookup_patiently(io, context, part, TagSide::Old).await;
        looked_up.map_err(|e| latch(Latched::Device(e)))?;
        let mut buf = context.pages.lend();
        let (mut kept, mut failed, mut unknown) = (Reserved::default(), false, None);
        for (i, block) in part.blocks().enumerate() {
            let result;
            (result, buf) = self.read_back(io, block, buf).await;
            if result.is_err() {
                unknown = Some(block);
                break;
            }
            let (new, old) = (context.tags.tags(part.count)[i], context.old.tags(part.count)[i]);
            let content = &buf[..self.metadata.block_size()];
            let proves_new = self.hasher.tagger().proves(&new, block, content);
            let proves_old = old == ZERO_TAG || self.hasher.tagger().proves(&old, block, content);
            if proves_new || !proves_old {
                kept.tags += self.metadata.publish(appended.epoch, appended.seq, block, &[new]);
            }
            failed |= !proves_new;
        }
        context.pages.give_back(buf);
        match (unknown, failed) {
            (Some(block), _) => return Err(latch(Latched::UnknownBlock(block))),
            (None, true) => appended.fail(kept),
            (None, false) => appended.complete(kept),
        }
        Ok(())
    }

    /// A block as it is on the medium, to the front of `buf`.
    async fn read_back<S: Io>(&self, io: &S, block: BlockIndex, mut buf: Buf) -> (Result<(), Errno>, Buf) {
        let (offset, bs) = (self.metadata.layout().block_offset(block), self.metadata.block_size());
        let read = async || {
            let result;
            (result, buf) = io.read(Device::Data, offset, std::mem::replace(&mut buf, Buf::none()), 0..bs).await;
            result
        };
        let result = retry(io, READ_BACK, read).await;
        (result, buf)
    }

    /// Makes `range`, which the caller holds, read as zeros. `discard`: tell the data device too.
    pub(crate) async fn zero<S: Io>(
        &self,
        io: &S,
        context: &mut RequestContext,
        range: BlockRange,
        discard: bool,
    ) -> Result<(), WriteError> {
        context.counters.zeroes.add(1);
        let mut done = 0;
        while done < range.count {
            let part = BlockRange::new(BlockIndex(range.first.0 + done), MAX_ZERO_RUN.min(range.count - done));
            let appended =
                self.log.append(context.requester(), Change::Zeros(part)).await.map_err(WriteError::Latched)?;
            self.log.commit(io, context.id, &appended).await.map_err(WriteError::Latched)?;
            if discard {
                let offset = self.metadata.layout().block_offset(part.first);
                let bytes = part.count * self.metadata.block_size() as u64;
                // Waited for, so that it can't land on a later write. Its failure is harmless: the
                // content of a block of zeros is never looked at.
                let refused = io.discard(Device::Data, offset, bytes).await.is_err();
                context.counters.failed_discards.add(refused.into());
            }
            let grown = self.metadata.pending[appended.epoch.parity()].insert_run(part, appended.seq);
            // Runs that this one swallowed give their space back.
            appended.complete_zeros(grown);
            done += part.count;
        }
        Ok(())
    }
}

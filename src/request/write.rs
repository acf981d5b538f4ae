//! Writing and zeroing: the log knows before the data device does, and the data goes out once.
//!
//! It is never the case that new data is on the medium and its tag in no durable record: after a
//! crash every block's content is one that the log or the tree can name.

use crate::{
    BlockIndex, BlockRange, Buf, Device, DeviceError, Durability, Errno, Io, Latched, Slot, Volume, WriteError,
    format::{Tag, ZERO_TAG},
    log::{Appended, Change, Reserved},
    metadata::lookup::Into,
    options::Access,
    request::range_lock::Mode,
};
use std::time::Duration;

/// How often, and how far apart, a block is read back whose write failed and whose read fails too.
const READ_BACK_TRIES: u32 = 5;
const READ_BACK_PAUSE: Duration = Duration::from_millis(200);

/// Most blocks of one zeros entry: its count has 32 bits.
const MAX_ZERO_RUN: u64 = u32::MAX as u64;

impl Volume {
    pub(crate) fn writable(&self, range: BlockRange) -> Result<(), WriteError> {
        if self.access == Access::ReadOnly {
            return Err(WriteError::ReadOnly);
        }
        match self.tree.layout.contains(range) {
            true => Ok(()),
            false => Err(WriteError::BadRange(range)),
        }
    }

    /// Writes `range` from the front of `buf`. [`Durable`](Durability::Durable): as if a [`flush`](Self::flush) of these blocks
    /// came with it, which waits for no other write.
    pub async fn write<S: Io>(
        &self,
        io: &S,
        slot: &mut Slot,
        range: BlockRange,
        buf: Buf,
        durability: Durability,
    ) -> (Result<(), WriteError>, Buf) {
        if let Err(e) = self.writable(range) {
            return (Err(e), buf);
        }
        let guard = self.ranges.acquire(slot.id, range, Mode::Exclusive).await;
        let (mut result, buf) = self.write_held(io, slot, range, buf).await;
        drop(guard);
        if result.is_ok() && durability == Durability::Durable {
            // A durable data write would be on the medium, but the log would not know: after a crash an older version would
            // be taken for this one's place.
            result = self.log.flush(io, slot.id).await.map_err(WriteError::Latched);
        }
        (result, buf)
    }

    /// The same for a range that the caller holds.
    pub(crate) async fn write_held<S: Io>(
        &self,
        io: &S,
        slot: &mut Slot,
        range: BlockRange,
        mut buf: Buf,
    ) -> (Result<(), WriteError>, Buf) {
        let Some(bytes) = self.request_bytes(range, &buf) else {
            return (Err(WriteError::BadRange(range)), buf);
        };
        self.counters[slot.queue].writes.add(1);
        self.counters[slot.queue].written_bytes.add(bytes as u64);
        let most = self.log.max_entry_tags() as u64;
        let mut done = 0;
        while done < range.count {
            let part = BlockRange::new(BlockIndex(range.first.0 + done), most.min(range.count - done));
            let result;
            (result, buf) = self.write_part(io, slot, part, buf, done as usize * self.block_size()).await;
            if result.is_err() {
                return (result, buf);
            }
            done += part.count;
        }
        (Ok(()), buf)
    }

    /// One log entry's worth of a write, from `at` in `buf`; the caller holds the range.
    pub(crate) async fn write_part<S: Io>(
        &self,
        io: &S,
        slot: &mut Slot,
        part: BlockRange,
        buf: Buf,
        at: usize,
    ) -> (Result<(), WriteError>, Buf) {
        let bytes = at..at + part.count as usize * self.block_size();
        let buf = self.make_tags(io, slot, Into::Tags, part, buf, at).await;
        let change = Change::Tags { first: part.first, tags: slot.tags.tags(part.count) };
        let appended = match self.log.append(slot, change).await {
            Ok(appended) => appended,
            Err(why) => return (Err(WriteError::Latched(why)), buf),
        };
        // Durable in the log first. If the data reached the medium before the record, a crash in
        // between would leave a block that nothing vouches for.
        if let Err(why) = self.log.commit(io, &appended).await {
            return (Err(WriteError::Latched(why)), buf);
        }
        let offset = self.tree.layout.block_offset(part.first);
        let (result, buf) = io.write(Device::Data, offset, buf, bytes.clone(), Durability::MayBeLost).await;
        match result {
            // Published before the number leaves the in-flight list: whoever drains the epoch finds the tags.
            Ok(()) => {
                let kept = self.publish(&appended, part, slot.tags.tags(part.count));
                appended.settle(kept);
                (Ok(()), buf)
            }
            Err(errno) => {
                self.counters[slot.queue].failed_writes.add(1);
                let settled = self.settle_failed(io, slot, part, appended).await;
                let device = WriteError::Device(DeviceError::new("write", Device::Data, offset, bytes.len(), errno));
                (Err(settled.err().map_or(device, WriteError::Latched)), buf)
            }
        }
    }

    /// Puts tags into the pending set of the epoch that the change took.
    fn publish(&self, appended: &Appended<'_>, part: BlockRange, tags: &[Tag]) -> Reserved {
        let set = &self.pending[appended.epoch.parity()];
        let new = part.blocks().zip(tags).filter(|(block, tag)| set.insert(*block, appended.seq, tag)).count();
        Reserved { tags: new, runs: 0 }
    }

    /// A data write failed: what is on the medium now? Judged block by block under the range. Nothing of this appends to
    /// the log, so it can't wait for space. Nor does it see the request's buffer: what was to be written stays in it, for
    /// whoever keeps it.
    async fn settle_failed<S: Io>(
        &self,
        io: &S,
        slot: &mut Slot,
        part: BlockRange,
        appended: Appended<'_>,
    ) -> Result<(), Latched> {
        self.log.flush(io, slot.id).await?;
        let latch = |why: Latched| {
            self.log.latch(why);
            why
        };
        // Tags before this write. Without them nothing can be decided; damaged ones prove nothing.
        let looked_up = self.lookup_patiently(io, slot, part, Into::Old).await;
        looked_up.map_err(|e| latch(Latched::Device(e)))?;
        let mut buf = slot.pages.lend();
        let (mut kept, mut abandon, mut unknown) = (Reserved::default(), false, None);
        for (i, block) in part.blocks().enumerate() {
            let result;
            (result, buf) = self.read_back(io, block, buf).await;
            if result.is_err() {
                unknown = Some(block);
                break;
            }
            let (new, old) = (slot.tags.tags(part.count)[i], slot.old.tags(part.count)[i]);
            let content = &buf[..self.block_size()];
            let proves_new = self.tagger.proves(&new, block, content);
            let proves_old = old == ZERO_TAG || self.tagger.proves(&old, block, content);
            if proves_new || !proves_old {
                let one = BlockRange::new(block, 1);
                kept.tags += self.publish(&appended, one, &[new]).tags;
            }
            abandon |= !proves_new;
        }
        slot.pages.give_back(buf);
        match (unknown, abandon) {
            (Some(block), _) => return Err(latch(Latched::UnknownBlock(block))),
            (None, true) => appended.abandon(kept),
            (None, false) => appended.settle(kept),
        }
        Ok(())
    }

    /// A block as it is on the medium, to the front of `buf`.
    async fn read_back<S: Io>(&self, io: &S, block: BlockIndex, mut buf: Buf) -> (Result<(), Errno>, Buf) {
        let mut result = Err(Errno::EIO);
        for attempt in 0..READ_BACK_TRIES {
            if attempt > 0 {
                let _ = io.sleep(READ_BACK_PAUSE).await;
            }
            let offset = self.tree.layout.block_offset(block);
            (result, buf) = io.read(Device::Data, offset, buf, 0..self.block_size()).await;
            if result.is_ok() {
                break;
            }
        }
        (result, buf)
    }

    /// Makes `range` read as zeros (discard and write-zeroes). `discard`: tell the data device too.
    pub async fn zero<S: Io>(
        &self,
        io: &S,
        slot: &mut Slot,
        range: BlockRange,
        discard: bool,
    ) -> Result<(), WriteError> {
        self.writable(range)?;
        self.counters[slot.queue].zeroes.add(1);
        let _guard = self.ranges.acquire(slot.id, range, Mode::Exclusive).await;
        let mut done = 0;
        while done < range.count {
            let part = BlockRange::new(BlockIndex(range.first.0 + done), MAX_ZERO_RUN.min(range.count - done));
            let appended = self.log.append(slot, Change::Zeros(part)).await.map_err(WriteError::Latched)?;
            self.log.commit(io, &appended).await.map_err(WriteError::Latched)?;
            if discard {
                let offset = self.tree.layout.block_offset(part.first);
                let bytes = part.count * self.block_size() as u64;
                // Waited for, so that it can't land on a later write. Its failure is harmless: the
                // content of a block of zeros is never looked at.
                let refused = io.discard(Device::Data, offset, bytes).await.is_err();
                self.counters[slot.queue].failed_discards.add(refused.into());
            }
            let grown = self.pending[appended.epoch.parity()].insert_run(part, appended.seq);
            // Runs that this one swallowed give their space back.
            appended.settle_runs(grown);
            done += part.count;
        }
        Ok(())
    }

    /// Makes every write that completed before durable.
    pub async fn flush<S: Io>(&self, io: &S, slot: &mut Slot) -> Result<(), WriteError> {
        self.counters[slot.queue].flushes.add(1);
        match self.access {
            // Nothing was written, so there is nothing to make durable.
            Access::ReadOnly if self.log.latched().is_none() => Ok(()),
            _ => {
                self.accepted.drained(slot.id).await;
                self.log.flush(io, slot.id).await.map_err(WriteError::Latched)
            }
        }
    }
}

//! The checkpoint: pending tags into pages, pages into the tree, and the superblock moves on.
//!
//! In this order, each step durable before the next:
//! 1. the epoch ends; its writes in flight are settled (waits only for requests that have logged)
//! 2. the data that the tags speak of — otherwise a crash could leave a tag in the tree whose data never arrived
//! 3. pages and tree, to slots that nothing current names
//! 4. both superblock copies — only then is anything of the old epoch (slots, log space) free

use crate::{
    Access, Device, DeviceError, Epoch, Latched, Storage, Volume, Work,
    format::Superblock,
    lifecycle::superblocks::{Change, publish},
    log::Unfinished,
    metadata::tree_update::{Applied, Scratch, apply},
};
use std::time::Duration;

/// The slot that recovery had: the checkpoint thread's place in the waiting lists.
const OWN_SLOT: usize = 0;
/// How long a flush entry waits for a record that would carry it along, before it gets one of its own.
const FLUSH_RECORD_DELAY: Duration = Duration::from_millis(5);

impl Volume {
    /// Completes when the checkpoint thread has something to do.
    pub async fn work_wanted(&self) -> Work {
        self.log.wanted().await
    }

    /// Does what [`Volume::work_wanted`] said. Only one thread calls this or [`Volume::checkpoint`].
    pub async fn work<S: Storage>(&self, io: &S, work: Work) -> Result<(), Latched> {
        match work {
            Work::Checkpoint => self.checkpoint(io).await,
            Work::FlushRecord => {
                let _ = io.sleep(FLUSH_RECORD_DELAY).await;
                self.log.write_flush_record(io).await
            }
        }
    }

    /// Moves the pending tags into pages and tree, and the superblock on. Nothing to do where nothing
    /// was written since the last. One at a time: the checkpoint thread's.
    pub async fn checkpoint<S: Storage>(&self, io: &S) -> Result<(), Latched> {
        if self.access == Access::ReadOnly {
            return Ok(());
        }
        if let Some(why) = self.log.latched() {
            return Err(why);
        }
        // Another would leave its epoch out. The log still has everything.
        let unfinished = Unfinished::new(&self.log);
        let result = self.try_checkpoint(io).await;
        if let Err(why) = result {
            self.log.latch(why);
        }
        unfinished.complete();
        result
    }

    async fn try_checkpoint<S: Storage>(&self, io: &S) -> Result<(), Latched> {
        let Some(ended) = self.log.switch_epoch() else { return Ok(()) };
        self.log.drained(ended).await;
        if let Some(why) = self.log.latched() {
            return Err(why);
        }
        // Its entry goes to the log of the next epoch. It matters where a superblock of the ended epoch is put
        // back: the log then goes on to say what was durable.
        self.log.flush(io, OWN_SLOT).await?;
        self.wait_for_holds(io).await;
        let mut scratch = self.scratch.lock().take().expect("one checkpoint at a time");
        let written = self.write_out(io, ended, &mut scratch).await;
        *self.scratch.lock() = Some(scratch);
        let (superblock, applied) = written?;
        // The new root first, then the pending set goes: a lookup that misses the one finds the other.
        self.tree.root.store(superblock.root);
        *self.superblock.lock() = superblock;
        self.pending[ended.parity()].clear();
        self.log.release(ended);
        let counters = &self.counters[0];
        counters.checkpoints.add(1);
        counters.pages_written.add(applied.pages_written);
        counters.pages_lost.add(applied.pages_lost);
        Ok(())
    }

    /// Pages, tree and superblock of the epoch that has ended.
    async fn write_out<S: Storage>(
        &self,
        io: &S,
        ended: Epoch,
        scratch: &mut Scratch,
    ) -> Result<(Superblock, Applied), Latched> {
        let set = &self.pending[ended.parity()];
        let epoch = ended.next();
        let (root, applied) = apply(io, &self.tree, scratch, set, self.tree.root.load(), epoch).await?;
        let meta = io.sync(Device::Meta).await;
        meta.map_err(|errno| Latched::Device(DeviceError::sync(Device::Meta, errno)))?;
        // A write-back error is reported to one sync only, and that may have been a flush's.
        if let Some(why) = self.log.latched() {
            return Err(why);
        }
        let end = self.log.end_of(ended);
        let current = *self.superblock.lock();
        let next =
            Superblock { epoch, root, log_begin: end.position, record_number: end.number, link: end.link, ..current };
        let page = scratch.lend_page();
        let (result, page) = publish(io, &self.keys, Change::MoveOn(&current, &next), page).await;
        scratch.give_back(page);
        result.map_err(Latched::Device)?;
        Ok((next, applied))
    }

    /// The last checkpoint: after it a new open finds nothing to recover. No requests may be under way.
    ///
    /// The log is told first that all of it is durable: the superblock before the last, put back together with an
    /// old block, must not make a crash of an orderly end.
    pub async fn close<S: Storage>(&self, io: &S) -> Result<(), Latched> {
        if self.access == Access::ReadWrite {
            self.log.flush(io, OWN_SLOT).await?;
            self.log.write_flush_record(io).await?;
            self.checkpoint(io).await?;
            // Where a full ring had no room for it, there is some now.
            self.log.write_flush_record(io).await?;
        }
        self.checkpoint(io).await
    }
}

//! The checkpoint: pending tags into pages, pages into the tree, and the superblock moves on.
//!
//! In this order, each step durable before the next:
//! 1. the epoch ends; its writes in flight complete (this waits only for requests that have logged)
//! 2. the data that the tags speak of — otherwise a crash could leave a tag in the tree whose data
//!    never arrived
//! 3. pages and tree, to slots that nothing current names
//! 4. both superblock copies — only then is anything of the old epoch (slots, log space) free

use crate::{
    Device, DeviceError, Epoch, Latched, Storage,
    crypto::keys::Keys,
    format::{Scrub, Superblock},
    lifecycle::superblocks::{SuperblockUpdate, publish},
    log::{Log, Unfinished, Unsynced},
    metadata::{
        Metadata,
        tree_update::{Applied, apply},
        update_scratch::Scratch,
    },
    sync::{AtomicBool, Mutex, Ordering},
    write_back::AdmittedWrites,
};
use std::time::Duration;

/// The number of the checkpoint thread's context in the waiting lists: the one that recovery had.
pub(crate) const OWN_CONTEXT: usize = 0;
/// How long a flush entry waits for a record that would carry it, before it gets one of its own.
pub(crate) const FLUSH_RECORD_DELAY: Duration = Duration::from_millis(5);

/// How long an admitted write waits for a flush, at least; several times as long until it goes to its
/// place where a record carries it.
pub(crate) const WRITE_BACK_TICK: Duration = Duration::from_millis(5);

/// What a checkpoint needs beside the metadata and the log.
pub(crate) struct Checkpoints {
    keys: Keys,
    /// As both copies have it.
    superblock: Mutex<Superblock>,
    /// How far a scrub is, for the next superblock.
    scrub: Mutex<Option<Scrub>>,
    /// Somebody needs the next one, though nothing has changed.
    wanted: AtomicBool,
    /// Its memory, while none runs.
    scratch: Mutex<Option<Scratch>>,
}

impl Checkpoints {
    pub(crate) fn new(keys: Keys, superblock: Superblock, scratch: Scratch) -> Self {
        Self {
            keys,
            superblock: Mutex::new(superblock),
            scrub: Mutex::new(None),
            wanted: AtomicBool::new(false),
            scratch: Mutex::new(Some(scratch)),
        }
    }

    /// The superblock that both copies hold, or did before the checkpoint that is under way.
    pub(crate) fn superblock(&self) -> Superblock {
        *self.superblock.lock()
    }

    /// How far a scrub is, for the next superblock to say.
    pub(crate) fn note_scrub(&self, scrub: Scrub) {
        *self.scrub.lock() = Some(scrub);
    }

    /// Makes the next checkpoint one that moves the superblock on, though nothing has changed: so both copies of it
    /// are written, and the log is free.
    pub(crate) fn want(&self) {
        self.wanted.store(true, Ordering::SeqCst);
    }

    /// Whether there is to be a checkpoint, though nothing has changed: the superblock is to say more of a scrub than
    /// it does (one of version 1 says nothing of it), or something has rotted.
    pub(crate) fn is_wanted(&self, metadata: &Metadata) -> bool {
        let noted = *self.scrub.lock();
        let unsaid = noted.is_some_and(|noted| self.superblock().scrub().is_some_and(|said| said != noted));
        let wanted = self.wanted.swap(false, Ordering::SeqCst);
        unsaid || wanted || !metadata.tree.rescued.is_empty()
    }

    /// Whether no checkpoint is at work on pages or copies.
    pub(crate) fn are_resting(&self) -> bool {
        self.scratch.lock().is_some()
    }

    /// The volume's keys.
    pub(crate) fn keys(&self) -> &Keys {
        &self.keys
    }

    /// Moves the pending tags into pages and tree, and the superblock on. `None` where nothing was
    /// written since the last. One at a time. One that fails latches the log.
    pub(crate) async fn run<S: Storage>(
        &self,
        io: &S,
        metadata: &Metadata,
        log: &Log,
        admitted: &AdmittedWrites,
    ) -> Result<Option<Applied>, Latched> {
        if let Some(why) = log.latched() {
            return Err(why);
        }
        // A further checkpoint would skip the epoch of this one. The log still has everything.
        let unfinished = Unfinished::new(log);
        let result = self.try_run(io, metadata, log, admitted).await;
        if let Err(why) = result {
            log.latch(why);
        }
        unfinished.complete();
        result
    }

    /// The last superblock, once a last checkpoint has left nothing in the log. Where the log might
    /// hold blocks it is of a version again that says it does not, if nothing else needs another.
    pub(crate) async fn close<S: Storage>(&self, io: &S, log: &Log) -> Result<(), Latched> {
        if let Some(why) = log.latched() {
            return Err(why);
        }
        let current = *self.superblock.lock();
        if !current.has_sync_log() {
            return Ok(());
        }
        let next = Superblock { epoch: current.epoch.next(), ..current }.with_sync_log(false);
        let mut scratch = self.scratch.lock().take().expect("one checkpoint at a time");
        let page = scratch.lend_page();
        // Whatever comes of it, the log must not go on: it is of another epoch, and might hold more
        // than this superblock says.
        log.latch(Latched::Closed);
        let (result, page) = publish(io, &self.keys, SuperblockUpdate::MoveOn(&current, &next), page).await;
        scratch.give_back(page);
        self.rest(scratch, result.is_ok().then_some(next));
        result.map_err(Latched::Device)
    }

    /// Gives the memory back, once it is known which superblock both copies hold now: who finds that checkpoints
    /// are resting must not find an older one.
    fn rest(&self, scratch: Scratch, superblock: Option<Superblock>) {
        if let Some(superblock) = superblock {
            *self.superblock.lock() = superblock;
        }
        *self.scratch.lock() = Some(scratch);
    }

    async fn try_run<S: Storage>(
        &self,
        io: &S,
        metadata: &Metadata,
        log: &Log,
        admitted: &AdmittedWrites,
    ) -> Result<Option<Applied>, Latched> {
        let Some(ended) = log.switch_epoch() else { return Ok(None) };
        // What its records carry must be in place before they go.
        admitted.hurry_parked();
        log.drained(ended).await;
        if let Some(why) = log.latched() {
            return Err(why);
        }
        // Its entry goes to the log of the next epoch. It matters where a superblock of the ended
        // epoch is put back: the log then goes on to say what was durable.
        log.sync_data(io, OWN_CONTEXT, Unsynced::Ended).await?;
        metadata.wait_for_holds(io).await;
        let mut scratch = self.scratch.lock().take().expect("one checkpoint at a time");
        let written = self.write_out(io, metadata, log, ended, &mut scratch).await;
        self.rest(scratch, written.as_ref().ok().map(|(superblock, _)| *superblock));
        let (superblock, applied) = written?;
        // The new root first, then the pending set goes: a lookup that misses the one finds the
        // other.
        metadata.tree.root.store(superblock.root);
        metadata.pending[ended.parity()].clear();
        log.release(ended);
        Ok(Some(applied))
    }

    /// Pages, tree and superblock of the epoch that has ended.
    async fn write_out<S: Storage>(
        &self,
        io: &S,
        metadata: &Metadata,
        log: &Log,
        ended: Epoch,
        scratch: &mut Scratch,
    ) -> Result<(Superblock, Applied), Latched> {
        let set = &metadata.pending[ended.parity()];
        let epoch = ended.next();
        let (root, applied) = apply(io, &metadata.tree, scratch, set, metadata.tree.root.load(), epoch).await?;
        let meta = io.sync(Device::Meta).await;
        meta.map_err(|errno| Latched::Device(DeviceError::sync(Device::Meta, errno)))?;
        // A page-cache write error is reported to one sync only, and that may have been a flush's.
        if let Some(why) = log.latched() {
            return Err(why);
        }
        let end = log.end_of(ended);
        let current = *self.superblock.lock();
        let next =
            Superblock { epoch, root, log_begin: end.position, record_number: end.number, link: end.link, ..current };
        let noted = *self.scrub.lock();
        let next = noted.map_or(next, |noted| next.with_scrub(noted));
        let page = scratch.lend_page();
        let (result, page) = publish(io, &self.keys, SuperblockUpdate::MoveOn(&current, &next), page).await;
        scratch.give_back(page);
        result.map_err(Latched::Device)?;
        metadata.tree.rescued.done(scratch.rescued());
        Ok((next, applied))
    }
}

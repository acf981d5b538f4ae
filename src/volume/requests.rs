//! The operations of an open volume, each in the order in which `docs/architecture.md` lists its
//! steps.

use super::{Opened, Volume};
use crate::{
    Admitted, BlockIndex, BlockRange, Buf, CheckpointerWork, Durability, Hint, Io, Latched, ReadError, RequestContext,
    Seq, Storage, WriteBackId, WriteError,
    log::{Recorded, Unsynced},
    maintenance::{
        checkpoint::{FLUSH_RECORD_DELAY, OWN_CONTEXT, WRITE_BACK_TICK},
        heal::{HealError, Healed},
        scrub::{ScrubControl, ScrubFinding, Scrubber},
    },
    options::{Access, OnMismatch},
    request::{
        fix::fix,
        lock_queue::{AdmittedBefore, Mode},
        read::Reader,
        write::{Holder, WriteBack, Writer},
    },
};
use std::{
    future::{Future, poll_fn},
    pin::pin,
    task::Poll,
};

impl Volume {
    /// Reads `range` into the front of `buf` and verifies every block. Fails with the first bad block
    /// unless the volume was opened to do otherwise.
    pub async fn read<S: Io>(
        &self,
        io: &S,
        context: &mut RequestContext,
        range: BlockRange,
        mut buf: Buf,
    ) -> (Result<(), ReadError>, Buf) {
        let Some(bytes) = self.request_bytes(range, &buf) else {
            return (Err(ReadError::BadRange(range)), buf);
        };
        context.counters.reads.add(1);
        context.counters.read_bytes.add(bytes as u64);
        context.is_counted = false;
        // Alone where a tag is to be chosen: nobody may look for it meanwhile.
        let undecided = self.opened.undecided.first_in(range).is_some();
        let mode = if undecided { Mode::Exclusive } else { Mode::Shared };
        // Of several blocks some might be read before a write and some after it.
        let may_pass = range.count == 1 && !undecided;
        let free = if may_pass { self.ranges.try_acquire(context.id, range, mode) } else { None };
        if may_pass && free.is_none() {
            let proven;
            (proven, buf) = self.try_read(io, context, range, buf).await;
            if proven {
                return (Ok(()), buf);
            }
        }
        let guard = match free {
            Some(guard) => guard,
            None => self.ranges.acquire(context.id, range, mode).await,
        };
        if self.admitted.has_failed(range) {
            return (Err(ReadError::NotInPlace(range)), buf);
        }
        let (decided, buf) = match undecided {
            true => self.opened.undecided.decide(io, &self.reader(), context, range, buf).await,
            false => (Ok(()), buf),
        };
        if let Err(e) = decided {
            return (Err(e), buf);
        }
        if self.opened.may_be_older(range, &self.metadata) {
            return (Err(ReadError::MayBeOlder(range)), buf);
        }
        let reader = self.reader();
        let (fetched, buf) = reader.fetch(io, context, range, buf).await;
        drop(guard);
        let fetched = match fetched {
            Ok(fetched) => fetched,
            Err(e) => return (Err(e.into()), buf),
        };
        let (result, buf) = reader.verify(io, context, range, buf, fetched).await;
        let fixes = self.opened.on_mismatch == OnMismatch::Fix && self.opened.access == Access::ReadWrite;
        if result.is_ok() || !fixes {
            return (result, buf);
        }
        let guard = self.ranges.acquire(context.id, range, Mode::Exclusive).await;
        fix(&reader, &self.writer(), io, context, &guard, buf).await
    }

    /// Reads a block though a write of it is under way: one that has not been answered may come later.
    /// `false`: that can't be, or the write came between, and the read has to wait for it.
    async fn try_read<S: Io>(&self, io: &S, context: &mut RequestContext, range: BlockRange, buf: Buf) -> (bool, Buf) {
        let waits = self.ranges.admitted_before(range) != AdmittedBefore::None
            || self.admitted.has_failed(range)
            || self.opened.may_be_older(range, &self.metadata);
        if waits { (false, buf) } else { self.reader().try_read(io, context, range, buf).await }
    }

    /// Reads `range` from the bytes that the caller keeps of its newest write, where that was admitted
    /// and is not in place. `copy` gets where the first of them [is kept](Admitted::kept_at), and says
    /// whether it has copied them. `false`: what was copied is to be forgotten, and `range`
    /// [read](Self::read).
    pub fn read_kept(&self, context: &RequestContext, range: BlockRange, copy: impl FnOnce(u64) -> bool) -> bool {
        if !self.metadata.layout().contains(range) {
            return false;
        }
        let Some(kept) = self.ranges.kept_before(range) else { return false };
        // A newer one may have failed, and left: only then is this the newest that is still there.
        if self.admitted.has_failed(range) {
            return false;
        }
        let from = kept.at + (range.first.0 - kept.range.first.0) * self.block_size() as u64;
        // While it is not in place nobody has used its memory again. Nor had it a successor: that may
        // have been answered while this was copied.
        let read = copy(from) && self.ranges.kept_before(range) == Some(kept);
        context.counters.reads.add(read.into());
        context.counters.read_bytes.add(if read { range.count * self.block_size() as u64 } else { 0 });
        read
    }

    /// Writes `range` from the front of `buf`. [`Durable`](Durability::Durable): as if a
    /// [`flush`](Self::flush) of these blocks came with it, which waits for no other write.
    pub async fn write<S: Io>(
        &self,
        io: &S,
        context: &mut RequestContext,
        range: BlockRange,
        buf: Buf,
        durability: Durability,
    ) -> (Result<(), WriteError>, Buf) {
        if let Err(e) = self.writable(range) {
            return (Err(e), buf);
        }
        if self.request_bytes(range, &buf).is_none() {
            return (Err(WriteError::BadRange(range)), buf);
        }
        let guard = self.ranges.acquire(context.id, range, Mode::Write).await;
        let (mut result, buf) = self.writer().write(io, context, range, buf, Holder::Request(&guard)).await;
        drop(guard);
        if result.is_ok() && durability == Durability::Durable {
            // A durable data write would be on the medium, but the log would not know: after a
            // crash an older version would be taken for this one's place.
            result = self.log.sync_data(io, context.id, Unsynced::NotCarried).await.map_err(WriteError::Latched);
        }
        (result, buf)
    }

    /// Admits the write of the context's next request, in line for its range: it may be answered at once, or when it is
    /// [safe](Self::wait_safe) if it is to be durable. `None`: [write](Self::write) it, which waits or says why not.
    pub fn admit(&self, context: &RequestContext, range: BlockRange, durability: Durability) -> Option<Admitted<'_>> {
        self.writable(range).ok()?;
        if durability == Durability::Durable && !self.log.may_carry_data() {
            return None;
        }
        let lock = self.ranges.admit(context.id, range, || self.admitted.next_number());
        self.admitted.admit(&self.log, lock, context.thread, durability)
    }

    /// Waits until the admitted write with this id is safe: durable, if it was admitted to be. Fails if the volume is
    /// read-only by then.
    pub async fn wait_safe(&self, context: &mut RequestContext, id: WriteBackId) -> Result<(), WriteError> {
        self.admitted.wait_safe(context.id, id).await;
        self.log.latched().map_or(Ok(()), |why| Err(WriteError::Latched(why)))
    }

    /// No more writes of the contexts of `thread` are admitted: those that wait to be in place go there.
    pub fn end_write_back(&self, thread: usize) {
        self.admitted.end_thread(thread);
    }

    /// Writes what `context` has admitted, from the front of `buf`. Once it is safe, or a later write is to be written in its
    /// place, `clear` clears what was kept of it; it may be long until this ends. If it fails, the volume is latched.
    pub async fn write_back<S: Io>(
        &self,
        io: &S,
        context: &mut RequestContext,
        mut admitted: Admitted<'_>,
        buf: Buf,
        clear: impl FnOnce(),
    ) -> (Result<(), WriteError>, Buf) {
        debug_assert_eq!(context.id, admitted.request());
        let range = admitted.range();
        let mut clear = Some(clear);
        let mut clear = || clear.take().into_iter().for_each(|clear| clear());
        let (mut result, buf) = match self.request_bytes(range, &buf) {
            Some(_) if admitted.granted().await => {
                let holder = Holder::Admitted(WriteBack { admitted: &mut admitted, clear: &mut clear });
                self.writer().write(io, context, range, buf, holder).await
            }
            Some(bytes) => {
                context.counters.count_write(bytes);
                (Ok(()), buf)
            }
            None => (Err(WriteError::BadRange(range)), buf),
        };
        context.counters.inherited_writes.add(admitted.has_heir().into());
        if result.is_ok() && admitted.durability() == Durability::Durable && !admitted.is_safe() {
            result = self.log.sync_data(io, context.id, Unsynced::NotCarried).await.map_err(WriteError::Latched);
        }
        context.counters.write_back_writes.add(result.is_ok().into());
        admitted.ended(result, clear);
        (result, buf)
    }

    /// Makes `range` read as zeros (discard and write-zeroes). `discard`: tell the data device too.
    pub async fn zero<S: Io>(
        &self,
        io: &S,
        context: &mut RequestContext,
        range: BlockRange,
        discard: bool,
    ) -> Result<(), WriteError> {
        self.writable(range)?;
        let _guard = self.ranges.acquire(context.id, range, Mode::Exclusive).await;
        self.writer().zero(io, context, range, discard).await
    }

    /// Makes every write that completed before durable; where flushes [wait for the anchor](crate::anchor::AnchorKeeper::hold_flushes),
    /// covered by that.
    pub async fn flush<S: Io>(&self, io: &S, context: &mut RequestContext) -> Result<(), WriteError> {
        context.counters.flushes.add(1);
        match self.opened.access {
            // Nothing was written, so there is nothing to make durable.
            Access::ReadOnly if self.log.latched().is_none() => Ok(()),
            _ if self.log.holds_flushes() => self.log.covered(context.id).await.map_err(WriteError::Latched),
            _ => {
                self.admitted.flush_and_log(io, context.requester(), &self.log, &self.ranges).await;
                self.log.sync_data(io, context.id, Unsynced::NotCarried).await.map_err(WriteError::Latched)
            }
        }
    }

    /// A flush, and then the record that says so, durable: what an anchor may rely on. `None` where all that was answered has a
    /// number up to `covered`.
    pub(crate) async fn record_flush<S: Storage>(
        &self,
        io: &S,
        context: &mut RequestContext,
        covered: Option<Seq>,
    ) -> Result<Option<Recorded>, Latched> {
        // What was admitted may have no number before this.
        self.admitted.flush(context.id).await;
        self.log.record_flush(io, context.id, covered).await
    }

    /// Loads the tag pages around a hint into the cache, and runs ahead of sequential reads.
    pub async fn prefetch<S: Storage>(&self, io: &S, context: &mut RequestContext, hint: Hint) {
        self.metadata.prefetch(io, context, hint).await;
    }

    /// The next run of blocks at or after `from` that may hold data; everything between reads as
    /// zeros. A run under damaged metadata counts as data: reading it tells what is wrong.
    pub async fn next_data<S: Storage>(
        &self,
        io: &S,
        context: &mut RequestContext,
        from: BlockIndex,
    ) -> Option<BlockRange> {
        if self.opened.newer_from.is_some() && from.0 < self.blocks() {
            // What the tree says of a subtree may be older, too.
            return Some(BlockRange::new(from, self.blocks() - from.0));
        }
        self.metadata.next_data(io, context, from, &self.opened.overlay).await
    }

    /// Completes when the checkpoint thread has something to do.
    pub async fn work_wanted(&self) -> CheckpointerWork {
        let mut of_log = pin!(self.log.wanted());
        poll_fn(|cx| match of_log.as_mut().poll(cx) {
            Poll::Ready(work) => Poll::Ready(work),
            Poll::Pending => self.admitted.poll_tick(cx.waker()).map(|()| CheckpointerWork::WriteBack),
        })
        .await
    }

    /// Does what [`Volume::work_wanted`] said. Only one thread calls this or [`Volume::checkpoint`].
    pub async fn work<S: Storage>(&self, io: &S, work: CheckpointerWork) -> Result<(), Latched> {
        match work {
            CheckpointerWork::Checkpoint => self.checkpoint(io).await,
            CheckpointerWork::FlushRecord => {
                let next = self.log.next_record();
                let _ = io.sleep(FLUSH_RECORD_DELAY).await;
                // One that came meanwhile has brought it along, or the next will.
                if self.log.next_record() == next { self.log.write_flush_record(io).await } else { Ok(()) }
            }
            CheckpointerWork::WriteBack => {
                let _ = io.sleep(WRITE_BACK_TICK).await;
                self.admitted.tick();
                Ok(())
            }
        }
    }

    /// Moves the pending tags into pages and tree, and the superblock on. Nothing to do where nothing
    /// was written since the last, and no scrub has gone on or found something to mend. One at a time:
    /// the checkpoint thread's.
    pub async fn checkpoint<S: Storage>(&self, io: &S) -> Result<(), Latched> {
        if self.opened.access == Access::ReadOnly {
            return Ok(());
        }
        if self.checkpoints.is_wanted(&self.metadata) {
            self.log.say_durable_again();
            self.log.write_flush_record(io).await?;
        }
        if let Some(applied) = self.checkpoints.run(io, &self.metadata, &self.log, &self.admitted).await? {
            let counters = self.contexts.first_counters();
            counters.checkpoints.add(1);
            counters.pages_written.add(applied.pages_written);
            counters.pages_lost.add(applied.pages_lost);
        }
        Ok(())
    }

    /// The last checkpoint: after it a new open finds nothing to recover. No request may be in
    /// flight. Opened with [`sync_log`](crate::OpenOptions::sync_log), the volume is of the older
    /// format version again, and takes no more writes. Dropped without, it is as after a crash.
    ///
    /// The log is told first that all of it is durable: the superblock before the last, put back
    /// together with an old block, must not make a crash of an orderly end.
    pub async fn close<S: Storage>(&self, io: &S) -> Result<(), Latched> {
        if self.opened.access == Access::ReadOnly || self.log.latched() == Some(Latched::Closed) {
            return Ok(());
        }
        self.log.sync_data(io, OWN_CONTEXT, Unsynced::Ended).await?;
        self.log.write_flush_record(io).await?;
        self.checkpoint(io).await?;
        // Where a full ring had no room for it, there is some now.
        self.log.write_flush_record(io).await?;
        self.checkpoint(io).await?;
        self.checkpoints.close(io, &self.log).await
    }

    /// One pass over the volume, which verifies all that lies on the medium while requests go on. It waits for
    /// none of them, and none waits for it. `control` steers it and has what it finds, `tell` hears of each
    /// finding. Memory is taken here and given back at the end. One pass at a time.
    pub async fn scrub<S: Io>(&self, io: &S, control: &ScrubControl, tell: impl FnMut(ScrubFinding)) {
        self.scrubber().run(io, control, tell).await;
    }

    /// Puts a block that has rotted back in place from the front of `replica`, a copy of it, if its tag
    /// proves that one. What is good already is not written.
    ///
    /// # Panics
    /// If `replica` is smaller than a block.
    pub async fn heal<S: Io>(
        &self,
        io: &S,
        context: &mut RequestContext,
        block: BlockIndex,
        replica: Buf,
    ) -> (Result<Healed, HealError>, Buf) {
        let one = BlockRange::new(block, 1);
        if let Err(e) = self.writable(one) {
            return (Err(e.into()), replica);
        }
        self.scrubber().heal(io, context, block, replica).await
    }

    fn scrubber(&self) -> Scrubber<'_> {
        Scrubber {
            metadata: &self.metadata,
            ranges: &self.ranges,
            tagger: self.hasher.tagger(),
            log: &self.log,
            admitted: &self.admitted,
            checkpoints: &self.checkpoints,
            contexts: &self.contexts,
            undecided: &self.opened.undecided,
            in_log: &self.opened.in_log,
            writable: self.opened.access == Access::ReadWrite,
        }
    }

    fn reader(&self) -> Reader<'_> {
        let Opened { in_log, on_mismatch, .. } = &self.opened;
        Reader { metadata: &self.metadata, hasher: &self.hasher, in_log, on_mismatch: *on_mismatch }
    }

    fn writer(&self) -> Writer<'_> {
        Writer { metadata: &self.metadata, hasher: &self.hasher, log: &self.log }
    }

    fn writable(&self, range: BlockRange) -> Result<(), WriteError> {
        if self.opened.access == Access::ReadOnly {
            return Err(WriteError::ReadOnly);
        }
        match self.metadata.layout().contains(range) {
            true => Ok(()),
            false => Err(WriteError::BadRange(range)),
        }
    }

    /// Bytes of a request, if it lies inside the volume and is no larger than a request may be.
    fn request_bytes(&self, range: BlockRange, buf: &Buf) -> Option<usize> {
        let most = self.max_request_bytes().min(buf.len()) / self.block_size();
        let fits = self.metadata.layout().contains(range) && range.count <= most as u64;
        fits.then(|| range.count as usize * self.block_size())
    }
}

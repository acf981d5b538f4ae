//! One admitted write, from its answer until it is in place.

use super::{AdmittedWrites, Place, WriteBackId, flush::Held, lazy::GoOn};
use crate::{
    BlockRange, Durability, Latched, RecordNumber, WriteError,
    log::{Appended, Log, Logged},
    request::{hash_batch::HashWork, range_lock::RangeGuard},
};
use std::{
    future::poll_fn,
    task::{Context, Poll},
};

/// A write whose range is held or in line, and which may be answered though nothing has been written. Dropped
/// before it is [in place](crate::Volume::write_back), it latches the volume.
pub struct Admitted<'v> {
    writes: &'v AdmittedWrites,
    log: &'v Log,
    guard: RangeGuard<'v>,
    number: u64,
    place: Place,
    stage: Stage,
    durability: Durability,
    first_not_durable: RecordNumber,
    /// A record carries it, and it has been told to go to its place.
    is_hurried: bool,
    why_failed: Option<Latched>,
}

/// What becomes of a write that has its tags.
pub(crate) enum Next {
    /// It is logged, with its blocks if a record is to carry it.
    Log { carry: bool },
    /// A flush has logged it, and perhaps seen its record durable.
    Logged { logged: Logged, is_durable: bool },
    /// Nothing: a later one is written in its place.
    Inherited,
}

/// How far an admitted write is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Nothing is decided.
    Admitted,
    /// It waits, with nothing logged but by a flush.
    Held,
    /// On its way in place, with nobody to carry it.
    InPlace,
    /// It is to be carried.
    Carried,
    /// It is safe, and waits.
    Parked,
    /// It is safe, and on its way in place.
    Safe,
}

impl<'v> Admitted<'v> {
    pub(super) fn new(
        writes: &'v AdmittedWrites,
        log: &'v Log,
        (guard, number): (RangeGuard<'v>, u64),
        thread: usize,
        durability: Durability,
        first_not_durable: RecordNumber,
    ) -> Self {
        let place = Place { thread, request: guard.request(), since: number };
        let (stage, why_failed) = (Stage::Admitted, Some(Latched::Abandoned));
        let is_hurried = false;
        Self { writes, log, guard, number, place, stage, durability, first_not_durable, is_hurried, why_failed }
    }
}

impl Admitted<'_> {
    /// What it is to write.
    pub fn range(&self) -> BlockRange {
        self.guard.range()
    }

    /// Says where the caller keeps its bytes, unchanged until the [write back](crate::Volume::write_back)
    /// has ended: reads of its blocks can be served [from there](crate::Volume::read_kept). The bytes must be there: an earlier
    /// write that this one covers may not be written from now on.
    pub fn kept_at(&mut self, at: u64) {
        let (request, mut since) = (self.place.request, None);
        let inherit = |earlier| {
            since = self.writes.inherit(request, earlier);
            since.is_some()
        };
        // One that must be durable is answered once it is, by itself.
        let may_have_heir = self.durability == Durability::MayBeLost;
        let is_heir = self.guard.kept(self.number, at, may_have_heir, inherit);
        match since {
            Some(since) if is_heir => self.place.since = since,
            // The other has begun meanwhile.
            Some(_) => self.writes.begin(request, self.number),
            None => {}
        }
    }

    /// Waits until it has its range. `false`: it has an heir, and is not to be written.
    pub(crate) async fn granted(&self) -> bool {
        self.guard.granted().await
    }

    /// Waits for a flush, with its tags made and nothing logged, unless it is to go on. `bytes` of its blocks are in `work`.
    pub(crate) async fn hold(&mut self, work: HashWork, bytes: usize) -> (Next, HashWork) {
        if self.durability == Durability::Durable {
            self.stage = Stage::Carried;
            return (self.begin(true), work);
        }
        let slot = &self.writes.held[self.place.request];
        let mut held = Some(Held { work, bytes, logged: None, is_durable: false });
        let go_on = match self.writes.lazy.hold(self.place, bytes, || *slot.lock() = held.take()) {
            Some(go_on) => go_on,
            None => self.wait(Stage::Held).await,
        };
        self.stage = if go_on == GoOn::InPlace { Stage::InPlace } else { Stage::Carried };
        let held = held.or_else(|| slot.lock().take());
        let Held { work, logged, is_durable, .. } = held.expect("nobody else takes it");
        let next = match logged {
            Some(logged) => Next::Logged { logged, is_durable },
            None => self.begin(go_on == GoOn::Flush),
        };
        (next, work)
    }

    /// It begins.
    pub(crate) fn begin(&self, carry: bool) -> Next {
        if self.guard.begin() { Next::Log { carry } } else { Next::Inherited }
    }

    /// Waits until it is told to go on, or somebody waits for its range.
    async fn wait(&mut self, stage: Stage) -> GoOn {
        self.stage = stage;
        let (go_on, is_told) = poll_fn(|cx| self.poll_go_on(cx)).await;
        self.is_hurried = is_told && go_on == GoOn::Logged;
        go_on
    }

    /// Why it goes on, and whether it has been told.
    fn poll_go_on(&self, cx: &Context<'_>) -> Poll<(GoOn, bool)> {
        let lazy = &self.writes.lazy;
        if let Poll::Ready(told) = lazy.poll_told(self.place.request, cx.waker()) {
            return Poll::Ready((told, true));
        }
        match self.guard.poll_contended(cx).map(|()| lazy.stop_waiting(self.place)) {
            Poll::Ready(Some(go_on)) => Poll::Ready((go_on, false)),
            // A flush has it in hand.
            Poll::Ready(None) | Poll::Pending => Poll::Pending,
        }
    }

    /// Whether a later write is written in its place.
    pub(crate) fn has_heir(&self) -> bool {
        self.guard.has_heir()
    }

    /// Its change has its place in the log: carried or not.
    pub(crate) fn appended(&mut self, change: &Appended<'_>) {
        if self.stage == Stage::Carried && !change.carried {
            self.writes.lazy.sets_out(self.place.thread);
            self.stage = Stage::InPlace;
        }
    }

    /// The record that carries it is durable, and all before it. `clear` clears what was kept of
    /// it; later writes of its blocks go on. Then it waits, unless `may_wait` says that it must not,
    /// it has been told before, or somebody needs it in place.
    pub(crate) async fn park(&mut self, clear: impl FnOnce(), may_wait: impl FnOnce() -> bool) {
        clear();
        self.stage = Stage::Safe;
        self.writes.end(self.place.request);
        self.guard.park();
        let is_hurried = std::mem::take(&mut self.is_hurried);
        if self.writes.lazy.park(self.place, || !is_hurried && may_wait()) {
            self.wait(Stage::Parked).await;
            self.stage = Stage::Safe;
        }
    }

    /// Notes how the write has ended. In place: `clear` clears what was kept of it, while its range
    /// is still held. Otherwise the volume is latched when this is dropped.
    pub(crate) fn ended(&mut self, result: Result<(), WriteError>, clear: impl FnOnce()) {
        self.why_failed = match result {
            Ok(()) => {
                clear();
                None
            }
            Err(WriteError::Device(e)) => Some(Latched::WriteBack(e)),
            Err(WriteError::Latched(why)) => Some(why),
            // A request larger than its buffer, or one that was never admitted.
            Err(_) => Some(Latched::Abandoned),
        };
    }

    pub(crate) fn request(&self) -> usize {
        self.guard.request()
    }

    pub(crate) fn guard(&self) -> &RangeGuard<'_> {
        &self.guard
    }

    /// Whether a durable record carries it.
    pub(crate) fn is_safe(&self) -> bool {
        self.stage == Stage::Safe
    }

    pub(crate) fn durability(&self) -> Durability {
        self.durability
    }

    /// By this it can be waited for until it is safe.
    pub fn id(&self) -> WriteBackId {
        WriteBackId { request: self.place.request, number: self.number }
    }

    /// Releases the range: the write has not been answered, and is not to be.
    pub fn withdraw(mut self) {
        self.why_failed = None;
    }

    /// The first record of the log that was not durable when it was admitted: a volume without
    /// those before is an older one.
    pub fn first_not_durable(&self) -> RecordNumber {
        self.first_not_durable
    }
}

impl Drop for Admitted<'_> {
    /// The write is in place, or has failed. The range is released after this.
    fn drop(&mut self) {
        if let Some(why) = self.why_failed {
            // In this order: a flush that sees it no longer in flight must find the volume latched.
            self.log.latch(why);
            self.writes.fail(self.guard.range());
        }
        let lazy = &self.writes.lazy;
        // One that still waits has been dropped.
        let waited = matches!(self.stage, Stage::Held | Stage::Parked).then(|| lazy.stop_waiting(self.place)).flatten();
        let set_out = self.stage == Stage::InPlace || self.stage == Stage::Held && waited == Some(GoOn::InPlace);
        if self.stage == Stage::Held {
            *self.writes.held[self.place.request].lock() = None;
        }
        if set_out {
            lazy.arrives(self.place.thread);
        }
        self.writes.end(self.guard.request());
    }
}

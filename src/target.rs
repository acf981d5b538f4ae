//! The seam between the program's front end and what serves its requests.
//!
//! The front end takes requests from the kernel (ublk) and calls these methods. How the target
//! verifies and stores is no matter of its own. It passes on two things without a look inside: why
//! the target is read-only ([`Latched`]), for people to read, and a number of the target's log
//! ([`AdmittedWrite::first_not_durable`]), to be kept with an admitted write. A target without a log
//! says 0.
//!
//! A [`Volume`] stands behind it today. A reader of another format can, too, and so do the doubles
//! of the front end's tests.

use crate::{
    Admitted, BlockRange, Buf, Durability, Io, Latched, ReadError, RecordNumber, RequestContext, Status, Volume,
    WriteBackId, WriteError,
};
use serde::Serialize;
use std::{convert::Infallible, future::Future};

/// Blocks that requests can read and write. Shared by all threads; each operation takes the calling
/// thread's own [`Io`] and the context of its request.
///
/// A request's range lies where its blocks are, its bytes at the front of the buffer, which comes
/// back in every case. An error says which errno answers the request.
pub trait BlockTarget: Send + Sync {
    /// The memory of one request, taken before the first request comes.
    type Context;
    /// A write that may be answered before it is written back.
    type Admitted<'t>: AdmittedWrite
    where
        Self: 't;
    /// What [`status`](Self::status) shows.
    type Status: Serialize;

    /// Unit of requests in bytes, a power of two from 512 to 4096.
    fn block_size(&self) -> usize;
    /// Usable size in blocks.
    fn blocks(&self) -> u64;
    /// Counters and state.
    fn status(&self) -> Self::Status;
    /// The first failure, if one has made the target read-only.
    fn latched(&self) -> Option<Latched>;

    /// The memory of one request of this thread, whose counters are `thread`'s.
    ///
    /// # Panics
    /// When more are taken than the target was opened for, or it knows no such thread.
    fn context(&self, thread: usize) -> Self::Context;
    /// Lets the requests of one thread share work that is cheaper for several at once, as hashing is.
    fn work_together<'c>(contexts: impl IntoIterator<Item = &'c mut Self::Context>)
    where
        Self::Context: 'c;

    /// Reads `range` into the front of `buf`. No byte that is in doubt is read without an error.
    fn read<S: Io>(
        &self,
        io: &S,
        context: &mut Self::Context,
        range: BlockRange,
        buf: Buf,
    ) -> impl Future<Output = (Result<(), ReadError>, Buf)>;
    /// Reads `range` from the bytes that the caller keeps of an admitted write. `copy` gets where the
    /// first of them [is kept](AdmittedWrite::kept_at), and says whether it has copied them. `false`:
    /// what was copied is to be forgotten, and `range` [read](Self::read).
    fn read_kept(&self, context: &Self::Context, range: BlockRange, copy: impl FnOnce(u64) -> bool) -> bool {
        let _ = (context, range, copy);
        false
    }
    /// Writes `range` from the front of `buf`, as durable as is asked for.
    fn write<S: Io>(
        &self,
        io: &S,
        context: &mut Self::Context,
        range: BlockRange,
        buf: Buf,
        durability: Durability,
    ) -> impl Future<Output = (Result<(), WriteError>, Buf)>;
    /// Makes `range` read as zeros (discard and write-zeroes). `discard`: the device may forget it,
    /// too.
    fn zero<S: Io>(
        &self,
        io: &S,
        context: &mut Self::Context,
        range: BlockRange,
        discard: bool,
    ) -> impl Future<Output = Result<(), WriteError>>;
    /// Makes every write durable that was answered before.
    fn flush<S: Io>(&self, io: &S, context: &mut Self::Context) -> impl Future<Output = Result<(), WriteError>>;

    /// Admits a write to the write-back cache, in line for its range: it may be answered once its bytes are kept; one
    /// that is to be durable, once it is [safe](Self::wait_safe). Until it is written back, reads of the range wait for
    /// it, or are served from [what is kept](Self::read_kept). Flushes wait until it is safe.
    /// `None`: it is to be [written](Self::write) first.
    fn admit<'t>(
        &'t self,
        context: &Self::Context,
        range: BlockRange,
        durability: Durability,
    ) -> Option<Self::Admitted<'t>>;
    /// Writes an admitted write back, from the front of `buf`, with the context that it was
    /// admitted with. Once it is safe, or a later one is to be written in its place, and before any later write of its blocks is
    /// safe, `clear` clears the bytes that were kept. The write may wait for others before it ends.
    fn write_back<'t, S: Io>(
        &'t self,
        io: &S,
        context: &mut Self::Context,
        admitted: Self::Admitted<'t>,
        buf: Buf,
        clear: impl FnOnce(),
    ) -> impl Future<Output = (Result<(), WriteError>, Buf)>;
    /// Waits until an admitted write is safe: it is durable, if it was admitted to be. Fails if the
    /// target is read-only by then. `context` is that of the request which waits.
    fn wait_safe(&self, context: &mut Self::Context, id: WriteBackId) -> impl Future<Output = Result<(), WriteError>>;
    /// No more writes of this thread are admitted: those that wait before they are written back wait
    /// no more.
    fn end_write_back(&self, thread: usize);
}

/// A write whose range is held or in line, and which may be answered before it is written. Dropped before it
/// is [written back](BlockTarget::write_back), it makes its target read-only: its bytes may have
/// been promised. Those that are kept when the process dies are to be written in the order of their
/// [numbers](WriteBackId::number).
pub trait AdmittedWrite {
    /// What it is to write.
    fn range(&self) -> BlockRange;
    /// The first record of the log that was not durable when it was admitted: a target without
    /// those before is an older one.
    fn first_not_durable(&self) -> RecordNumber;
    /// By this it can be waited for until it is safe.
    fn id(&self) -> WriteBackId;
    /// Says where the caller keeps its bytes, unchanged until the write back has ended. They must be there already.
    fn kept_at(&mut self, at: u64) {
        let _ = at;
    }
    /// Releases the range: the write has not been answered.
    fn withdraw(self);
}

impl BlockTarget for Volume {
    type Context = RequestContext;
    type Admitted<'t> = Admitted<'t>;
    type Status = Status;

    fn block_size(&self) -> usize {
        self.block_size()
    }
    fn blocks(&self) -> u64 {
        self.blocks()
    }
    fn status(&self) -> Status {
        self.status()
    }
    fn latched(&self) -> Option<Latched> {
        self.latched()
    }
    fn context(&self, thread: usize) -> RequestContext {
        self.context(thread)
    }
    fn work_together<'c>(contexts: impl IntoIterator<Item = &'c mut RequestContext>) {
        RequestContext::work_together(contexts);
    }
    fn read<S: Io>(
        &self,
        io: &S,
        context: &mut RequestContext,
        range: BlockRange,
        buf: Buf,
    ) -> impl Future<Output = (Result<(), ReadError>, Buf)> {
        self.read(io, context, range, buf)
    }
    fn read_kept(&self, context: &RequestContext, range: BlockRange, copy: impl FnOnce(u64) -> bool) -> bool {
        self.read_kept(context, range, copy)
    }
    fn write<S: Io>(
        &self,
        io: &S,
        context: &mut RequestContext,
        range: BlockRange,
        buf: Buf,
        durability: Durability,
    ) -> impl Future<Output = (Result<(), WriteError>, Buf)> {
        self.write(io, context, range, buf, durability)
    }
    fn zero<S: Io>(
        &self,
        io: &S,
        context: &mut RequestContext,
        range: BlockRange,
        discard: bool,
    ) -> impl Future<Output = Result<(), WriteError>> {
        self.zero(io, context, range, discard)
    }
    fn flush<S: Io>(&self, io: &S, context: &mut RequestContext) -> impl Future<Output = Result<(), WriteError>> {
        self.flush(io, context)
    }
    fn admit<'t>(
        &'t self,
        context: &RequestContext,
        range: BlockRange,
        durability: Durability,
    ) -> Option<Admitted<'t>> {
        self.admit(context, range, durability)
    }
    fn write_back<'t, S: Io>(
        &'t self,
        io: &S,
        context: &mut RequestContext,
        admitted: Admitted<'t>,
        buf: Buf,
        clear: impl FnOnce(),
    ) -> impl Future<Output = (Result<(), WriteError>, Buf)> {
        self.write_back(io, context, admitted, buf, clear)
    }
    fn wait_safe(&self, context: &mut RequestContext, id: WriteBackId) -> impl Future<Output = Result<(), WriteError>> {
        self.wait_safe(context, id)
    }
    fn end_write_back(&self, thread: usize) {
        self.end_write_back(thread);
    }
}

impl AdmittedWrite for Admitted<'_> {
    fn range(&self) -> BlockRange {
        self.range()
    }
    fn first_not_durable(&self) -> RecordNumber {
        self.first_not_durable()
    }
    fn id(&self) -> WriteBackId {
        self.id()
    }
    fn kept_at(&mut self, at: u64) {
        self.kept_at(at);
    }
    fn withdraw(self) {
        self.withdraw();
    }
}

/// Of a target that admits none.
impl AdmittedWrite for Infallible {
    fn range(&self) -> BlockRange {
        match *self {}
    }
    fn first_not_durable(&self) -> RecordNumber {
        match *self {}
    }
    fn id(&self) -> WriteBackId {
        match *self {}
    }
    fn withdraw(self) {
        match self {}
    }
}

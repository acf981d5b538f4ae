//! From a descriptor of the kernel to the answer: the wall between ublk and what serves its requests.

use super::{
    load::Load,
    request::{Request, UnknownRequest},
    shared::{Memory, Shared},
    transfer::Transfer,
    write_back::{Answer, WriteBack},
};
use crate::{daemon::log::Event, write_back_file::MOST_BYTES};
use std::mem;
use ublk_integrity::{BlockRange, BlockTarget, Buf, Errno, Io, WriteBackId};

impl<T: BlockTarget> Shared<T> {
    /// Serves a request. What the kernel is answered: the bytes that were moved,
    /// or an error number below 0.
    pub(super) async fn answer<'t>(
        &'t self,
        request: Result<Request, UnknownRequest>,
        transfer: Transfer,
        io: &impl Io,
        memory: &mut Memory<T>,
        load: &Load<'_>,
        write_back: &WriteBack<'t, T>,
    ) -> i32 {
        let result = match request {
            Ok(request) => {
                let answer = match write_back.admit(self, request, transfer, load) {
                    Some(Ok(Answer::Now)) => Ok(()),
                    Some(Ok(Answer::Safe(id))) => self.safe(request, id, memory).await,
                    Some(Err(e)) => Err(e),
                    None => self.handle(request, transfer, io, memory).await,
                };
                answer.map(|()| request.success(self.shift))
            }
            Err(unknown) => {
                self.log.tell(Event::UnknownRequest(unknown));
                Err(Errno::EINVAL)
            }
        };
        result.unwrap_or_else(|errno| -errno.0)
    }

    /// Waits until a write that was admitted is durable.
    async fn safe(&self, request: Request, id: WriteBackId, memory: &mut Memory<T>) -> Result<(), Errno> {
        self.target.wait_safe(&mut memory.context, id).await.map_err(|e| {
            self.log.tell(Event::Write(request, e));
            e.errno()
        })
    }

    /// Reads what was written last from the write-back file, where it is not in place yet.
    fn read_kept(&self, context: &T::Context, range: BlockRange, buf: &mut Buf, bytes: usize) -> bool {
        let Some(mapped) = &self.write_back_file else { return false };
        let Some(buf) = buf.get_mut(..bytes).filter(|_| bytes <= MOST_BYTES) else { return false };
        self.target.read_kept(context, range, |at| mapped.file.read_at(buf, at).is_ok())
    }

    async fn handle(
        &self,
        request: Request,
        transfer: Transfer,
        io: &impl Io,
        memory: &mut Memory<T>,
    ) -> Result<(), Errno> {
        let (target, context) = (&*self.target, &mut memory.context);
        let bytes = request.success(self.shift) as usize;
        let result = match request {
            Request::Read(range) if self.read_kept(context, range, &mut memory.buf, bytes) => {
                return transfer.give(&memory.buf, bytes).map_err(|e| self.not_copied(request, e));
            }
            Request::Read(range) => {
                let (result, buf) = target.read(io, context, range, mem::replace(&mut memory.buf, Buf::none())).await;
                memory.buf = buf;
                result.map_err(|e| {
                    self.log.tell(Event::Read(range, e));
                    e.errno()
                })?;
                return transfer.give(&memory.buf, bytes).map_err(|e| self.not_copied(request, e));
            }
            Request::Write { range, durability } => {
                transfer.fetch(&mut memory.buf, bytes).map_err(|e| self.not_copied(request, e))?;
                let buf = mem::replace(&mut memory.buf, Buf::none());
                let (result, buf) = target.write(io, context, range, buf, durability).await;
                memory.buf = buf;
                result
            }
            Request::Flush => target.flush(io, context).await,
            Request::Discard(range) => target.zero(io, context, range, self.discard).await,
            Request::WriteZeroes { range, unmap } => target.zero(io, context, range, unmap && self.discard).await,
        };
        result.map_err(|e| {
            self.log.tell(Event::Write(request, e));
            e.errno()
        })
    }
}

//! The library's seam, on the simulated disks: operations start when asked for and end when the
//! executor says.

use super::{
    disk::{Disk, Kind},
    exec::yield_now,
};
use std::{
    cell::RefCell,
    future::Future,
    ops::Range,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};
use ublk_integrity::{Buf, ByteOffset, Device, Durability, Errno, Geometry, Phase, Scheduler, Storage};

/// A handle on the disks; clones share them.
#[derive(Clone)]
pub struct SimStorage(Rc<RefCell<Disk>>);

impl SimStorage {
    pub fn new(disk: Disk) -> Self {
        Self(Rc::new(RefCell::new(disk)))
    }
    pub fn disk(&self) -> std::cell::RefMut<'_, Disk> {
        self.0.borrow_mut()
    }
    pub fn in_flight(&self) -> usize {
        self.0.borrow().pending().count()
    }
    pub fn complete(&self, nth: usize) {
        self.0.borrow_mut().complete(nth);
    }
    /// Completes the oldest operation of this device; `false` where there is none.
    pub fn complete_of(&self, device: Device) -> bool {
        let mut disk = self.0.borrow_mut();
        let nth = disk.pending().position(|i| disk.ops[i].device == device);
        nth.is_some_and(|nth| {
            disk.complete(nth);
            true
        })
    }
    pub fn complete_any(&self) {
        let mut disk = self.0.borrow_mut();
        let n = disk.pending().count();
        let nth = disk.rng.index(n);
        disk.complete(nth);
    }
    fn start(&self, device: Device, offset: u64, kind: Kind, buf: Option<Buf>) -> SimOp {
        let id = self.0.borrow_mut().start(device, offset, kind, buf);
        SimOp { io: self.clone(), id }
    }
}

/// An operation under way.
pub struct SimOp {
    io: SimStorage,
    id: u64,
}

impl SimOp {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<(Result<(), Errno>, Option<Buf>)> {
        let mut disk = self.io.0.borrow_mut();
        // After a power cut nothing completes any more.
        let Some(i) = disk.ops.iter().position(|op| op.id == self.id) else { return Poll::Pending };
        match disk.ops[i].result {
            None => {
                disk.ops[i].waker = Some(cx.waker().clone());
                Poll::Pending
            }
            Some(result) => Poll::Ready((result, disk.ops.swap_remove(i).buf)),
        }
    }
}

pub struct Transfer(SimOp);
pub struct Command(SimOp);

/// Nobody waits for a sleep that is given up; it has no effect.
impl Drop for SimOp {
    fn drop(&mut self) {
        self.io.disk().ops.retain(|op| op.id != self.id || !matches!(op.kind, Kind::Sleep(_)));
    }
}

impl Future for Transfer {
    type Output = (Result<(), Errno>, Buf);
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.poll(cx).map(|(result, buf)| (result, buf.expect("a transfer has a buffer")))
    }
}

impl Future for Command {
    type Output = Result<(), Errno>;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.poll(cx).map(|(result, _)| result)
    }
}

impl Storage for SimStorage {
    type Transfer = Transfer;
    type Command = Command;

    fn geometry(&self, device: Device) -> Geometry {
        let disk = self.0.borrow();
        let which = disk.disk(device);
        Geometry { size: disk.sizes[which], physical_block: disk.physical, logical_block: disk.logical[which] }
    }
    fn read(&self, device: Device, offset: ByteOffset, buf: Buf, part: Range<usize>) -> Transfer {
        Transfer(self.start(device, offset.0, Kind::Read(part), Some(buf)))
    }
    fn write(
        &self,
        device: Device,
        offset: ByteOffset,
        buf: Buf,
        part: Range<usize>,
        durability: Durability,
    ) -> Transfer {
        Transfer(self.start(device, offset.0, Kind::Write(part, durability), Some(buf)))
    }
    fn sync(&self, device: Device) -> Command {
        let since = self.0.borrow().clock;
        Command(self.start(device, 0, Kind::Sync(since), None))
    }
    fn discard(&self, device: Device, offset: ByteOffset, len: u64) -> Command {
        Command(self.start(device, offset.0, Kind::Discard(len), None))
    }
    fn sleep(&self, time: Duration) -> Command {
        let until = self.disk().now + time;
        Command(self.start(Device::Data, 0, Kind::Sleep(until), None))
    }
}

impl Scheduler for SimStorage {
    /// Others may run before, as the executor likes.
    fn batch_boundary(&self, _: Phase) -> impl Future<Output = ()> {
        yield_now()
    }
    fn runnable(&self) -> usize {
        self.disk().rng.below(8) as usize
    }
}

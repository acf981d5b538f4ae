//! The library's [`Storage`] over a ring.

use super::{
    super::batch::Batch,
    op::{FileIndex, Work},
    ops::{Ops, Running},
};
use std::{
    future::Future,
    ops::Range,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};
use ublk_integrity::{Buf, ByteOffset, Device, Durability, Errno, Geometry, Phase, Scheduler, Storage};

/// The backing devices as a ring knows them.
#[derive(Clone, Copy, Debug)]
pub struct DeviceFiles {
    /// Index of the data device among the ring's files.
    pub data: u32,
    /// Index of the metadata device; the same where there is only one.
    pub meta: u32,
    /// The data device.
    pub data_geometry: Geometry,
    /// The metadata device.
    pub meta_geometry: Geometry,
}

/// A handle on the backing devices, bound to the ring of one thread.
#[derive(Clone)]
pub struct RingStorage {
    ops: Rc<Ops>,
    batch: Rc<Batch>,
    files: DeviceFiles,
}

impl RingStorage {
    /// A handle that submits to the ring of `ops`, for tasks that run in `batch`.
    pub fn new(ops: Rc<Ops>, batch: Rc<Batch>, files: DeviceFiles) -> Self {
        Self { ops, batch, files }
    }

    fn file(&self, device: Device) -> FileIndex {
        FileIndex(match device {
            Device::Data => self.files.data,
            Device::Meta => self.files.meta,
        })
    }
}

impl Storage for RingStorage {
    type Transfer = Transfer;
    type Command = Command;

    fn geometry(&self, device: Device) -> Geometry {
        match device {
            Device::Data => self.files.data_geometry,
            Device::Meta => self.files.meta_geometry,
        }
    }

    fn read(&self, device: Device, at: ByteOffset, buf: Buf, part: Range<usize>) -> Transfer {
        Transfer(self.ops.start(self.file(device), Work::Read { buf, part, at }))
    }

    fn write(&self, device: Device, at: ByteOffset, buf: Buf, part: Range<usize>, durability: Durability) -> Transfer {
        Transfer(self.ops.start(self.file(device), Work::Write { buf, part, at, durability }))
    }

    fn sync(&self, device: Device) -> Command {
        Command(self.ops.start(self.file(device), Work::Sync))
    }

    fn discard(&self, device: Device, at: ByteOffset, len: u64) -> Command {
        Command(self.ops.start(self.file(device), Work::Discard { at, len }))
    }

    fn sleep(&self, time: Duration) -> Command {
        Command(self.ops.start(self.file(Device::Data), Work::Sleep(time)))
    }
}

impl Scheduler for RingStorage {
    fn batch_boundary(&self, phase: Phase) -> impl Future<Output = ()> {
        self.batch.boundary(phase)
    }
    fn charge(&self) {
        self.batch.charge();
    }
    fn runnable(&self) -> usize {
        self.batch.runnable()
    }
}

/// A read or write in flight.
pub struct Transfer(Running);

impl Future for Transfer {
    type Output = (Result<(), Errno>, Buf);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx).map(|(result, work)| match work {
            Work::Read { buf, .. } | Work::Write { buf, .. } => (result, buf),
            _ => unreachable!("a transfer has a buffer"),
        })
    }
}

/// A sync, discard or sleep in flight.
pub struct Command(Running);

impl Future for Command {
    type Output = Result<(), Errno>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx).map(|(result, _)| result)
    }
}

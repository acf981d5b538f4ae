//! What a pass reads is counted here, whatever it reads it for: so its rate holds for all of it.

use crate::{Buf, ByteOffset, Device, Durability, Geometry, Phase, Scheduler, Storage};
use std::{cell::Cell, future::Future, ops::Range, time::Duration};

/// The devices of a pass.
pub(super) struct Metered<'a, S> {
    io: &'a S,
    read: Cell<u64>,
}

impl<'a, S> Metered<'a, S> {
    pub(super) fn new(io: &'a S) -> Self {
        Self { io, read: Cell::new(0) }
    }

    /// Bytes that were read since this was asked last.
    pub(super) fn take_read(&self) -> u64 {
        self.read.take()
    }
}

impl<S: Storage> Storage for Metered<'_, S> {
    type Transfer = S::Transfer;
    type Command = S::Command;

    fn geometry(&self, device: Device) -> Geometry {
        self.io.geometry(device)
    }
    fn read(&self, device: Device, offset: ByteOffset, buf: Buf, part: Range<usize>) -> S::Transfer {
        self.read.set(self.read.get() + part.len() as u64);
        self.io.read(device, offset, buf, part)
    }
    fn write(
        &self,
        device: Device,
        offset: ByteOffset,
        buf: Buf,
        part: Range<usize>,
        durability: Durability,
    ) -> S::Transfer {
        self.io.write(device, offset, buf, part, durability)
    }
    fn sync(&self, device: Device) -> S::Command {
        self.io.sync(device)
    }
    fn discard(&self, device: Device, offset: ByteOffset, len: u64) -> S::Command {
        self.io.discard(device, offset, len)
    }
    fn sleep(&self, time: Duration) -> S::Command {
        self.io.sleep(time)
    }
}

impl<S: Scheduler> Scheduler for Metered<'_, S> {
    fn batch_boundary(&self, phase: Phase) -> impl Future<Output = ()> {
        self.io.batch_boundary(phase)
    }
    fn charge(&self) {
        self.io.charge();
    }
    fn runnable(&self) -> usize {
        self.io.runnable()
    }
}

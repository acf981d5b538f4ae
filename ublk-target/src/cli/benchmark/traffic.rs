//! What a run asks the devices for, counted on the way.

use crate::event_loop::ring::RingStorage;
use std::{
    future::Future,
    ops::{Range, Sub},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};
use ublk_integrity::{Buf, ByteOffset, Device, Durability, Geometry, Phase, Scheduler, Storage};

/// What the devices were asked for, by all threads.
#[derive(Default)]
pub struct Traffic {
    written: AtomicU64,
    syncs: AtomicU64,
    metadata_reads: AtomicU64,
}

/// The same at one moment, or between two.
#[derive(Clone, Copy, Default)]
pub struct Asked {
    /// Bytes written to either device.
    pub written: u64,
    /// Syncs of either device. A durable write is none.
    pub syncs: u64,
    /// Reads of metadata, however large.
    pub metadata_reads: u64,
}

impl Traffic {
    pub fn so_far(&self) -> Asked {
        let of = |counter: &AtomicU64| counter.load(Relaxed);
        Asked { written: of(&self.written), syncs: of(&self.syncs), metadata_reads: of(&self.metadata_reads) }
    }
}

impl Sub for Asked {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            written: self.written - before.written,
            syncs: self.syncs - before.syncs,
            metadata_reads: self.metadata_reads - before.metadata_reads,
        }
    }
}

/// A ring's handle on the devices that counts what goes through it.
pub struct Counted<'t> {
    pub io: RingStorage,
    pub traffic: &'t Traffic,
}

impl Storage for Counted<'_> {
    type Transfer = <RingStorage as Storage>::Transfer;
    type Command = <RingStorage as Storage>::Command;

    fn geometry(&self, device: Device) -> Geometry {
        self.io.geometry(device)
    }

    fn read(&self, device: Device, offset: ByteOffset, buf: Buf, part: Range<usize>) -> Self::Transfer {
        if device == Device::Meta {
            self.traffic.metadata_reads.fetch_add(1, Relaxed);
        }
        self.io.read(device, offset, buf, part)
    }

    fn write(
        &self,
        device: Device,
        offset: ByteOffset,
        buf: Buf,
        part: Range<usize>,
        durability: Durability,
    ) -> Self::Transfer {
        self.traffic.written.fetch_add(part.len() as u64, Relaxed);
        self.io.write(device, offset, buf, part, durability)
    }

    fn sync(&self, device: Device) -> Self::Command {
        self.traffic.syncs.fetch_add(1, Relaxed);
        self.io.sync(device)
    }

    fn discard(&self, device: Device, offset: ByteOffset, len: u64) -> Self::Command {
        self.io.discard(device, offset, len)
    }

    fn sleep(&self, time: Duration) -> Self::Command {
        self.io.sleep(time)
    }
}

impl Scheduler for Counted<'_> {
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

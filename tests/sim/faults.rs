//! What a simulated device does wrong, and the record of what it was asked to do.

use super::disk::{Disk, Kind, Version};
use std::{ops::Range, time::Duration};
use ublk_integrity::{Device, Errno};

/// What goes over the wire, in order; tests of an order look at this.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trace {
    Read { device: Device, offset: u64, len: usize },
    WriteStart { device: Device, offset: u64, len: usize, durable: bool },
    WriteEnd { device: Device, offset: u64, len: usize, durable: bool },
    WriteFailed { device: Device, offset: u64 },
    SyncStart(Device),
    SyncEnd(Device),
    Discard { offset: u64, len: u64 },
}

/// Which operations fail.
#[derive(Clone, Copy, Default, Debug)]
pub struct Faults {
    /// Per cent of data writes that fail; what they leave is old, new or torn.
    pub data_writes: u64,
    /// Per cent of data reads that fail.
    pub data_reads: u64,
    /// Per cent of data reads that bring other bytes than those that are there.
    pub garbled: u64,
    /// Every operation of the data device fails.
    pub data_dead: bool,
    /// Until then: a path that fails over.
    pub data_dead_until: Option<Duration>,
    /// The data device answers so many reads more, then it is dead.
    pub data_dies_after: Option<u64>,
    /// Every operation of the metadata device fails.
    pub meta_dead: bool,
    /// Every write and sync of the metadata device fails.
    pub meta_unwritable: bool,
    /// Per cent of metadata reads that fail.
    pub meta_reads: u64,
    /// Per cent of metadata writes that fail; what they leave is old, new or torn.
    pub meta_writes: u64,
    /// Per cent of syncs that fail, of either device.
    pub syncs: u64,
    /// In so many of a hundred moments the devices take longer than anybody waits.
    pub slow: u64,
    /// While a device tries to read a bad range for long, whatever comes later waits.
    pub in_order: bool,
    /// Of this device, some per cent of the writes are acknowledged and forgotten.
    pub lost: Option<(Device, u64)>,
    /// Of this device, some per cent of the writes go to the place after the one they were meant for.
    pub misdirected: Option<(Device, u64)>,
    /// This device acknowledges syncs and durable writes and keeps everything in volatile memory,
    /// in any order.
    pub lying: Option<Device>,
}

/// A part of a device that can't be read, or can't be written: then it keeps what it has.
#[derive(Clone, Debug)]
pub struct BadRange {
    pub device: Device,
    pub range: Range<u64>,
    pub reads: Option<Errno>,
    pub writes: Option<Errno>,
    /// How long it takes to fail.
    pub takes: Duration,
    /// A write of all of it makes it good, as of a sector that is remapped.
    pub until_written: bool,
}

impl BadRange {
    /// Reads fail with EIO, at once.
    pub fn unreadable(device: Device, range: Range<u64>) -> Self {
        Self { device, range, reads: Some(Errno::EIO), writes: None, takes: Duration::ZERO, until_written: false }
    }

    pub fn unwritable(device: Device, range: Range<u64>, errno: Errno) -> Self {
        Self { device, range, reads: None, writes: Some(errno), takes: Duration::ZERO, until_written: false }
    }
}

/// How the disk goes wrong.
impl Disk {
    pub(super) fn in_bad_range(&self, device: Device, offset: u64, kind: &Kind) -> Option<Errno> {
        let (len, write) = match kind {
            Kind::Read(part) => (part.len() as u64, false),
            Kind::Write(part, _) => (part.len() as u64, true),
            _ => return None,
        };
        let hit = |bad: &&BadRange| bad.device == device && bad.range.start < offset + len && offset < bad.range.end;
        let errno = |bad: &BadRange| if write { bad.writes } else { bad.reads };
        self.bad_ranges.iter().filter(hit).find_map(errno)
    }

    /// A transfer of parts of logical blocks, as the kernel refuses it with O_DIRECT.
    pub(super) fn is_misaligned(&self, disk: usize, offset: u64, kind: &Kind) -> bool {
        let len = match kind {
            Kind::Read(part) | Kind::Write(part, _) => part.len() as u64,
            Kind::Discard(_) | Kind::Sync(_) | Kind::Sleep(_) => return false,
        };
        (offset | len) % u64::from(self.logical[disk]) != 0
    }

    pub(super) fn fails(&mut self, device: Device, kind: &Kind) -> bool {
        if let (Device::Data, Kind::Read(_), Some(left)) = (device, kind, &mut self.faults.data_dies_after) {
            self.faults.data_dead |= *left == 0;
            *left = left.saturating_sub(1);
        }
        let f = self.faults;
        match (device, kind) {
            (_, Kind::Sleep(_)) => false,
            (Device::Data, _) if f.data_dead && f.data_dead_until.is_none_or(|end| self.now < end) => true,
            (Device::Meta, _) if f.meta_dead => true,
            (Device::Meta, Kind::Write(..) | Kind::Sync(_)) if f.meta_unwritable => true,
            (Device::Data, Kind::Write(..)) => self.strikes(f.data_writes),
            (Device::Data, Kind::Read(_)) => self.strikes(f.data_reads),
            (Device::Meta, Kind::Write(..)) => self.strikes(f.meta_writes),
            (Device::Meta, Kind::Read(_)) => self.strikes(f.meta_reads),
            (_, Kind::Sync(_)) => self.strikes(f.syncs),
            _ => false,
        }
    }

    /// What has been read comes over the wire with an error that nobody notices.
    pub(super) fn garble(&mut self, device: Device, offset: u64, bytes: &mut [u8]) {
        if let Some(at) =
            self.garbled_once.take_if(|at| device == Device::Meta && (offset..offset + bytes.len() as u64).contains(at))
        {
            bytes[(at - offset) as usize] ^= 1;
        }
        // Not the identity block, which is read but once, for a message.
        if device == Device::Data && offset > 0 && self.strikes(self.faults.garbled) {
            let at = self.rng.index(bytes.len());
            bytes[at] ^= 1 + self.rng.below(255) as u8;
        }
    }

    /// How long an operation takes that a bad range makes fail.
    pub(super) fn time_to_fail(&self, device: Device, offset: u64, kind: &Kind) -> Duration {
        let hit = |bad: &&BadRange| match kind {
            Kind::Read(part) => {
                bad.device == device && bad.range.start < offset + part.len() as u64 && offset < bad.range.end
            }
            _ => false,
        };
        self.bad_ranges.iter().filter(hit).map(|bad| bad.takes).max().unwrap_or_default()
    }

    pub(super) fn is_slow(&mut self) -> bool {
        self.strikes(self.faults.slow)
    }

    /// Draws nothing where there is nothing to draw for: old seeds replay.
    fn strikes(&mut self, percent: u64) -> bool {
        percent > 0 && self.rng.chance(percent)
    }

    pub(super) fn strays(&mut self, device: Device, fault: Option<(Device, u64)>) -> bool {
        fault.is_some_and(|(which, percent)| which == device && self.rng.chance(percent))
    }

    /// The medium holds something else from now on, durable at once. Writes under way are still to come.
    pub fn rot(&mut self, device: Device, offset: u64, bytes: &[u8]) {
        let disk = self.disk(device);
        let unit = self.unit(disk, offset);
        let mut current = vec![0; unit];
        for (at, bytes) in (offset..).step_by(unit).zip(bytes.chunks_exact(unit)) {
            self.read_into(disk, at, &mut current);
            if current == bytes {
                continue;
            }
            let version = Version { at: Some(self.clock), op: u64::MAX, torn: false, bytes: bytes.into() };
            let versions = self.units[disk].entry(at).or_default();
            versions.retain(|version| version.at.is_none());
            versions.insert(0, version);
        }
    }

    /// The write lands one place further on.
    pub(super) fn misdirect(&mut self, id: u64, disk: usize, offset: u64, len: u64) {
        let unit = self.unit(disk, offset);
        let own = |v: &&Version| v.op == id;
        let bytes: Vec<u8> = (offset..offset + len)
            .step_by(unit)
            .flat_map(|at| self.units[disk][&at].iter().find(own).unwrap().bytes.to_vec())
            .collect();
        self.end_versions(id, disk, offset, len, false, false);
        if offset + 2 * len <= self.sizes[disk] {
            self.add_versions(id, disk, offset + len, &bytes);
            self.end_versions(id, disk, offset + len, len, true, false);
        }
    }

    /// A failed write leaves each unit old, new or, below the unit, torn.
    pub(super) fn end_failed_write(&mut self, id: u64, disk: usize, offset: u64, len: u64) {
        let mut at = offset;
        while at < offset + len {
            let unit = self.unit(disk, at) as u64;
            match self.rng.below(3) {
                0 => self.end_versions(id, disk, at, unit, false, false),
                1 => self.end_versions(id, disk, at, unit, true, false),
                _ => {
                    self.end_versions(id, disk, at, unit, true, false);
                    let mut bytes = vec![0; unit as usize];
                    self.read_into(disk, at, &mut bytes);
                    bytes[unit as usize / 2..].fill(0xee);
                    self.poke_current(disk, at, bytes);
                }
            }
            at += unit;
        }
    }

    fn poke_current(&mut self, disk: usize, at: u64, bytes: Vec<u8>) {
        let versions = self.units[disk].get_mut(&at).unwrap();
        let v = versions.iter_mut().rev().find(|v| v.at.is_some()).unwrap();
        v.bytes = bytes.into();
        v.torn = true;
    }
}

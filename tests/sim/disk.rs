//! Two disks with a volatile and a durable half.
//!
//! A unit is what the disk writes atomically: the physical block where data lies, 512 bytes for
//! metadata. For each unit the disk remembers every version that a power cut may leave: the last
//! one that is surely durable, and all that came later.

use super::Rng;
use std::{
    collections::{BTreeSet, HashMap},
    ops::Range,
    rc::Rc,
    task::Waker,
    time::Duration,
};
use ublk_integrity::{Buf, Device, Durability, Errno};

const META_UNIT: usize = 512;
#[derive(Clone)]
pub(super) struct Version {
    /// When it was completed; `None` while in flight.
    pub(super) at: Option<u64>,
    pub(super) op: u64,
    /// A failed write left half of it.
    pub(super) torn: bool,
    pub(super) bytes: Rc<[u8]>,
}

#[derive(Clone)]
pub(super) enum Kind {
    Read(Range<usize>),
    Write(Range<usize>, Durability),
    /// Everything completed before this time becomes durable.
    Sync(u64),
    Discard(u64),
    /// Until this moment.
    Sleep(Duration),
}

pub(super) struct Op {
    pub(super) id: u64,
    pub(super) device: Device,
    pub(super) disk: usize,
    pub(super) offset: u64,
    pub(super) kind: Kind,
    /// It ends then, where that was settled when it began.
    pub(super) until: Option<Duration>,
    pub(super) buf: Option<Buf>,
    pub(super) result: Option<Result<(), Errno>>,
    pub(super) waker: Option<Waker>,
}

pub use super::faults::{BadRange, Faults, Trace};

pub struct Disk {
    /// One map where data and metadata share a device, else data and metadata.
    pub(super) units: Vec<HashMap<u64, Vec<Version>>>,
    /// Units with more than one version, by disk.
    pub(super) unsettled: Vec<BTreeSet<u64>>,
    pub(super) sizes: Vec<u64>,
    pub(super) physical: u32,
    /// The least that is transferred, by disk: all else is EINVAL.
    pub logical: [u32; 2],
    /// From here on, on disk 0, units are physical blocks.
    data_from: u64,
    pub(super) ops: Vec<Op>,
    next_op: u64,
    pub(super) clock: u64,
    /// Time as sleepers see it: it passes when nothing else happens.
    pub(super) now: Duration,
    /// The first read of this byte of the metadata device brings another.
    pub garbled_once: Option<u64>,
    pub rng: Rng,
    pub faults: Faults,
    pub bad_ranges: Vec<BadRange>,
    /// Operations by number, as they start and end.
    pub trace: Option<Vec<(u64, Trace)>>,
    /// Device writes that were completed.
    pub writes: u64,
    pub syncs: u64,
}

impl Disk {
    pub fn new(data: u64, meta: Option<u64>, physical: u32, seed: u64) -> Self {
        let sizes: Vec<u64> = [Some(data), meta].into_iter().flatten().collect();
        Self {
            units: sizes.iter().map(|_| HashMap::new()).collect(),
            unsettled: sizes.iter().map(|_| BTreeSet::new()).collect(),
            sizes,
            physical,
            logical: [512; 2],
            data_from: 1 << 20,
            ops: Vec::new(),
            next_op: 0,
            clock: 0,
            now: Duration::ZERO,
            garbled_once: None,
            rng: Rng::new(seed ^ 0x5eed),
            faults: Faults::default(),
            bad_ranges: Vec::new(),
            trace: None,
            writes: 0,
            syncs: 0,
        }
    }

    pub(super) fn disk(&self, device: Device) -> usize {
        match device {
            Device::Data => 0,
            Device::Meta => self.sizes.len() - 1,
        }
    }

    /// Where physical blocks begin on disk 0: the first byte of the data area.
    pub fn set_data_from(&mut self, offset: u64) {
        self.data_from = offset;
    }

    pub(super) fn unit(&self, disk: usize, offset: u64) -> usize {
        let data = disk == 0 && offset >= self.data_from;
        if data { self.physical as usize } else { META_UNIT }
    }

    pub(super) fn read_into(&self, disk: usize, mut offset: u64, mut out: &mut [u8]) {
        while !out.is_empty() {
            let unit = self.unit(disk, offset) as u64;
            let start = offset / unit * unit;
            let skip = (offset - start) as usize;
            let n = out.len().min(unit as usize - skip);
            let current = self.units[disk].get(&start).and_then(|v| v.iter().rev().find(|v| v.at.is_some()));
            match current {
                Some(v) => out[..n].copy_from_slice(&v.bytes[skip..skip + n]),
                None => out[..n].fill(0),
            }
            out = &mut out[n..];
            offset += n as u64;
        }
    }

    /// The device's current bytes.
    pub fn peek(&self, device: Device, offset: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.read_into(self.disk(device), offset, &mut out);
        out
    }

    /// Changes the medium behind everybody's back; durable at once.
    pub fn poke(&mut self, device: Device, offset: u64, bytes: &[u8]) {
        let disk = self.disk(device);
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let unit = self.unit(disk, at) as u64;
            let start = at / unit * unit;
            let skip = (at - start) as usize;
            let n = rest.len().min(unit as usize - skip);
            let mut content = vec![0; unit as usize];
            self.read_into(disk, start, &mut content);
            content[skip..skip + n].copy_from_slice(&rest[..n]);
            let version = Version { at: Some(self.clock), op: u64::MAX, torn: false, bytes: content.into() };
            self.units[disk].insert(start, vec![version]);
            rest = &rest[n..];
            at += n as u64;
        }
    }

    pub(super) fn add_versions(&mut self, op: u64, disk: usize, offset: u64, bytes: &[u8]) {
        let mut at = 0;
        while at < bytes.len() {
            let unit = self.unit(disk, offset + at as u64);
            let start = offset + at as u64;
            assert_eq!(start % unit as u64, 0, "writes are whole units");
            let version = Version { at: None, op, torn: false, bytes: bytes[at..at + unit].into() };
            let zeros = || vec![Version { at: Some(0), op: u64::MAX, torn: false, bytes: vec![0; unit].into() }];
            self.units[disk].entry(start).or_insert_with(zeros).push(version);
            self.unsettled[disk].insert(start);
            at += unit;
        }
    }

    /// Ends an operation's versions: kept or, where the write failed and left the old, dropped.
    pub(super) fn end_versions(&mut self, op: u64, disk: usize, offset: u64, len: u64, keep: bool, durable: bool) {
        let clock = self.clock;
        let mut at = offset;
        while at < offset + len {
            let unit = self.unit(disk, at) as u64;
            if let Some(versions) = self.units[disk].get_mut(&at) {
                if let Some(i) = versions.iter().position(|v| v.op == op) {
                    if keep {
                        // What completes last is what is read, whatever began first.
                        let mut v = versions.remove(i);
                        v.at = Some(clock);
                        if durable {
                            versions.retain(|v| v.at.is_none());
                        }
                        let place = versions.iter().position(|v| v.at.is_none()).unwrap_or(versions.len());
                        versions.insert(place, v);
                    } else {
                        versions.remove(i);
                    }
                }
            }
            at += unit;
        }
    }

    fn sync(&mut self, disk: usize, since: u64) {
        let units = &mut self.units[disk];
        self.unsettled[disk].retain(|key| {
            let versions = units.get_mut(key).unwrap();
            // The newest version that was complete when the sync began is durable; older
            // ones can't come back.
            if let Some(last) = versions.iter().rposition(|v| v.at.is_some_and(|at| at <= since)) {
                versions.drain(..last);
            }
            versions.len() > 1
        });
    }

    fn note(&mut self, op: u64, trace: Trace) {
        if let Some(list) = &mut self.trace {
            list.push((op, trace));
        }
    }

    fn device(&self, disk: usize, offset: u64) -> Device {
        if disk == 0 && (self.sizes.len() == 2 || offset >= self.data_from) { Device::Data } else { Device::Meta }
    }

    pub(super) fn start(&mut self, device: Device, offset: u64, kind: Kind, buf: Option<Buf>) -> u64 {
        self.next_op += 1;
        let (id, disk) = (self.next_op, self.disk(device));
        let traced = match kind {
            Kind::Sync(_) => device,
            _ => self.device(disk, offset),
        };
        match (&kind, &buf) {
            (Kind::Write(part, durability), Some(buf)) => {
                assert!(offset + part.len() as u64 <= self.sizes[disk], "write past the end");
                let bytes = buf[part.clone()].to_vec();
                if !self.is_misaligned(disk, offset, &kind) {
                    self.add_versions(id, disk, offset, &bytes);
                }
                let durable = *durability == Durability::Durable;
                self.note(id, Trace::WriteStart { device: traced, offset, len: bytes.len(), durable });
            }
            (Kind::Read(part), _) => self.note(id, Trace::Read { device: traced, offset, len: part.len() }),
            (Kind::Sync(_), _) => self.note(id, Trace::SyncStart(device)),
            (Kind::Discard(len), _) => self.note(id, Trace::Discard { offset, len: *len }),
            _ => {}
        }
        let until = match kind {
            Kind::Sleep(until) => Some(until),
            _ => self.ends(disk, self.time_to_fail(traced, offset, &kind)),
        };
        self.ops.push(Op { id, device: traced, disk, offset, kind, until, buf, result: None, waker: None });
        id
    }

    pub(super) fn pending(&self) -> impl Iterator<Item = usize> {
        self.ops.iter().enumerate().filter(|(_, op)| op.result.is_none()).map(|(i, _)| i)
    }

    pub(super) fn complete(&mut self, nth: usize) {
        let Some(i) = self.pending().nth(nth) else {
            self.ops.clear();
            return;
        };
        let i = self.instead_of(i);
        self.clock += 1;
        let (id, device, disk, offset, kind) = {
            let op = &self.ops[i];
            (op.id, op.device, op.disk, op.offset, op.kind.clone())
        };
        let misaligned = self.is_misaligned(disk, offset, &kind).then_some(Errno::EINVAL);
        let refused = misaligned.or_else(|| self.in_bad_range(device, offset, &kind));
        let fails = refused.is_some() || self.fails(device, &kind);
        match &kind {
            Kind::Read(part) => {
                let mut buf = self.ops[i].buf.take().unwrap();
                if !fails {
                    self.read_into(disk, offset, &mut buf[part.clone()]);
                    self.garble(device, offset, &mut buf[part.clone()]);
                }
                self.ops[i].buf = Some(buf);
            }
            Kind::Write(part, durability) => {
                let written = offset..offset + part.len() as u64;
                let covers = |range: &Range<u64>| written.start <= range.start && range.end <= written.end;
                self.bad_ranges.retain(|bad| bad.device != device || !bad.until_written || !covers(&bad.range));
                self.writes += 1;
                let durable = *durability == Durability::Durable;
                let len = part.len() as u64;
                let lost = !fails && self.strays(device, self.faults.lost);
                let astray = !fails && !lost && self.strays(device, self.faults.misdirected);
                let durable = durable && self.faults.lying != Some(device);
                match (refused, fails) {
                    _ if lost => self.end_versions(id, disk, offset, len, false, false),
                    _ if astray => self.misdirect(id, disk, offset, len),
                    (Some(_), _) => self.end_versions(id, disk, offset, len, false, false),
                    (None, true) => self.end_failed_write(id, disk, offset, len),
                    (None, false) => self.end_versions(id, disk, offset, len, true, durable),
                }
                let event = match fails {
                    true => Trace::WriteFailed { device, offset },
                    false => Trace::WriteEnd { device, offset, len: part.len(), durable },
                };
                self.note(id, event);
            }
            Kind::Sync(since) if !fails => {
                self.syncs += 1;
                if self.faults.lying != Some(device) {
                    self.sync(disk, *since);
                }
                self.note(id, Trace::SyncEnd(device));
            }
            _ => {}
        }
        let op = &mut self.ops[i];
        op.result = Some(if fails { Err(refused.unwrap_or(Errno::EIO)) } else { Ok(()) });
        if let Some(waker) = op.waker.take() {
            waker.wake();
        }
    }

    /// Whether what is read there was left by a failed write.
    pub fn is_torn(&self, device: Device, offset: u64) -> bool {
        let versions = self.units[self.disk(device)].get(&offset);
        versions.and_then(|v| v.iter().rev().find(|v| v.at.is_some())).is_some_and(|v| v.torn)
    }

    /// Another disk with the same content, without the operations in flight.
    pub fn fork(&self, seed: u64) -> Self {
        Self {
            units: self.units.clone(),
            unsettled: self.unsettled.clone(),
            sizes: self.sizes.clone(),
            logical: self.logical,
            data_from: self.data_from,
            next_op: self.next_op,
            clock: self.clock,
            ..Self::new(0, None, self.physical, seed)
        }
    }

    /// Puts back what another disk holds in these bytes of a device.
    pub fn put_back(&mut self, other: &Self, device: Device, bytes: Range<u64>) {
        let disk = self.disk(device);
        let within = |at: &u64| bytes.contains(at);
        self.units[disk].retain(|at, _| !within(at));
        self.unsettled[disk].retain(|at| !within(at));
        let theirs = other.units[disk].iter().filter(|(at, _)| within(at));
        self.units[disk].extend(theirs.map(|(at, versions)| (*at, versions.clone())));
        self.unsettled[disk].extend(other.unsettled[disk].iter().filter(|at| within(at)));
    }
}

//! How a life ends: what a power cut and a daemon's death leave on the disks.

use super::disk::{Disk, Kind};
use std::rc::Rc;
use ublk_integrity::{Durability, Errno};

/// Before this offset lie the superblocks. Each fits a sector, so that no power cut would ever tear
/// one; there are two because sectors do go bad, so here they tear all the same.
const SUPERBLOCKS_END: u64 = 1 << 20;

fn half_of_each(old: &[u8], new: &[u8]) -> Rc<[u8]> {
    let (half, _) = new.split_at(new.len() / 2);
    half.iter().chain(&old[half.len()..]).copied().collect()
}

impl Disk {
    /// Pulls the power: of each unit one of the possible versions is left.
    pub fn power_cut(&mut self) {
        self.ops.clear();
        for disk in 0..self.units.len() {
            for key in std::mem::take(&mut self.unsettled[disk]) {
                let versions = self.units[disk].get_mut(&key).unwrap();
                let last = versions.last().unwrap();
                let tears = key < SUPERBLOCKS_END && last.at.is_none() && self.rng.chance(30);
                let torn: Option<Rc<[u8]>> = tears.then(|| half_of_each(&versions[0].bytes, &last.bytes));
                let mut v = versions.swap_remove(self.rng.index(versions.len()));
                v.bytes = torn.unwrap_or(v.bytes);
                v.at = Some(0);
                *versions = vec![v];
            }
        }
        self.clock = 1;
    }

    /// The daemon dies, the machine goes on: completed operations stay. Of the writes and syncs in flight some never reach the device, for
    /// the kernel drops what it has not begun. A durable one may lie in the device's cache alone: that it is written out was still to come.
    pub fn kill(&mut self) {
        let in_flight: Vec<usize> = self.pending().collect();
        for i in in_flight {
            let fate = self.rng.below(4);
            let op = &mut self.ops[i];
            match (&mut op.kind, fate) {
                (Kind::Write(part, _), 0) => {
                    let (id, disk, offset, len) = (op.id, op.disk, op.offset, part.len() as u64);
                    op.result = Some(Err(Errno::EIO));
                    self.end_versions(id, disk, offset, len, false, false);
                }
                (Kind::Write(_, durability), 1) => *durability = Durability::MayBeLost,
                (Kind::Sync(_), 0) => op.result = Some(Err(Errno::EIO)),
                _ => {}
            }
        }
        while !self.ops.is_empty() {
            self.complete(0);
        }
    }
}

//! The simulated disks' time: it passes when nothing else happens, and when a device takes long.

use super::disk::{Disk, Kind, Op};
use std::time::Duration;

impl Disk {
    /// Time as sleepers see it.
    pub fn now(&self) -> Duration {
        self.now
    }

    /// Who sleeps shortest wakes first; and seldom does a device take longer than a
    /// deadline of seconds.
    pub(super) fn instead_of(&mut self, i: usize) -> usize {
        let until = |op: &Op| op.until;
        if until(&self.ops[i]).is_none() {
            return i;
        }
        let sleepers = self.pending().filter_map(|i| Some((until(&self.ops[i])?, i)));
        let (first, sleeper) = sleepers.min().expect("there is one");
        let at_work = self.pending().find(|i| until(&self.ops[*i]).is_none());
        match at_work.filter(|_| first >= self.now + Duration::from_secs(1)) {
            Some(other) if !self.is_slow() => other,
            _ => {
                self.now = self.now.max(first);
                sleeper
            }
        }
    }

    /// When an operation ends that takes so long by itself; `None`: at any time.
    pub(super) fn ends(&self, disk: usize, takes: Duration) -> Option<Duration> {
        let is_before = |op: &&Op| op.disk == disk && op.result.is_none() && !matches!(op.kind, Kind::Sleep(_));
        let before = self.ops.iter().filter(is_before).filter_map(|op| op.until).max();
        match before.filter(|_| self.faults.in_order) {
            Some(before) => Some(before.max(self.now) + takes),
            None => Some(self.now + takes).filter(|_| !takes.is_zero()),
        }
    }
}

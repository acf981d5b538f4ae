//! What a device was asked to be; kept in its state file, so that `recover` can ask for the same.

use crate::{device::is_same_device, key::KeySource, size::Size};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use ublk_integrity::OnMismatch;

/// Everything that `add` was told, the key excepted.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Settings {
    /// The data device.
    pub data: PathBuf,
    /// The metadata device, where separate.
    pub meta: Option<PathBuf>,
    /// Where the key comes from.
    pub key: KeySource,
    /// Queues.
    pub queues: u16,
    /// Requests of each queue.
    pub depth: u16,
    /// Bytes of verified pages kept.
    pub cache: u64,
    /// Bytes of the largest request.
    pub max_io: u32,
    /// Whether pages are loaded ahead of reads.
    pub prefetch: bool,
    /// What a read does with a bad block.
    pub on_mismatch: Mismatch,
    /// Whether discards are offered and passed down.
    pub discard: bool,
    /// Whether nothing is written.
    pub read_only: bool,
    /// Whether checkpoints are logged too.
    pub verbose: bool,
    /// Whether the device waits for a new daemon when this one dies. `status` has a report named `recovery`.
    #[serde(rename = "user_recovery", alias = "recovery")]
    pub recovery: bool,
}

impl Settings {
    /// Whether both need one device.
    pub fn shares_devices(&self, other: &Self) -> bool {
        let all = |settings: &Self| settings.meta.iter().chain([&settings.data]).cloned().collect::<Vec<_>>();
        let others = all(other);
        all(self).iter().any(|a| others.iter().any(|b| is_same_device(a, b).unwrap_or(false)))
    }
}

/// What a read does with a block that does not match its tag.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Mismatch {
    /// Fail with EILSEQ
    Fail,
    /// Return zeros
    Zero,
    /// Accept and sign what is there: gives integrity up, for rescue only
    Fix,
}

impl From<Mismatch> for OnMismatch {
    fn from(mismatch: Mismatch) -> Self {
        match mismatch {
            Mismatch::Fail => Self::Fail,
            Mismatch::Zero => Self::Zero,
            Mismatch::Fix => Self::Fix,
        }
    }
}

/// Sizes that were left to us.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Defaults {
    /// Queues.
    pub queues: u16,
    /// Requests of each queue.
    pub depth: u16,
    /// Bytes of verified pages kept.
    pub cache: u64,
}

/// Bytes of the largest request by default: what the kernel's own drivers ask for at least.
pub const DEFAULT_MAX_IO: u32 = 512 << 10;

/// Ring tables, stacks and code.
const REST: u64 = 18 << 20;
/// What log, pending tags and checkpoint take at most with the defaults.
const LOG: u64 = 20 << 20;

impl Defaults {
    /// At most 1/8 of the machine's memory, from 512 MiB on: what [`LOG`] and [`REST`] leave of that goes to request
    /// buffers by two thirds, to the cache by one.
    pub fn for_machine(memory: u64, cpus: usize, max_io: u32) -> Self {
        let free = (memory / 8).saturating_sub(LOG + REST);
        let mut queues = cpus.clamp(1, 4) as u16;
        let mut depth: u16 = 128;
        let buffers = |queues: u16, depth: u16| u64::from(queues) * u64::from(depth) * u64::from(max_io);
        while buffers(queues, depth) > free / 3 * 2 && queues > 1 {
            queues -= 1;
        }
        while buffers(queues, depth) > free / 3 * 2 && depth > 16 {
            depth /= 2;
        }
        Self { queues, depth, cache: (free / 3).min(memory / 32).clamp(4 << 20, 256 << 20) }
    }

    /// For the machine we run on.
    pub fn here(max_io: u32) -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, Into::into);
        Self::for_machine(machine_memory(), cpus, max_io)
    }
}

/// Bytes of memory of this machine.
pub fn machine_memory() -> u64 {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = info.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kilobytes = total.and_then(|text| text.trim().trim_end_matches(" kB").parse::<u64>().ok());
    // Unreadable: as if small.
    kilobytes.map_or(512 << 20, |k| k * 1024)
}

/// What the daemon takes, for the line it prints at start.
pub fn memory_line(settings: &Settings, volume_bytes: u64) -> (u64, String) {
    let (queues, depth, max_io) = (settings.queues, settings.depth, settings.max_io);
    let buffers = u64::from(queues) * u64::from(depth) * u64::from(max_io);
    let volume_rest = volume_bytes.saturating_sub(settings.cache);
    let total = buffers + volume_bytes.max(settings.cache) + REST;
    let line = format!(
        "memory: {} = {queues} queue{} × {depth} requests × {} + cache {} + log and pending tags {} + {}",
        Size(total),
        if queues == 1 { "" } else { "s" },
        Size(max_io.into()),
        Size(settings.cache),
        Size(volume_rest),
        Size(REST)
    );
    (total, line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_fit_an_eighth_of_any_machine() {
        for megabytes in [512, 1024, 2048, 24 << 10, 1 << 20] {
            for cpus in [1, 2, 64] {
                let memory = megabytes << 20;
                let d = Defaults::for_machine(memory, cpus, DEFAULT_MAX_IO);
                let buffers = u64::from(d.queues) * u64::from(d.depth) * u64::from(DEFAULT_MAX_IO);
                assert!(buffers + d.cache + LOG + REST <= memory / 8, "{megabytes} MiB, {cpus} CPUs: {d:?}");
            }
        }
        let big = Defaults::for_machine(16 << 30, 4, DEFAULT_MAX_IO);
        assert_eq!(big, Defaults { queues: 4, depth: 128, cache: 256 << 20 });
    }
}

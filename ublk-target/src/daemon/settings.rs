//! What a device was asked to be; kept in its state file, so that `recover` can ask for the same.

use super::{
    counts::Counts,
    memory_budget::{Available, machine_memory, most_memory, rest},
};
use crate::{
    anchor::AnchorSettings,
    device::is_same_device,
    failure::{Exit, Failure, Outcome, with_paths},
    key::KeySource,
    name::DeviceName,
    size::Size,
};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use ublk_integrity::{OnMismatch, create::VolumeInfo, open::Grow};

/// Everything that `add` was told, the key excepted.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Settings {
    /// What the device is called.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<DeviceName>,
    /// The data device.
    pub data: PathBuf,
    /// The metadata device, where separate.
    pub meta: Option<PathBuf>,
    /// Where the key comes from.
    pub key: KeySource,
    /// Queues.
    pub queues: u16,
    /// Threads of each queue, which share its requests.
    #[serde(default = "one")]
    pub threads: u16,
    /// Threads that hash for those.
    #[serde(default)]
    pub hash_threads: u16,
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
    /// Small writes of each thread that may be answered before they are in place.
    #[serde(default)]
    pub write_back: u16,
    /// Whether small writes that must be durable at once lie in the log with their data. `status`
    /// has the outcome by the plain name.
    #[serde(rename = "sync_log_option", default = "off")]
    pub sync_log: SyncLog,
    /// The volume's anchor. `status` has a report by the plain name.
    #[serde(rename = "anchor_option", default, skip_serializing_if = "Option::is_none")]
    pub anchor: Option<AnchorSettings>,
    /// Whether a volume that has an anchor is read without it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub without_anchor: bool,
    /// Whether checkpoints are logged too.
    pub verbose: bool,
    /// Whether the device waits for a new daemon when this one dies. `status` has a
    /// report named `recovery`.
    #[serde(rename = "user_recovery", alias = "recovery")]
    pub recovery: bool,
    /// Whether recovery takes the newest tag of a block that can't be read: asked for anew each time.
    #[serde(skip)]
    pub decide_unreadable: bool,
    /// How large the volume is to be from this open on, where that is another size.
    #[serde(skip)]
    pub grow: Option<Grow>,
}

/// Before there were several.
fn one() -> u16 {
    1
}

/// Of a device that an older program added: its volume stays one that this can recover, too.
fn off() -> SyncLog {
    SyncLog::Off
}

impl Settings {
    /// What the daemon takes, for the line it prints at start.
    pub fn memory_line(&self, volume_bytes: u64) -> (u64, String) {
        let (counts, max_io) = (self.counts(), self.max_io);
        let (queues, depth) = (counts.queues, counts.depth);
        let buffers = counts.requests() * u64::from(max_io);
        let volume_rest = volume_bytes.saturating_sub(self.cache);
        let rest = rest(counts);
        let total = buffers + volume_bytes.max(self.cache) + rest;
        let line = format!(
            "memory: {} = {queues} queue{} × {depth} requests × {} + cache {} + log and pending tags {} + {}",
            Size(total),
            if queues == 1 { "" } else { "s" },
            Size(max_io.into()),
            Size(self.cache),
            Size(volume_rest),
            Size(rest)
        );
        (total, line)
    }

    /// The device's numbers.
    pub fn counts(&self) -> Counts {
        Counts {
            queues: self.queues,
            threads: self.threads,
            hash_threads: self.hash_threads,
            depth: self.depth,
            write_back: self.write_back,
        }
    }

    /// The devices.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        std::iter::once(&self.data).chain(&self.meta).map(PathBuf::as_path)
    }

    /// The devices, and what its anchor lies on.
    pub fn needs(&self) -> impl Iterator<Item = &Path> {
        self.paths().chain(self.anchor.as_ref().and_then(|anchor| anchor.place.file()))
    }

    /// The device that both need, by the path that it has here.
    pub fn shared_device(&self, other: &Self) -> Option<&Path> {
        self.paths().find(|ours| other.paths().any(|theirs| is_same_device(ours, theirs).unwrap_or(false)))
    }

    /// The library's words for the devices in a text replaced by the paths.
    pub fn named(&self, text: &str) -> String {
        with_paths(text, &self.data, self.meta.as_deref())
    }

    /// The devices, for a line.
    pub fn paths_in_words(&self) -> String {
        self.paths().map(|path| path.display().to_string()).collect::<Vec<_>>().join(" and ")
    }

    /// The device with the metadata.
    pub fn meta_path(&self) -> &Path {
        self.meta.as_ref().unwrap_or(&self.data)
    }

    /// Refuses what can't be had with this `volume`, or any. Before anything is taken: an
    /// allocation that fails, or is killed for, ends the process without a word, and what a daemon
    /// has locked the kernel can't get back.
    pub fn refuse_more_than(&self, available: &Available, volume: Option<&VolumeInfo>) -> Outcome {
        available.refuse_less_than(self.most_memory(volume), LOWER)
    }

    /// The same, but where the cache `may_shrink` that is done first. Returns what the daemon takes
    /// at most. Looks at no device: others may wait for us to be done.
    pub fn fit(&mut self, available: &Available, volume: Option<&VolumeInfo>, may_shrink: bool) -> Outcome<u64> {
        let most = self.most_memory(volume);
        if may_shrink && most > available.bytes {
            let uncached = Self { cache: 0, ..self.clone() }.most_memory(volume);
            let left = available.bytes.saturating_sub(uncached) / PAGE_WITH_ENTRY.1 * PAGE_WITH_ENTRY.0;
            self.cache = self.cache.min(left.max(LEAST_CACHE));
        }
        self.refuse_more_than(available, volume)?;
        Ok(self.most_memory(volume))
    }

    fn most_memory(&self, volume: Option<&VolumeInfo>) -> u64 {
        most_memory(volume, self.counts(), self.max_io, self.cache)
    }
}

/// Whether small writes that must be durable at once lie in the log with their data.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum SyncLog {
    /// Where there is write-back and the log is large enough
    Auto,
    /// Refuse to start where that can't be
    On,
    /// Never: the volume stays of format version 1
    Off,
}

impl SyncLog {
    /// As the option's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::On => "on",
            Self::Off => "off",
        }
    }

    /// The outcome for this volume, with so many slots of each thread in the write-back file.
    pub fn decide(self, volume: &VolumeInfo, read_only: bool, write_back: usize) -> Outcome<bool> {
        let (least, size) = (VolumeInfo::LEAST_SYNC_LOG, volume.log_size);
        let why_not = match () {
            () if read_only => Some("nothing is written to this device".into()),
            () if write_back == 0 => Some("there is no write-back (--write-back), which it needs".into()),
            () if !volume.fits_sync_log() => Some(format!(
                "the tag log has {}, and {} at least are needed: `format --log-size`",
                Size(size),
                Size(least)
            )),
            () => None,
        };
        match (self, why_not) {
            (Self::Off, _) | (Self::Auto, Some(_)) => Ok(false),
            (Self::Auto | Self::On, None) => Ok(true),
            (Self::On, Some(why)) => Err(Failure::new(Exit::Arguments, format_args!("--sync-log on: {why}"))),
        }
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

/// What was chosen of [`Counts`], and what the machine is like: the rest is left to us.
#[derive(Clone, Copy, Default, Debug)]
pub struct Wanted {
    /// Queues.
    pub queues: Option<u16>,
    /// Threads of each queue.
    pub threads: Option<u16>,
    /// Threads that hash for those.
    pub hash_threads: Option<u16>,
    /// Requests of each queue.
    pub depth: Option<u16>,
    /// Slots of each thread in the write-back file.
    pub write_back: Option<u16>,
    /// Processors.
    pub cpus: usize,
    /// Whether several threads can share a queue here.
    pub shares: bool,
}

impl Wanted {
    /// Where threads can share a queue two do, as far as there are processors: one submitter uses
    /// one queue, and a thread's part of a small request takes twice the submitter's. More
    /// processors have more queues, up to half of them a thread for requests; the others have one
    /// that hashes for those, and where two share a queue there is one at least: large requests may
    /// all be one thread's.
    fn counts(self) -> Counts {
        let cpus = self.cpus.clamp(1, 16) as u16;
        let serving = cpus.div_ceil(2);
        let queues = self.queues.unwrap_or(if self.shares { (serving / 2).max(1) } else { serving.min(4) });
        let depth = self.depth.unwrap_or(128);
        let threads = if self.shares { (cpus / queues).clamp(1, 2).min(depth) } else { 1 };
        let threads = self.threads.unwrap_or(threads);
        let left = cpus.saturating_sub(queues.saturating_mul(threads)).max(u16::from(threads > 1));
        let hash_threads = self.hash_threads.unwrap_or(left.min(8));
        Counts { queues, threads, hash_threads, depth, write_back: self.write_back.unwrap_or(DEFAULT_WRITE_BACK) }
    }
}

/// Sizes that were left to us.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Defaults {
    /// Queues, threads, requests.
    pub counts: Counts,
    /// Bytes of verified pages kept.
    pub cache: u64,
}

/// Bytes of the largest request by default: what the kernel's own drivers ask for at least.
pub const DEFAULT_MAX_IO: u32 = 512 << 10;

/// The smallest cache that we choose.
const LEAST_CACHE: u64 = 1 << 20;
/// The pages of a cache need a little more than their own size: so much of so much.
const PAGE_WITH_ENTRY: (u64, u64) = (64, 65);
/// What to do where memory does not suffice.
const LOWER: &str = "lower --queues, --threads-per-queue, --hash-threads, --depth, --write-back, --max-io or --cache";

/// Slots of each thread in the write-back file, by default: as many as keep a thread busy that
/// nobody waits for.
pub const DEFAULT_WRITE_BACK: u16 = 32;

impl Defaults {
    /// At most 1/8 of the machine's memory, from 512 MiB on, and no more than is `available`, down
    /// to eight requests, four slots of the write-back file for each thread and a cache of 1 MiB:
    /// what is left of that when nothing has been chosen goes to requests by three quarters at
    /// most, to the cache what remains.
    pub fn for_machine(memory: u64, available: u64, wanted: Wanted, max_io: u32, volume: Option<&VolumeInfo>) -> Self {
        let fixed =
            most_memory(volume, Counts { queues: 0, threads: 0, hash_threads: 0, depth: 0, write_back: 0 }, max_io, 0);
        let free = (memory / 8).min(available).saturating_sub(fixed);
        let mut counts = wanted.counts();
        let taken = |counts| most_memory(volume, counts, max_io, 0) - fixed;
        while taken(counts) > free / 4 * 3 && counts.queues > 1 && wanted.queues.is_none() {
            counts.queues -= 1;
        }
        while taken(counts) > free / 4 * 3 && counts.write_back > 4 && wanted.write_back.is_none() {
            counts.write_back /= 2;
        }
        while taken(counts) > free / 4 * 3 && counts.depth > 8 && wanted.depth.is_none() {
            counts.depth /= 2;
        }
        while taken(counts) > free / 4 * 3 && counts.hash_threads > 1 && wanted.hash_threads.is_none() {
            counts.hash_threads -= 1;
        }
        let left = free.saturating_sub(taken(counts)) / PAGE_WITH_ENTRY.1 * PAGE_WITH_ENTRY.0;
        Self { counts, cache: left.min(memory / 32).clamp(LEAST_CACHE, 256 << 20) }
    }

    /// For the machine we run on.
    pub fn here(wanted: Wanted, max_io: u32, volume: Option<&VolumeInfo>, available: &Available) -> Self {
        Self::for_machine(machine_memory(), available.bytes, wanted, max_io, volume)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use ublk_integrity::create::FormatOptions;

    #[test]
    fn defaults_fit_an_eighth_of_any_machine() {
        for megabytes in [512, 700, 1024, 1500, 2048, 24 << 10, 1 << 20] {
            for cpus in [1, 2, 64] {
                for shares in [false, true] {
                    let memory = megabytes << 20;
                    let d = Defaults::for_machine(memory, memory, machine(cpus, shares), DEFAULT_MAX_IO, None);
                    let most = most_memory(None, d.counts, DEFAULT_MAX_IO, d.cache);
                    assert!(most <= memory / 8, "{megabytes} MiB, {cpus} CPUs: {d:?} take {most}");
                }
            }
        }
        let info = plan(512, 64 << 40);
        let d = Defaults::for_machine(2 << 30, 2 << 30, machine(2, false), DEFAULT_MAX_IO, Some(&info));
        assert!(most_memory(Some(&info), d.counts, DEFAULT_MAX_IO, d.cache) <= 256 << 20, "{d:?}");
        // What is known to be small leaves more for requests.
        let d = Defaults::for_machine(2 << 30, 2 << 30, machine(2, false), DEFAULT_MAX_IO, Some(&plan(4096, 1 << 30)));
        assert_eq!(d.counts, Counts { queues: 1, threads: 1, hash_threads: 1, depth: 128, write_back: 32 });
        let big = Defaults::for_machine(16 << 30, 16 << 30, machine(4, false), DEFAULT_MAX_IO, None);
        let counts = Counts { queues: 2, threads: 1, hash_threads: 2, depth: 128, write_back: 32 };
        assert_eq!(big, Defaults { counts, cache: 256 << 20 });
    }

    fn machine(cpus: usize, shares: bool) -> Wanted {
        Wanted { cpus, shares, ..Wanted::default() }
    }

    #[test]
    fn two_threads_share_a_queue_and_what_is_left_hashes() {
        let counts = |wanted: Wanted| {
            let c = wanted.counts();
            (c.queues, c.threads, c.hash_threads)
        };
        let shared = [1, 2, 3, 4, 8, 16, 128].map(|cpus| counts(machine(cpus, true)));
        assert_eq!(shared, [(1, 1, 0), (1, 2, 1), (1, 2, 1), (1, 2, 2), (2, 2, 4), (4, 2, 8), (4, 2, 8)]);
        let odd = [5, 6, 10, 14].map(|cpus| counts(machine(cpus, true)));
        assert_eq!(odd, [(1, 2, 3), (1, 2, 4), (2, 2, 6), (3, 2, 8)]);
        let not = [1, 2, 3, 4, 8, 128].map(|cpus| counts(machine(cpus, false)));
        assert_eq!(not, [(1, 1, 0), (1, 1, 1), (2, 1, 1), (2, 1, 2), (4, 1, 4), (4, 1, 8)]);
        let four = Wanted { queues: Some(4), ..machine(2, true) };
        assert_eq!(counts(four), (4, 1, 0), "no more threads than processors");
        assert_eq!(
            counts(Wanted { threads: Some(3), hash_threads: Some(2), ..four }),
            (4, 3, 2),
            "unless they are wanted"
        );
        assert_eq!(counts(Wanted { depth: Some(1), ..machine(4, true) }), (1, 1, 3), "a request for each");
        let most = Wanted { queues: Some(u16::MAX), threads: Some(u16::MAX), ..machine(4, true) };
        assert_eq!(counts(most), (u16::MAX, u16::MAX, 1));
    }

    fn plan(block_size: u32, size: u64) -> VolumeInfo {
        let options = FormatOptions { size: Some(size), ..FormatOptions::new(block_size, [0; 16]) };
        ublk_integrity::create::plan(&options).unwrap()
    }

    pub(in crate::daemon) fn settings() -> Settings {
        let json = serde_json::json!({
            "data": "/dev/vda", "meta": null, "key": "stdin", "queues": 4, "depth": 128, "cache": 64 << 20,
            "max_io": DEFAULT_MAX_IO, "prefetch": true, "on_mismatch": "fail", "discard": true, "read_only": false,
            "verbose": false, "recovery": true,
        });
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn the_sync_log_needs_write_back_and_a_log_for_it() {
        let of = |log_size| VolumeInfo { log_size, ..plan(4096, 1 << 30) };
        let (large, small) = (of(320 << 10), of(316 << 10));
        let possible =
            [(&large, false, 1, true), (&large, true, 1, false), (&large, false, 0, false), (&small, false, 1, false)];
        for (volume, read_only, write_back, possible) in possible {
            let decide = |option: SyncLog| option.decide(volume, read_only, write_back).map_err(|failure| failure.exit);
            assert_eq!(decide(SyncLog::Off), Ok(false));
            assert_eq!(decide(SyncLog::Auto), Ok(possible));
            assert_eq!(decide(SyncLog::On), if possible { Ok(true) } else { Err(Exit::Arguments) });
        }
        let said = SyncLog::On.decide(&small, false, 1).unwrap_err().message;
        assert!(["--sync-log on", "316.00 KiB", "320.00 KiB"].iter().all(|word| said.contains(word)), "{said}");
    }

    #[test]
    fn a_device_that_an_older_program_added_has_no_sync_log() {
        assert_eq!(settings().sync_log, SyncLog::Off);
        let now = serde_json::json!(Settings { sync_log: SyncLog::Auto, ..settings() });
        assert_eq!((now.get("sync_log"), &now["sync_log_option"]), (None, &"auto".into()));
        assert_eq!(serde_json::from_value::<Settings>(now).unwrap().sync_log, SyncLog::Auto);
    }

    #[test]
    fn the_settings_name_is_not_that_of_the_recovery_report() {
        let now = serde_json::json!(settings());
        assert_eq!((now.get("recovery"), &now["user_recovery"]), (None, &true.into()));
        assert!(serde_json::from_value::<Settings>(now).unwrap().recovery, "and it is read back");
    }

    #[test]
    fn defaults_shrink_to_what_is_available() {
        let plan = plan(4096, 1 << 30);
        let of = |available: u64| {
            let d = Defaults::for_machine(4 << 30, available, machine(2, true), DEFAULT_MAX_IO, Some(&plan));
            (d, most_memory(Some(&plan), d.counts, DEFAULT_MAX_IO, d.cache))
        };
        let (_, ample) = of(4 << 30);
        assert!(ample > 200 << 20);
        for megabytes in [60, 80, 100, 150, 200] {
            let (d, most) = of(megabytes << 20);
            assert!(most <= megabytes << 20, "{megabytes} MiB: {d:?} take {most}");
            assert!(most > (megabytes << 20) / 3, "{megabytes} MiB: {d:?} take {most}");
        }
        let (least, most) = of(0);
        assert_eq!((least.counts.queues, least.counts.depth, least.counts.write_back, least.cache), (1, 8, 4, 1 << 20));
        assert!(most < 60 << 20, "{most}");
    }

    #[test]
    fn more_memory_than_there_is_is_exit_3() {
        let available = Available::of_test(1 << 30);
        let fits = |settings: Settings| settings.refuse_more_than(&available, None);
        assert!(fits(settings()).is_ok());
        let too_much = [
            Settings { depth: 4096, max_io: 32 << 20, ..settings() },
            Settings { queues: 4096, depth: 4096, max_io: 32 << 20, cache: 100 << 40, ..settings() },
            Settings { cache: 100 << 40, ..settings() },
            Settings { cache: u64::MAX, ..settings() },
            Settings { queues: 600, depth: 1, max_io: 4096, ..settings() },
        ];
        for settings in too_much {
            let failure = fits(settings).unwrap_err();
            assert_eq!(failure.exit, Exit::Memory);
            assert!(failure.message.contains("1.00 GiB") && failure.message.contains("--cache"), "{failure}");
        }
    }

    #[test]
    fn only_a_cache_that_may_shrink_does() {
        let wanted = settings().most_memory(None);
        let mut ample = settings();
        assert_eq!(ample.fit(&Available::of_test(wanted), None, true).unwrap(), wanted);
        assert_eq!(ample.cache, settings().cache);
        let scarce = Available::of_test(wanted - (20 << 20));
        let mut shrunk = settings();
        assert!(shrunk.fit(&scarce, None, true).unwrap() <= scarce.bytes);
        assert!((40 << 20..44 << 20).contains(&shrunk.cache), "{}", shrunk.cache);
        assert_eq!(settings().fit(&scarce, None, false).unwrap_err().exit, Exit::Memory);
        let too_scarce = Available::of_test(wanted - (64 << 20));
        assert_eq!(settings().fit(&too_scarce, None, true).unwrap_err().exit, Exit::Memory);
    }

    #[test]
    fn the_device_that_two_need_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let [d1, d2, m] = ["d1", "d2", "m"].map(|name| folder.path().join(name));
        [&d1, &d2, &m].into_iter().for_each(|path| std::fs::write(path, "").unwrap());
        let with =
            |data: &PathBuf, meta: Option<&PathBuf>| Settings { data: data.clone(), meta: meta.cloned(), ..settings() };
        assert_eq!(with(&d2, Some(&m)).shared_device(&with(&d1, Some(&m))), Some(m.as_path()), "not the data device");
        assert_eq!(with(&d1, Some(&m)).shared_device(&with(&m, None)), Some(m.as_path()));
        assert_eq!(with(&d1, Some(&m)).shared_device(&with(&d1, Some(&d2))), Some(d1.as_path()));
        assert_eq!(with(&d1, Some(&m)).shared_device(&with(&d2, None)), None);
    }

    #[test]
    fn what_a_volume_takes_is_known_without_its_device() {
        let small = plan(4096, 1 << 30);
        // Its device does not exist: whoever looks for it here takes it for any volume.
        let mut known = Settings { data: "/nowhere".into(), ..settings() };
        let most = known.fit(&Available::of_test(1 << 30), Some(&small), false).unwrap();
        assert!(most < known.most_memory(None), "{most}");
    }
}

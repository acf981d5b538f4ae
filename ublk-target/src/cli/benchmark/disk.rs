//! The verified path on a real disk beside plain I/O on the same file, and opening after a crash.

use super::{
    lanes::{Lane, Pattern, Run, Target, Until, lanes},
    tags::{TagBench, median},
};
use crate::{
    device::{Backings, Use},
    event_loop::HashPool,
    failure::{Context, Exit, Failure, Outcome},
    offline::Offline,
    random::random,
    size::Size,
};
use serde::Serialize;
use std::{
    fs::File,
    path::Path,
    time::{Duration, Instant},
};
use ublk_integrity::{
    MasterKey, TagAlgorithm, Volume,
    create::{self, FormatOptions},
    open::{Access, OpenOptions, open},
};

const BLOCK: u32 = 4096;
/// Bytes of the largest request.
pub const LARGEST: usize = 1 << 20;

const fn pattern(name: &'static str, request: usize, depth: usize, random: bool, write: bool) -> Pattern {
    Pattern { name, request, depth, random, write }
}

const PATTERNS: [Pattern; 6] = [
    pattern("read 4K random, depth 1", 4 << 10, 1, true, false),
    pattern("read 4K random, depth 32", 4 << 10, 32, true, false),
    pattern("read 1M sequential, depth 32", 1 << 20, 32, false, false),
    pattern("write 4K random, depth 1", 4 << 10, 1, true, true),
    pattern("write 4K random, depth 32", 4 << 10, 32, true, true),
    pattern("write 1M sequential, depth 32", 1 << 20, 32, false, true),
];
const FILL: Pattern = pattern("fill", LARGEST, 8, false, true);
const DEEPEST: usize = 32;

/// Turns of each pattern: plain, the tags alone and verified, one after the other, all of the same
/// length: what else a machine does comes and goes by the second, and must not spoil more of one
/// than of another.
const TURNS: u32 = 5;
/// Writes in the log when the power fails.
const CRASH_WRITES: u64 = 10_000;
/// A log that holds all of them, however few share a record: 10,000 × 4 KiB.
const CRASH_LOG: u64 = 64 << 20;
/// A volume whose pending tags hold them: 64 MiB are 16,384 blocks. Nobody makes a
/// checkpoint meanwhile.
const CRASH_VOLUME: u64 = 64 << 20;

/// Bytes per second of a pattern, median over the turns.
#[derive(Serialize)]
pub struct DiskSpeed {
    pub pattern: &'static str,
    /// One for requests; the others hash for it.
    pub threads: usize,
    pub request_bytes: usize,
    pub plain: f64,
    /// Of the tags alone, as many blocks at a time, by one thread.
    pub tags: f64,
    pub verified: f64,
}

/// What a disk was found to do.
#[derive(Serialize)]
pub struct DiskReport {
    pub disk: Vec<DiskSpeed>,
    /// Seconds to format a sparse volume of 1 TiB.
    pub format_1t_seconds: f64,
    /// Random writes of 4 KiB that were in the log when the volume was left as by a power cut.
    pub crash_writes: u64,
    /// Seconds to open it.
    pub open_after_crash_seconds: f64,
}

/// Everything that `benchmark --data` measures, on scratch files in `folder`.
pub fn measure(folder: &Path, size: Size, tag: TagAlgorithm, time: Duration, threads: usize) -> Outcome<DiskReport> {
    let size = size.0 / LARGEST as u64 * LARGEST as u64;
    let format_1t_seconds = format_1t(folder)?;
    let usual = FormatOptions { tag, ..options(size, None) };
    let crash = FormatOptions { tag, ..options(size.max(CRASH_VOLUME), Some(CRASH_LOG)) };
    let volume_bytes = create::plan(&usual)?.data_device_bytes.max(create::plan(&crash)?.data_device_bytes);
    let file_bytes = volume_bytes + size;
    let bench = Bench {
        // Plain I/O goes to the same file, behind the volume.
        offline: scratch(folder, file_bytes)?,
        size,
        plain: Target::Plain(volume_bytes),
        turn: time / TURNS,
        threads,
        hashing: HashPool::new(threads - 1),
    };
    bench.fill_holes(file_bytes)?;
    let disk = bench.patterns(&bench.new_volume(&usual)?)?;
    let open_after_crash_seconds = bench.open_after_crash(&crash)?;
    Ok(DiskReport { disk, format_1t_seconds, crash_writes: CRASH_WRITES, open_after_crash_seconds })
}

/// Refuses what [`measure`] can't use.
pub fn try_scratch(folder: &Path, size: Size) -> Outcome {
    if size.0 < LARGEST as u64 {
        return Err(Failure::new(Exit::Arguments, format_args!("--size {} bytes: at least 1M is needed", size.0)));
    }
    if !folder.metadata().doing(format_args!("can't use {}", folder.display()))?.is_dir() {
        return Err(Failure::new(Exit::Device, format_args!("{} is no folder", folder.display())));
    }
    create::plan(&options(size.0 / LARGEST as u64 * LARGEST as u64, None))?;
    scratch(folder, size.0).map(drop)
}

fn options(size: u64, log_size: Option<u64>) -> FormatOptions {
    FormatOptions { size: Some(size), log_size, ..FormatOptions::new(BLOCK, uuid::Uuid::new_v4().into_bytes()) }
}

fn format_1t(folder: &Path) -> Outcome<f64> {
    let options = options(1 << 40, None);
    let offline = scratch(folder, create::plan(&options)?.data_device_bytes)?;
    let key = MasterKey::new(&random::<32>()?)?;
    let begin = Instant::now();
    offline.run(create::format(&offline.io(), &key, &options))??;
    Ok(begin.elapsed().as_secs_f64())
}

/// A new file of so many bytes, which has lost its name already: it goes when it is closed, also by
/// whoever kills this process.
fn scratch(folder: &Path, bytes: u64) -> Outcome<Offline> {
    let path = folder.join(format!("ublk-integrity-benchmark.{}", std::process::id()));
    let what = format!("can't make {}", path.display());
    let file = File::create_new(&path).doing(&what)?;
    let open = || Offline::with(Backings::open(&path, None, Use::Exclusive, Duration::ZERO)?);
    let opened = file.set_len(bytes).doing(&what).and_then(|()| open());
    std::fs::remove_file(&path).doing(format!("can't remove {}", path.display()))?;
    opened
}

struct Bench {
    offline: Offline,
    /// Bytes that are read and written: whole requests of the largest size.
    size: u64,
    /// Plain requests go here.
    plain: Target<'static>,
    /// How long one turn takes.
    turn: Duration,
    /// Most threads.
    threads: usize,
    hashing: HashPool,
}

/// An open volume and its key.
struct Opened {
    volume: Volume,
    key: MasterKey,
    tag: TagAlgorithm,
}

impl Bench {
    fn new_volume(&self, options: &FormatOptions) -> Outcome<Opened> {
        let key = MasterKey::new(&random::<32>()?)?;
        self.offline.run(create::format(&self.offline.io(), &key, options))??;
        Ok(Opened { volume: self.open(&key)?, key, tag: options.tag })
    }

    fn open(&self, key: &MasterKey) -> Outcome<Volume> {
        let options = OpenOptions {
            cache_bytes: 64 << 20,
            max_requests: DEEPEST,
            max_request_bytes: LARGEST,
            hash_threads: Some(self.hashing.threads()),
            ..OpenOptions::new(Access::ReadWrite, random()?)
        };
        Ok(self.offline.run(open(&self.offline.io(), key, &options))??)
    }

    /// Writes all of the file once: the first write to a hole has the file system write much else,
    /// which would be measured until the log and the tree have been everywhere.
    fn fill_holes(&self, bytes: u64) -> Outcome {
        let lanes = &mut lanes(None, FILL.depth, LARGEST);
        self.run_over(bytes, &FILL, Target::Plain(0), lanes, 1, Until::Moved(bytes)).map(drop)
    }

    /// All patterns, plain and through the volume in turns. What is read has been written before.
    fn patterns(&self, opened: &Opened) -> Outcome<Vec<DiskSpeed>> {
        let volume = &opened.volume;
        let (mut plain, mut verified) = (lanes(None, DEEPEST, LARGEST), lanes(Some(volume), DEEPEST, LARGEST));
        let (target, turn) = (Target::Volume(volume), Until::Elapsed(self.turn));
        self.run(&FILL, target, &mut verified, 1, Until::Moved(self.size))?;
        let mut one = |pattern: &Pattern, threads: usize| {
            let mut tags = TagBench::new(opened.tag, BLOCK, pattern.request / BLOCK as usize, LARGEST);
            let (mut speeds, mut plain_speeds, mut tag_speeds) = (Vec::new(), Vec::new(), Vec::new());
            for _ in 0..TURNS {
                plain_speeds.push(self.run(pattern, self.plain, &mut plain, threads, turn)?);
                tag_speeds.push(tags.measure(self.turn).bytes_per_second);
                speeds.push(self.run(pattern, target, &mut verified, threads, turn)?);
            }
            Ok(DiskSpeed {
                pattern: pattern.name,
                threads,
                request_bytes: pattern.request,
                plain: median(&mut plain_speeds),
                tags: median(&mut tag_speeds),
                verified: median(&mut speeds),
            })
        };
        let counts = if self.threads > 1 { &[1, self.threads][..] } else { &[1] };
        // One request at a time needs one thread.
        let runs = PATTERNS.iter().flat_map(|p| counts.iter().filter(|n| **n <= p.depth).map(move |n| (p, *n)));
        runs.map(|(pattern, threads)| one(pattern, threads)).collect()
    }

    /// Seconds to open a volume that was left with [`CRASH_WRITES`] random writes in its
    /// log and no checkpoint.
    fn open_after_crash(&self, options: &FormatOptions) -> Outcome<f64> {
        let Opened { volume, key, .. } = self.new_volume(options)?;
        let writes = pattern("write 4K random, depth 32", 4 << 10, DEEPEST, true, true);
        let mut lanes = lanes(Some(&volume), DEEPEST, LARGEST);
        let total = Until::Moved(CRASH_WRITES * writes.request as u64);
        self.run(&writes, Target::Unattended(&volume), &mut lanes, 1, total)?;
        drop(lanes);
        drop(volume);
        let begin = Instant::now();
        let volume = self.open(&key)?;
        let seconds = begin.elapsed().as_secs_f64();
        let found = volume.recovery();
        // Several writes of one block count once.
        if found.blocks == 0 || found.corrupt + found.older + found.unreadable > 0 {
            return Err(Failure::new(Exit::Integrity, format_args!("recovery after the writes found {found:?}")));
        }
        Ok(seconds)
    }

    fn run(
        &self,
        pattern: &Pattern,
        target: Target<'_>,
        lanes: &mut [Lane],
        threads: usize,
        until: Until,
    ) -> Outcome<f64> {
        self.run_over(self.size, pattern, target, lanes, threads, until)
    }

    fn run_over(
        &self,
        size: u64,
        pattern: &Pattern,
        target: Target<'_>,
        lanes: &mut [Lane],
        threads: usize,
        until: Until,
    ) -> Outcome<f64> {
        let (backings, files) = self.offline.handles();
        let run = Run { pattern, target, size, until, threads, hashing: &self.hashing, backings, files };
        run.measure(&mut lanes[..pattern.depth])
    }
}

//! The verified path on a real disk beside plain I/O on the same file, and opening after a crash.

use super::{
    lane::{Lane, lanes},
    lanes::{Found, Run, Target, Until},
    pattern::{Act, Pattern, Places},
    pinned::Pinned,
    tags::{TagBench, median},
    traffic::{Asked, Counted, Traffic},
};
use crate::{
    checkpoints::{self, AtStop, Stop},
    daemon::settings::DEFAULT_WRITE_BACK,
    device::{Backings, Use},
    event_loop::{HashPool, OwnRing},
    failure::{Context, Exit, Failure, Outcome, no_ring},
    offline::Offline,
    random::random,
    size::Size,
    write_back_file::MOST_BYTES,
};
use serde::Serialize;
use std::{
    fs::File,
    path::Path,
    process, thread,
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

const fn pattern(name: &'static str, act: Act, places: Places, request: usize, depth: usize) -> Pattern {
    Pattern { name, act, places, request, depth }
}

const PATTERNS: [Pattern; 11] = [
    pattern("read 4K random, depth 1", Act::Read, Places::Scattered, 4 << 10, 1),
    pattern("read 4K random, depth 32", Act::Read, Places::Scattered, 4 << 10, 32),
    pattern("read 1M sequential, depth 32", Act::Read, Places::InOrder, 1 << 20, 32),
    pattern("write 4K random, depth 1", Act::Write, Places::Scattered, 4 << 10, 1),
    pattern("write 4K random, depth 32", Act::Write, Places::Scattered, 4 << 10, 32),
    pattern("write 1M sequential, depth 32", Act::Write, Places::InOrder, 1 << 20, 32),
    pattern("write 4K fsync, depth 1", Act::WriteFlush, Places::Scattered, 4 << 10, 1),
    // As PostgreSQL writes the last page of its log.
    pattern("write 4K fsync, depth 1, rewritten", Act::WriteFlush, Places::EachTwice, 4 << 10, 1),
    // As SQLite does, whose frames are a little larger than a page.
    pattern("write 8K fsync, overlapping tail", Act::WriteFlush, Places::HalfOver, 8 << 10, 1),
    pattern("write 4K FUA, depth 1", Act::WriteFua, Places::Scattered, 4 << 10, 1),
    pattern("fsync mix, 4 jobs", Act::ReadWriteFlush, Places::Scattered, 4 << 10, 4),
];
/// With a cache far smaller than the tags.
const COLD: Pattern = pattern("read 4K random, cold, depth 32", Act::Read, Places::Scattered, 4 << 10, 32);
const FILL: Pattern = pattern("fill", Act::Write, Places::InOrder, LARGEST, 8);
const DEEPEST: usize = 32;

/// Bytes of cached metadata, more than there is.
const CACHE: u64 = 64 << 20;
/// Bytes of a tag.
const TAG: u64 = 32;
/// The tags are so many times as large as the cache for cold reads, which also holds tree pages.
const COLD_SHARE: u64 = 16;

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
    /// What all threads use of the processors for a request.
    pub plain_processor_seconds: f64,
    pub verified_processor_seconds: f64,
    /// Reads of metadata that a verified read takes.
    pub metadata_reads_per_read: Option<f64>,
    /// Bytes written to the device for a byte that was to be written: data, log and checkpoints.
    pub written_per_byte: Option<f64>,
    /// Syncs of the device that a verified write takes, those of checkpoints with it. A durable
    /// write is none.
    pub syncs_per_write: Option<f64>,
}

impl DiskSpeed {
    /// A speed relative to plain requests, each with as many more as there are metadata reads: what
    /// a cold read can't do without.
    pub fn to_plain_with_metadata(&self) -> f64 {
        self.verified / self.plain * (1.0 + self.metadata_reads_per_read.unwrap_or_default())
    }
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
        traffic: Traffic::default(),
    };
    bench.fill_holes(file_bytes)?;
    let disk = bench.patterns(bench.new_volume(&usual)?)?;
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
    /// Of the volume.
    traffic: Traffic,
}

/// A volume, which each pattern opens anew: the last checkpoint of the one before has ended its life.
struct Formatted {
    key: MasterKey,
    tag: TagAlgorithm,
    cache: u64,
}

impl Bench {
    fn new_volume(&self, options: &FormatOptions) -> Outcome<Formatted> {
        let key = MasterKey::new(&random::<32>()?)?;
        self.offline.run(create::format(&self.offline.io(), &key, options))??;
        Ok(Formatted { key, tag: options.tag, cache: CACHE })
    }

    fn open(&self, formatted: &Formatted) -> Outcome<Volume> {
        let options = OpenOptions {
            cache_bytes: formatted.cache,
            sync_log: true,
            write_back_slots: DEFAULT_WRITE_BACK.into(),
            max_requests: DEEPEST + usize::from(DEFAULT_WRITE_BACK),
            max_request_bytes: LARGEST,
            hash_threads: Some(self.hashing.threads()),
            ..OpenOptions::new(Access::ReadWrite, random()?)
        };
        Ok(self.offline.run(open(&self.offline.io(), &formatted.key, &options))??)
    }

    /// Writes all of the file once: the first write to a hole has the file system write much else,
    /// which would be measured until the log and the tree have been everywhere.
    fn fill_holes(&self, bytes: u64) -> Outcome {
        let lanes = &mut lanes(None, FILL.depth, LARGEST);
        let run = Run { size: bytes, ..self.run(&FILL, Target::Plain(0), 1, Until::Moved(bytes)) };
        run.measure(lanes, &mut []).map(drop)
    }

    /// All patterns, plain and through the volume in turns. What is read has been written before.
    fn patterns(&self, formatted: Formatted) -> Outcome<Vec<DiskSpeed>> {
        let volume = self.open(&formatted)?;
        let mut memory = Memory::new(&volume);
        let fill = self.run(&FILL, Target::Volume(&volume), 1, Until::Moved(self.size));
        self.beside_checkpoints(&volume, || fill.measure(&mut memory.verified[..FILL.depth], &mut []))?;
        drop((memory, volume));
        let several = self.threads > 1;
        // One request at a time needs one thread, and so do those that wait for a sync.
        let runs = PATTERNS.iter().flat_map(|pattern| {
            let more = several && self.threads <= pattern.depth && !pattern.act.is_durable();
            [Some((pattern, 1)), more.then_some((pattern, self.threads))].into_iter().flatten()
        });
        let mut speeds: Vec<_> =
            runs.map(|(pattern, threads)| self.turns(&formatted, pattern, threads)).collect::<Outcome<_>>()?;
        let tags = self.size / u64::from(BLOCK) * TAG;
        speeds.push(self.turns(&Formatted { cache: tags / COLD_SHARE, ..formatted }, &COLD, 1)?);
        Ok(speeds)
    }

    /// One pattern, in turns, beside one checkpoint thread.
    fn turns(&self, formatted: &Formatted, pattern: &Pattern, threads: usize) -> Outcome<DiskSpeed> {
        let volume = self.open(formatted)?;
        let Memory { mut plain, mut verified, mut slots } = Memory::new(&volume);
        let mut tags = TagBench::new(formatted.tag, BLOCK, pattern.request / BLOCK as usize, LARGEST);
        let (mut plain_turns, mut tag_speeds, mut turns) = (Vec::new(), Vec::new(), Vec::new());
        let turn = Until::Elapsed(self.turn);
        let apart = Traffic::default();
        let plainly = Run { traffic: &apart, ..self.run(pattern, self.plain, threads, turn) };
        let run = self.run(pattern, Target::Volume(&volume), threads, turn);
        let before = self.traffic.so_far();
        let asked = self.beside_checkpoints(&volume, || {
            for turn in 0..TURNS {
                // Threads beside it would be pinned, too.
                let _pinned = (threads == 1).then(|| Pinned::at(turn as usize)).flatten();
                plain_turns.push(plainly.measure(&mut plain[..pattern.depth], &mut [])?);
                tag_speeds.push(tags.measure(self.turn).bytes_per_second);
                turns.push(run.measure(&mut verified[..pattern.depth], &mut slots)?);
            }
            // Before the last checkpoint, which would not come so early.
            Ok(self.traffic.so_far() - before)
        })?;
        Ok(speed(pattern, threads, median(&mut tag_speeds), &plain_turns, &turns, asked))
    }

    /// Does the work while another thread makes checkpoints, as in the daemon, and one more at the
    /// end.
    fn beside_checkpoints<T>(&self, volume: &Volume, work: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
        let (stop, traffic) = (Stop::default(), &self.traffic);
        let (backings, files) = self.offline.handles();
        let make_checkpoints = || {
            let ring = backings.descriptors().and_then(OwnRing::new).map_err(|e| no_ring(&e))?;
            let io = Counted { io: ring.storage(files), traffic };
            let done = ring
                .block_on(checkpoints::run(volume, &io, (&stop, AtStop::Close), |_| {}))
                .doing("io_uring failed")?;
            Ok(done?)
        };
        thread::scope(|scope| {
            let checkpoints = scope.spawn(make_checkpoints);
            let done = work();
            stop.set();
            let ended = checkpoints.join().unwrap_or_else(|_| process::abort());
            done.and_then(|done| ended.map(|()| done))
        })
    }

    /// Seconds to open a volume that was left with [`CRASH_WRITES`] random writes in its
    /// log and no checkpoint.
    fn open_after_crash(&self, options: &FormatOptions) -> Outcome<f64> {
        let formatted = self.new_volume(options)?;
        let volume = self.open(&formatted)?;
        let writes = pattern("write 4K random, depth 32", Act::Write, Places::Scattered, 4 << 10, DEEPEST);
        let mut lanes = lanes(Some(&volume), DEEPEST, LARGEST);
        let total = Until::Moved(CRASH_WRITES * writes.request as u64);
        let unsynced = Run { synced: false, ..self.run(&writes, Target::Volume(&volume), 1, total) };
        unsynced.measure(&mut lanes, &mut [])?;
        drop(lanes);
        drop(volume);
        let begin = Instant::now();
        let volume = self.open(&formatted)?;
        let seconds = begin.elapsed().as_secs_f64();
        let found = volume.recovery();
        // Several writes of one block count once.
        if found.blocks == 0 || found.corrupt + found.older + found.unreadable > 0 {
            return Err(Failure::new(Exit::Integrity, format_args!("recovery after the writes found {found:?}")));
        }
        Ok(seconds)
    }

    /// A run of a pattern on all bytes.
    fn run<'a>(&'a self, pattern: &'a Pattern, target: Target<'a>, threads: usize, until: Until) -> Run<'a> {
        let (backings, files) = self.offline.handles();
        let (size, hashing, traffic) = (self.size, &self.hashing, &self.traffic);
        Run { pattern, target, size, until, synced: true, threads, hashing, backings, files, traffic }
    }
}

/// The memory of all requests.
struct Memory {
    plain: Vec<Lane>,
    verified: Vec<Lane>,
    /// For writes that are answered early: as many as a thread of the daemon has.
    slots: Vec<Lane>,
}

impl Memory {
    fn new(volume: &Volume) -> Self {
        Self {
            plain: lanes(None, DEEPEST, LARGEST),
            verified: lanes(Some(volume), DEEPEST, LARGEST),
            slots: lanes(Some(volume), DEFAULT_WRITE_BACK.into(), MOST_BYTES),
        }
    }
}

/// What the turns of a pattern come to: medians of speeds, sums of all else.
fn speed(pattern: &Pattern, threads: usize, tags: f64, plain: &[Found], verified: &[Found], asked: Asked) -> DiskSpeed {
    let request = pattern.request as f64;
    let speed = |turns: &[Found]| median(&mut turns.iter().map(|t| t.bytes as f64 / t.seconds).collect::<Vec<_>>());
    let bytes = |turns: &[Found]| turns.iter().map(|turn| turn.bytes).sum::<u64>() as f64;
    let processor = |turns: &[Found]| turns.iter().map(|t| t.processor_seconds).sum::<f64>() * request / bytes(turns);
    let (reads, writes) = pattern.act.requests();
    let each = bytes(verified) / request / (reads + writes) as f64;
    let of = |requests: u64, count: u64| (requests > 0).then(|| count as f64 / (each * requests as f64));
    DiskSpeed {
        pattern: pattern.name,
        threads,
        request_bytes: pattern.request,
        plain: speed(plain),
        tags,
        verified: speed(verified),
        plain_processor_seconds: processor(plain),
        verified_processor_seconds: processor(verified),
        metadata_reads_per_read: of(reads, asked.metadata_reads),
        written_per_byte: of(writes, asked.written).map(|bytes| bytes / request),
        syncs_per_write: of(writes, asked.syncs),
    }
}

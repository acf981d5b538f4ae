//! The verified path on a real disk beside plain I/O on the same file, and opening after a crash.

use crate::{
    checkpoints::{self, Stop},
    device::{Backings, Use},
    failure::{Context, Exit, Failure, Outcome},
    offline::{Offline, random},
    ring::{DeviceFiles, OwnRing, RingStorage},
    size::Size,
};
use serde::Serialize;
use std::{
    cell::{Cell, RefCell},
    fs::File,
    future::Future,
    os::fd::RawFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use ublk_integrity::{
    BlockIndex, BlockRange, Buf, ByteOffset, Device, Durability, MasterKey, OnMismatch, Slot, Storage, TagAlgorithm,
    Volume,
    create::{self, FormatOptions},
    open::{Access, OpenOptions, open},
    speed::median,
};

const BLOCK: u32 = 4096;
/// Bytes of the largest request.
pub const LARGEST: usize = 1 << 20;

/// One way to use a disk.
struct Pattern {
    name: &'static str,
    request: usize,
    depth: usize,
    random: bool,
    write: bool,
}

const fn pattern(name: &'static str, request: usize, depth: usize, random: bool, write: bool) -> Pattern {
    Pattern { name, request, depth, random, write }
}

const PATTERNS: [Pattern; 6] = [
    pattern("read 4K random, depth 1", 4 << 10, 1, true, false),
    pattern("read 4K random, depth 32", 4 << 10, 32, true, false),
    pattern("read 1M sequential, depth 16", 1 << 20, 16, false, false),
    pattern("write 4K random, depth 1", 4 << 10, 1, true, true),
    pattern("write 4K random, depth 32", 4 << 10, 32, true, true),
    pattern("write 1M sequential, depth 16", 1 << 20, 16, false, true),
];
const DEEPEST: usize = 32;

/// Plain and verified turns of each pattern, one after the other.
const TURNS: u32 = 3;
/// Writes in the log when the power fails.
const CRASH_WRITES: u64 = 10_000;
/// A log that holds all of them, however few share a record: 10,000 × 4 KiB.
const CRASH_LOG: u64 = 64 << 20;
/// A volume whose pending tags hold them: 64 MiB are 16,384 blocks. Nobody makes a checkpoint meanwhile.
const CRASH_VOLUME: u64 = 64 << 20;

/// Bytes per second of a pattern, median over the turns.
#[derive(Serialize)]
pub struct DiskSpeed {
    pub pattern: &'static str,
    pub request_bytes: usize,
    pub plain: f64,
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
pub fn measure(folder: &Path, size: Size, time: Duration) -> Outcome<DiskReport> {
    let size = size.0 / LARGEST as u64 * LARGEST as u64;
    if size == 0 {
        return Err(Failure::new(Exit::Arguments, format_args!("--size {}: at least 1M is needed", Size(size))));
    }
    let format_1t_seconds = format_1t(folder)?;
    let usual = options(size, None);
    let crash = options(size.max(CRASH_VOLUME), Some(CRASH_LOG));
    let volume_bytes = create::plan(&usual)?.data_device_bytes.max(create::plan(&crash)?.data_device_bytes);
    // Plain I/O goes to the same file, behind the volume.
    let scratch = Scratch::new(folder, volume_bytes + size)?;
    let bench = Bench { offline: scratch.open()?, size, plain_at: volume_bytes, time: time / TURNS };
    let disk = bench.patterns(&bench.new_volume(&usual)?)?;
    let open_after_crash_seconds = bench.open_after_crash(&crash)?;
    Ok(DiskReport { disk, format_1t_seconds, crash_writes: CRASH_WRITES, open_after_crash_seconds })
}

fn options(size: u64, log_size: Option<u64>) -> FormatOptions {
    FormatOptions {
        block_size: BLOCK,
        size: Some(size),
        log_size,
        tag: TagAlgorithm::default(),
        uuid: uuid::Uuid::new_v4().into_bytes(),
        separate_meta: false,
    }
}

fn format_1t(folder: &Path) -> Outcome<f64> {
    let options = options(1 << 40, None);
    let scratch = Scratch::new(folder, create::plan(&options)?.data_device_bytes)?;
    let offline = scratch.open()?;
    let key = MasterKey::new(&random::<32>()?)?;
    let begin = Instant::now();
    offline.run(create::format(&offline.io(), &key, &options))??;
    Ok(begin.elapsed().as_secs_f64())
}

/// A file that goes when this does.
struct Scratch {
    path: PathBuf,
}

impl Scratch {
    fn new(folder: &Path, bytes: u64) -> Outcome<Self> {
        let path = folder.join(format!("ublk-integrity-benchmark.{}", std::process::id()));
        let what = format!("can't make {}", path.display());
        let file = File::create_new(&path).doing(&what)?;
        let scratch = Self { path };
        file.set_len(bytes).doing(&what)?;
        Ok(scratch)
    }

    fn open(&self) -> Outcome<Offline> {
        Offline::with(Backings::open(&self.path, None, Use::Exclusive, Duration::ZERO)?)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

struct Bench {
    offline: Offline,
    /// Bytes that are read and written: whole requests of the largest size.
    size: u64,
    /// Where the bytes of plain requests begin.
    plain_at: u64,
    /// Of one turn.
    time: Duration,
}

/// An open volume and its key.
struct Opened {
    volume: Volume,
    key: MasterKey,
}

/// What one of the requests under way owns.
struct Lane {
    slot: Option<Slot>,
    buf: Buf,
}

/// The state that a pattern's lanes share.
struct Progress {
    begin: Instant,
    next: Cell<u64>,
    bytes: Cell<u64>,
    failed: RefCell<Option<Failure>>,
}

impl Progress {
    fn new() -> Self {
        Self { begin: Instant::now(), next: Cell::new(0), bytes: Cell::new(0), failed: RefCell::new(None) }
    }

    /// Keeps the first failure.
    async fn keep(&self, work: impl Future<Output = Outcome>) {
        if let Err(failure) = work.await {
            self.failed.borrow_mut().get_or_insert(failure);
        }
    }

    /// Bytes per second so far.
    fn result(&self) -> Outcome<f64> {
        match self.failed.borrow_mut().take() {
            Some(failure) => Err(failure),
            None => Ok(self.bytes.get() as f64 / self.begin.elapsed().as_secs_f64()),
        }
    }
}

fn lanes(volume: Option<&Volume>) -> Vec<Lane> {
    let lane = |_| {
        let mut buf = Buf::new(LARGEST);
        buf.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i % 251) as u8 + 1);
        Lane { slot: volume.map(|v| v.slot(0)), buf }
    };
    (0..DEEPEST).map(lane).collect()
}

impl Bench {
    fn new_volume(&self, options: &FormatOptions) -> Outcome<Opened> {
        let key = MasterKey::new(&random::<32>()?)?;
        self.offline.run(create::format(&self.offline.io(), &key, options))??;
        Ok(Opened { volume: self.open(&key)?, key })
    }

    fn open(&self, key: &MasterKey) -> Outcome<Volume> {
        let options = OpenOptions {
            access: Access::ReadWrite,
            cache_bytes: 64 << 20,
            max_slots: DEEPEST,
            queues: 1,
            max_request_bytes: LARGEST,
            separate_meta: false,
            on_mismatch: OnMismatch::Fail,
            open_id: random()?,
            hints: None,
        };
        Ok(self.offline.run(open(&self.offline.io(), key, &options))??)
    }

    /// All patterns, plain and through the volume in turns. What is read has been written before.
    fn patterns(&self, opened: &Opened) -> Outcome<Vec<DiskSpeed>> {
        let volume = &opened.volume;
        let (mut plain, mut verified) = (lanes(None), lanes(Some(volume)));
        self.offline.register(plain.iter_mut().chain(&mut verified).map(|lane| &mut lane.buf));
        let fill = pattern("fill", LARGEST, 8, false, true);
        self.measure(&fill, None, &mut plain, Some(self.size))?;
        self.measure(&fill, Some(volume), &mut verified, Some(self.size))?;
        let one = |pattern: &Pattern| {
            let (mut speeds, mut plain_speeds) = (Vec::new(), Vec::new());
            for _ in 0..TURNS {
                plain_speeds.push(self.measure(pattern, None, &mut plain, None)?);
                speeds.push(self.measure(pattern, Some(volume), &mut verified, None)?);
            }
            Ok(DiskSpeed {
                pattern: pattern.name,
                request_bytes: pattern.request,
                plain: median(&mut plain_speeds),
                verified: median(&mut speeds),
            })
        };
        PATTERNS.iter().map(one).collect()
    }

    /// Seconds to open a volume that was left with [`CRASH_WRITES`] random writes in its log and no checkpoint.
    fn open_after_crash(&self, options: &FormatOptions) -> Outcome<f64> {
        let Opened { volume, key } = self.new_volume(options)?;
        let writes = pattern("write 4K random, depth 32", 4 << 10, DEEPEST, true, true);
        let io = self.offline.io();
        let progress = Progress::new();
        let mut lanes = lanes(Some(&volume));
        let total = Some(CRASH_WRITES * writes.request as u64);
        let requests =
            lanes.iter_mut().map(|lane| progress.keep(self.lane(&writes, Some(&volume), &io, lane, &progress, total)));
        self.offline.run_together(requests, async {})?;
        progress.result()?;
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

    /// Bytes per second over `self.time`, or over exactly `total` bytes.
    fn measure(
        &self,
        pattern: &Pattern,
        volume: Option<&Volume>,
        lanes: &mut [Lane],
        total: Option<u64>,
    ) -> Outcome<f64> {
        let io = self.offline.io();
        let progress = Progress::new();
        let (stop, handles) = (Stop::default(), self.offline.handles());
        let requests = lanes[..pattern.depth]
            .iter_mut()
            .map(|lane| progress.keep(self.lane(pattern, volume, &io, lane, &progress, total)));
        std::thread::scope(|threads| {
            // As in the daemon, on a thread and a ring of their own.
            let checkpoints = volume.map(|volume| threads.spawn(|| Self::make_checkpoints(&handles, volume, &stop)));
            let done = self.offline.run_together(requests, async {});
            stop.set();
            done.and(checkpoints.map_or(Ok(()), |thread| thread.join().unwrap_or_else(|_| std::process::abort())))
        })?;
        progress.result()
    }

    fn make_checkpoints(handles: &(Vec<RawFd>, DeviceFiles), volume: &Volume, stop: &Stop) -> Outcome {
        let (fds, files) = handles;
        let ring = OwnRing::new(fds).doing("can't set up io_uring")?;
        let io = ring.storage(*files);
        let done = ring.block_on(checkpoints::run(volume, &io, stop, |_| {})).doing("io_uring failed")?;
        Ok(done?)
    }

    async fn lane(
        &self,
        pattern: &Pattern,
        volume: Option<&Volume>,
        io: &RingStorage,
        lane: &mut Lane,
        progress: &Progress,
        total: Option<u64>,
    ) -> Outcome {
        let places = self.size / pattern.request as u64;
        loop {
            let done = match total {
                Some(total) => progress.next.get() * pattern.request as u64 >= total,
                None => progress.begin.elapsed() >= self.time,
            };
            if done {
                return Ok(());
            }
            let turn = progress.next.replace(progress.next.get() + 1);
            let place = if pattern.random { scatter(turn) } else { turn } % places;
            let at = place * pattern.request as u64;
            match volume {
                Some(volume) => verified_request(pattern, volume, io, lane, at).await?,
                None => plain_request(pattern, io, lane, self.plain_at + at).await?,
            }
            progress.bytes.set(progress.bytes.get() + pattern.request as u64);
        }
    }
}

async fn verified_request(pattern: &Pattern, volume: &Volume, io: &RingStorage, lane: &mut Lane, at: u64) -> Outcome {
    let buf = std::mem::replace(&mut lane.buf, Buf::new(0));
    let slot = lane.slot.as_mut().expect("this lane was made for the volume");
    let range = BlockRange::new(BlockIndex(at / u64::from(BLOCK)), pattern.request as u64 / u64::from(BLOCK));
    let result: Outcome;
    (result, lane.buf) = match pattern.write {
        true => {
            let (result, buf) = volume.write(io, slot, range, buf, Durability::MayBeLost).await;
            (result.map_err(Failure::from), buf)
        }
        false => {
            let (result, buf) = volume.read(io, slot, range, buf).await;
            (result.map_err(Failure::from), buf)
        }
    };
    result
}

async fn plain_request(pattern: &Pattern, io: &RingStorage, lane: &mut Lane, at: u64) -> Outcome {
    let buf = std::mem::replace(&mut lane.buf, Buf::new(0));
    let part = 0..pattern.request;
    let transfer = match pattern.write {
        true => io.write(Device::Data, ByteOffset(at), buf, part, Durability::MayBeLost),
        false => io.read(Device::Data, ByteOffset(at), buf, part),
    };
    let result;
    (result, lane.buf) = transfer.await;
    result.map_err(|e| Failure::new(Exit::Device, format_args!("plain I/O at {at}: {e}")))
}

/// Spreads consecutive numbers over all of u64 (the finalizer of a 64-bit hash; no two collide).
fn scatter(n: u64) -> u64 {
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

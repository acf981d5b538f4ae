//! `benchmark`: how fast tags are made here, and what verification costs on a disk.

use crate::{
    checkpoints::{self, Stop},
    device::{Backings, Use},
    failure::{Context, Exit, Failure, Outcome},
    offline::{Offline, random},
    ring::RingStorage,
    size::Size,
};
use serde::Serialize;
use std::{
    cell::{Cell, RefCell},
    fs::File,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use ublk_integrity::{
    BlockIndex, BlockRange, Buf, ByteOffset, Device, Durability, MasterKey, OnMismatch, Slot, Storage, TagAlgorithm,
    Volume,
    create::{self, FormatOptions},
    open::{Access, OpenOptions, open},
    speed::{TagBench, TagSpeed},
};

/// Measure the tag algorithms on this CPU and, with --data, verified reads and writes beside plain ones
#[derive(clap::Args)]
pub struct Args {
    /// Folder for a scratch volume, which is removed again; no ublk and no root needed
    #[arg(long, value_name = "FOLDER")]
    data: Option<PathBuf>,
    /// Usable size of the scratch volume
    #[arg(long, default_value = "256M", requires = "data")]
    size: Size,
    /// Seconds for each measurement
    #[arg(long, default_value_t = 1.0, value_name = "SECONDS")]
    time: f64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

const BLOCK: u32 = 4096;
const LARGEST: usize = 1 << 20;

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
    pattern("read 1M sequential, depth 8", 1 << 20, 8, false, false),
    pattern("write 4K random, depth 1", 4 << 10, 1, true, true),
    pattern("write 4K random, depth 32", 4 << 10, 32, true, true),
    pattern("write 1M sequential, depth 8", 1 << 20, 8, false, true),
];
const DEEPEST: usize = 32;

#[derive(Serialize)]
struct Report {
    tags: Vec<TagSpeed>,
    disk: Vec<DiskSpeed>,
}

/// Bytes per second of a pattern.
#[derive(Serialize)]
struct DiskSpeed {
    pattern: &'static str,
    request_bytes: usize,
    plain: f64,
    verified: f64,
}

pub fn run(args: &Args) -> Outcome {
    if !(0.01..=3600.0).contains(&args.time) {
        return Err(Failure::new(Exit::Arguments, format_args!("--time {}: must be from 0.01 to 3600", args.time)));
    }
    let time = Duration::from_secs_f64(args.time);
    let tags = tag_speeds(time / 4);
    if !args.json {
        print_tags(&tags);
    }
    let disk = args.data.as_deref().map(|folder| disk_speeds(folder, args.size, time)).transpose()?.unwrap_or_default();
    if args.json {
        println!("{}", serde_json::to_string_pretty(&Report { tags, disk }).expect("plain data"));
    } else if !disk.is_empty() {
        print_disk(&disk);
    }
    Ok(())
}

fn tag_speeds(time: Duration) -> Vec<TagSpeed> {
    let sizes = [(512, 1), (512, 8), (4096, 1), (4096, 8), (4096, 128)];
    let benches = TagAlgorithm::ALL.into_iter().flat_map(|tag| sizes.map(|(block, batch)| (tag, block, batch)));
    benches.map(|(tag, block, batch)| TagBench::new(tag, block, batch, LARGEST).measure(time)).collect()
}

fn print_tags(tags: &[TagSpeed]) {
    println!("{:<14}{:>6}{:>16}  {:<14}{:>14}", "tags", "block", "blocks at once", "by", "speed");
    for speed in tags {
        let name = serde_json::to_value(speed.algorithm).ok();
        let name = name.as_ref().and_then(|name| name.as_str()).unwrap_or("?");
        let TagSpeed { block_size, batch, implementation, bytes_per_second, .. } = speed;
        println!("{name:<14}{block_size:>6}{batch:>16}  {implementation:<14}{:>14}", rate(*bytes_per_second));
    }
}

fn print_disk(disk: &[DiskSpeed]) {
    println!("\n{:<30}{:>14}{:>14}{:>12}{:>8}", "one thread, in process", "plain", "verified", "verified/s", "ratio");
    for speed in disk {
        let DiskSpeed { pattern, request_bytes, plain, verified } = speed;
        let requests = verified / *request_bytes as f64;
        println!("{pattern:<30}{:>14}{:>14}{requests:>12.0}{:>8.2}", rate(*plain), rate(*verified), verified / plain);
    }
}

fn rate(bytes_per_second: f64) -> String {
    format!("{}/s", Size(bytes_per_second as u64))
}

/// Both columns, on one scratch file in `folder`.
fn disk_speeds(folder: &Path, size: Size, time: Duration) -> Outcome<Vec<DiskSpeed>> {
    let options = FormatOptions {
        block_size: BLOCK,
        size: Some(size.0),
        log_size: None,
        tag: TagAlgorithm::default(),
        uuid: uuid::Uuid::new_v4().into_bytes(),
        separate_meta: false,
    };
    let plan = create::plan(&options)?;
    let scratch = Scratch::new(folder, plan.data_device_bytes)?;
    let bench = Bench {
        offline: Offline::with(Backings::open(&scratch.path, None, Use::Exclusive, Duration::ZERO)?)?,
        size: plan.size / LARGEST as u64 * LARGEST as u64,
        time,
    };
    if bench.size == 0 {
        return Err(Failure::new(Exit::Arguments, format_args!("--size {size}: at least 1M is needed")));
    }
    let plain = bench.column(None)?;

    let key = MasterKey::new(&random::<32>()?)?;
    let io = bench.offline.io();
    bench.offline.run(create::format(&io, &key, &options))??;
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
    let volume = bench.offline.run(open(&io, &key, &options))??;
    let verified = bench.column(Some(&volume))?;
    let both = PATTERNS.iter().zip(plain.into_iter().zip(verified));
    Ok(both
        .map(|(p, (plain, verified))| DiskSpeed { pattern: p.name, request_bytes: p.request, plain, verified })
        .collect())
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
    time: Duration,
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

impl Bench {
    /// All patterns, plain or through `volume`. What is read has been written before.
    fn column(&self, volume: Option<&Volume>) -> Outcome<Vec<f64>> {
        let lane = |_| {
            let mut buf = Buf::new(LARGEST);
            buf.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i % 251) as u8 + 1);
            Lane { slot: volume.map(|v| v.slot(0)), buf }
        };
        let mut lanes: Vec<Lane> = (0..DEEPEST).map(lane).collect();
        let fill = pattern("fill", LARGEST, 8, false, true);
        self.measure(&fill, volume, &mut lanes, Some(self.size))?;
        PATTERNS.iter().map(|pattern| self.measure(pattern, volume, &mut lanes, None)).collect()
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
        let progress =
            Progress { begin: Instant::now(), next: Cell::new(0), bytes: Cell::new(0), failed: RefCell::new(None) };
        let stop = Stop::default();
        let active = Cell::new(pattern.depth);
        let requests = lanes[..pattern.depth].iter_mut().map(|lane| async {
            if let Err(failure) = self.lane(pattern, volume, &io, lane, &progress, total).await {
                progress.failed.borrow_mut().get_or_insert(failure);
            }
            active.set(active.get() - 1);
            if active.get() == 0 {
                stop.set();
            }
        });
        let checkpoints = async {
            if let Some(volume) = volume {
                // A failure shows in the requests.
                let _ = checkpoints::run(volume, &io, &stop, |_| {}).await;
            }
        };
        self.offline.run_together(requests, checkpoints)?;
        match progress.failed.into_inner() {
            Some(failure) => Err(failure),
            None => Ok(progress.bytes.get() as f64 / progress.begin.elapsed().as_secs_f64()),
        }
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
            request(pattern, volume, io, lane, place * pattern.request as u64).await?;
            progress.bytes.set(progress.bytes.get() + pattern.request as u64);
        }
    }
}

async fn request(pattern: &Pattern, volume: Option<&Volume>, io: &RingStorage, lane: &mut Lane, at: u64) -> Outcome {
    let buf = std::mem::replace(&mut lane.buf, Buf::new(0));
    let part = 0..pattern.request;
    let range = BlockRange::new(BlockIndex(at / u64::from(BLOCK)), pattern.request as u64 / u64::from(BLOCK));
    let result: Outcome;
    (result, lane.buf) = match (volume, &mut lane.slot) {
        (Some(volume), Some(slot)) if pattern.write => {
            let (result, buf) = volume.write(io, slot, range, buf, Durability::MayBeLost).await;
            (result.map_err(Failure::from), buf)
        }
        (Some(volume), Some(slot)) => {
            let (result, buf) = volume.read(io, slot, range, buf).await;
            (result.map_err(Failure::from), buf)
        }
        _ => {
            let transfer = match pattern.write {
                true => io.write(Device::Data, ByteOffset(at), buf, part, Durability::MayBeLost),
                false => io.read(Device::Data, ByteOffset(at), buf, part),
            };
            let (result, buf) = transfer.await;
            (result.map_err(|e| Failure::new(Exit::Device, format_args!("plain I/O at {at}: {e}"))), buf)
        }
    };
    result
}

/// Spreads consecutive numbers over all of u64 (the finalizer of a 64-bit hash; no two collide).
fn scatter(n: u64) -> u64 {
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

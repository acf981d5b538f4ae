//! `benchmark`: how fast tags are made here, and what verification costs on a disk.

mod disk;
mod lane;
mod lanes;
mod memory;
mod pattern;
mod pinned;
mod tags;
mod traffic;
mod write_back;

use crate::{
    cli::tag_name::TagName,
    daemon::abort_on_panic,
    failure::{Exit, Failure, Outcome},
    os,
    output::Output,
    size::Size,
};
use disk::{DiskReport, DiskSpeed, LARGEST};
use memory::MemorySpeed;
use serde::Serialize;
use std::{
    path::PathBuf,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};
use tags::{TagBench, TagSpeed, measure_crates, median};
use ublk_integrity::{TagAlgorithm, hashing::Way};

/// Measure the tag algorithms on this CPU and, with --data, verified reads and writes beside plain
/// ones
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
    /// Algorithm of what is verified; the tags alone are measured of all
    #[arg(long, value_enum, default_value = "hmac-sha256")]
    tag: TagName,
    /// Most threads: one for requests to it, the others hash for that; each pattern runs on one,
    /// too [default: one for each CPU, at most 4]
    #[arg(long, value_name = "N", requires = "data", value_parser = clap::value_parser!(u16).range(1..=32))]
    threads: Option<u16>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    tags: Vec<TagSpeed>,
    /// HMAC-SHA256 tags of 4 KiB blocks, by each way of this processor alone.
    ways: Vec<TagSpeed>,
    /// What the `sha2` and `hmac` crates make of tags of 4 KiB blocks, one after the other.
    sha2_bytes_per_second: f64,
    /// From one thread's call until another, asleep, goes on.
    wake_up_seconds: f64,
    /// The verified path on a disk in memory.
    memory: Vec<MemorySpeed>,
    #[serde(flatten)]
    disk: Option<DiskReport>,
}

pub fn run(args: &Args) -> Outcome {
    if !(0.01..=3600.0).contains(&args.time) {
        return Err(Failure::new(Exit::Arguments, format_args!("--time {}: must be from 0.01 to 3600", args.time)));
    }
    if let Some(folder) = &args.data {
        // Not after all that needs no disk.
        disk::try_scratch(folder, args.size)?;
    }
    // One that hashes for others would leave them waiting.
    abort_on_panic();
    let time = Duration::from_secs_f64(args.time);
    let TagSpeeds { tags, ways, sha2_bytes_per_second } = tag_speeds(time / 4);
    let mut report = Report {
        tags,
        ways,
        sha2_bytes_per_second,
        wake_up_seconds: wake_up(time / 4).as_secs_f64(),
        memory: memory::measure(args.tag.into(), time / 4),
        disk: None,
    };
    if !args.json {
        // Before the rest is measured, which takes its time.
        let mut out = Output::new();
        print_tags(&mut out, &report);
        print_memory(&mut out, &report.memory);
        out.print()?;
    }
    let threads = args.threads.map_or_else(|| os::processors().min(4), usize::from);
    report.disk = args
        .data
        .as_deref()
        .map(|folder| disk::measure(folder, args.size, args.tag.into(), time, threads))
        .transpose()?;
    match &report.disk {
        _ if args.json => Output::json(&report).print(),
        Some(disk) => print_disk(disk).print(),
        None => Ok(()),
    }
}

/// See [`Report`].
struct TagSpeeds {
    tags: Vec<TagSpeed>,
    ways: Vec<TagSpeed>,
    sha2_bytes_per_second: f64,
}

/// Of each algorithm, of each way, and of the crates; one after the other and all over again, for a
/// machine is not always as fast.
fn tag_speeds(time: Duration) -> TagSpeeds {
    const TURNS: usize = 5;
    let sizes = [(512, 1), (512, 8), (4096, 1), (4096, 8), (4096, 128)];
    let of_all = TagAlgorithm::ALL.into_iter().flat_map(|tag| sizes.map(|(block, batch)| (tag, block, batch)));
    let mut benches: Vec<_> = of_all.map(|(tag, block, batch)| TagBench::new(tag, block, batch, LARGEST)).collect();
    let count = benches.len();
    let of_ways = Way::all().into_iter().flat_map(|way| [1, 8, 128].map(|batch| (way, batch)));
    benches.extend(of_ways.map(|(way, batch)| TagBench::by(way, 4096, batch, LARGEST)));
    let time = time / TURNS as u32;
    let (turns, mut crates): (Vec<Vec<TagSpeed>>, Vec<f64>) = (0..TURNS)
        .map(|_| (benches.iter_mut().map(|bench| bench.measure(time)).collect(), measure_crates(4096, LARGEST, time)))
        .unzip();
    let of = |i: usize| {
        let mut speeds: Vec<_> = turns.iter().map(|turn: &Vec<TagSpeed>| turn[i].bytes_per_second).collect();
        TagSpeed { bytes_per_second: median(&mut speeds), ..turns[0][i].clone() }
    };
    TagSpeeds {
        tags: (0..count).map(of).collect(),
        ways: (count..benches.len()).map(of).collect(),
        sha2_bytes_per_second: median(&mut crates),
    }
}

/// What it takes to wake a thread. A request passes through several threads, so where hashing is as
/// slow as in an emulator this tells how far the rest is.
fn wake_up(time: Duration) -> Duration {
    let (there, other) = mpsc::sync_channel::<()>(0);
    let (answers, back) = mpsc::sync_channel(0);
    let echo = thread::spawn(move || other.iter().all(|()| answers.send(()).is_ok()));
    let (begin, mut rounds) = (Instant::now(), 0);
    while rounds < 100 || begin.elapsed() < time {
        // Both ends live until this function drops its own.
        let _ = there.send(());
        let _ = back.recv();
        rounds += 1;
    }
    let each = begin.elapsed() / (2 * rounds);
    drop((there, back));
    let _ = echo.join();
    each
}

fn print_tags(out: &mut Output, report: &Report) {
    out.line(format_args!("{:<14}{:>6}{:>16}  {:<20}{:>14}", "tags", "block", "blocks at once", "by", "speed"));
    report.tags.iter().for_each(|speed| print_tag(out, speed));
    out.line("\nof hmac-sha256, each way of this processor alone; above is what was found to be the fastest");
    report.ways.iter().for_each(|speed| print_tag(out, speed));
    let (algorithm, speed) = (TagAlgorithm::HmacSha256, rate(report.sha2_bytes_per_second));
    out.line(format_args!("{algorithm:<14}{:>6}{:>16}  {:<20}{speed:>14}", 4096, 1, "sha2, hmac crates"));
    out.line(format_args!("\nwake-up of another thread: {:.1} µs", report.wake_up_seconds * 1e6));
}

fn print_tag(out: &mut Output, speed: &TagSpeed) {
    let TagSpeed { algorithm, block_size, batch, implementation, bytes_per_second } = speed;
    let speed = rate(*bytes_per_second);
    out.line(format_args!("{algorithm:<14}{block_size:>6}{batch:>16}  {implementation:<20}{speed:>14}"));
}

fn print_memory(out: &mut Output, memory: &[MemorySpeed]) {
    out.line(format_args!(
        "\n{:<30}{:>14}{:>14}{:>20}",
        "one thread, disk in memory", "tags alone", "verified", "ratio"
    ));
    for MemorySpeed { pattern, verified, tags, .. } in memory {
        out.line(format_args!("{pattern:<30}{:>14}{:>14}{:>20.2}", rate(*tags), rate(*verified), verified / tags));
    }
}

fn print_disk(report: &DiskReport) -> Output {
    let mut out = Output::new();
    out.line(format_args!(
        "\n{:<36}{:>8}{:>14}{:>14}{:>14}{:>12}{:>8}",
        "disk", "threads", "plain", "tags alone", "verified", "verified/s", "ratio"
    ));
    for speed in &report.disk {
        let DiskSpeed { pattern, threads, request_bytes, plain, tags, verified, .. } = speed;
        let (requests, ratio) = (verified / *request_bytes as f64, verified / plain);
        let (plain, tags, verified) = (rate(*plain), rate(*tags), rate(*verified));
        out.line(format_args!(
            "{pattern:<36}{threads:>8}{plain:>14}{tags:>14}{verified:>14}{requests:>12.0}{ratio:>8.2}"
        ));
    }
    print_requests(&mut out, &report.disk);
    out.line(format_args!("\nformat of a sparse 1 TiB volume: {:.3} s", report.format_1t_seconds));
    let (writes, seconds) = (report.crash_writes, report.open_after_crash_seconds);
    out.line(format_args!("open after a crash with {writes} random 4 KiB writes in the log: {seconds:.3} s"));
    out
}

/// What a request takes besides time.
fn print_requests(out: &mut Output, disk: &[DiskSpeed]) {
    out.line(format_args!(
        "\n{:<36}{:>8}{:>14}{:>14}{:>14}{:>12}{:>8}",
        "of each request", "threads", "processor,", "verified", "metadata", "written", "syncs"
    ));
    out.line(format_args!("{:>58}{:>28}", "plain", "reads"));
    let some = |figure: Option<f64>, end: &str| figure.map_or_else(String::new, |figure| format!("{figure:.2}{end}"));
    for speed in disk {
        let DiskSpeed { pattern, threads, .. } = speed;
        let (plain, verified) = (speed.plain_processor_seconds * 1e6, speed.verified_processor_seconds * 1e6);
        let (plain, verified) = (format!("{plain:.1} µs"), format!("{verified:.1} µs"));
        let (reads, written) = (some(speed.metadata_reads_per_read, ""), some(speed.written_per_byte, " ×"));
        let syncs = some(speed.syncs_per_write, "");
        out.line(format_args!("{pattern:<36}{threads:>8}{plain:>14}{verified:>14}{reads:>14}{written:>12}{syncs:>8}"));
    }
    for cold in disk.iter().filter(|speed| speed.pattern.contains("cold")) {
        let (pattern, ratio) = (cold.pattern, cold.to_plain_with_metadata());
        out.line(format_args!("\n{pattern}, to plain with as many reads: {ratio:.2}"));
    }
}

fn rate(bytes_per_second: f64) -> String {
    format!("{}/s", Size(bytes_per_second as u64))
}

//! `add`: a device from a volume.

use super::{
    DeviceArgs, ExpectedArgs,
    anchored::{AnchorArgs, KeepArgs},
    one_device::device_number,
    session,
};
use crate::{
    daemon::{
        self, Origin, Start,
        launch::{self, Reporter, Side},
        log::Sink,
        memory_budget::{Available, Purpose},
        peek::peek,
        settings::{DEFAULT_MAX_IO, Defaults, Mismatch, Settings, SyncLog, Wanted},
    },
    device::stack::is_read_only,
    failure::{Context, Exit, Failure, Outcome},
    key::{KeyArgs, KeySource},
    name::DeviceName,
    os, output,
    size::Size,
    ublk,
};
use std::path::{Path, PathBuf};
use ublk_integrity::create::VolumeInfo;
use uuid::Uuid;

/// Start a device /dev/ublkbN from a volume; returns when it answers, and prints its path
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    devices: DeviceArgs,
    #[command(flatten)]
    expected: ExpectedArgs,
    #[command(flatten)]
    pub(super) key: KeyArgs,
    /// What the device is called: /dev/ublk-integrity/NAME leads to it, and other commands take the
    /// name for its number
    #[arg(long, value_name = "NAME")]
    pub(super) name: Option<DeviceName>,
    /// If a device of this name waits for a daemon, `recover` that instead
    #[arg(long, requires = "name")]
    pub(super) or_recover: bool,
    /// Number of the device [default: the next free one]
    #[arg(short, long, value_name = "N", value_parser = device_number)]
    number: Option<u32>,
    #[command(flatten)]
    pub sizes: SizeArgs,
    /// Do not load tag pages ahead of reads
    #[arg(long)]
    no_prefetch: bool,
    /// What a read does with a block that does not match its tag
    #[arg(long, value_enum, default_value = "fail")]
    on_mismatch: Mismatch,
    /// Let small writes that must be durable at once lie in the log with their data until they are
    /// in place. Programs of before there was this open the volume only after it was ended in good
    /// order
    #[arg(long, value_name = "WHEN", value_enum, default_value = "auto")]
    sync_log: SyncLog,
    /// Offer no discard, and pass none down
    #[arg(long)]
    no_discard: bool,
    #[command(flatten)]
    pub(super) anchor: AnchorArgs,
    #[command(flatten)]
    pub(super) keep: KeepArgs,
    /// With --read-only: serve a volume that has an anchor without it; what is read may be an older state
    #[arg(long, requires = "read_only", conflicts_with = "anchor")]
    without_anchor: bool,
    /// Write nothing
    #[arg(long)]
    read_only: bool,
    /// Take the newest tag of a block that recovery can't read, instead of opening read-only until
    /// it can: if that write never arrived, the block is lost until it is written again
    #[arg(long, conflicts_with = "read_only")]
    pub(super) decide_unreadable: bool,
    /// End the device with its daemon, instead of letting it wait for `recover`
    #[arg(long)]
    no_recovery: bool,
    /// Log checkpoints too
    #[arg(long)]
    verbose: bool,
    /// Stay in the foreground, and log to standard error
    #[arg(long)]
    pub(super) foreground: bool,
}

/// What the daemon's memory depends on.
#[derive(clap::Args)]
pub struct SizeArgs {
    /// Queues [default: one for four CPUs, at most 4; where threads can't share one, one for two;
    /// less where memory is short]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    queues: Option<u16>,
    /// Threads of each queue, which share its requests; more than one needs Linux 6.16 [default: 2
    /// where there are as many CPUs]
    #[arg(short = 'T', long, alias = "threads_per_queue", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    threads_per_queue: Option<u16>,
    /// Threads that hash for those of the queues when these have more to do [default: one for each
    /// CPU that is left, at most 8, and one at least where threads share a queue]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(0..=256))]
    hash_threads: Option<u16>,
    /// Requests of each queue [default: 128, less where memory is short]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    depth: Option<u16>,
    /// Writes of at most 16K that each thread may answer before they are in place: a flush waits
    /// for them, they outlive the daemon, and one that fails makes the device read-only; 0: none
    /// [default: 32, less where memory is short]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(0..=1024))]
    write_back: Option<u16>,
    /// Memory for verified tag pages [default: 1/32 of the machine's, at most 256M]
    #[arg(long, value_name = "SIZE")]
    cache: Option<Size>,
    /// Largest request [default: 512K]
    #[arg(long, alias = "max_io_buf_bytes", value_name = "SIZE")]
    pub max_io: Option<Size>,
}

pub fn run(args: &Args) -> Outcome {
    launch(prepare(args)?, args.foreground)
}

/// Checks what can be checked before there is a daemon.
pub fn prepare(args: &Args) -> Outcome<Start> {
    args.keep.refuse_contradiction()?;
    let shares_queues = ublk::shares_queues();
    let available = Available::here(Purpose::New);
    let volume = peek(args.devices.meta_path())?;
    let settings = settings(args, args.key.source()?, shares_queues, &available, volume.as_ref())?;
    refuse_unstorable(&settings)?;
    refuse_idle_threads(&settings)?;
    settings.refuse_more_than(&available, volume.as_ref())?;
    ublk::need_driver()?;
    if settings.threads > 1 && !shares_queues {
        return Err(cant_share_queues(settings.threads));
    }
    if let Some(number) = args.number.filter(|n| ublk::exists(*n)) {
        return Err(Failure::new(
            Exit::Busy,
            format_args!("/dev/ublkb{number} exists: choose another number, or none"),
        ));
    }
    let key = settings.key.load()?;
    if settings.on_mismatch == Mismatch::Fix {
        output::warn(
            "--on-mismatch fix accepts and signs whatever is found on the device: its integrity is lost, use it for rescue only",
        );
    }
    let uuid = args.expected.uuid.map(Uuid::into_bytes);
    Ok(Start { settings, may_shrink: args.sizes.cache.is_none(), origin: Origin::New(args.number), volume, key, uuid })
}

/// Runs the daemon here or in a process of its own.
pub fn launch(start: Start, foreground: bool) -> Outcome {
    let (reporter, sink) = if foreground {
        (Reporter::terminal(), Sink::foreground())
    } else {
        os::close_inherited().doing("can't close inherited descriptors")?;
        match launch::fork()? {
            Side::Parent(daemon) => {
                let what = start.settings.paths_in_words();
                // This process only waits from here on.
                drop(start);
                session::take_out(daemon.pid());
                return daemon.outcome(&what);
            }
            Side::Daemon(reporter) => (reporter, Sink::system()),
        }
    };
    // Told by the reporter.
    daemon::run(start, reporter, sink).map_err(Failure::told)
}

/// What can't be written to is opened read-only, with a word.
fn read_only(args: &Args) -> bool {
    let devices = std::iter::once(&args.devices.data).chain(&args.devices.meta);
    let protected = devices.into_iter().find(|path| is_read_only(path));
    if let Some(path) = protected.filter(|_| !args.read_only) {
        output::warn(format_args!("{} is read-only, and so is the device made of it", path.display()));
    }
    args.read_only || protected.is_some()
}

fn settings(
    args: &Args,
    key: KeySource,
    shares_queues: bool,
    available: &Available,
    volume: Option<&VolumeInfo>,
) -> Outcome<Settings> {
    let max_io = args.sizes.max_io.map_or(Ok(DEFAULT_MAX_IO), max_io)?;
    let (sizes, read_only) = (&args.sizes, read_only(args));
    let wanted = Wanted {
        queues: sizes.queues,
        threads: sizes.threads_per_queue,
        hash_threads: sizes.hash_threads,
        depth: sizes.depth,
        write_back: sizes.write_back,
        cpus: os::processors(),
        shares: shares_queues,
    };
    let defaults = Defaults::here(wanted, max_io, volume, available);
    Ok(Settings {
        name: args.name.clone(),
        data: absolute(&args.devices.data)?,
        meta: args.devices.meta.as_deref().map(absolute).transpose()?,
        key,
        queues: defaults.counts.queues,
        threads: defaults.counts.threads,
        hash_threads: defaults.counts.hash_threads,
        depth: defaults.counts.depth,
        cache: sizes.cache.map_or(defaults.cache, |s| s.0),
        max_io,
        prefetch: !args.no_prefetch,
        on_mismatch: args.on_mismatch,
        discard: !args.no_discard,
        read_only,
        write_back: if read_only { 0 } else { defaults.counts.write_back },
        sync_log: args.sync_log,
        anchor: args.anchor.settings(&args.keep),
        without_anchor: args.without_anchor,
        verbose: args.verbose,
        recovery: !args.no_recovery,
        decide_unreadable: args.decide_unreadable,
        grow: None,
    })
}

/// What `recover` and `list` will need is stored as JSON, which has no bytes that are not text.
pub fn refuse_unstorable(settings: &Settings) -> Outcome {
    let key = settings.key.file();
    match settings.needs().chain(key.map(PathBuf::as_path)).find(|path| path.to_str().is_none()) {
        Some(path) => {
            let message = format!("the path {} is not UTF-8 and can't be stored: use a link to it", path.display());
            Err(Failure::new(Exit::Arguments, message))
        }
        None => Ok(()),
    }
}

fn refuse_idle_threads(settings: &Settings) -> Outcome {
    let (threads, depth) = (settings.threads, settings.depth);
    if threads <= depth {
        return Ok(());
    }
    let message = format!("--threads-per-queue {threads} is more than the {depth} requests of a queue: lower it");
    Err(Failure::new(Exit::Arguments, message))
}

fn cant_share_queues(threads: u16) -> Failure {
    let message = format!(
        "--threads-per-queue {threads}: on this kernel a queue has one thread (more need Linux 6.16 or later): use --queues"
    );
    Failure::new(Exit::Device, message)
}

/// The kernel takes whole pages, up to 32 MiB.
fn max_io(size: Size) -> Outcome<u32> {
    const LEAST: u64 = 4096;
    const MOST: u64 = 32 << 20;
    match size.0 {
        bytes if (LEAST..=MOST).contains(&bytes) && bytes % 4096 == 0 => Ok(bytes as u32),
        bytes => Err(Failure::new(
            Exit::Arguments,
            format_args!("--max-io of {bytes} bytes: must be a multiple of 4K from 4K to 32M"),
        )),
    }
}

/// The daemon leaves the current folder. Links stay what they are: `/dev/disk/by-id/…` leads to the
/// device when `recover` comes, whatever the kernel calls it by then.
fn absolute(path: &Path) -> Outcome<PathBuf> {
    let what = format!("can't use {}", path.display());
    path.metadata().doing(&what)?;
    std::path::absolute(path).doing(&what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_to_devices_stay_links() {
        let folder = tempfile::tempdir().unwrap();
        let (disk, link) = (folder.path().join("disk"), folder.path().join("by-id"));
        std::fs::write(&disk, "").unwrap();
        std::os::unix::fs::symlink(&disk, &link).unwrap();
        assert_eq!(absolute(&link).unwrap(), link);
        assert!(absolute(Path::new("Cargo.toml")).unwrap().is_absolute());
        assert_eq!(absolute(&folder.path().join("nowhere")).unwrap_err().exit, Exit::Device);
    }
}

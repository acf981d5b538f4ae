//! `format`: a new volume.

use super::{DeviceArgs, dump::describe};
use crate::{
    device::{Backings, Use, signature},
    failure::{Context, Exit, Failure, Outcome},
    key::KeyArgs,
    offline::Offline,
    output::Output,
    size::Size,
};
use std::{
    fs::OpenOptions,
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};
use ublk_integrity::{
    Device, TagAlgorithm,
    create::{self, FormatOptions, VolumeInfo},
    open,
};

/// Make a new, empty volume; all it holds reads as zeros
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub devices: DeviceArgs,
    #[command(flatten)]
    key: KeyArgs,
    /// Unit of integrity: 512, 1K, 2K or 4K [default: what the device writes atomically]
    #[arg(long, value_name = "SIZE")]
    block_size: Option<Size>,
    /// Usable size; files that do not exist yet are made, sparse [default: all that fits]
    #[arg(long)]
    size: Option<Size>,
    /// Size of the log that makes writes crash-safe [default: by the volume's size]
    #[arg(long, value_name = "SIZE")]
    log_size: Option<Size>,
    /// How blocks are signed
    #[arg(long, value_enum, default_value = "hmac-sha256")]
    tag: Tag,
    /// Destroy what is there, and disregard that it is mounted
    #[arg(long)]
    force: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Tag {
    /// HMAC-SHA-256: fast on CPUs with SHA instructions
    HmacSha256,
    /// Keyed BLAKE3: fast on any CPU with wide vectors
    Blake3,
}

impl From<Tag> for TagAlgorithm {
    fn from(tag: Tag) -> Self {
        match tag {
            Tag::HmacSha256 => Self::HmacSha256,
            Tag::Blake3 => Self::Blake3,
        }
    }
}

/// The physical block that a regular file counts as having.
const FILE_BLOCK: u32 = 4096;

pub fn run(args: &Args) -> Outcome {
    let key = args.key.load()?;
    let mut made = Vec::new();
    let done = make_files(args, &mut made).and_then(|()| format(args, &key));
    if done.is_err() {
        for path in made {
            let _ = std::fs::remove_file(path);
        }
    }
    let mut out = Output::new();
    describe(&mut out, &done?);
    out.print()
}

fn options(args: &Args, physical_block: u32) -> FormatOptions {
    let block_size = args.block_size.map(|size| u32::try_from(size.0).unwrap_or(u32::MAX));
    FormatOptions {
        block_size: block_size.unwrap_or_else(|| physical_block.clamp(512, 4096)),
        size: args.size.map(|s| s.0),
        log_size: args.log_size.map(|s| s.0),
        tag: args.tag.into(),
        uuid: uuid::Uuid::new_v4().into_bytes(),
        separate_meta: args.devices.meta.is_some(),
    }
}

/// Makes sparse files for devices that do not exist, and names them in `made`.
fn make_files(args: &Args, made: &mut Vec<PathBuf>) -> Outcome {
    let DeviceArgs { data, meta } = &args.devices;
    let missing = |path: &Path| !path.exists();
    if !missing(data) && !meta.as_deref().is_some_and(missing) {
        return Ok(());
    }
    if args.size.is_none() {
        let path = if missing(data) { data } else { meta.as_ref().unwrap_or(data) };
        let path = path.display();
        return Err(Failure::new(
            Exit::Device,
            format_args!("{path} does not exist: give --size to make a file of it"),
        ));
    }
    let plan = create::plan(&options(args, FILE_BLOCK))?;
    let files = [(Some(data), plan.data_device_bytes), (meta.as_ref(), plan.meta_device_bytes)];
    for (path, bytes) in files.into_iter().filter_map(|(path, bytes)| Some((path?, bytes))) {
        if missing(path) {
            let what = format!("can't make {}", path.display());
            let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).doing(&what)?;
            made.push(path.clone());
            file.set_len(bytes).doing(&what)?;
        }
    }
    Ok(())
}

fn format(args: &Args, key: &ublk_integrity::MasterKey) -> Outcome<VolumeInfo> {
    let DeviceArgs { data, meta } = &args.devices;
    let purpose = if args.force { Use::Forced } else { Use::Exclusive };
    let backings = Backings::open(data, meta.as_deref(), purpose, Duration::ZERO)?;
    if !args.force {
        for path in std::iter::once(data).chain(meta) {
            refuse_content(path)?;
        }
    }
    let offline = Offline::with(backings)?;
    let io = offline.io();
    if !args.force {
        refuse_volume(&offline, data, meta.as_deref())?;
    }
    let physical = ublk_integrity::Storage::geometry(&io, Device::Data).physical_block;
    Ok(offline.run(create::format(&io, key, &options(args, physical)))??)
}

fn refuse_volume(offline: &Offline, data: &Path, meta: Option<&Path>) -> Outcome {
    let Ok(dump) = offline.run(open::dump(&offline.io()))? else { return Ok(()) };
    let of = |uuid: &str| format!("an ublk-integrity volume ({uuid})");
    if let Some(volume) = dump.volume {
        return Err(holds(format_args!("{} holds {}", meta.unwrap_or(data).display(), of(&volume.uuid))));
    }
    match dump.identity {
        Some(uuid) => Err(holds(format_args!("{} holds the data of {}", data.display(), of(&uuid)))),
        None => Ok(()),
    }
}

fn refuse_content(path: &Path) -> Outcome {
    match signature::find(path)? {
        Some(name) => Err(holds(format_args!("{} holds {name}", path.display()))),
        None if is_mounted(path)? => Err(holds(format_args!("{} is mounted", path.display()))),
        None => Ok(()),
    }
}

fn holds(what: std::fmt::Arguments<'_>) -> Failure {
    Failure::new(Exit::Busy, format_args!("{what}: --force destroys it"))
}

/// Block devices in use are refused by O_EXCL already; this finds files that are mounted through a loop device.
fn is_mounted(path: &Path) -> Outcome<bool> {
    let meta = path.metadata().doing(format_args!("can't use {}", path.display()))?;
    if meta.file_type().is_block_device() {
        return Ok(false);
    }
    let Ok(path) = path.canonicalize() else { return Ok(false) };
    let loops = std::fs::read_dir("/sys/block").into_iter().flatten().flatten();
    Ok(loops
        .map(|entry| entry.path().join("loop/backing_file"))
        .any(|file| std::fs::read_to_string(file).is_ok_and(|backing| Path::new(backing.trim_end()) == path)))
}

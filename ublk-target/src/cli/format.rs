//! `format`: a new volume.

use super::{DeviceArgs, dump::print_volume};
use crate::{
    device::{Backings, Use, signature},
    failure::{Context, Exit, Failure, Outcome},
    kept::{self, Owner},
    key::KeyArgs,
    offline::Offline,
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
    create::{self, FormatError, FormatOptions, VolumeInfo},
    open,
};

/// Make a new, empty volume; all it holds reads as zeros
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    devices: DeviceArgs,
    #[command(flatten)]
    key: KeyArgs,
    /// Unit of integrity in bytes: 512, 1024, 2048 or 4096 [default: what the device writes atomically]
    #[arg(long, value_name = "N")]
    block_size: Option<u32>,
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
    print_volume(&done?);
    Ok(())
}

fn options(args: &Args, physical_block: u32) -> FormatOptions {
    FormatOptions {
        block_size: args.block_size.unwrap_or_else(|| physical_block.clamp(512, 4096)),
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
    let before = last_opens(&offline)?;
    let physical = ublk_integrity::Storage::geometry(&io, Device::Data).physical_block;
    let volume = offline.run(create::format(&io, key, &options(args, physical)))?.map_err(|e| match e {
        FormatError::BelowSector(why) => Failure::from(e).context(offline.backings().get(why.device).path().display()),
        _ => e.into(),
    })?;
    give_up_kept(&offline, &before)?;
    Ok(volume)
}

/// The ids of the last opens of the volume that was there, by either superblock copy.
fn last_opens(offline: &Offline) -> Outcome<Vec<String>> {
    let copies = offline.run(open::dump(&offline.io()))?.map(|dump| dump.copies).unwrap_or_default();
    Ok(copies.into_iter().filter_map(|copy| copy.open_id).collect())
}

/// What a daemon had answered for that volume, and nobody has put in place, belongs nowhere any more.
fn give_up_kept(offline: &Offline, opens: &[String]) -> Outcome {
    let owner = Owner::of(&offline.backings().data)?;
    let count: usize = opens.iter().map(|id| kept::give_up(id, &owner)).sum();
    if count > 0 {
        eprintln!(
            "ublk-integrity: warning: {} of the volume that was here, in memory yet, were given up",
            kept::writes(count)
        );
    }
    Ok(())
}

fn refuse_volume(offline: &Offline, data: &Path, meta: Option<&Path>) -> Outcome {
    let Ok(dump) = offline.run(open::dump(&offline.io()))? else { return Ok(()) };
    let of = |uuid: &str| format!("an ublk-integrity volume ({uuid})");
    if let Some(volume) = dump.volume {
        return Err(holds(format_args!("{} holds {}", meta.unwrap_or(data).display(), of(&volume.uuid))));
    }
    if let Some(uuid) = dump.identity {
        return Err(holds(format_args!("{} holds the data of {}", data.display(), of(&uuid))));
    }
    match dump.unknown {
        Some(unknown) => {
            let path = meta.unwrap_or(data).display();
            Err(holds(format_args!("{path} holds an ublk-integrity volume of another program ({unknown})")))
        }
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

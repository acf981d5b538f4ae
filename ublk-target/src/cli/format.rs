//! `format`: a new volume.

use super::{
    DeviceArgs, anchor,
    anchored::AnchorArgs,
    dump::describe,
    key::{CostArgs, new_slot},
    tag_name::TagName,
};
use crate::{
    anchor::asked,
    device::{Backing, Backings, Use, signature},
    failure::{Context, Exit, Failure, Outcome},
    key::{KeyArgs, KeySource},
    offline::Offline,
    os,
    output::{self, Output},
    random::random,
    size::Size,
    write_back_file::{self, Owner},
};
use serde::Serialize;
use std::{
    cmp::Ordering,
    fs::OpenOptions,
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};
use ublk_integrity::{
    Credential, Device, Storage,
    create::{self, Capacity, FormatOptions, Label, VolumeInfo},
    key_slots::{self, UnlockedSlots},
    open::{self, Dump},
};
use zeroize::Zeroizing;

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
    /// Trust the data device to write so much atomically, whatever it says itself: 512, 1K, 2K or 4K.
    /// Where it does not, a power cut tears blocks, which then read as errors
    #[arg(long, value_name = "SIZE", value_parser = atomic_bytes)]
    assume_atomic: Option<u32>,
    /// Name of the volume, for people: at most 32 bytes
    #[arg(long, value_name = "TEXT")]
    label: Option<Label>,
    /// Usable size [default: all that fits]
    #[arg(long)]
    size: Option<Size>,
    /// Size that the volume can grow to, by `resize`: its metadata has room for that from the start
    /// [default: with --meta, what that device has room for, 16 times the size at most; else the size]
    #[arg(long, value_name = "SIZE")]
    max_size: Option<Size>,
    /// Make files, sparse, of --data and --meta where there is nothing yet
    #[arg(long, requires = "size")]
    create: bool,
    /// Size of the log that makes writes crash-safe [default: by the volume's size, 128M at most]
    #[arg(long, value_name = "SIZE")]
    log_size: Option<Size>,
    /// How blocks are signed
    #[arg(long, value_enum, default_value = "hmac-sha256")]
    tag: TagName,
    /// Draw a key for the volume, and wrap it for those who may open it: the key or passphrase given
    /// is the first, `key add` adds others. A passphrase has slots anyhow
    #[arg(long)]
    key_slots: bool,
    #[command(flatten)]
    cost: CostArgs,
    #[command(flatten)]
    anchor: AnchorArgs,
    /// Destroy what is there, and disregard that it is mounted
    #[arg(long)]
    force: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The physical block that a regular file counts as having.
const FILE_BLOCK: u32 = 4096;
/// Looks after a wipe: what was hidden by what is gone is found by the next.
const LOOKS: usize = 8;

/// What was done, beside the volume.
#[derive(Default, Serialize)]
struct Done {
    /// Files that were made.
    made: Vec<PathBuf>,
    /// What was there before: path and signature.
    wiped: Vec<(PathBuf, String)>,
}

#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    volume: &'a VolumeInfo,
    #[serde(flatten)]
    done: &'a Done,
}

/// The key of a new volume.
struct NewKey {
    given: Credential,
    /// A fresh key, in a slot that is opened by what was given: else that is the key.
    wrapped: Option<Box<UnlockedSlots>>,
}

impl NewKey {
    fn of(given: KeySource, slots: bool, cost: CostArgs) -> Outcome<Self> {
        let given = given.load_new()?;
        if matches!(&given, Credential::Key(_) if !slots) {
            return Ok(Self { given, wrapped: None });
        }
        let (uuid, key) = (uuid::Uuid::new_v4().into_bytes(), Zeroizing::new(random::<32>()?));
        let wrapped = Box::new(key_slots::first((&uuid, &key), &given, &new_slot(None, cost)?)?);
        Ok(Self { given, wrapped: Some(wrapped) })
    }
}

pub fn run(args: &Args) -> Outcome {
    let mut key = NewKey::of(args.key.source()?, args.key_slots, args.cost)?;
    let mut done = Done::default();
    let volume = make_files(args, &mut done.made)
        .and_then(|()| room_for_anchor(args, &mut done.made))
        .and_then(|()| format(args, &mut key, &mut done.wiped));
    if volume.is_err() {
        for path in &done.made {
            let _ = std::fs::remove_file(path);
        }
    }
    let volume = volume?;
    if args.anchor.anchor.is_some() {
        let begun = args.devices.open(Use::Exclusive);
        let begun = begun.and_then(|offline| anchor::begin(&offline, &key.given, &args.anchor, &args.devices));
        begun.doing(format_args!("volume {} is made, but has no anchor (`anchor init`)", volume.uuid))?;
    }
    let out = if args.json { Output::json(&Report { volume: &volume, done: &done }) } else { lines(&volume, &done) };
    out.print().doing(format_args!("volume {} is made, but", volume.uuid))
}

fn lines(volume: &VolumeInfo, done: &Done) -> Output {
    let mut out = Output::new();
    for path in &done.made {
        out.line(format_args!("made          {}, a sparse file", path.display()));
    }
    for (path, signature) in &done.wiped {
        out.line(format_args!("wiped         {}: {signature}", path.display()));
    }
    describe(&mut out, volume);
    if volume.block_size == 512 {
        out.line(small_blocks(volume));
    }
    out
}

/// Not what most people would choose, but what their disk allows.
fn small_blocks(volume: &VolumeInfo) -> String {
    let share = 100.0 * volume.metadata_bytes as f64 / (volume.size + volume.metadata_bytes) as f64;
    format!(
        "note          512-byte blocks give {share:.1} % to metadata, 4096-byte blocks 1.6 %. They need a device that writes 4096 bytes at once: a disk with such sectors (some can be switched), or a file. If you know that this one does, whatever it says: --assume-atomic 4096. --meta puts metadata elsewhere"
    )
}

fn atomic_bytes(text: &str) -> Result<u32, String> {
    let bytes = text.parse::<Size>()?.0;
    let known = [512, 1024, 2048, 4096].into_iter().find(|known| u64::from(*known) == bytes);
    known.ok_or_else(|| "must be 512, 1K, 2K or 4K".into())
}

/// What is trusted where the device says something else.
fn trusted(path: &Path, says: u32, assumed: u32) -> Option<String> {
    let harm = match says.cmp(&assumed) {
        Ordering::Equal => return None,
        Ordering::Less => "a power cut tears blocks",
        Ordering::Greater => "a power cut damages the neighbours of a block under way",
    };
    let path = path.display();
    Some(format!(
        "{path} says that it writes {says} bytes atomically, and is trusted to write {assumed} so (--assume-atomic): where it does not, {harm}, which then read as errors"
    ))
}

fn options(args: &Args, physical_block: u32) -> FormatOptions {
    let block_size = args.block_size.map(|size| u32::try_from(size.0).unwrap_or(u32::MAX));
    let atomic = args.assume_atomic.unwrap_or(physical_block).clamp(512, 4096);
    let capacity = match args.max_size {
        Some(most) => Capacity::Bytes(most.0),
        None if args.devices.meta.is_some() => Capacity::OfMetaDevice,
        None => Capacity::OfSize,
    };
    FormatOptions {
        size: args.size.map(|s| s.0),
        capacity,
        log_size: args.log_size.map(|s| s.0),
        tag: args.tag.into(),
        separate_meta: args.devices.meta.is_some(),
        assumed_atomic_bytes: args.assume_atomic,
        label: args.label.unwrap_or_default(),
        ..FormatOptions::new(block_size.unwrap_or(atomic), uuid::Uuid::new_v4().into_bytes())
    }
}

/// Makes sparse files for devices that do not exist, where asked, and names them in `made`.
fn make_files(args: &Args, made: &mut Vec<PathBuf>) -> Outcome {
    let DeviceArgs { data, meta } = &args.devices;
    let missing: Vec<_> = std::iter::once(data).chain(meta).filter(|path| !path.exists()).collect();
    let Some(first) = missing.first() else { return Ok(()) };
    if !args.create {
        let message = format!("{} does not exist: --create with --size makes a file of it", first.display());
        return Err(Failure::new(Exit::Device, message));
    }
    missing.iter().try_for_each(|path| refuse_dev(path))?;
    let plan = create::plan(&options(args, FILE_BLOCK))?;
    let files = [(Some(data), Some(plan.data_device_bytes)), (meta.as_ref(), plan.meta_device_bytes)];
    for (path, bytes) in files.into_iter().filter_map(|(path, bytes)| Some((path?, bytes?))) {
        if missing.contains(&path) {
            let what = format!("can't make {}", path.display());
            let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).doing(&what)?;
            made.push(path.clone());
            file.set_len(bytes).doing(&what)?;
        }
    }
    Ok(())
}

/// What is not in /dev is a device that is not there, or misspelt: a file of that name would be
/// memory.
fn refuse_dev(path: &Path) -> Outcome {
    let what = format!("can't make {}", path.display());
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if folder.canonicalize().doing(&what)?.starts_with("/dev") {
        return Err(Failure::new(
            Exit::Device,
            format_args!("{what}: there is no such device, and no file is made in /dev"),
        ));
    }
    Ok(())
}

/// An anchor that can't be the volume's destroys nothing. A file that is made for it goes with the others.
fn room_for_anchor(args: &Args, made: &mut Vec<PathBuf>) -> Outcome {
    let Some(place) = &args.anchor.anchor else { return Ok(()) };
    let (chosen, is_new) = args.anchor.make(&args.devices)?;
    made.extend(is_new.then(|| place.path().to_owned()));
    match asked(chosen.holds_nothing()) {
        true => Ok(()),
        false => Err(Failure::new(Exit::Busy, format_args!("the anchor {place} holds something: name another place"))),
    }
}

fn format(args: &Args, key: &mut NewKey, wiped: &mut Vec<(PathBuf, String)>) -> Outcome<VolumeInfo> {
    let DeviceArgs { data, meta } = &args.devices;
    let purpose = if args.force { Use::Forced } else { Use::Anew };
    let backings = Backings::open(data, meta.as_deref(), purpose, Duration::ZERO)?;
    let offline = Offline::with(backings)?;
    offline.backings().lock_key_area()?;
    let io = offline.io();
    if !args.force {
        refuse_unknown(&offline)?;
        offline.backings().both().try_for_each(refuse_content)?;
    }
    let physical_block = io.geometry(Device::Data).physical_block;
    let options = options(args, physical_block);
    // What can't be done destroys nothing.
    create::plan_on(&io, &options)?;
    let before = last_opens(&offline)?;
    if args.force {
        for backing in offline.backings().both() {
            let path = backing.path();
            let found = wipe(backing).doing(path.display())?;
            wiped.extend(found.into_iter().map(|signature| (path.to_owned(), signature)));
        }
    }
    let volume = match (&key.given, key.wrapped.take()) {
        (_, Some(slots)) => offline.run(create::format_with_slots(&io, *slots, &options))??,
        (Credential::Key(key), None) => offline.run(create::format(&io, key, &options))??,
        (Credential::Passphrase(_), None) => unreachable!("it has slots anyhow"),
    };
    if options.tag.lacks_instructions() {
        output::warn(format_args!(
            "this processor has no AES instructions: {} tags are slow here, `benchmark` shows how slow",
            options.tag
        ));
    }
    if let Some(line) = args.assume_atomic.and_then(|assumed| trusted(data, physical_block, assumed)) {
        output::warn(line);
    }
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
    let count: usize = opens.iter().map(|id| write_back_file::give_up(id, &owner)).sum();
    if count > 0 {
        let writes = write_back_file::writes(count);
        output::warn(format_args!("{writes} of the volume that was here, in memory yet, were given up"));
    }
    Ok(())
}

/// A volume of ours that another program has made is named as what it is.
fn refuse_unknown(offline: &Offline) -> Outcome {
    match offline.run(open::dump(&offline.io()))? {
        Ok(Dump { unknown: Some(unknown), .. }) => {
            let path = offline.backings().get(Device::Meta).path().display();
            let message =
                format!("{path} holds an ublk-integrity volume of another program ({unknown}): --force destroys it");
            Err(Failure::new(Exit::Busy, message))
        }
        _ => Ok(()),
    }
}

fn refuse_content(backing: &Backing) -> Outcome {
    let path = backing.path();
    let holds = |what: &str| Failure::new(Exit::Busy, format_args!("{} {what}: --force destroys it", path.display()));
    let file = backing.reopened(false).doing(format_args!("can't read {}", path.display()))?;
    let found = signature::find_content(&file, backing.size());
    let found = found
        .doing(path.display())
        .map_err(|failure| Failure { message: format!("{failure}; --force destroys what is there"), ..failure })?;
    if !found.is_empty() {
        let names: Vec<_> = found.iter().map(ToString::to_string).collect();
        return Err(holds(&format!("holds {}", names.join(", "))));
    }
    if is_mounted(path)? { Err(holds("is mounted")) } else { Ok(()) }
}

/// Leaves nothing that anybody would find; returns what there was.
fn wipe(backing: &Backing) -> Outcome<Vec<String>> {
    let (size, what) = (backing.size(), "can't wipe what is there");
    let file = backing.reopened(true).doing(what)?;
    let mut wiped = Vec::new();
    for _ in 0..LOOKS {
        let found = signature::find(&file, size).unwrap_or_else(|failure| {
            output::warn(format_args!("{}: {failure}: only its ends are wiped", backing.path().display()));
            Vec::new()
        });
        signature::wipe(&file, size, &found).doing(what)?;
        if found.is_empty() {
            if !wiped.is_empty() && os::read_partitions(&file) == Err(nix::Error::EBUSY) {
                output::warn(format_args!(
                    "{}: a partition is in use: the kernel still knows it",
                    backing.path().display()
                ));
            }
            return Ok(wiped);
        }
        wiped.extend(found.iter().map(ToString::to_string));
    }
    Err(Failure::new(Exit::Device, format_args!("{what}: it is still there: {}", wiped.last().map_or("", |w| w))))
}

/// Block devices in use are refused by O_EXCL already; this finds files that are mounted through a
/// loop device.
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

//! `export --rescue`: of a volume whose tag log can't be read in part, what is newest for sure, and apart from it what may be
//! older than what was last written.
//!
//! A record that can't be read may name any block. So a block is newest for sure only where a record behind it names it.

use super::{
    check::refuse_latched,
    export::{Args, Copied, Part, Sink, copy},
    new_file::NewFile,
};
use crate::{
    failure::{Context, Exit, Failure, Outcome},
    offline::{Offline, Opening},
};
use std::{
    ffi::OsStr,
    io::{self, Write},
    path::{Path, PathBuf},
};
use ublk_integrity::{
    BlockIndex, BlockRange, MasterKey, Volume,
    open::{Access, UnreadLog},
};

/// Exports what can be had. Fails, with all told, where anything may be older.
pub fn run(args: &Args, offline: &Offline, key: &MasterKey) -> Outcome {
    if args.out.as_os_str() == "-" {
        return Err(Failure::new(Exit::Arguments, "--rescue makes up to three files: name OUT"));
    }
    let (beside, map) = (with_suffix(&args.out, ".may-be-older"), with_suffix(&args.out, ".map"));
    if let Some(path) = [&beside, &map].into_iter().find(|path| path.exists() && !args.force) {
        return Err(Failure::new(Exit::Busy, format_args!("{} exists: --force overwrites it", path.display())));
    }
    let volume = open(args, offline, key, UnreadLog::FailOlder)?;
    let (block, named) = (volume.block_size(), |text: &str| args.devices.named(text));
    let Copied { bad, older } = copy(offline, &volume, Part::From(BlockIndex(0)), Sink::open(args)?, &args.out, named)?;
    let told = bad.finish(block, named);
    if older.is_empty() {
        return told.and_then(|()| refuse_latched(&volume));
    }
    drop(volume);
    let volume = open(args, offline, key, UnreadLog::ServeOlder)?;
    let last_first = older.iter().rev().copied().collect();
    let what = |path: &Path| format!("can't write {}", path.display());
    let out = Sink::File(NewFile::beside(&beside, beside.exists()).doing(what(&beside))?);
    copy(offline, &volume, Part::Runs(last_first), out, &beside, named)?.bad.finish(block, named).or_else(told_all)?;
    let list = NewFile::beside(&map, map.exists()).doing(what(&map))?;
    write_map(list, &older, block as u64).doing(what(&map))?;
    let blocks: u64 = older.iter().map(|run| run.count).sum();
    let message = format!(
        "a part of the tag log can't be read: {blocks} blocks may be older than what was last written. {} has them, {} lists them; in {} they are zeros",
        beside.display(),
        map.display(),
        args.out.display()
    );
    Err(Failure::new(Exit::Integrity, message))
}

fn open(args: &Args, offline: &Offline, key: &MasterKey, unread_log: UnreadLog) -> Outcome<Volume> {
    offline.open_volume(
        key,
        Opening { unread_log, without_kept: true, ..Opening::new(Access::ReadOnly, args.expected.uuid) },
    )
}

/// Bad blocks have been told one by one, and the exit code says no more.
fn told_all(failure: Failure) -> Outcome {
    if failure.exit == Exit::Integrity { Ok(()) } else { Err(failure) }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(OsStr::new(suffix));
    name.into()
}

fn write_map(list: NewFile, older: &[BlockRange], block: u64) -> io::Result<()> {
    let mut text = String::from("# byte offset and length of what may be older than what was last written\n");
    for run in older {
        text += &format!("{} {}\n", run.first.0 * block, run.count * block);
    }
    list.file().write_all(text.as_bytes())?;
    list.finish()
}

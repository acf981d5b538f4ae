//! `export --rescue`: of a volume whose tag log can't be read in part, what is newest for sure, and
//! apart from it what may be older than what was last written.
//!
//! A record that can't be read may name any block. So a block is newest for sure only where a
//! record behind it names it.

use super::{Args, Part, Sink, copy, unwritable};
use crate::{
    cli::check::refuse_latched,
    failure::{Context, Exit, Failure, Outcome},
    new_file::NewFile,
    offline::{Offline, Opening},
};
use std::{
    ffi::OsStr,
    fs,
    io::Write,
    path::{Path, PathBuf},
};
use ublk_integrity::{
    BlockIndex, BlockRange, Credential, Volume,
    open::{Access, UnreadLog},
};

/// Exports what can be had. Fails, with all told, where anything may be older.
///
/// All files are whole before the first gets its name, and OUT gets it last: where it is, the
/// others are.
pub fn run(args: &Args, offline: &Offline, key: &Credential) -> Outcome {
    if args.out.as_os_str() == "-" {
        return Err(Failure::new(Exit::Arguments, "--rescue makes up to three files: name OUT"));
    }
    let [out, beside, map] = ["", ".may-be-older", ".map"].map(|suffix| with_suffix(&args.out, suffix));
    let out = OutFile::of(args, out)?;
    let (beside, map) = (OutFile::of(args, beside)?, OutFile::of(args, map)?);
    let volume = open(args, offline, key, UnreadLog::FailOlder)?;
    let (block, size) = (volume.block_size(), volume.info().size);
    let named = |text: &str| args.devices.named(text);
    let newest = copy(offline, &volume, Part::From(BlockIndex(0)), Sink::File(out.new_file()?), &out.path, named)?;
    let told = newest.bad.finish(block, named);
    if newest.older.is_empty() {
        // What is there of another rescue does not belong to this OUT.
        beside.clear()?;
        map.clear()?;
        newest.out.finish(size).map_err(|e| unwritable(&out.path, &e))?;
        return told.and_then(|()| refuse_latched(&volume));
    }
    drop(volume);
    let volume = open(args, offline, key, UnreadLog::ServeOlder)?;
    let last_first = newest.older.iter().rev().copied().collect();
    let older = copy(offline, &volume, Part::Runs(last_first), Sink::File(beside.new_file()?), &beside.path, named)?;
    older.bad.finish(block, named).or_else(told_all)?;
    let list = map.new_file()?;
    list.file().write_all(map_of(&newest.older, block as u64).as_bytes()).map_err(|e| unwritable(&map.path, &e))?;
    older.out.finish(size).map_err(|e| unwritable(&beside.path, &e))?;
    list.finish().map_err(|e| unwritable(&map.path, &e))?;
    newest.out.finish(size).map_err(|e| unwritable(&out.path, &e))?;
    let blocks: u64 = newest.older.iter().map(|run| run.count).sum();
    let message = format!(
        "a part of the tag log can't be read: {blocks} blocks may be older than what was last written. {} has them, {} lists them; in {} they are zeros",
        beside.path.display(),
        map.path.display(),
        out.path.display()
    );
    Err(Failure::new(Exit::Integrity, message))
}

/// One of the files that are made: where, and whether it replaces another.
struct OutFile {
    path: PathBuf,
    replaces: bool,
}

impl OutFile {
    /// Refuses what can't be replaced, before anything is written.
    fn of(args: &Args, path: PathBuf) -> Outcome<Self> {
        let found = args.replaced(&path)?;
        if found.as_ref().is_some_and(|found| !found.is_file()) {
            let message = format!("{} is no file: --rescue makes up to three files, name another OUT", path.display());
            return Err(Failure::new(Exit::Arguments, message));
        }
        Ok(Self { replaces: found.is_some(), path })
    }

    fn new_file(&self) -> Outcome<NewFile> {
        NewFile::beside(&self.path, self.replaces).doing(format_args!("can't write {}", self.path.display()))
    }

    /// Leaves nothing there.
    fn clear(&self) -> Outcome {
        if self.replaces {
            fs::remove_file(&self.path).doing(format_args!("can't remove {}", self.path.display()))?;
        }
        Ok(())
    }
}

fn open(args: &Args, offline: &Offline, key: &Credential, unread_log: UnreadLog) -> Outcome<Volume> {
    let anchor = args.anchor.open(&args.devices)?;
    let how = Opening {
        unread_log,
        without_kept: true,
        without_anchor: args.without.without_anchor,
        ..Opening::new(Access::ReadOnly, args.expected.uuid)
    };
    offline.open_anchored(key, how, anchor.as_ref()).map(|(volume, _)| volume)
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

fn map_of(older: &[BlockRange], block: u64) -> String {
    let runs = older.iter().map(|run| format!("{} {}\n", run.first.0 * block, run.count * block));
    let head = "# byte offset and length of what may be older than what was last written\n".to_owned();
    std::iter::once(head).chain(runs).collect()
}

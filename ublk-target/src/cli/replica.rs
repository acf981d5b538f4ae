//! Replicas: copies of what a volume holds, from which blocks that have rotted are healed.
//!
//! A replica is an image as `export` makes it, another leg of a mirror, a snapshot of the device, or a raw
//! copy of the volume's data device. Which it is need not be said: each block is tried at both places, and
//! its tag says whether the bytes are the right ones.

use crate::{
    failure::{Context, Exit, Failure, Outcome},
    output::Output,
};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde::Serialize;
use std::{
    fs::{File, OpenOptions},
    io::ErrorKind,
    os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt},
    path::{Path, PathBuf},
};
use ublk_integrity::{BlockIndex, BlockRange, check::BadRun, heal::Healed};

/// Where blocks are healed from, if that was asked for.
#[derive(clap::Args)]
pub struct ReplicaArgs {
    /// Heal bad blocks from this copy: an image, a snapshot, another leg of a mirror, or a copy of the data
    /// device. What a block's tag does not prove is not taken. May be given several times
    #[arg(long, value_name = "PATH")]
    pub repair_from: Vec<PathBuf>,
}

/// Copies that are open.
pub struct Replicas(Vec<(PathBuf, File)>);

/// Where blocks lie, in bytes.
#[derive(Clone, Copy)]
pub struct Places {
    pub block_size: u64,
    /// Of the first block, in a copy of the data device.
    pub data_offset: u64,
}

/// What has become of blocks.
#[derive(Default, Serialize)]
pub struct Tally {
    pub healed: u64,
    /// Found good when it was their turn.
    pub was_good: u64,
    /// Bad yet.
    pub left: u64,
    #[serde(skip)]
    lines: Vec<Line>,
}

/// Blocks that the same is to be said of.
struct Line {
    range: BlockRange,
    before: &'static str,
    after: String,
}

impl Replicas {
    pub fn open(args: &ReplicaArgs) -> Outcome<Self> {
        let open = |path: &PathBuf| {
            let doing = format!("can't read the replica {}", path.display());
            // Nobody may ever write to a pipe.
            let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).doing(&doing)?;
            let kind = file.metadata().doing(&doing)?.file_type();
            if !kind.is_file() && !kind.is_block_device() {
                let why = format!("{doing}: it is neither a file nor a block device");
                return Err(Failure::new(Exit::Arguments, why));
            }
            Ok((path.clone(), file))
        };
        args.repair_from.iter().map(open).collect::<Outcome<_>>().map(Self)
    }

    /// Refuses one that is one of these devices: what is bad there is no copy of itself.
    pub fn refuse(&self, devices: impl Iterator<Item = PathBuf>) -> Outcome {
        let devices: Vec<_> = devices.filter_map(|path| path.metadata().ok()).collect();
        for (path, file) in &self.0 {
            let there = file.metadata().doing(format_args!("can't use {}", path.display()))?;
            if devices.iter().any(|device| super::is_same(device, &there)) {
                let message = format!("{} is the volume itself: name a copy of it", path.display());
                return Err(Failure::new(Exit::Arguments, message));
            }
        }
        Ok(())
    }

    /// The kernel may have an older content of a device in memory: whoever writes to the other leg of a mirror goes past
    /// that. From now on they are read from their disks, and no block before its turn.
    fn read_anew(&self) {
        for (_, file) in &self.0 {
            for advice in [PosixFadviseAdvice::POSIX_FADV_DONTNEED, PosixFadviseAdvice::POSIX_FADV_RANDOM] {
                // Where it is not heeded a block may not be healed: no tag proves an older one.
                let _ = posix_fadvise(file, 0, 0, advice);
            }
        }
    }

    /// Heals the blocks of these runs: `heal` is to write one of them, if its tag proves the bytes. A
    /// failure of one block does not keep the others from being tried.
    pub fn heal(
        &self,
        runs: &[BadRun],
        places: Places,
        mut heal: impl FnMut(BlockIndex, &[u8]) -> Outcome<Healed>,
    ) -> Tally {
        self.read_anew();
        let mut tally = Tally::default();
        for block in runs.iter().flat_map(|run| run.range.blocks()) {
            match self.heal_one(block, places, &mut heal) {
                Ok(Some((path, Healed::Healed))) => {
                    tally.healed += 1;
                    tally.say(block, "healed: blocks ", format!(" from {}", path.display()));
                }
                Ok(Some(_)) => {
                    tally.was_good += 1;
                    tally.say(
                        block,
                        "good: blocks ",
                        ", though they were found bad: restored, or read once more".into(),
                    );
                }
                Ok(None) => {
                    tally.left += 1;
                    tally.say(block, "not healed: no copy of blocks ", " holds what was written last".into());
                }
                Err(why) => {
                    tally.left += 1;
                    tally.say(block, "not healed: blocks ", format!(": {}", why.message));
                }
            }
        }
        tally
    }

    /// The copy that has the block as its tag says, if one has, and whether it was needed.
    fn heal_one(
        &self,
        block: BlockIndex,
        places: Places,
        heal: &mut impl FnMut(BlockIndex, &[u8]) -> Outcome<Healed>,
    ) -> Outcome<Option<(&Path, Healed)>> {
        let mut bytes = vec![0; places.block_size as usize];
        let (at, mut unread) = (block.0 * places.block_size, None);
        for (path, file) in &self.0 {
            for at in [at, places.data_offset + at] {
                match file.read_exact_at(&mut bytes, at) {
                    Ok(()) => {}
                    // A copy may be shorter, and rot, too.
                    Err(e) if e.kind() == ErrorKind::UnexpectedEof => continue,
                    Err(e) => {
                        unread.get_or_insert_with(|| Failure::io(format_args!("can't read {}", path.display()), &e));
                        continue;
                    }
                }
                match heal(block, &bytes)? {
                    Healed::NotInReplica => {}
                    healed => return Ok(Some((path, healed))),
                }
            }
        }
        unread.map_or(Ok(None), Err)
    }
}

impl Tally {
    /// None of these could be tried.
    pub fn none_of(runs: &[BadRun], why: &Failure) -> Self {
        let mut tally = Self::default();
        for block in runs.iter().flat_map(|run| run.range.blocks()) {
            tally.left += 1;
            tally.say(block, "not healed: blocks ", format!(": {}", why.message));
        }
        tally
    }

    fn say(&mut self, block: BlockIndex, before: &'static str, after: String) {
        match self.lines.last_mut() {
            Some(last) if last.range.end() == block.0 && (last.before, &last.after) == (before, &after) => {
                last.range.count += 1;
            }
            _ => self.lines.push(Line { range: BlockRange::new(block, 1), before, after }),
        }
    }

    /// What has become of each run.
    pub fn tell(&self, out: &mut Output) {
        for Line { range, before, after } in &self.lines {
            out.line(format_args!("{before}{range}{after}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use ublk_integrity::BadReason;

    const PLACES: Places = Places { block_size: 512, data_offset: 1024 };

    fn replica(bytes: &[u8]) -> (tempfile::NamedTempFile, PathBuf) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        let path = file.path().to_owned();
        (file, path)
    }

    fn told(tally: &Tally) -> Vec<String> {
        tally.lines.iter().map(|line| format!("{}{}{}", line.before, line.range, line.after)).collect()
    }

    #[test]
    fn each_block_is_tried_in_each_copy_at_both_places_until_its_tag_proves_one() {
        // Blocks 0 to 3 are bad. The image has 0 and 1, the raw copy has 2 behind its metadata, and 3 nobody has.
        let (_image, image) = replica(&[[1; 512], [1; 512]].concat());
        let (_raw, raw) = replica(&[[9; 512], [9; 512], [7; 512], [7; 512], [1; 512]].concat());
        let replicas = Replicas::open(&ReplicaArgs { repair_from: vec![image.clone(), raw.clone()] }).unwrap();
        let runs = [BadRun { range: BlockRange::new(BlockIndex(0), 4), reason: BadReason::Mismatch }];
        let good = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 1);
        let tally = replicas
            .heal(&runs, PLACES, |_, bytes| Ok(if good(bytes) { Healed::Healed } else { Healed::NotInReplica }));
        assert_eq!((tally.healed, tally.was_good, tally.left), (3, 0, 1));
        let (image, raw) = (image.display(), raw.display());
        assert_eq!(
            told(&tally),
            [
                format!("healed: blocks 0-1 from {image}"),
                format!("healed: blocks 2 from {raw}"),
                "not healed: no copy of blocks 3 holds what was written last".into()
            ]
        );
    }

    #[test]
    fn one_block_that_fails_keeps_none_of_the_others_from_being_healed() {
        let (_file, path) = replica(&[1; 2048]);
        let replicas = Replicas::open(&ReplicaArgs { repair_from: vec![path.clone()] }).unwrap();
        let runs = [BadRun { range: BlockRange::new(BlockIndex(0), 3), reason: BadReason::Mismatch }];
        let tally = replicas.heal(&runs, PLACES, |block, _| match block.0 {
            0 => Err(Failure::new(Exit::Integrity, "its tag is lost")),
            1 => Ok(Healed::Healed),
            _ => Ok(Healed::WasGood),
        });
        assert_eq!((tally.healed, tally.was_good, tally.left), (1, 1, 1));
        assert_eq!(told(&tally)[0], "not healed: blocks 0: its tag is lost");
        let itself = replicas.refuse([path].into_iter()).unwrap_err();
        assert!(itself.exit == Exit::Arguments && itself.message.contains("is the volume itself"));
        replicas.refuse(["/nowhere".into()].into_iter()).unwrap();
    }
}

//! `export`: the whole content through the verified path.

mod rescue;

use super::{
    DeviceArgs, ExpectedArgs,
    anchored::{AnchorArgs, WithoutAnchor},
    bad_runs::BadRuns,
    check::refuse_latched,
    progress,
};
use crate::{
    device::Use,
    event_loop::ring::RingStorage,
    failure::{Context, Exit, Failure, Outcome},
    key::KeyArgs,
    new_file::NewFile,
    offline::{LANES, Lane, Offline, Opening, REQUEST, lanes},
    output,
};
use futures_util::future::join_all;
use std::{
    fs::{File, Metadata, OpenOptions},
    io::{self, IsTerminal, Read, Write},
    ops::Range,
    os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt},
    path::{Path, PathBuf},
};
use ublk_integrity::{BlockIndex, BlockRange, ReadError, Volume, open::Access};

/// Write the whole verified content of a volume that is not in use to a file or pipe
///
/// Goes on past bad blocks: they are written as zeros and listed on standard error, and the exit
/// code is 6. A file appears when it is whole, or not at all.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub devices: DeviceArgs,
    #[command(flatten)]
    pub expected: ExpectedArgs,
    #[command(flatten)]
    key: KeyArgs,
    /// The new file (sparse), or "-" for standard output
    pub out: PathBuf,
    /// Overwrite OUT
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    anchor: AnchorArgs,
    #[command(flatten)]
    without: WithoutAnchor,
    /// Where a part of the tag log can't be read: OUT gets what is newest for sure. What
    /// may be older than what was last written goes to OUT.may-be-older, OUT.map lists it,
    /// and the exit code is 6
    #[arg(long)]
    rescue: bool,
}

/// What of a volume is copied.
pub enum Part {
    /// All that may hold data, from this block on.
    From(BlockIndex),
    /// These runs, the last first.
    Runs(Vec<BlockRange>),
}

/// A copy, and what of the volume is not in it.
pub struct Copied {
    /// Where the rest is, not in its place yet.
    pub out: Sink,
    pub bad: BadRuns,
    /// Left out, since a part of the log that can't be read may name it.
    pub older: Vec<BlockRange>,
}

pub fn run(args: &Args) -> Outcome {
    let offline = args.devices.open(Use::Shared)?;
    let key = args.key.load()?;
    if args.rescue {
        return rescue::run(args, &offline, &key);
    }
    let anchor = args.anchor.open(&args.devices)?;
    let how =
        Opening { without_anchor: args.without.without_anchor, ..Opening::new(Access::ReadOnly, args.expected.uuid) };
    let (volume, _) = offline.open_anchored(&key, how, anchor.as_ref())?;
    let out = Sink::open(args)?;
    let named = |text: &str| args.devices.named(text);
    let copied = copy(&offline, &volume, Part::From(BlockIndex(0)), out, &args.out, named)?;
    copied.out.finish(volume.info().size).map_err(|e| unwritable(&args.out, &e))?;
    copied.bad.finish(volume.block_size(), named).and_then(|()| refuse_latched(&volume))
}

/// Copies a part of the volume to `out`, which is of `path`; `named` puts paths into the words
/// about what is bad.
pub fn copy(
    offline: &Offline,
    volume: &Volume,
    mut part: Part,
    out: Sink,
    path: &Path,
    named: impl Fn(&str) -> String,
) -> Outcome<Copied> {
    let (block, size) = (volume.block_size(), volume.info().size);
    let mut copied = Copied { out, bad: BadRuns::default(), older: Vec::new() };
    let bar = progress::bar(size);
    let io = offline.io();
    offline.run(async {
        let mut lanes = lanes(volume);
        loop {
            let ranges = next_batch(volume, &io, &mut lanes[0], &mut part).await;
            if ranges.is_empty() {
                break;
            }
            let idle = lanes.split_off(ranges.len());
            let reads = ranges.into_iter().zip(lanes).map(|(range, lane)| fetch(volume, &io, range, lane));
            let done = join_all(reads).await;
            lanes = idle;
            for (range, lane, errors) in done {
                let bytes = &lane.buf[..range.count as usize * block];
                copied.out.put(range.first.0 * block as u64, bytes).map_err(|e| unwritable(path, &e))?;
                bar.set_position(range.end() * block as u64);
                for (block_index, error) in errors {
                    copied.failed(block_index, &error, block, &named);
                }
                lanes.push(lane);
            }
        }
        Outcome::Ok(())
    })??;
    bar.finish_and_clear();
    Ok(copied)
}

impl Copied {
    fn failed(&mut self, block: BlockIndex, error: &ReadError, block_size: usize, named: impl Fn(&str) -> String) {
        if !matches!(error, ReadError::MayBeOlder(_)) {
            let ended = self.bad.add(block, error);
            return self.bad.tell(ended, block_size, named);
        }
        match self.older.last_mut() {
            Some(run) if run.end() == block.0 => run.count += 1,
            _ => self.older.push(BlockRange::new(block, 1)),
        }
    }
}

/// The next up to [`LANES`] requests' worth; none when only zeros are left.
async fn next_batch(volume: &Volume, io: &RingStorage, lane: &mut Lane, part: &mut Part) -> Vec<BlockRange> {
    let most = (REQUEST / volume.block_size()) as u64;
    let mut ranges = Vec::with_capacity(LANES);
    while ranges.len() < LANES {
        let run = match part {
            Part::From(from) => volume.next_data(io, &mut lane.context, *from).await,
            Part::Runs(runs) => runs.pop(),
        };
        let Some(run) = run else { break };
        let range = BlockRange::new(run.first, run.count.min(most));
        let end = BlockIndex(range.end());
        match part {
            Part::From(from) => *from = end,
            Part::Runs(runs) if end.0 < run.end() => runs.push(BlockRange::new(end, run.end() - end.0)),
            Part::Runs(_) => {}
        }
        ranges.push(range);
    }
    ranges
}

/// Reads `range` into the front of the lane's buffer, block by block where it fails as a whole; bad
/// blocks become zeros.
async fn fetch(
    volume: &Volume,
    io: &RingStorage,
    range: BlockRange,
    mut lane: Lane,
) -> (BlockRange, Lane, Vec<(BlockIndex, ReadError)>) {
    let (result, buf) = volume.read(io, &mut lane.context, range, lane.buf).await;
    lane.buf = buf;
    let mut errors = Vec::new();
    if result.is_err() {
        let size = volume.block_size();
        // From the last to the first: the front of the buffer is where the library reads to.
        for i in (0..range.count as usize).rev() {
            let block = BlockIndex(range.first.0 + i as u64);
            let (result, buf) = volume.read(io, &mut lane.context, BlockRange::new(block, 1), lane.buf).await;
            lane.buf = buf;
            if let Err(e) = result {
                lane.buf[..size].fill(0);
                errors.push((block, e));
            }
            lane.buf.copy_within(..size, i * size);
        }
        errors.reverse();
    }
    (range, lane, errors)
}

/// Standard output has no path, and may be read no longer.
pub fn unwritable(path: &Path, e: &io::Error) -> Failure {
    match path.as_os_str() == "-" {
        true => output::unwritable("standard output", e),
        false => Failure::io(format_args!("can't write {}", path.display()), e),
    }
}

/// Where the content goes: a file with holes for zeros, or a stream, which has to be filled.
pub enum Sink {
    /// A new file.
    File(NewFile),
    /// Anything else.
    Stream { file: File, written: u64 },
}

impl Args {
    /// Refuses what the export needs itself.
    fn refuse_own(&self, found: &Metadata, path: &Path) -> Outcome {
        self.devices.refuse_itself(found, path)?;
        self.key.refuse_itself(found)
    }

    /// What is at a path that is to be written, if anything. Refuses what the export needs itself,
    /// and, without --force, the rest.
    pub fn replaced(&self, path: &Path) -> Outcome<Option<Metadata>> {
        match path.metadata() {
            Err(e) if e.kind() == io::ErrorKind::NotFound && !path.is_symlink() => Ok(None),
            Err(e) => Err(Failure::io(format_args!("can't write {}", path.display()), &e)),
            Ok(_) if !self.force => {
                Err(Failure::new(Exit::Busy, format_args!("{} exists: --force overwrites it", path.display())))
            }
            Ok(found) => self.refuse_own(&found, path).map(|()| Some(found)),
        }
    }
}

impl Sink {
    /// Opens what the arguments name.
    pub fn open(args: &Args) -> Outcome<Self> {
        let path = &args.out;
        let what = format!("can't write {}", path.display());
        if path.as_os_str() == "-" {
            let file = File::from(nix::unistd::dup(io::stdout()).doing(&what)?);
            return Self::stream(args, file);
        }
        match args.replaced(path)? {
            None => NewFile::beside(path, false).doing(&what).map(Self::File),
            Some(found) => Self::overwrite(args, &found).map_err(|failure| match failure.exit {
                Exit::Arguments => failure,
                _ => failure.context(&what),
            }),
        }
    }

    fn overwrite(args: &Args, found: &Metadata) -> Outcome<Self> {
        if found.is_file() {
            return NewFile::beside(&args.out, true).map(Self::File);
        }
        // A block device that is mounted, or otherwise in use, refuses this.
        let exclusive = if found.file_type().is_block_device() { libc::O_EXCL } else { 0 };
        let file = OpenOptions::new().write(true).custom_flags(exclusive | libc::O_NOCTTY).open(&args.out);
        Self::stream(args, file.doing("can't open it")?)
    }

    fn stream(args: &Args, file: File) -> Outcome<Self> {
        args.refuse_own(&file.metadata().doing("can't look at it")?, &args.out)?;
        if file.is_terminal() {
            let message = "the content would go to a terminal: name a file, or a program after |";
            return Err(Failure::new(Exit::Arguments, message));
        }
        Ok(Self::Stream { file, written: 0 })
    }

    fn put(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::File(new) => {
                data_runs(bytes).try_for_each(|run| new.file().write_all_at(&bytes[run.clone()], at + run.start as u64))
            }
            Self::Stream { file, written } => {
                zeros(file, at - *written)?;
                *written = at + bytes.len() as u64;
                file.write_all(bytes)
            }
        }
    }

    /// All has been put: the file is put in its place.
    pub fn finish(self, size: u64) -> io::Result<()> {
        match self {
            Self::File(new) => {
                new.file().set_len(size)?;
                new.finish()
            }
            Self::Stream { mut file, written } => {
                zeros(&mut file, size - written)?;
                match file.sync_all() {
                    // A pipe, or another that has nothing to sync.
                    Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(()),
                    done => done,
                }
            }
        }
    }
}

/// The parts of `bytes` that are not zeros, in whole pages.
fn data_runs(bytes: &[u8]) -> impl Iterator<Item = Range<usize>> {
    const PAGE: usize = 4096;
    let mut pages = bytes.chunks(PAGE).enumerate().peekable();
    std::iter::from_fn(move || {
        let (first, _) = pages.find(|(_, page)| !is_zero(page))?;
        let mut end = first + 1;
        while pages.next_if(|(_, page)| !is_zero(page)).is_some() {
            end += 1;
        }
        Some(first * PAGE..(end * PAGE).min(bytes.len()))
    })
}

fn zeros(to: &mut File, count: u64) -> io::Result<()> {
    io::copy(&mut io::repeat(0).take(count), to).map(drop)
}

/// Whether all bytes are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // In words of a cache line, which the compiler turns into wide compares.
    let (lines, rest) = bytes.split_at(bytes.len() / 64 * 64);
    lines.chunks_exact(64).all(|line| line == [0; 64]) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pages_with_data_are_written() {
        let mut bytes = vec![0; 10 * 4096 + 100];
        assert_eq!(data_runs(&bytes).count(), 0);
        for at in [4096, 3 * 4096 - 1, 7 * 4096 + 5, 10 * 4096 + 99] {
            bytes[at] = 1;
        }
        let runs: Vec<_> = data_runs(&bytes).collect();
        assert_eq!(runs, [4096..3 * 4096, 7 * 4096..8 * 4096, 10 * 4096..10 * 4096 + 100]);
    }
}

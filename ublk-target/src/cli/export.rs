//! `export`: the whole content through the verified path.

use super::{DeviceArgs, progress};
use crate::{
    device::Use,
    failure::{Context, Exit, Failure, Outcome},
    key::KeyArgs,
    offline::{LANES, Lane, Offline, REQUEST, lanes},
    output,
    ring::RingStorage,
};
use futures_util::future::join_all;
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    ops::Range,
    os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt},
    path::PathBuf,
};
use ublk_integrity::{BlockIndex, BlockRange, ReadError, Volume, open::Access};

/// Write the whole verified content of a volume that is not in use to a file or pipe
///
/// Goes on past bad blocks: they are written as zeros and listed on standard error, and the exit code is 6.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub devices: DeviceArgs,
    #[command(flatten)]
    key: KeyArgs,
    /// The new file (sparse), or "-" for standard output
    out: PathBuf,
    /// Overwrite OUT
    #[arg(long)]
    force: bool,
}

pub fn run(args: &Args) -> Outcome {
    let offline = Offline::open(&args.devices, Use::Shared)?;
    let key = args.key.load()?;
    offline.refuse_left_in_memory(&key)?;
    let volume = offline.open_volume(&key, Access::ReadOnly)?;
    let what = format!("can't write {}", args.out.display());
    let (out, made) = Sink::open(args)?;
    match copy(&offline, &volume, out, &what) {
        Ok(bad) => bad.report(),
        Err(failure) => {
            // Half a file would look like a whole one.
            if made {
                let _ = fs::remove_file(&args.out);
            }
            Err(failure)
        }
    }
}

fn copy(offline: &Offline, volume: &Volume, mut out: Sink, what: &str) -> Outcome<BadBlocks> {
    let block = volume.block_size();
    let mut bad = BadBlocks::default();
    let bar = progress::bar(volume.info().size);
    let io = offline.io();
    offline.run(async {
        let mut lanes = lanes(volume);
        let mut from = BlockIndex(0);
        loop {
            let ranges = next_batch(volume, &io, &mut lanes[0], &mut from).await;
            if ranges.is_empty() {
                break;
            }
            let idle = lanes.split_off(ranges.len());
            let reads = ranges.into_iter().zip(lanes).map(|(range, lane)| fetch(volume, &io, range, lane));
            let done = join_all(reads).await;
            lanes = idle;
            for (range, lane, errors) in done {
                let bytes = &lane.buf[..range.count as usize * block];
                out.put(range.first.0 * block as u64, bytes).doing(what)?;
                bar.set_position(range.end() * block as u64);
                bad.add(errors);
                lanes.push(lane);
            }
        }
        Outcome::Ok(())
    })??;
    out.finish(volume.info().size).doing(what)?;
    bar.finish_and_clear();
    Ok(bad)
}

/// The next up to [`LANES`] runs of data from `from` on; none when only zeros are left.
async fn next_batch(volume: &Volume, io: &RingStorage, lane: &mut Lane, from: &mut BlockIndex) -> Vec<BlockRange> {
    let most = (REQUEST / volume.block_size()) as u64;
    let mut ranges = Vec::with_capacity(LANES);
    while ranges.len() < LANES {
        let Some(run) = volume.next_data(io, &mut lane.slot, *from).await else { break };
        let range = BlockRange::new(run.first, run.count.min(most));
        *from = BlockIndex(range.end());
        ranges.push(range);
    }
    ranges
}

/// Reads `range` into the front of the lane's buffer, block by block where it fails as a whole; bad blocks become zeros.
async fn fetch(
    volume: &Volume,
    io: &RingStorage,
    range: BlockRange,
    mut lane: Lane,
) -> (BlockRange, Lane, Vec<(BlockIndex, ReadError)>) {
    let (result, buf) = volume.read(io, &mut lane.slot, range, lane.buf).await;
    lane.buf = buf;
    let mut errors = Vec::new();
    if result.is_err() {
        let size = volume.block_size();
        // From the last to the first: the front of the buffer is where the library reads to.
        for i in (0..range.count as usize).rev() {
            let block = BlockIndex(range.first.0 + i as u64);
            let (result, buf) = volume.read(io, &mut lane.slot, BlockRange::new(block, 1), lane.buf).await;
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

/// Where the content goes: a file with holes for zeros, or a stream, which has to be filled.
enum Sink {
    File(File),
    Stream { file: File, written: u64 },
}

impl Sink {
    /// Opens it; whether it is new.
    fn open(args: &Args) -> Outcome<(Self, bool)> {
        let path = &args.out;
        let what = format!("can't write {}", path.display());
        if path.as_os_str() == "-" {
            let file = File::from(nix::unistd::dup(io::stdout()).doing(&what)?);
            args.devices.refuse_itself(&file.metadata().doing(&what)?, path)?;
            return Ok((Self::Stream { file, written: 0 }, false));
        }
        match OpenOptions::new().write(true).create_new(true).open(path) {
            Ok(file) => Ok((Self::File(file), true)),
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(Failure::io(&what, &e)),
            Err(_) if args.force => Ok((Self::overwrite(args).doing(&what)?, false)),
            Err(_) => Err(Failure::new(Exit::Busy, format_args!("{} exists: --force overwrites it", path.display()))),
        }
    }

    fn overwrite(args: &Args) -> Outcome<Self> {
        let found = args.out.metadata().doing("can't look at it")?;
        args.devices.refuse_itself(&found, &args.out)?;
        let mut options = OpenOptions::new();
        options.write(true);
        if found.file_type().is_block_device() {
            // What is mounted, or otherwise in use, refuses this.
            options.custom_flags(libc::O_EXCL);
        } else {
            options.create(true).truncate(true);
        }
        let file = options.open(&args.out).doing("can't open it")?;
        // Zeros are left out of regular files only: a device keeps what was there.
        Ok(if found.is_file() { Self::File(file) } else { Self::Stream { file, written: 0 } })
    }

    fn put(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::File(file) => {
                data_runs(bytes).try_for_each(|run| file.write_all_at(&bytes[run.clone()], at + run.start as u64))
            }
            Self::Stream { file, written } => {
                zeros(file, at - *written)?;
                *written = at + bytes.len() as u64;
                file.write_all(bytes)
            }
        }
    }

    fn finish(self, size: u64) -> io::Result<()> {
        match self {
            Self::File(file) => {
                file.set_len(size)?;
                file.sync_all()
            }
            Self::Stream { mut file, written } => {
                zeros(&mut file, size - written)?;
                match file.sync_all() {
                    // A pipe.
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

/// The first bad blocks, and how many there are.
#[derive(Default)]
struct BadBlocks {
    count: u64,
}

impl BadBlocks {
    /// How many are listed one by one.
    const LISTED: u64 = 100;

    fn add(&mut self, errors: Vec<(BlockIndex, ReadError)>) {
        for (block, error) in errors {
            self.count += 1;
            if self.count <= Self::LISTED {
                output::tell(format_args!("block {block} exported as zeros: {error}"));
            }
        }
    }

    fn report(&self) -> Outcome {
        match self.count {
            0 => Ok(()),
            n => Err(Failure::new(Exit::Integrity, format_args!("{n} blocks are bad and were exported as zeros"))),
        }
    }
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

//! `import`: the whole content, written through the verified path.

use super::{DeviceArgs, ExpectedArgs, anchored::AnchorArgs, check::refuse_latched, export::is_zero, progress};
use crate::{
    checkpoints::AtStop,
    device::Use,
    event_loop::ring::RingStorage,
    failure::{Context, Exit, Failure, Outcome},
    interrupt,
    key::KeyArgs,
    offline::{LANES, Lane, Offline, Opening, REQUEST, lanes},
    size::Size,
};
use futures_util::future::try_join_all;
use nix::unistd::{Whence, lseek};
use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    ops::Range,
    path::{Path, PathBuf},
};
use ublk_integrity::{BlockIndex, BlockRange, Durability, Volume, check, open::Access};

/// Fill a volume that is not in use from a file or pipe of its size
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub devices: DeviceArgs,
    #[command(flatten)]
    expected: ExpectedArgs,
    #[command(flatten)]
    key: KeyArgs,
    #[command(flatten)]
    anchor: AnchorArgs,
    /// The content (holes are not read), or "-" for standard input
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// Take an input that is shorter than the volume; the rest becomes zeros
    #[arg(long)]
    zero_rest: bool,
    /// Fail unless the input has so many bytes: for pipes, which may end early because the program
    /// before has failed
    #[arg(long, value_name = "SIZE")]
    expect: Option<Size>,
    /// Overwrite a volume that holds data
    #[arg(long)]
    force: bool,
}

pub fn run(args: &Args) -> Outcome {
    let what = format!("can't read {}", args.input.display());
    let key = args.key.source()?;
    if args.input.as_os_str() == "-" && key.is_standard_input() {
        return Err(Failure::new(Exit::Arguments, "standard input can't be both the key and the content"));
    }
    let mut input = Input::open(&args.input).doing(&what)?;
    args.devices.refuse_itself(&input.file.metadata().doing(&what)?, &args.input)?;
    input.refuse_empty(&args.input)?;
    let offline = args.devices.open(Use::Exclusive)?;
    let key = key.load()?;
    let anchor = args.anchor.open(&args.devices)?;
    let how = Opening::new(Access::ReadWrite, args.expected.uuid);
    let (volume, keeper) = offline.open_anchored(&key, how, anchor.as_ref())?;
    refuse_latched(&volume)?;
    let size = volume.info().size;
    let wanted = Wanted { args, size };
    wanted.refuse_early(&input)?;
    let io = offline.io();
    if !args.force && offline.run(check::holds_data(&volume, &io, &mut volume.context(0)))? {
        let message = format!("volume {} holds data: --force overwrites it", volume.info().uuid);
        return Err(Failure::new(Exit::Busy, message));
    }
    interrupt::unfinished(format!(
        "interrupted: volume {} on {} holds a part of {} and a part of what was there: `import --force` once more",
        volume.info().uuid,
        args.devices.data.display(),
        name(&args.input)
    ));
    let bar = progress::bar(size);
    let written = offline.run_with_checkpoints(&volume, AtStop::Close, async {
        let mut lanes = lanes(&volume);
        while input.at < size {
            let mut batch = Vec::with_capacity(LANES);
            for mut lane in lanes {
                let piece = input.next(&volume, &mut lane.buf).doing(&what)?;
                if let Some(len) = input.ended {
                    wanted.accept(len)?;
                }
                batch.push(store(&volume, &io, piece, lane));
            }
            lanes = try_join_all(batch).await?;
            bar.set_position(input.at);
        }
        if input.has_more().doing(&what)? {
            return Err(wanted.too_large(size + 1));
        }
        match input.file_size {
            None => wanted.accept(input.ended.unwrap_or(size))?,
            Some(before) => {
                // What was cut off meanwhile has been taken for a hole, what was added not at all.
                let now = input.file.metadata().doing(&what)?.len();
                if now != before {
                    let what = format!("had {before} bytes and has {now} by now: it changed while it was read");
                    return Err(wanted.refused(format_args!("{what}")));
                }
            }
        }
        Ok(volume.flush(&io, &mut lanes[0].context).await?)
    });
    written.map_err(half_done)?;
    Offline::finish(&volume, keeper, anchor.as_ref())?;
    interrupt::finished();
    bar.finish_and_clear();
    Ok(())
}

/// How much there is to be.
struct Wanted<'a> {
    args: &'a Args,
    /// Bytes of the volume.
    size: u64,
}

impl Wanted<'_> {
    /// What can be said before anything is written.
    fn refuse_early(&self, input: &Input) -> Outcome {
        let (size, expected) = (self.size, self.args.expect.map(|size| size.0));
        match expected {
            Some(expected) if expected > size => return Err(self.too_large(expected)),
            Some(expected) if expected < size && !self.args.zero_rest => return Err(self.short(expected)),
            _ => {}
        }
        match input.file_size {
            Some(bytes) if bytes > size => Err(self.too_large(bytes)),
            Some(bytes) => self.accept(bytes),
            None => Ok(()),
        }
    }

    /// Whether an input of `len` bytes is what was asked for.
    fn accept(&self, len: u64) -> Outcome {
        match self.args.expect {
            Some(Size(expected)) if len != expected => {
                Err(self.refused(format_args!("ended after {len} bytes, {expected} were expected")))
            }
            _ if len < self.size && !self.args.zero_rest => Err(self.short(len)),
            _ => Ok(()),
        }
    }

    fn short(&self, len: u64) -> Failure {
        let size = self.size;
        self.refused(format_args!("has {len} bytes, the volume {size}: --zero-rest makes the rest zeros"))
    }

    fn too_large(&self, len: u64) -> Failure {
        self.refused(format_args!("has {len} bytes or more, the volume only {}", self.size))
    }

    fn refused(&self, what: std::fmt::Arguments<'_>) -> Failure {
        Failure::new(Exit::Arguments, format_args!("{} {what}", name(&self.args.input)))
    }
}

/// All that came before may be in place. A signal has words of its own.
fn half_done(failure: Failure) -> Failure {
    match failure.message.is_empty() {
        true => failure,
        false => Failure { message: format!("{failure}; the volume may hold part of it"), ..failure },
    }
}

fn name(input: &Path) -> String {
    if input.as_os_str() == "-" { "standard input".into() } else { input.display().to_string() }
}

/// A part of the content.
enum Piece {
    /// In the front of the lane's buffer.
    Data(BlockRange),
    /// Known to be zeros without reading.
    Zeros(BlockRange),
    /// The end was reached before.
    Nothing,
}

async fn store(volume: &Volume, io: &RingStorage, piece: Piece, mut lane: Lane) -> Outcome<Lane> {
    match piece {
        Piece::Data(range) if !is_zero(&lane.buf[..range.count as usize * volume.block_size()]) => {
            let (result, buf) = volume.write(io, &mut lane.context, range, lane.buf, Durability::MayBeLost).await;
            lane.buf = buf;
            result?;
        }
        Piece::Data(range) | Piece::Zeros(range) => volume.zero(io, &mut lane.context, range, true).await?,
        Piece::Nothing => {}
    }
    Ok(lane)
}

/// The content, in order.
struct Input {
    file: File,
    /// `None` for pipes and devices.
    file_size: Option<u64>,
    /// Bytes that were read to see whether there are any.
    head: Vec<u8>,
    /// Of a pipe, its length once that is known.
    ended: Option<u64>,
    /// How far it has been taken.
    at: u64,
    /// The run of data, as far as it is known, that `at` lies in or before.
    data: Range<u64>,
}

impl Input {
    fn open(path: &Path) -> io::Result<Self> {
        let file = if path.as_os_str() == "-" { File::from(nix::unistd::dup(io::stdin())?) } else { File::open(path)? };
        let meta = file.metadata()?;
        let file_size = meta.is_file().then_some(meta.len());
        // A pipe is data to its end, wherever that may be.
        let data = if file_size.is_some() { 0..0 } else { 0..u64::MAX };
        Ok(Self { file, file_size, head: Vec::new(), ended: None, at: 0, data })
    }

    /// An input without a byte is no content: the program before the pipe has failed, or the name
    /// is wrong. Waits for the first.
    fn refuse_empty(&mut self, path: &Path) -> Outcome {
        let mut first = [0];
        let empty = match self.file_size {
            Some(size) => size == 0,
            None => read_full(&mut self.file, &mut first).doing(format_args!("can't read {}", path.display()))? == 0,
        };
        if empty {
            return Err(Failure::new(Exit::Arguments, format_args!("{} is empty: nothing is written", name(path))));
        }
        self.head = if self.file_size.is_none() { first.to_vec() } else { Vec::new() };
        Ok(())
    }

    /// Reads until `buf` is full or the input ends.
    fn fill(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let head = std::mem::take(&mut self.head);
        buf[..head.len()].copy_from_slice(&head);
        Ok(head.len() + read_full(&mut self.file, &mut buf[head.len()..])?)
    }

    /// The next part, of at most a request's size if it is data.
    fn next(&mut self, volume: &Volume, buf: &mut [u8]) -> io::Result<Piece> {
        let (size, block) = (volume.info().size, volume.block_size() as u64);
        if self.at >= size {
            return Ok(Piece::Nothing);
        }
        let from = self.at;
        let range = |to: u64| BlockRange::new(BlockIndex(from / block), (to - from) / block);
        if self.at >= self.data.end {
            self.data = self.find_data(size, block)?;
        }
        let data_start = (self.data.start / block * block).min(size);
        if data_start > self.at {
            self.at = data_start;
            return Ok(Piece::Zeros(range(self.at)));
        }
        let want = (self.data.end.min(size) - self.at).next_multiple_of(block).min(REQUEST as u64) as usize;
        let got = self.fill(&mut buf[..want])?;
        if got < want && self.file_size.is_none() {
            // Later looks find the same end, from the next whole block.
            self.ended.get_or_insert(self.at + got as u64);
        }
        if got == 0 {
            self.at = size;
            return Ok(Piece::Zeros(range(size)));
        }
        let whole = got.next_multiple_of(block as usize);
        buf[got..whole].fill(0);
        self.at += whole as u64;
        Ok(Piece::Data(range(self.at)))
    }

    /// The next run of a file that is no hole. Leaves the file's position where reading goes on: at
    /// the start of the block that the run begins in.
    fn find_data(&mut self, size: u64, block: u64) -> io::Result<Range<u64>> {
        let start = match lseek(&self.file, self.at as i64, Whence::SeekData) {
            Ok(start) => start as u64,
            Err(nix::Error::ENXIO) => return Ok(size..size),
            // A file system that does not know holes.
            Err(nix::Error::EINVAL) => self.at,
            Err(e) => return Err(e.into()),
        };
        let end = lseek(&self.file, start as i64, Whence::SeekHole).map_or(u64::MAX, |end| end as u64);
        self.file.seek(SeekFrom::Start(start / block * block))?;
        Ok(start..end)
    }

    fn has_more(&mut self) -> io::Result<bool> {
        match self.file_size {
            Some(_) => Ok(false),
            None => Ok(read_full(&mut self.file, &mut [0])? > 0),
        }
    }
}

/// Reads until `buf` is full or the input ends.
fn read_full(input: &mut File, buf: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buf.len() {
        match input.read(&mut buf[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(filled)
}

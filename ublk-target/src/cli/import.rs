//! `import`: the whole content, written through the verified path.

use super::{DeviceArgs, export::is_zero, progress};
use crate::{
    device::Use,
    failure::{Context, Exit, Failure, Outcome},
    key::{KeyArgs, KeySource},
    offline::{LANES, Lane, Offline, REQUEST, lanes},
    ring::RingStorage,
};
use futures_util::future::try_join_all;
use nix::unistd::{Whence, lseek};
use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    ops::Range,
    path::{Path, PathBuf},
};
use ublk_integrity::{BlockIndex, BlockRange, Durability, Volume, open::Access};

/// Fill a volume that is not in use from a file or pipe; what lies behind the input's end becomes zeros
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub devices: DeviceArgs,
    #[command(flatten)]
    key: KeyArgs,
    /// The content (holes are not read), or "-" for standard input
    #[arg(value_name = "IN")]
    input: PathBuf,
}

pub fn run(args: &Args) -> Outcome {
    let what = format!("can't read {}", args.input.display());
    let key = args.key.source()?;
    if args.input.as_os_str() == "-" && key == KeySource::Stdin {
        return Err(Failure::new(Exit::Arguments, "standard input can't be both the key and the content"));
    }
    let mut input = Input::open(&args.input).doing(&what)?;
    args.devices.refuse_itself(&input.file.metadata().doing(&what)?, &args.input)?;
    let offline = Offline::open(&args.devices, Use::Exclusive)?;
    let key = key.load()?;
    offline.refuse_left_in_memory(&key)?;
    let volume = offline.open_volume(&key, Access::ReadWrite)?;
    let size = volume.info().size;
    let too_large = |bytes: u64| {
        let path = args.input.display();
        Failure::new(Exit::Arguments, format_args!("{path} has {bytes} bytes or more, the volume only {size}"))
    };
    if let Some(bytes) = input.file_size.filter(|bytes| *bytes > size) {
        return Err(too_large(bytes));
    }
    let bar = progress::bar(size);
    let io = offline.io();
    offline.run_with_checkpoints(&volume, async {
        let mut lanes = lanes(&volume);
        while input.at < size {
            let mut batch = Vec::with_capacity(LANES);
            for mut lane in lanes {
                let piece = input.next(&volume, &mut lane.buf).doing(&what)?;
                batch.push(store(&volume, &io, piece, lane));
            }
            lanes = try_join_all(batch).await?;
            bar.set_position(input.at);
        }
        if input.has_more().doing(&what)? {
            return Err(too_large(size + 1));
        }
        Ok(volume.flush(&io, &mut lanes[0].slot).await?)
    })?;
    bar.finish_and_clear();
    Ok(())
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
            let (result, buf) = volume.write(io, &mut lane.slot, range, lane.buf, Durability::MayBeLost).await;
            lane.buf = buf;
            result?;
        }
        Piece::Data(range) | Piece::Zeros(range) => volume.zero(io, &mut lane.slot, range, true).await?,
        Piece::Nothing => {}
    }
    Ok(lane)
}

/// The content, in order.
struct Input {
    file: File,
    /// `None` for pipes and devices.
    file_size: Option<u64>,
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
        Ok(Self { file, file_size, at: 0, data })
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
        let got = read_full(&mut self.file, &mut buf[..want])?;
        if got == 0 {
            self.at = size;
            return Ok(Piece::Zeros(range(size)));
        }
        let whole = got.next_multiple_of(block as usize);
        buf[got..whole].fill(0);
        self.at += whole as u64;
        Ok(Piece::Data(range(self.at)))
    }

    /// The next run of a file that is no hole. Leaves the file's position where reading goes on: at the start of the
    /// block that the run begins in.
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

//! What the tests under the model checker share: a device in memory for several threads, a small
//! volume on it, and requests that run to their end. Of the library's tests and of the program's.
#![allow(dead_code, unreachable_pub)] // each uses its own part of this

use shuttle::{
    Config, Runner,
    future::block_on,
    scheduler::{PctScheduler, RandomScheduler},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};
use std::{
    future::Future,
    ops::Range,
    pin::Pin,
    sync::OnceLock,
    task::{Context, Poll},
    time::Duration,
};
use ublk_integrity::{
    Access, BlockIndex, BlockRange, Buf, ByteOffset, Device, Durability, Errno, Geometry, MasterKey, MemoryStorage,
    OpenOptions, Phase, Scheduler, Storage, Volume, WriteError,
    create::{FormatOptions, format},
    open::open,
};

pub const BLOCK: usize = 4096;

/// A device in memory that all threads share; an operation takes effect when it starts and ends at
/// the second poll.
#[derive(Clone)]
pub struct Memory {
    pub disk: Arc<Mutex<MemoryStorage>>,
    /// Metadata writes that still succeed.
    pub writes_left: Arc<AtomicU64>,
}

pub struct Soon<T>(Option<T>, bool);

impl<T: Unpin> Future for Soon<T> {
    type Output = T;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        if !std::mem::replace(&mut self.1, true) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.0.take().map_or(Poll::Pending, Poll::Ready)
    }
}

fn soon<T>(value: T) -> Soon<T> {
    Soon(Some(value), false)
}

impl Memory {
    fn new(bytes: Vec<u8>) -> Self {
        let disk = MemoryStorage::new(bytes, BLOCK as u32);
        Self { disk: Arc::new(Mutex::new(disk)), writes_left: Arc::new(AtomicU64::new(u64::MAX)) }
    }
}

impl Storage for Memory {
    type Transfer = Soon<(Result<(), Errno>, Buf)>;
    type Command = Soon<Result<(), Errno>>;

    fn geometry(&self, device: Device) -> Geometry {
        self.disk.lock().unwrap().geometry(device)
    }
    fn read(&self, device: Device, at: ByteOffset, buf: Buf, part: Range<usize>) -> Self::Transfer {
        soon(self.disk.lock().unwrap().read(device, at, buf, part).into_inner())
    }
    fn write(
        &self,
        device: Device,
        at: ByteOffset,
        buf: Buf,
        part: Range<usize>,
        durability: Durability,
    ) -> Self::Transfer {
        let left = match device {
            Device::Data => u64::MAX,
            Device::Meta => self.writes_left.load(Ordering::SeqCst),
        };
        if left == 0 {
            return soon((Err(Errno::EIO), buf));
        }
        if left != u64::MAX {
            self.writes_left.fetch_sub(1, Ordering::SeqCst);
        }
        soon(self.disk.lock().unwrap().write(device, at, buf, part, durability).into_inner())
    }
    fn sync(&self, _: Device) -> Self::Command {
        soon(Ok(()))
    }
    fn discard(&self, _: Device, _: ByteOffset, _: u64) -> Self::Command {
        soon(Ok(()))
    }
    /// Pauses between retries pass at once; no time passes for a timer of seconds.
    fn sleep(&self, time: Duration) -> Self::Command {
        Soon((time < Duration::from_secs(1)).then_some(Ok(())), false)
    }
}

impl Scheduler for Memory {
    fn batch_boundary(&self, _: Phase) -> impl Future<Output = ()> {
        soon(())
    }
    fn runnable(&self) -> usize {
        usize::MAX
    }
}

pub fn key() -> MasterKey {
    MasterKey::new(&[1; 32]).unwrap()
}

/// An empty volume; formatted once, copied for every schedule.
pub fn formatted() -> Memory {
    static IMAGE: OnceLock<Vec<u8>> = OnceLock::new();
    Memory::new(IMAGE.get_or_init(|| image(64 << 10)).clone())
}

/// With a log that is large enough to carry data.
pub fn formatted_for_sync_log() -> Memory {
    static IMAGE: OnceLock<Vec<u8>> = OnceLock::new();
    Memory::new(IMAGE.get_or_init(|| image(320 << 10)).clone())
}

fn image(log_size: u64) -> Vec<u8> {
    let options =
        FormatOptions { size: Some(1 << 20), log_size: Some(log_size), ..FormatOptions::new(BLOCK as u32, [3; 16]) };
    let bytes = ublk_integrity::create::plan(&options).unwrap().data_device_bytes as usize;
    let io = Memory::new(vec![0; bytes]);
    block_on(format(&io, &key(), &options)).unwrap();
    io.disk.lock().unwrap().image()
}

pub fn opened(io: &Memory, id: u8) -> Arc<Volume> {
    opened_with(io, options(id))
}

pub fn options(id: u8) -> OpenOptions {
    OpenOptions { max_requests: 32, max_request_bytes: 2 * BLOCK, ..OpenOptions::new(Access::ReadWrite, [id; 32]) }
}

pub fn opened_with(io: &Memory, options: OpenOptions) -> Arc<Volume> {
    Arc::new(block_on(open(io, &key(), &options)).unwrap())
}

pub fn range(first: u64, count: u64) -> BlockRange {
    BlockRange::new(BlockIndex(first), count)
}

pub fn write(volume: &Volume, io: &Memory, blocks: BlockRange, fill: u8) -> Result<(), WriteError> {
    let mut buf = Buf::new(2 * BLOCK);
    buf.fill(fill);
    block_on(volume.write(io, &mut volume.context(0), blocks, buf, Durability::MayBeLost)).0
}

/// What the blocks hold; panics where a block is not of one piece or the blocks differ.
pub fn read(volume: &Volume, io: &Memory, blocks: BlockRange) -> u8 {
    let bytes = blocks.count as usize * BLOCK;
    let (result, buf) = block_on(volume.read(io, &mut volume.context(0), blocks, Buf::new(2 * BLOCK)));
    result.expect("a false alarm");
    assert!(buf[..bytes].iter().all(|b| *b == buf[0]), "half of one write and half of another");
    buf[0]
}

/// Half of the schedules are random; the other half let one thread run far ahead of another
/// (Burckhardt and others 2010), which a fair coin at every step hardly ever does.
pub fn check(test: impl Fn() + Send + Sync + Copy + 'static) {
    let schedules = std::env::var("SHUTTLE_ITERATIONS").map_or(1000, |n| n.parse().expect("a number"));
    let mut config = Config::default();
    // Of a thread. The default is too small for a few functions that call each other, unoptimized.
    config.stack_size = 1 << 20;
    Runner::new(RandomScheduler::new(schedules / 2), config.clone()).run(test);
    Runner::new(PctScheduler::new(3, schedules / 2), config).run(test);
}

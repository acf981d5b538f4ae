//! Real threads, all their locks and atomics under a model checker: it tries interleavings, finds
//! deadlocks and lost wake-ups, and prints a schedule that replays.
//!
//! `RUSTFLAGS='--cfg shuttle' cargo test --test interleavings`; without the flag there is nothing here.
//! `SHUTTLE_ITERATIONS=n` sets how many schedules are tried.
#![cfg(shuttle)]

use shuttle::{
    future::block_on,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
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
    Access, BlockIndex, BlockRange, Buf, ByteOffset, Device, Durability, Errno, Geometry, MasterKey, OnMismatch,
    OpenOptions, Storage, TagAlgorithm, Volume, WriteError,
    create::{FormatOptions, format},
    open::open,
};

const BLOCK: usize = 4096;

/// A device in memory that all threads share; an operation takes effect when it starts and ends at the second poll.
#[derive(Clone)]
struct Memory {
    bytes: Arc<Mutex<Vec<u8>>>,
    /// Metadata writes that still succeed.
    writes_left: Arc<AtomicU64>,
}

struct Soon<T>(Option<T>, bool);

impl<T: Unpin> Future for Soon<T> {
    type Output = T;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        if !std::mem::replace(&mut self.1, true) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(self.0.take().expect("polled to its end once"))
    }
}

fn soon<T>(value: T) -> Soon<T> {
    Soon(Some(value), false)
}

impl Memory {
    fn new(bytes: Vec<u8>) -> Self {
        Self { bytes: Arc::new(Mutex::new(bytes)), writes_left: Arc::new(AtomicU64::new(u64::MAX)) }
    }
}

impl Storage for Memory {
    type Transfer = Soon<(Result<(), Errno>, Buf)>;
    type Command = Soon<Result<(), Errno>>;

    fn geometry(&self, _: Device) -> Geometry {
        Geometry { size: self.bytes.lock().unwrap().len() as u64, physical_block: BLOCK as u32 }
    }
    fn read(&self, _: Device, offset: ByteOffset, mut buf: Buf, part: Range<usize>) -> Self::Transfer {
        let (at, len) = (offset.0 as usize, part.len());
        buf[part].copy_from_slice(&self.bytes.lock().unwrap()[at..at + len]);
        soon((Ok(()), buf))
    }
    fn write(&self, device: Device, offset: ByteOffset, buf: Buf, part: Range<usize>, _: Durability) -> Self::Transfer {
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
        let at = offset.0 as usize;
        self.bytes.lock().unwrap()[at..at + part.len()].copy_from_slice(&buf[part]);
        soon((Ok(()), buf))
    }
    fn sync(&self, _: Device) -> Self::Command {
        soon(Ok(()))
    }
    fn discard(&self, _: Device, _: ByteOffset, _: u64) -> Self::Command {
        soon(Ok(()))
    }
    fn sleep(&self, _: Duration) -> Self::Command {
        soon(Ok(()))
    }
}

fn key() -> MasterKey {
    MasterKey::new(&[1; 32]).unwrap()
}

/// An empty volume; formatted once, copied for every schedule.
fn formatted() -> Memory {
    static IMAGE: OnceLock<Vec<u8>> = OnceLock::new();
    let options = FormatOptions {
        block_size: BLOCK as u32,
        size: Some(1 << 20),
        log_size: Some(64 << 10),
        tag: TagAlgorithm::HmacSha256,
        uuid: [3; 16],
        separate_meta: false,
    };
    let bytes = ublk_integrity::create::plan(&options).unwrap().data_device_bytes as usize;
    let image = IMAGE.get_or_init(|| {
        let io = Memory::new(vec![0; bytes]);
        block_on(format(&io, &key(), &options)).unwrap();
        io.bytes.lock().unwrap().clone()
    });
    Memory::new(image.clone())
}

fn opened(io: &Memory, id: u8) -> Arc<Volume> {
    let options = OpenOptions {
        access: Access::ReadWrite,
        cache_bytes: 0,
        max_slots: 32,
        queues: 1,
        max_request_bytes: 2 * BLOCK,
        separate_meta: false,
        on_mismatch: OnMismatch::Fail,
        open_id: [id; 32],
        hints: None,
    };
    Arc::new(block_on(open(io, &key(), &options)).unwrap())
}

fn range(first: u64, count: u64) -> BlockRange {
    BlockRange::new(BlockIndex(first), count)
}

fn write(volume: &Volume, io: &Memory, blocks: BlockRange, fill: u8) -> Result<(), WriteError> {
    let mut buf = Buf::new(2 * BLOCK);
    buf.fill(fill);
    block_on(volume.write(io, &mut volume.slot(0), blocks, buf, Durability::MayBeLost)).0
}

/// What the blocks hold; panics where a block is not of one piece or the blocks differ.
fn read(volume: &Volume, io: &Memory, blocks: BlockRange) -> u8 {
    let bytes = blocks.count as usize * BLOCK;
    let (result, buf) = block_on(volume.read(io, &mut volume.slot(0), blocks, Buf::new(2 * BLOCK)));
    result.expect("a false alarm");
    assert!(buf[..bytes].iter().all(|b| *b == buf[0]), "half of one write and half of another");
    buf[0]
}

/// Half of the schedules are random; the other half let one thread run far ahead of another (Burckhardt
/// and others 2010), which a fair coin at every step hardly ever does.
fn check(test: impl Fn() + Send + Sync + Copy + 'static) {
    let schedules = std::env::var("SHUTTLE_ITERATIONS").map_or(1000, |n| n.parse().expect("a number"));
    shuttle::check_random(test, schedules / 2);
    shuttle::check_pct(test, schedules / 2, 3);
}

/// Runs `f` on a thread of its own.
fn with<T: Send + 'static>(
    volume: &Arc<Volume>,
    io: &Memory,
    f: impl FnOnce(&Volume, &Memory) -> T + Send + 'static,
) -> thread::JoinHandle<T> {
    let (volume, io) = (volume.clone(), io.clone());
    thread::spawn(move || f(&volume, &io))
}

#[test]
fn ranges_are_taken_whole_across_threads() {
    check(|| {
        let io = formatted();
        let volume = opened(&io, 1);
        let writers = [1, 2].map(|fill| with(&volume, &io, move |v, io| write(v, io, range(3, 2), fill).unwrap()));
        // Reads of zeros hold their range so shortly that a release meets a waiter that is just arriving.
        let reader = with(&volume, &io, |v, io| [(); 3].map(|()| read(v, io, range(3, 2))));
        assert!(reader.join().unwrap().iter().all(|fill| [0, 1, 2].contains(fill)));
        writers.into_iter().for_each(|w| w.join().unwrap());
        assert_ne!(read(&volume, &io, range(3, 2)), 0);
    });
}

#[test]
fn writes_zeros_and_flushes_across_epoch_switches() {
    check(|| {
        let io = formatted();
        let volume = opened(&io, 1);
        let threads = [
            with(&volume, &io, |v, io| {
                write(v, io, range(0, 1), 1).unwrap();
                write(v, io, range(0, 1), 2).unwrap();
            }),
            with(&volume, &io, |v, io| {
                write(v, io, range(1, 1), 3).unwrap();
                block_on(v.zero(io, &mut v.slot(0), range(1, 1), false)).unwrap();
                block_on(v.flush(io, &mut v.slot(0))).unwrap();
            }),
            with(&volume, &io, |v, io| {
                block_on(v.checkpoint(io)).unwrap();
                block_on(v.checkpoint(io)).unwrap();
            }),
        ];
        threads.into_iter().for_each(|t| t.join().unwrap());
        assert_eq!((read(&volume, &io, range(0, 1)), read(&volume, &io, range(1, 1))), (2, 0));
        // What the log and the tree say together is what was acknowledged.
        let volume = opened(&io, 2);
        let found = volume.recovery();
        assert_eq!((found.older, found.corrupt), (0, 0), "{found:?}");
        assert_eq!((read(&volume, &io, range(0, 1)), read(&volume, &io, range(1, 1))), (2, 0));
    });
}

#[test]
fn group_commits_and_flushes_wake_each_other() {
    check(|| {
        let io = formatted();
        let volume = opened(&io, 1);
        let writers = [0, 1, 2].map(|block| {
            with(&volume, &io, move |v, io| {
                write(v, io, range(block, 1), 7).unwrap();
                block_on(v.flush(io, &mut v.slot(0))).unwrap();
            })
        });
        writers.into_iter().for_each(|w| w.join().unwrap());
        assert!([0, 1, 2].iter().all(|block| read(&volume, &io, range(*block, 1)) == 7));
    });
}

#[test]
fn readers_under_a_moving_root_see_the_newest() {
    check(|| {
        let io = formatted();
        let volume = opened(&io, 1);
        write(&volume, &io, range(5, 1), 1).unwrap();
        let checkpoint = with(&volume, &io, |v, io| block_on(v.checkpoint(io)).unwrap());
        let reader = with(&volume, &io, |v, io| [(); 2].map(|()| read(v, io, range(5, 1))));
        assert_eq!(reader.join().unwrap(), [1, 1]);
        checkpoint.join().unwrap();
    });
}

#[test]
fn a_device_that_fails_in_the_middle_ends_every_wait() {
    check(|| {
        let io = formatted();
        let volume = opened(&io, 1);
        io.writes_left.store(1, Ordering::SeqCst);
        let writers = [0, 1, 0].map(|block| {
            with(&volume, &io, move |v, io| {
                let written = write(v, io, range(block, 1), 9);
                let flushed = block_on(v.flush(io, &mut v.slot(0)));
                assert!(written.is_err() || flushed.is_ok() || v.latched().is_some());
            })
        });
        let worker = with(&volume, &io, |v, io| {
            let _ = block_on(v.checkpoint(io));
        });
        writers.into_iter().for_each(|w| w.join().unwrap());
        worker.join().unwrap();
    });
}

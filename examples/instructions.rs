//! So many requests of one kind on a disk in memory: `scripts/instructions` has what `counted` does
//! counted.
//!
//! `cargo run --release --example instructions -- read|write|cold BLOCKS REQUESTS DEPTH TAG [SIZE]`
//!
//! "cold": reads of a volume of SIZE bytes whose written blocks lie one to a tag page, as far apart
//! as they can, with a cache that holds few of those pages.

use std::{
    cell::RefCell,
    collections::HashMap,
    future::Future,
    ops::Range,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};
use ublk_integrity::{
    Access, BlockIndex, BlockRange, Buf, ByteOffset, Device, Durability, Errno, Geometry, MasterKey, OpenOptions,
    Phase, RequestContext, Scheduler, Storage, TagAlgorithm, Volume,
    create::{FormatOptions, format, plan},
    open::open,
};

const BLOCK: usize = 4096;
/// Blocks that requests go to. Unless they are cold they are the volume's first, and their metadata
/// fits into the cache.
const BLOCKS: u64 = 4096;
/// Blocks of the largest request.
const LARGEST: u64 = 32;
/// Most requests under way.
const DEEPEST: usize = 32;
/// Blocks that cold requests go to: one to a tag page of the smallest volume that is measured.
const COLD_PLACES: u64 = 2048;

/// Bytes of the cache of cold reads of a volume of `size` bytes: an eighth of the tags of 1 GiB, and a
/// four thousandth of those of 8 TiB, where the tree above the tag pages' parents fits into it.
fn cold_cache(size: u64) -> u64 {
    (size >> 10).clamp(1 << 20, 16 << 20)
}

/// A disk in memory, of which only what was written takes any. Each operation takes two polls, so
/// that requests meet. (Not the library's, which older ones do not have.)
struct Disk {
    size: u64,
    /// By number, what has been written.
    chunks: RefCell<HashMap<u64, Box<[u8; CHUNK]>>>,
}

const CHUNK: usize = 8 << 10;

impl Disk {
    fn new(size: u64) -> Self {
        Self { size, chunks: RefCell::default() }
    }

    /// The number of each chunk that so many bytes lie on, where in the chunk, and where in the bytes.
    fn pieces(at: u64, len: usize) -> impl Iterator<Item = (u64, Range<usize>, Range<usize>)> {
        let mut done = 0;
        std::iter::from_fn(move || {
            let (number, from) = ((at + done as u64) / CHUNK as u64, (at + done as u64) as usize % CHUNK);
            let now = (CHUNK - from).min(len - done);
            let piece = (number, from..from + now, done..done + now);
            done += now;
            (now > 0).then_some(piece)
        })
    }

    /// Apart from what is counted for the volume.
    #[inline(never)]
    fn disk_read(&self, at: u64, into: &mut [u8]) {
        let chunks = self.chunks.borrow();
        for (number, there, here) in Self::pieces(at, into.len()) {
            match chunks.get(&number) {
                Some(chunk) => into[here].copy_from_slice(&chunk[there]),
                None => into[here].fill(0),
            }
        }
    }

    #[inline(never)]
    fn disk_write(&self, at: u64, from: &[u8]) {
        let mut chunks = self.chunks.borrow_mut();
        for (number, there, here) in Self::pieces(at, from.len()) {
            chunks.entry(number).or_insert_with(|| Box::new([0; CHUNK]))[there].copy_from_slice(&from[here]);
        }
    }
}

/// Ready at the second poll.
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

impl Storage for Disk {
    type Transfer = Soon<(Result<(), Errno>, Buf)>;
    type Command = Soon<Result<(), Errno>>;

    fn geometry(&self, _: Device) -> Geometry {
        Geometry { size: self.size, physical_block: BLOCK as u32, logical_block: 512 }
    }
    fn read(&self, _: Device, at: ByteOffset, mut buf: Buf, part: Range<usize>) -> Self::Transfer {
        self.disk_read(at.0, &mut buf[part]);
        soon((Ok(()), buf))
    }
    fn write(&self, _: Device, at: ByteOffset, buf: Buf, part: Range<usize>, _: Durability) -> Self::Transfer {
        self.disk_write(at.0, &buf[part]);
        soon((Ok(()), buf))
    }
    fn sync(&self, _: Device) -> Self::Command {
        soon(Ok(()))
    }
    fn discard(&self, _: Device, _: ByteOffset, _: u64) -> Self::Command {
        soon(Err(Errno::EOPNOTSUPP))
    }
    fn sleep(&self, _: Duration) -> Self::Command {
        soon(Ok(()))
    }
}

impl Scheduler for Disk {
    fn batch_boundary(&self, _: Phase) -> impl Future<Output = ()> {
        soon(())
    }
}

/// Whether a task was woken.
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }
    fn wake_by_ref(self: &Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A future and what wakes it.
struct Task<'a> {
    future: Option<Pin<Box<dyn Future<Output = ()> + 'a>>>,
    woken: Arc<Woken>,
    waker: Waker,
}

impl<'a> Task<'a> {
    fn new(future: impl Future<Output = ()> + 'a) -> Self {
        let woken = Arc::new(Woken(AtomicBool::new(true)));
        Self { future: Some(Box::pin(future)), waker: Waker::from(Arc::clone(&woken)), woken }
    }
    fn is_woken(&self) -> bool {
        self.woken.0.load(Ordering::Relaxed)
    }
    fn run_if_woken(&mut self) {
        let Some(future) = &mut self.future else { return };
        if self.woken.0.swap(false, Ordering::Relaxed)
            && future.as_mut().poll(&mut Context::from_waker(&self.waker)).is_ready()
        {
            self.future = None;
        }
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return value;
        }
    }
}

/// What one request after the other uses.
struct Lane {
    context: RequestContext,
    buf: Option<Buf>,
}

/// All of one kind.
#[derive(Clone, Copy)]
struct Requests {
    write: bool,
    /// Of each.
    blocks: u64,
    count: u64,
    /// Blocks from one place to the next: 0 where they lie side by side.
    apart: u64,
}

/// What is counted.
#[inline(never)]
fn counted(volume: &Volume, disk: &Disk, lanes: &mut [Lane], requests: Requests) {
    run(volume, disk, lanes, requests);
    // Not to be left by a jump.
    std::hint::black_box(());
}

/// Runs them to their end, and the checkpoints that they bring about.
fn run(volume: &Volume, disk: &Disk, lanes: &mut [Lane], requests: Requests) {
    let each = requests.count / lanes.len() as u64;
    let mut checkpoints = Task::new(async {
        loop {
            let work = volume.work_wanted().await;
            volume.work(disk, work).await.expect("memory does not fail");
        }
    });
    let tasks =
        (0..).zip(lanes).map(|(i, lane)| Task::new(one_by_one(volume, disk, lane, requests, i * each..(i + 1) * each)));
    let mut tasks: Vec<_> = tasks.collect();
    while checkpoints.is_woken() || tasks.iter().any(|task| task.future.is_some()) {
        tasks.iter_mut().for_each(Task::run_if_woken);
        checkpoints.run_if_woken();
    }
}

async fn one_by_one(volume: &Volume, disk: &Disk, lane: &mut Lane, requests: Requests, turns: Range<u64>) {
    let Requests { write, blocks, apart, .. } = requests;
    let mut buf = lane.buf.take().expect("given back");
    for turn in turns {
        // Each place before any comes again, in an order that jumps: 1009 is odd, the number of
        // places a power of two.
        let place = turn * 1009 % if apart > 0 { COLD_PLACES } else { BLOCKS / blocks };
        let range = BlockRange::new(BlockIndex(place * apart.max(blocks)), blocks);
        if write {
            let written;
            (written, buf) = volume.write(disk, &mut lane.context, range, buf, Durability::MayBeLost).await;
            written.expect("memory does not fail");
        } else {
            let read;
            (read, buf) = volume.read(disk, &mut lane.context, range, buf).await;
            read.expect("memory does not fail");
        }
    }
    lane.buf = Some(buf);
}

/// A volume, and what is done with it.
struct Bench {
    requests: Requests,
    depth: usize,
    tag: TagAlgorithm,
    cold: bool,
    /// Bytes.
    size: u64,
}

fn main() {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let (kind, blocks, count, depth, tag, size) = match &arguments[..] {
        [kind, blocks, count, depth, tag] => (kind, blocks, count, depth, tag, BLOCKS * BLOCK as u64),
        [kind, blocks, count, depth, tag, size] => (kind, blocks, count, depth, tag, number(size)),
        _ => panic!("what, blocks of a request, how many requests, how many at a time, tag algorithm, bytes"),
    };
    assert!(["read", "write", "cold"].contains(&&kind[..]), "read, write or cold, not {kind}");
    let tag = TagAlgorithm::ALL.into_iter().find(|known| known.to_string() == *tag).expect("a tag algorithm");
    let requests = Requests { write: kind == "write", blocks: number(blocks), count: number(count), apart: 0 };
    measure(&Bench { requests, depth: number(depth) as usize, tag, cold: kind == "cold", size });
}

fn number(text: &str) -> u64 {
    text.parse().expect("a number")
}

fn measure(bench: &Bench) {
    let Bench { requests, depth, tag, cold, size } = *bench;
    let blocks = requests.blocks;
    assert!(blocks <= LARGEST && blocks.is_power_of_two(), "1, 2, 4, 8, 16 or 32 blocks, not {blocks}");
    assert!((1..=DEEPEST).contains(&depth), "1 to {DEEPEST} at a time, not {depth}");
    let options = FormatOptions { size: Some(size), tag, ..FormatOptions::new(BLOCK as u32, [1; 16]) };
    let disk = Disk::new(plan(&options).expect("a possible volume").data_device_bytes);
    let key = MasterKey::new(&[0x5a; 32]).expect("32 bytes are enough");
    block_on(format(&disk, &key, &options)).expect("memory does not fail");
    let options = OpenOptions {
        cache_bytes: if cold { cold_cache(size) } else { 4 << 20 },
        max_requests: DEEPEST,
        max_request_bytes: LARGEST as usize * BLOCK,
        ..OpenOptions::new(Access::ReadWrite, [2; 32])
    };
    let volume = block_on(open(&disk, &key, &options)).expect("a new volume opens");
    let mut lanes = lanes(&volume);
    let (each, places, apart) = match cold {
        true => (1, COLD_PLACES, size / BLOCK as u64 / COLD_PLACES),
        false => (LARGEST, BLOCKS / LARGEST, 0),
    };
    // All is written, and in the caches where these are large enough.
    let all = |write| Requests { write, blocks: each, count: places, apart };
    run(&volume, &disk, &mut lanes, all(true));
    block_on(volume.checkpoint(&disk)).expect("memory does not fail");
    run(&volume, &disk, &mut lanes, all(false));
    let before = volume.status().counters;
    counted(&volume, &disk, &mut lanes[..depth], Requests { apart, ..requests });
    let after = volume.status().counters;
    let (reads, misses) = (after.reads - before.reads, after.cache_misses - before.cache_misses);
    assert!(!cold || misses * 10 > reads * 9, "{misses} of {reads} reads found no tag page in the cache");
}

fn lanes(volume: &Volume) -> Vec<Lane> {
    let lane = |mut buf: Buf| {
        buf.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i % 251) as u8 + 1);
        Lane { context: volume.context(0), buf: Some(buf) }
    };
    let mut lanes: Vec<_> = Buf::several(DEEPEST, LARGEST as usize * BLOCK).into_iter().map(lane).collect();
    RequestContext::work_together(lanes.iter_mut().map(|lane| &mut lane.context));
    lanes
}

#[test]
fn it_runs() {
    let bench = |write, cold, size| Bench {
        requests: Requests { write, blocks: 1, count: COLD_PLACES, apart: 0 },
        depth: 32,
        tag: TagAlgorithm::default(),
        cold,
        size,
    };
    [false, true].into_iter().for_each(|write| measure(&bench(write, false, BLOCKS * BLOCK as u64)));
    [1 << 30, 8 << 40].into_iter().for_each(|size| measure(&bench(false, true, size)));
}

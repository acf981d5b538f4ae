//! So many requests of one kind, 32 at a time, on a disk in memory: `scripts/instructions` has what
//! `counted` does counted.
//!
//! `cargo run --release --example instructions -- read|write BLOCKS REQUESTS`

use std::{
    cell::RefCell,
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
    Phase, RequestContext, Scheduler, Storage, Volume,
    create::{FormatOptions, format, plan},
    open::open,
};

const BLOCK: usize = 4096;
/// Blocks of the volume, all of which requests go to: their metadata fits into the cache.
const BLOCKS: u64 = 4096;
/// Blocks of the largest request.
const LARGEST: u64 = 32;
/// Requests under way.
const DEPTH: usize = 32;

/// A disk in memory. Each operation takes two polls, so that requests meet. (Not the library's,
/// which older ones do not have.)
struct Disk(RefCell<Vec<u8>>);

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
        Geometry { size: self.0.borrow().len() as u64, physical_block: BLOCK as u32, logical_block: 512 }
    }
    fn read(&self, _: Device, at: ByteOffset, mut buf: Buf, part: Range<usize>) -> Self::Transfer {
        let into = &mut buf[part];
        into.copy_from_slice(&self.0.borrow()[at.0 as usize..][..into.len()]);
        soon((Ok(()), buf))
    }
    fn write(&self, _: Device, at: ByteOffset, buf: Buf, part: Range<usize>, _: Durability) -> Self::Transfer {
        let from = &buf[part];
        self.0.borrow_mut()[at.0 as usize..][..from.len()].copy_from_slice(from);
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
    let Requests { write, blocks, .. } = requests;
    let mut buf = lane.buf.take().expect("given back");
    for turn in turns {
        // Each place before any comes again, in an order that jumps: 1009 is odd, the number of
        // places a power of two.
        let place = turn * 1009 % (BLOCKS / blocks);
        let range = BlockRange::new(BlockIndex(place * blocks), blocks);
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

fn main() {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [kind, blocks, count] = &arguments[..] else { panic!("what, blocks of a request, how many requests") };
    let write = match &kind[..] {
        "read" => false,
        "write" => true,
        _ => panic!("read or write, not {kind}"),
    };
    let number = |text: &str| text.parse().expect("a number");
    measure(Requests { write, blocks: number(blocks), count: number(count) });
}

fn measure(requests: Requests) {
    let Requests { blocks, .. } = requests;
    assert!(blocks <= LARGEST && blocks.is_power_of_two(), "1, 2, 4, 8, 16 or 32 blocks, not {blocks}");
    let options = FormatOptions { size: Some(BLOCKS * BLOCK as u64), ..FormatOptions::new(BLOCK as u32, [1; 16]) };
    let bytes = plan(&options).expect("a possible volume").data_device_bytes;
    let disk = Disk(vec![0; bytes as usize].into());
    let key = MasterKey::new(&[0x5a; 32]).expect("32 bytes are enough");
    block_on(format(&disk, &key, &options)).expect("memory does not fail");
    let options = OpenOptions {
        cache_bytes: 4 << 20,
        max_requests: DEPTH,
        max_request_bytes: LARGEST as usize * BLOCK,
        ..OpenOptions::new(Access::ReadWrite, [2; 32])
    };
    let volume = block_on(open(&disk, &key, &options)).expect("a new volume opens");
    let mut lanes = lanes(&volume);
    // All is written, and in the caches.
    let all = |write| Requests { write, blocks: LARGEST, count: BLOCKS / LARGEST };
    run(&volume, &disk, &mut lanes, all(true));
    block_on(volume.checkpoint(&disk)).expect("memory does not fail");
    run(&volume, &disk, &mut lanes, all(false));
    counted(&volume, &disk, &mut lanes, requests);
}

fn lanes(volume: &Volume) -> Vec<Lane> {
    let lane = |mut buf: Buf| {
        buf.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i % 251) as u8 + 1);
        Lane { context: volume.context(0), buf: Some(buf) }
    };
    let mut lanes: Vec<_> = Buf::several(DEPTH, LARGEST as usize * BLOCK).into_iter().map(lane).collect();
    RequestContext::work_together(lanes.iter_mut().map(|lane| &mut lane.context));
    lanes
}

#[test]
fn it_runs() {
    [false, true].into_iter().for_each(|write| measure(Requests { write, blocks: 1, count: 64 }));
}

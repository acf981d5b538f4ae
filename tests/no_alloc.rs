//! After start the library's I/O path allocates nothing: a counting allocator, a storage that
//! does not allocate either, and many requests of every kind, cached and not, with
//! checkpoints in between.

use arrayvec::{ArrayVec, CapacityError};
use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    future::{Future, poll_fn},
    ops::Range,
    pin::{Pin, pin},
    sync::Mutex,
    task::{Context, Poll, Waker},
    time::Duration,
};
use ublk_integrity::{
    Access, BlockIndex, BlockRange, Buf, ByteOffset, Device, Durability, Errno, Geometry, HashJob, HashThreads,
    MasterKey, MemoryStorage, OpenOptions, Phase, RequestContext, Scheduler, Storage, Volume,
    anchor::{Anchor, AnchorBytes, AnchorKeeper, AnchorNote, AnchorPurpose, AnchorUse, Held, Replaced, generation},
    create::{FormatOptions, format},
    hints,
    open::{VerifiedVolume, open},
};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
    static JOBS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: every call is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller keeps `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps `dealloc`'s contract, and `place` came from `System`.
        unsafe { System.dealloc(place, layout) }
    }
    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller keeps `realloc`'s contract, and `place` came from `System`.
        unsafe { System.realloc(place, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A device in memory; each operation takes two polls, so that requests meet.
struct Memory(MemoryStorage);

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

impl Storage for Memory {
    type Transfer = Soon<(Result<(), Errno>, Buf)>;
    type Command = Soon<Result<(), Errno>>;

    fn geometry(&self, device: Device) -> Geometry {
        self.0.geometry(device)
    }
    fn read(&self, device: Device, at: ByteOffset, buf: Buf, part: Range<usize>) -> Self::Transfer {
        soon(self.0.read(device, at, buf, part).into_inner())
    }
    fn write(
        &self,
        device: Device,
        at: ByteOffset,
        buf: Buf,
        part: Range<usize>,
        durability: Durability,
    ) -> Self::Transfer {
        soon(self.0.write(device, at, buf, part, durability).into_inner())
    }
    fn sync(&self, device: Device) -> Self::Command {
        soon(self.0.sync(device).into_inner())
    }
    fn discard(&self, device: Device, at: ByteOffset, len: u64) -> Self::Command {
        soon(self.0.discard(device, at, len).into_inner())
    }
    fn sleep(&self, time: Duration) -> Self::Command {
        soon(self.0.sleep(time).into_inner())
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

const BLOCK: usize = 512;
const CLIENTS: usize = 4;
/// Each client keeps to its own blocks, so that it knows what they hold.
const BLOCKS_EACH: u64 = 3000;
const MAX_BLOCKS: u64 = 80;

struct Client {
    context: RequestContext,
    buf: Option<Buf>,
    first: u64,
    versions: Vec<u64>,
    random: u64,
}

impl Client {
    fn new(volume: &Volume, i: u64) -> Self {
        Self {
            context: volume.context(0),
            buf: Some(Buf::new(MAX_BLOCKS as usize * BLOCK)),
            first: i * BLOCKS_EACH,
            versions: vec![0; BLOCKS_EACH as usize],
            random: i + 1,
        }
    }
    /// xorshift64 (Marsaglia 2003).
    fn below(&mut self, n: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % n
    }

    async fn request(&mut self, volume: &Volume, io: &Memory, version: u64) {
        let at = self.below(BLOCKS_EACH - MAX_BLOCKS);
        let count = 1 + self.below(MAX_BLOCKS);
        let range = BlockRange::new(BlockIndex(self.first + at), count);
        let own = at as usize..(at + count) as usize;
        match self.below(10) {
            0 => volume.flush(io, &mut self.context).await.unwrap(),
            1 => {
                volume.zero(io, &mut self.context, range, true).await.unwrap();
                self.versions[own].fill(0);
            }
            2..=4 => {
                let mut buf = self.buf.take().unwrap();
                buf[..count as usize * BLOCK].fill(version as u8);
                let admitted =
                    if version % 2 == 0 { volume.admit(&self.context, range, Durability::MayBeLost) } else { None };
                let (result, buf) = match admitted {
                    Some(admitted) => volume.write_back(io, &mut self.context, admitted, buf, || ()).await,
                    None => volume.write(io, &mut self.context, range, buf, Durability::MayBeLost).await,
                };
                result.unwrap();
                self.buf = Some(buf);
                self.versions[own].fill(version & 0xff);
            }
            _ => {
                let buf = self.buf.take().unwrap();
                let (result, buf) = volume.read(io, &mut self.context, range, buf).await;
                result.unwrap();
                let blocks = buf.chunks_exact(BLOCK).zip(&self.versions[own]);
                assert!(blocks.into_iter().all(|(b, v)| u64::from(b[0]) == *v && u64::from(b[BLOCK - 1]) == *v));
                self.buf = Some(buf);
            }
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

/// What other threads were handed to hash; done here, between two rounds.
static ELSEWHERE: Mutex<ArrayVec<HashJob, 8>> = Mutex::new(ArrayVec::new_const());

fn hash_threads() -> HashThreads {
    HashThreads::new(|job| ELSEWHERE.lock().unwrap().try_push(job).err().map(CapacityError::element))
}

/// Polls all until all but the worker have ended.
fn drive(requests: &mut [Pin<&mut dyn Future<Output = ()>>; CLIENTS], worker: &mut Pin<&mut dyn Future<Output = ()>>) {
    let mut cx = Context::from_waker(Waker::noop());
    let mut ended = [false; CLIENTS];
    for _ in 0..100_000 {
        for (request, ended) in requests.iter_mut().zip(&mut ended) {
            *ended = *ended || request.as_mut().poll(&mut cx).is_ready();
        }
        let _: Poll<()> = worker.as_mut().poll(&mut cx);
        let handed = std::mem::take(&mut *ELSEWHERE.lock().unwrap());
        for job in handed {
            job.run();
            JOBS.set(JOBS.get() + 1);
        }
        if ended.iter().all(|e| *e) {
            return;
        }
    }
    panic!("requests do not end");
}

/// An anchor that holds what it was told last.
struct Told(Cell<Option<AnchorBytes>>);

impl Anchor for Told {
    async fn load(&self, _: &[u8; 16]) -> Result<Held, String> {
        Ok(Held::of(self.0.get()))
    }
    async fn replace(&self, _: &[u8; 16], expected: u64, body: &AnchorBytes) -> Replaced {
        let is_expected = generation(self.0.get().as_ref()) == expected;
        if is_expected {
            self.0.set(Some(*body));
        }
        if is_expected { Replaced::Done } else { Replaced::Conflict }
    }
}

fn options_of_open(cache_bytes: u64, hints: hints::HintSender) -> OpenOptions {
    OpenOptions {
        cache_bytes,
        max_requests: CLIENTS + 1,
        max_request_bytes: MAX_BLOCKS as usize * BLOCK,
        hints: Some(hints),
        hash_threads: Some(hash_threads()),
        ..OpenOptions::new(Access::ReadWrite, [1; 32])
    }
}

#[test]
fn the_io_path_does_not_allocate() {
    // In release a million requests, in three volumes.
    let rounds = if cfg!(debug_assertions) { 5_000 } else { 1_000_000 / 3 / CLIENTS as u64 };
    let (key, io) = (MasterKey::new(&[1; 32]).unwrap(), Memory(MemoryStorage::new(vec![0; 16 << 20], 512)));
    let mut options =
        FormatOptions { size: Some(8 << 20), log_size: Some(256 << 10), ..FormatOptions::new(BLOCK as u32, [3; 16]) };
    for (i, cache_bytes) in [0, 64 << 10, 4 << 20].into_iter().enumerate() {
        // A volume of its own, empty: the records of the last one mean nothing under another UUID.
        options.uuid = [i as u8; 16];
        block_on(format(&io, &key, &options)).unwrap();
        let (sender, _receiver) = hints::channel(8);
        let volume = block_on(open(&io, &key, &options_of_open(cache_bytes, sender))).unwrap();
        let checkpoints = run(&volume, &io, std::future::pending(), rounds);
        assert!(volume.status().counters.write_back_writes > rounds / 10, "few writes were answered early");
        assert!(checkpoints > 10, "{checkpoints} checkpoints");
        assert!(JOBS.get() > rounds / 10, "{} jobs for other threads", JOBS.get());
    }
}

/// Where flushes wait for the anchor they allocate nothing either, nor does who tells it.
#[test]
fn the_io_path_with_an_anchor_does_not_allocate() {
    let rounds = if cfg!(debug_assertions) { 2_000 } else { 20_000 };
    let (key, io) = (MasterKey::new(&[1; 32]).unwrap(), Memory(MemoryStorage::new(vec![0; 16 << 20], 512)));
    let format_options =
        FormatOptions { size: Some(8 << 20), log_size: Some(256 << 10), ..FormatOptions::new(BLOCK as u32, [3; 16]) };
    block_on(format(&io, &key, &format_options)).unwrap();
    let (sender, _receiver) = hints::channel(8);
    let (options, anchor, note) = (options_of_open(4 << 20, sender), Told(Cell::new(None)), AnchorNote::default());
    let with_anchor = AnchorUse { anchor: &anchor, purpose: AnchorPurpose::Begin, note: note.clone() };
    let (volume, mut keeper): (Volume, AnchorKeeper) = block_on(async {
        let verified = VerifiedVolume::read(&io, &key, &options).await.unwrap();
        verified.open_anchored(&io, &options, with_anchor).await.unwrap()
    });
    keeper.hold_flushes(&volume);
    let before = generation(anchor.0.get().as_ref());
    let mut context = volume.context(0);
    let ticks = async {
        loop {
            keeper.flush_waits(&volume, &context).await;
            keeper.tick((&volume, &io), &mut context, (&anchor, &note)).await.unwrap();
        }
    };
    run(&volume, &io, ticks, rounds);
    let told = generation(anchor.0.get().as_ref()) - before;
    assert!(told > rounds / 20, "the anchor was told {told} times");
}

/// Returns the number of checkpoints.
fn run(volume: &Volume, io: &Memory, ticks: impl Future<Output = ()>, rounds: u64) -> u64 {
    let mut clients: [Client; CLIENTS] = std::array::from_fn(|i| Client::new(volume, i as u64));
    RequestContext::work_together(clients.iter_mut().map(|client| &mut client.context));
    let mut checkpoints = pin!(async {
        loop {
            let work = volume.work_wanted().await;
            volume.work(io, work).await.unwrap();
        }
    });
    let mut ticks = pin!(ticks);
    let mut worker = pin!(poll_fn(|cx| {
        let _: Poll<()> = checkpoints.as_mut().poll(cx);
        ticks.as_mut().poll(cx)
    }));
    let mut worker: Pin<&mut dyn Future<Output = ()>> = worker.as_mut();
    let before = ALLOCATIONS.get();
    for round in 1..=rounds {
        let [a, b, c, d] = &mut clients;
        let (mut a, mut b, mut c, mut d) = (
            pin!(a.request(volume, io, round)),
            pin!(b.request(volume, io, round)),
            pin!(c.request(volume, io, round)),
            pin!(d.request(volume, io, round)),
        );
        drive(&mut [a.as_mut(), b.as_mut(), c.as_mut(), d.as_mut()], &mut worker);
        assert_eq!(ALLOCATIONS.get() - before, 0, "allocations by round {round}");
    }
    volume.status().counters.checkpoints
}

#[test]
fn the_counter_counts() {
    let before = ALLOCATIONS.get();
    drop(std::hint::black_box(Box::new(7)));
    assert_eq!(ALLOCATIONS.get() - before, 1);
}

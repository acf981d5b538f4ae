//! Nobody waits for the hint worker, for a slow reader, or for memory: every request ends, with the
//! right bytes.

use crate::sim::{
    Executor, Lab, Rng, SimStorage,
    exec::{Step, yield_now},
    format_options, formatted, open_options, reopen,
    world::{MAX_REQUEST, QUEUES, Queue, World, no_tail},
};
use std::{
    cell::{Cell, RefCell},
    future::{Pending, Ready, ready},
    ops::Range,
    rc::Rc,
    time::Duration,
};
use ublk_integrity::{
    BlockIndex, BlockRange, Buf, ByteOffset, CounterValues, Device, Durability, Errno, Geometry, HintReceiver,
    OpenOptions, Scheduler, Storage, create::FormatOptions, hints,
};

/// What became of the thread that brings pages.
enum Worker {
    Dead,
    /// It never looks at the channel.
    Asleep,
    /// It took one hint and waits for its first read for ever.
    StuckInIo,
    Alive,
}

/// A device that never answers.
#[derive(Clone)]
struct NeverAnswers;

impl Storage for NeverAnswers {
    type Transfer = Pending<(Result<(), Errno>, Buf)>;
    type Command = Ready<Result<(), Errno>>;

    fn geometry(&self, _: Device) -> Geometry {
        unreachable!("asked for at open only")
    }
    fn read(&self, _: Device, _: ByteOffset, _: Buf, _: Range<usize>) -> Self::Transfer {
        std::future::pending()
    }
    fn write(&self, _: Device, _: ByteOffset, _: Buf, _: Range<usize>, _: Durability) -> Self::Transfer {
        std::future::pending()
    }
    fn sync(&self, _: Device) -> Self::Command {
        ready(Ok(()))
    }
    fn discard(&self, _: Device, _: ByteOffset, _: u64) -> Self::Command {
        ready(Ok(()))
    }
    fn sleep(&self, _: Duration) -> Self::Command {
        ready(Ok(()))
    }
}

impl Scheduler for NeverAnswers {
    fn runnable(&self) -> usize {
        usize::MAX
    }
}

async fn work_on_hints<S: Storage>(world: &World, io: &S, hints: &HintReceiver) {
    let mut context = world.volume.context(0);
    loop {
        match hints.try_recv() {
            Ok(hint) => world.volume.prefetch(io, &mut context, hint).await,
            Err(_) => yield_now().await,
        }
    }
}

/// A volume full of data that has been checkpointed and is not in the cache.
fn world(io: &SimStorage, options: &OpenOptions, seed: u64) -> World {
    let mut lab = Lab::open(io.clone(), options).unwrap();
    let all = BlockRange::new(BlockIndex(0), lab.volume.blocks());
    (0..all.count).step_by(64).for_each(|first| lab.write(first, 64, 1));
    lab.checkpoint();
    drop(lab);
    let world = World {
        io: io.clone(),
        volume: reopen(io, options).unwrap(),
        oracle: Rc::default(),
        rng: RefCell::new(Rng::new(seed)),
        next_version: Rc::new(RefCell::new(1)),
        kept: Rc::default(),
        tail: no_tail(),
        at_checkpoint: Default::default(),
        covered: None,
        rot: None,
        distrust: false,
    };
    let places = world.oracle.borrow_mut().issue(all, 1);
    world.oracle.borrow_mut().ack(all, &places, true);
    world
}

/// So many random requests on each queue, and the checkpoint thread; all must end.
fn serve(worker: Worker, channel: usize, cache_bytes: u64, seed: u64) -> CounterValues {
    const EACH: usize = 150;
    let (sender, receiver) = hints::channel(channel);
    let io =
        formatted(&FormatOptions { log_size: Some([320, 64][seed as usize % 2] << 10), ..format_options(512) }, seed);
    let options = OpenOptions {
        cache_bytes,
        hints: Some(sender),
        max_requests: 2 * QUEUES + 2,
        max_request_bytes: MAX_REQUEST,
        sync_log: seed % 2 == 0,
        write_back_slots: 4,
        ..open_options(&mut Rng::new(seed))
    };
    let world = world(&io, &options, seed);
    drop(options);
    let receiver = Some(receiver).filter(|_| !matches!(worker, Worker::Dead));
    let ended = Cell::new(0);
    let mut exec = Executor::new(seed);
    exec.spawn(world.checkpoints());
    match (&worker, &receiver) {
        (Worker::StuckInIo, Some(receiver)) => exec.spawn(work_on_hints(&world, &NeverAnswers, receiver)),
        (Worker::Alive, Some(receiver)) => exec.spawn(work_on_hints(&world, &io, receiver)),
        _ => {}
    }
    for mut q in Queue::all(&world.volume) {
        let (ended, world) = (&ended, &world);
        exec.spawn(async move {
            for _ in 0..EACH {
                world.request(&mut q).await;
            }
            ended.set(ended.get() + 1);
        });
    }
    for _ in 0..2_000_000 {
        if ended.get() == QUEUES {
            return world.volume.status().counters;
        }
        assert_eq!(exec.step(&io), Step::Ran, "deadlock");
    }
    panic!("{} of {QUEUES} queues have ended", ended.get());
}

#[test]
fn a_dead_worker_costs_hints_and_nothing_else() {
    for cache in [0, 1 << 20] {
        let counters = serve(Worker::Dead, 64, cache, 1);
        assert!(counters.hints_sent == 0 && counters.hints_dropped > 0, "{counters:?}");
    }
}

#[test]
fn a_worker_asleep_fills_the_channel_once() {
    for channel in [1, 4] {
        let counters = serve(Worker::Asleep, channel, 0, 7);
        assert!(counters.hints_sent == channel as u64 && counters.hints_dropped > 0, "{counters:?}");
    }
}

#[test]
fn a_worker_stuck_in_io_for_ever_is_not_waited_for() {
    for cache in [0, 4096, 1 << 20] {
        let counters = serve(Worker::StuckInIo, 1, cache, 3);
        assert!(counters.checkpoints > 0 && counters.reads > 0, "{counters:?}");
    }
}

#[test]
fn a_live_worker_with_a_channel_of_one_and_any_cache() {
    for (seed, cache) in [(4, 0), (5, 4096), (6, 1 << 20)] {
        let counters = serve(Worker::Alive, 1, cache, seed);
        assert!(counters.hints_sent > 0, "{counters:?}");
    }
}

#[test]
fn a_reader_stuck_in_io_holds_up_neither_checkpoints_nor_other_blocks() {
    let io = formatted(&format_options(512), 1);
    let options = OpenOptions { cache_bytes: 0, ..open_options(&mut Rng::new(1)) };
    let mut lab = Lab::open(io, &options).unwrap();
    lab.write(0, 200, 1);
    lab.checkpoint();
    let mut context = lab.volume.context(0);
    {
        let one = BlockRange::new(BlockIndex(130), 1);
        let mut stuck = std::pin::pin!(lab.volume.read(&NeverAnswers, &mut context, one, Buf::new(512)));
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(stuck.as_mut().poll(&mut cx).is_pending());
        let mut other = lab.volume.context(0);
        for i in 0..4 {
            // The same tag page, and three checkpoints over it.
            let range = BlockRange::new(BlockIndex(140 + i), 1);
            let write = lab.volume.write(&lab.io, &mut other, range, Buf::new(512), Durability::Durable);
            crate::sim::block_on(&lab.io, write).0.unwrap();
            crate::sim::block_on(&lab.io, lab.volume.checkpoint(&lab.io)).unwrap();
        }
        assert!(stuck.as_mut().poll(&mut cx).is_pending());
    }
    assert!(lab.reads_as(131, 1) && lab.reads_as(130, 1));
}

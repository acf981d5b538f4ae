//! The orders of `docs/crash-safety.md`, seen on the wire: a random workload under the eyes of
//! [`Watch`], and the requests that must cost nothing, one by one.

use crate::sim::{
    Lab, Rng, SimStorage,
    answered::{BeforeAnswer, Beside},
    disk::Trace,
    exec::yield_now,
    format_options, formatted,
    image::Logged,
    open_options,
    oracle::Oracle,
    watch::Watch,
    world::{MAX_REQUEST, QUEUES, World, live, no_tail},
};
use std::{
    cell::RefCell,
    future::Future,
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Waker},
};
use ublk_integrity::{
    BlockIndex, BlockRange, Buf, CheckpointerWork, Device, Durability, OpenOptions, create::FormatOptions, open::open,
};

fn separate() -> (FormatOptions, OpenOptions) {
    let format = FormatOptions { separate_meta: true, ..format_options(512) };
    (format, OpenOptions { separate_meta: true, ..open_options(&mut Rng::new(1)) })
}

/// And how many writes were carried, and superseded.
fn watched(seed: u64) -> (Watch, [u64; 2]) {
    let (mut format, mut options) = separate();
    options.max_request_bytes = MAX_REQUEST;
    options.max_requests = 2 * QUEUES + 1;
    if seed % 3 > 0 {
        format.log_size = Some(512 << 10);
        options.sync_log = true;
        options.write_back_slots = [2, 4, 8][seed as usize / 3 % 3];
    }
    options.cache_bytes = [0, 4096, 1 << 20][seed as usize % 3];
    let io: SimStorage = formatted(&format, seed);
    let volume = crate::sim::block_on(&io, open(&io, &crate::sim::key(), &options)).unwrap();
    let world = World {
        io: io.clone(),
        volume,
        oracle: Rc::new(RefCell::new(Oracle::default())),
        rng: RefCell::new(Rng::new(seed)),
        next_version: Rc::default(),
        kept: Rc::default(),
        tail: no_tail(),
        at_checkpoint: Default::default(),
        covered: None,
        distrust: false,
    };
    let mut watch = Watch::new(&io);
    // Writes that fail are resolved with a sync, and that has its order too.
    io.disk().faults.data_writes = [0, 5][seed as usize % 2];
    live(&world, seed, 7000, || watch.look(&io));
    let counters = world.volume.status().counters;
    (watch, [counters.carried_writes, counters.superseded_writes])
}

#[test]
fn random_requests_keep_every_order() {
    let (mut checkpoints, mut writes, mut beside, mut carried) = (0, 0, 0, [0, 0]);
    for seed in 0..18 {
        println!("seed {seed}");
        let (watch, of_seed) = watched(seed);
        carried = [0, 1].map(|i| carried[i] + of_seed[i]);
        checkpoints += watch.checkpoints;
        writes += watch.data_writes;
        beside += watch.beside;
    }
    println!("{checkpoints} checkpoints, {writes} data writes, {beside} records beside another, {carried:?} carried");
    assert!(checkpoints > 50 && writes > 3000 && beside > 50, "nothing was seen");
    assert!(carried[0] > 100 && carried[1] > 0, "no record has carried anything");
}

/// One whose log may carry small synchronous writes.
fn lab_with_sync_log() -> Lab {
    let (format, options) = separate();
    let format = FormatOptions { log_size: Some(320 << 10), ..format };
    Lab::new(&format, &OpenOptions { sync_log: true, write_back_slots: 32, ..options })
}

fn lab() -> Lab {
    let (format, options) = separate();
    Lab::new(&format, &options)
}

#[test]
fn a_flush_is_one_sync_after_the_acknowledged_writes() {
    let mut lab = lab();
    let trace = lab.traced(|lab| {
        lab.write(3, 1, 1);
        lab.try_flush().unwrap();
    });
    let data = |t: &&Trace| {
        !matches!(t, Trace::WriteStart { device: Device::Meta, .. } | Trace::WriteEnd { device: Device::Meta, .. })
    };
    let data: Vec<_> = trace.iter().filter(data).collect();
    assert!(
        matches!(
            data[..],
            [
                Trace::WriteStart { .. },
                Trace::WriteEnd { .. },
                Trace::SyncStart(Device::Data),
                Trace::SyncEnd(Device::Data)
            ]
        ),
        "{data:?}"
    );
}

fn write_fua(lab: &mut Lab, block: u64) {
    let Lab { io, volume, context, .. } = lab;
    let one = BlockRange::new(BlockIndex(block), 1);
    crate::sim::block_on(io, volume.write(io, context, one, Buf::new(512), Durability::Durable)).0.unwrap();
}

/// The numbers that the log's newest record says are durable: the highest, and how many of those
/// before are not.
fn told(lab: &Lab) -> Option<(u64, usize)> {
    lab.records().last()?.entries.iter().find_map(|entry| match entry {
        Logged::Flush { highest, except } => Some((*highest, except.len())),
        _ => None,
    })
}

#[test]
fn a_fua_write_is_a_write_and_a_flush_of_its_own_which_the_next_record_tells() {
    let mut lab = lab();
    for _ in 0..2 {
        let trace = lab.traced(|lab| write_fua(lab, 3));
        let [
            Trace::WriteStart { device: Device::Meta, durable: true, .. },
            Trace::WriteEnd { device: Device::Meta, .. },
            Trace::WriteStart { device: Device::Data, durable: false, .. },
            Trace::WriteEnd { device: Device::Data, .. },
            Trace::SyncStart(Device::Data),
            Trace::SyncEnd(Device::Data),
        ] = trace[..]
        else {
            panic!("{trace:?}");
        };
    }
    assert_eq!(told(&lab), Some((1, 0)), "the second one's record says that the first is durable");
    let trace = lab
        .traced(|lab| crate::sim::block_on(&lab.io, lab.volume.work(&lab.io, CheckpointerWork::FlushRecord)).unwrap());
    assert!(matches!(trace[..], [Trace::WriteStart { durable: true, .. }, Trace::WriteEnd { .. }]), "{trace:?}");
    assert_eq!(told(&lab), Some((2, 0)), "one of its own, where no other comes");
    let trace = lab.traced(|lab| lab.try_flush().unwrap());
    assert_eq!(trace, [], "nothing is left to flush");
}

/// A small write as the daemon does it: admitted, and so answered, before it is written back.
fn admitted<'a>(lab: &'a Lab, beside: &mut Beside<'a>, block: u64, blocks: u64) {
    let Lab { io, volume, .. } = lab;
    let mut context = volume.context(0);
    let admitted = volume
        .admit(&context, BlockRange::new(BlockIndex(block), blocks), Durability::MayBeLost)
        .expect("the volume takes writes");
    beside.spawn(async move {
        let buf = Buf::new(blocks as usize * volume.block_size());
        volume.write_back(io, &mut context, admitted, buf, || ()).await.0.unwrap();
    });
}

/// What is waited for at an fsync: the flush that follows such a write at once. It is the same where
/// the block is written again at once, as the tail of a log is.
#[test]
fn without_a_sync_log_an_fsync_of_a_small_write_is_three_operations_in_series() {
    let lab = lab();
    let (mut beside, mut context) = (Beside::default(), lab.volume.context(0));
    for _ in 0..2 {
        admitted(&lab, &mut beside, 3, 1);
        let (flushed, seen) = beside.answer(&lab.io, lab.volume.flush(&lab.io, &mut context));
        flushed.unwrap();
        let record_data_sync = BeforeAnswer { in_series: 3, durable_writes: 1, other_writes: 1, syncs: 1, reads: 0 };
        assert_eq!(seen, record_data_sync);
    }
    beside.end(&lab.io);
}

/// ext4 writes the blocks of its journal, then the commit block with PREFLUSH and FUA: a flush, and
/// a durable write.
#[test]
fn without_a_sync_log_a_commit_of_a_journal_is_six_operations_in_series() {
    let lab = lab();
    let (mut beside, mut context) = (Beside::default(), lab.volume.context(0));
    (0..4).for_each(|n| admitted(&lab, &mut beside, 100 + 2 * n, 2));
    let Lab { io, volume, .. } = &lab;
    let commit = async {
        volume.flush(io, &mut context).await.unwrap();
        let range = BlockRange::new(BlockIndex(108), 1);
        volume.write(io, &mut context, range, Buf::new(512), Durability::Durable).await.0.unwrap();
    };
    let ((), seen) = beside.answer(io, commit);
    beside.end(io);
    assert_eq!((seen.in_series, seen.syncs, seen.reads), (6, 2, 0), "record, data, sync; and once more: {seen:?}");
}

/// One durable write: nothing else is on either device between the write and the flush's answer.
const RECORD: BeforeAnswer = BeforeAnswer { in_series: 1, durable_writes: 1, other_writes: 0, syncs: 0, reads: 0 };

#[test]
fn an_fsync_of_a_small_write_is_one_durable_write() {
    let lab = lab_with_sync_log();
    let (mut beside, mut context) = (Beside::default(), lab.volume.context(0));
    // The same block again, and one that covers half of it.
    for (block, blocks) in [(3, 2), (3, 2), (4, 2)] {
        admitted(&lab, &mut beside, block, blocks);
        let (flushed, seen) = beside.answer(&lab.io, lab.volume.flush(&lab.io, &mut context));
        flushed.unwrap();
        assert_eq!(seen, RECORD);
    }
    lab.volume.end_write_back(0);
    beside.end(&lab.io);
    let counters = lab.volume.status().counters;
    assert_eq!((counters.carried_writes, counters.superseded_writes), (3, 1));
}

/// Those beside get as far as they do without anybody.
fn settled(lab: &Lab, beside: &mut Beside<'_>) {
    beside.answer(&lab.io, async {
        for _ in 0..50 {
            yield_now().await;
        }
    });
}

#[test]
fn a_flush_logs_what_is_held_and_wakes_nobody() {
    let lab = lab_with_sync_log();
    let (mut beside, mut context) = (Beside::default(), lab.volume.context(0));
    // The first of them is written again, twice: it hears that it is waited for.
    for blocks in [vec![3, 5, 7], vec![3], vec![3]] {
        blocks.into_iter().for_each(|block| admitted(&lab, &mut beside, block, 1));
        settled(&lab, &mut beside);
        // Those whose writes they are do nothing meanwhile.
        let (flushed, seen) = Beside::default().answer(&lab.io, lab.volume.flush(&lab.io, &mut context));
        flushed.unwrap();
        assert_eq!(seen, RECORD);
    }
    assert_eq!(lab.volume.status().counters.carried_writes, 2, "no other had to go on");
    lab.volume.end_write_back(0);
    beside.end(&lab.io);
    let counters = lab.volume.status().counters;
    assert_eq!((counters.carried_writes, counters.superseded_writes, counters.write_back_writes), (5, 1, 5));
}

#[test]
fn what_a_flush_has_logged_and_given_up_goes_on_by_itself() {
    let lab = lab_with_sync_log();
    let (mut beside, mut context) = (Beside::default(), lab.volume.context(0));
    admitted(&lab, &mut beside, 3, 1);
    settled(&lab, &mut beside);
    {
        let flush = pin!(lab.volume.flush(&lab.io, &mut context));
        assert!(flush.poll(&mut Context::from_waker(Waker::noop())).is_pending(), "its record has not been written");
    }
    // It is waited for by another write, too.
    admitted(&lab, &mut beside, 3, 1);
    let (flushed, _) = beside.answer(&lab.io, lab.volume.flush(&lab.io, &mut context));
    flushed.unwrap();
    lab.volume.end_write_back(0);
    beside.end(&lab.io);
    assert_eq!(lab.volume.status().counters.carried_writes, 2);
}

#[test]
fn what_a_flush_has_made_durable_goes_in_place_though_the_volume_becomes_read_only() {
    let mut lab = lab_with_sync_log();
    {
        let (mut beside, mut context) = (Beside::default(), lab.volume.context(0));
        admitted(&lab, &mut beside, 3, 1);
        settled(&lab, &mut beside);
        Beside::default().answer(&lab.io, lab.volume.flush(&lab.io, &mut context)).0.unwrap();
        // Answered, and nobody writes it.
        drop(lab.volume.admit(&context, BlockRange::new(BlockIndex(9), 1), Durability::MayBeLost).unwrap());
        assert!(lab.volume.latched().is_some());
        lab.volume.end_write_back(0);
        beside.end(&lab.io);
    }
    lab.read(3).expect("it is in place");
}

/// Polls without anything happening on the devices.
fn poll_alone(future: Pin<&mut impl Future>) {
    let mut future = future;
    for _ in 0..9 {
        assert!(future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    }
}

#[test]
fn a_flush_that_is_given_up_while_it_waits_to_lead_does_not_lead() {
    let lab = lab_with_sync_log();
    let Lab { io, volume, .. } = &lab;
    // Of those that wait the flush comes first.
    let (mut flusher, mut writer) = (volume.context(0), volume.context(0));
    let mut beside = Beside::default();
    admitted(&lab, &mut beside, 3, 1);
    settled(&lab, &mut beside);
    // A record is under way that is larger than what gathers meanwhile.
    let large = volume.admit(&writer, BlockRange::new(BlockIndex(20), 32), Durability::Durable).unwrap();
    let mut large = Box::pin(volume.write_back(io, &mut writer, large, Buf::new(32 * 512), || ()));
    poll_alone(large.as_mut());
    poll_alone(pin!(volume.flush(io, &mut flusher)));
    beside.spawn(async {
        large.await.0.unwrap();
    });
    let (flushed, _) = beside.answer(io, volume.flush(io, &mut flusher));
    flushed.unwrap();
    volume.end_write_back(0);
    beside.end(io);
}

#[test]
fn a_commit_of_a_journal_is_two_durable_writes() {
    let lab = lab_with_sync_log();
    let (mut beside, mut context) = (Beside::default(), lab.volume.context(0));
    (0..4).for_each(|n| admitted(&lab, &mut beside, 100 + 2 * n, 2));
    let (flushed, seen) = beside.answer(&lab.io, lab.volume.flush(&lab.io, &mut context));
    flushed.unwrap();
    assert_eq!(seen, RECORD);
    let mut writer = lab.volume.context(0);
    let range = BlockRange::new(BlockIndex(108), 1);
    let commit = lab.volume.admit(&writer, range, Durability::Durable).expect("the volume takes writes");
    let id = commit.id();
    let Lab { io, volume, .. } = &lab;
    beside.spawn(async move {
        volume.write_back(io, &mut writer, commit, Buf::new(512), || ()).await.0.unwrap();
    });
    let (safe, seen) = beside.answer(io, volume.wait_safe(&mut context, id));
    safe.unwrap();
    assert_eq!(seen, RECORD);
    volume.end_write_back(0);
    beside.end(io);
}

/// What no record carries is synced; what one carries is not, before a checkpoint.
#[test]
fn a_flush_syncs_only_what_no_record_carries() {
    let mut lab = lab_with_sync_log();
    lab.write(50, 1, 1);
    {
        let (mut beside, mut context) = (Beside::default(), lab.volume.context(0));
        admitted(&lab, &mut beside, 3, 1);
        let (flushed, seen) = beside.answer(&lab.io, lab.volume.flush(&lab.io, &mut context));
        flushed.unwrap();
        assert_eq!((seen.in_series, seen.durable_writes, seen.other_writes, seen.syncs), (2, 1, 0, 1));
        lab.volume.end_write_back(0);
        beside.end(&lab.io);
    }
    let syncs = |trace: Vec<Trace>| trace.iter().filter(|t| **t == Trace::SyncEnd(Device::Data)).count();
    let flush = lab.traced(|lab| lab.try_flush().unwrap());
    assert_eq!(syncs(flush), 0, "it is in place, and its record is still there");
    let checkpoint = lab.traced(|lab| lab.checkpoint());
    assert_eq!(syncs(checkpoint), 1, "its record is not, afterwards");
}

#[test]
fn a_flush_with_nothing_to_do_does_no_io() {
    let mut lab = lab();
    let idle = |lab: &mut Lab| lab.traced(|lab| lab.try_flush().unwrap());
    assert_eq!(idle(&mut lab), [], "a fresh volume");
    lab.write(3, 1, 1);
    assert_ne!(idle(&mut lab), [], "the teeth of this test");
    assert_eq!(idle(&mut lab), []);
    assert!(lab.reads_as(3, 1));
    assert_eq!(idle(&mut lab), [], "reads need no flush");
    lab.checkpoint();
    assert_eq!(idle(&mut lab), [], "nor does a checkpoint");
}

/// Reads on the wire: data device, metadata device.
fn reads(trace: &[Trace]) -> (usize, usize) {
    let of = |wanted| trace.iter().filter(|t| matches!(t, Trace::Read { device, .. } if *device == wanted)).count();
    (of(Device::Data), of(Device::Meta))
}

#[test]
fn reads_do_no_io_that_they_can_do_without() {
    let mut lab = lab();
    lab.write(3, 1, 1);
    let read = |lab: &mut Lab, block, version| reads(&lab.traced(|lab| assert!(lab.reads_as(block, version))));
    assert_eq!(read(&mut lab, 3, 1), (1, 0), "its tag is pending");
    assert_eq!(read(&mut lab, 600, 0), (0, 0), "absent: reads as zeros");
    lab.checkpoint();
    assert_eq!(read(&mut lab, 3, 1), (1, 0), "the checkpoint has left its pages in the cache");
    assert_eq!(read(&mut lab, 4, 0), (0, 0), "zeros on the same tag page");
    let mut lab = lab.reopened().unwrap();
    assert_eq!(read(&mut lab, 3, 1), (1, 2), "every missing level at once, once");
    assert_eq!(read(&mut lab, 3, 1), (1, 0));
    lab.zero(3, 1);
    assert_eq!(read(&mut lab, 3, 0), (0, 0), "zeros are pending");
}

/// Many tag pages of one request: whatever is missing is asked for before anything has come back,
/// in one read.
#[test]
fn data_and_all_tag_pages_of_a_request_are_read_together() {
    let (format, options) = separate();
    let mut lab = Lab::new(&format, &OpenOptions { max_request_bytes: 512 << 10, ..options });
    lab.write(0, 1024, 1);
    lab.write(1024, 1024, 1);
    lab.checkpoint();
    const FIRST: u64 = 64;
    const BLOCKS: u64 = 1024;
    let pairs = (lab.superblock().slot_offset(0, 0, 0), 9 * 2 * 4096);
    for warm in [false, true] {
        lab = lab.reopened().unwrap();
        if warm {
            // Brings the root, and one tag page that the request does not touch.
            assert!(lab.reads_as(2047, 1));
        }
        let trace = lab.traced(|lab| {
            let range = BlockRange::new(BlockIndex(FIRST), BLOCKS);
            let Lab { io, volume, context, .. } = lab;
            let mut read = std::pin::pin!(volume.read(io, context, range, Buf::new(512 << 10)));
            let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
            assert!(read.as_mut().poll(&mut cx).is_pending());
            let started = io.in_flight();
            assert_eq!(started, if warm { 2 } else { 3 }, "nothing has come back yet");
            assert!(crate::sim::block_on(io, read).0.is_ok());
        });
        let meta = trace.iter().filter_map(|t| match t {
            Trace::Read { device: Device::Meta, offset, len } => Some((*offset, *len)),
            _ => None,
        });
        let meta: Vec<_> = meta.collect();
        assert_eq!(reads(&trace), (1, if warm { 1 } else { 2 }), "all of it began at once: {trace:?}");
        assert_eq!(meta.last(), Some(&pairs));
        assert!(lab.range_reads_as(FIRST, BLOCKS, 1));
        assert_eq!(reads(&lab.traced(|lab| assert!(lab.range_reads_as(FIRST, BLOCKS, 1)))), (1, 0), "all are cached");
    }
}

#[test]
fn a_write_reads_nothing_and_writes_twice() {
    let (format, options) = separate();
    let mut lab = Lab::new(&format, &OpenOptions { cache_bytes: 0, ..options });
    lab.write(0, 200, 1);
    lab.checkpoint();
    let trace = lab.traced(|lab| lab.write(5, 3, 2));
    assert_eq!(reads(&trace), (0, 0));
    let (log, data) = match trace[..] {
        [
            Trace::WriteStart { offset: log, .. },
            Trace::WriteEnd { .. },
            Trace::WriteStart { offset: data, .. },
            Trace::WriteEnd { .. },
        ] => (log, data),
        _ => panic!("{trace:?}"),
    };
    assert_eq!(log, lab.records()[0].offset);
    assert_eq!(data, lab.block_offset(5));
    assert_eq!(reads(&lab.traced(|lab| lab.zero(5, 3))), (0, 0));
}

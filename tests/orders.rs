//! The orders of `docs/crash-safety.md`, seen on the wire: a random workload under the eyes of
//! [`Watch`], and the requests that must cost nothing, one by one.

use crate::sim::{
    Lab, Rng, SimStorage,
    disk::Trace,
    format_options, formatted,
    image::Logged,
    life::live,
    open_options,
    oracle::Oracle,
    watch::Watch,
    world::{MAX_REQUEST, QUEUES, World, no_tail},
};
use std::{cell::RefCell, future::Future, rc::Rc};
use ublk_integrity::{
    BlockIndex, BlockRange, Buf, CheckpointerWork, Device, Durability, OpenOptions, create::FormatOptions, open::open,
};

pub(crate) fn separate() -> (FormatOptions, OpenOptions) {
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
        rot: None,
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

pub(crate) fn lab() -> Lab {
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

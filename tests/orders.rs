//! The orders of section 4, seen on the wire: a random workload under the eyes of [`Watch`], and the
//! requests that must cost nothing, one by one.

mod sim;

use sim::{
    Lab, Rng, SimStorage,
    disk::Trace,
    format_options, formatted, open_options,
    oracle::Oracle,
    watch::Watch,
    world::{MAX_REQUEST, QUEUES, World, live},
};
use std::{cell::RefCell, rc::Rc};
use ublk_integrity::{Device, OpenOptions, create::FormatOptions, open::open};

fn separate() -> (FormatOptions, OpenOptions) {
    let format = FormatOptions { separate_meta: true, ..format_options(512) };
    (format, OpenOptions { separate_meta: true, ..open_options(&mut Rng::new(1)) })
}

fn watched(seed: u64) -> (u64, u64) {
    let (format, mut options) = separate();
    options.max_request_bytes = MAX_REQUEST;
    options.max_slots = QUEUES + 1;
    options.cache_bytes = [0, 4096, 1 << 20][seed as usize % 3];
    let io: SimStorage = formatted(&format, seed);
    let volume = sim::block_on(&io, open(&io, &sim::key(), &options)).unwrap();
    let world = World {
        io: io.clone(),
        volume,
        oracle: Rc::new(RefCell::new(Oracle::default())),
        rng: RefCell::new(Rng::new(seed)),
        next_version: Rc::default(),
        distrust: false,
    };
    let mut watch = Watch::new(&io);
    live(&world, seed, 6000, || watch.look(&io));
    (watch.checkpoints, watch.data_writes)
}

#[test]
fn random_requests_keep_every_order() {
    let (mut checkpoints, mut writes) = (0, 0);
    for seed in 0..12 {
        println!("seed {seed}");
        let (c, w) = watched(seed);
        checkpoints += c;
        writes += w;
    }
    assert!(checkpoints > 50 && writes > 3000, "{checkpoints} checkpoints, {writes} data writes: nothing was seen");
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

//! The smallest and the largest volume, a full log.

use crate::sim::{Executor, Lab, Rng, disk::Trace, exec::Step, format_options, image::Logged, open_options};
use std::cell::Cell;
use ublk_integrity::{
    BlockIndex, BlockRange, Buf, Device, Durability, OpenOptions, WriteError, create::FormatOptions, open::OpenError,
};

const TIB: u64 = 1 << 40;

fn options() -> OpenOptions {
    open_options(&mut Rng::new(1))
}

fn sized(block_size: u32, size: u64) -> FormatOptions {
    FormatOptions { size: Some(size), ..format_options(block_size) }
}

/// Operations and bytes written.
fn written(trace: &[Trace]) -> (usize, usize) {
    let lens = trace.iter().filter_map(|t| match t {
        Trace::WriteStart { len, .. } => Some(*len),
        _ => None,
    });
    (lens.clone().count(), lens.sum())
}

#[test]
fn format_costs_the_same_at_any_size() {
    let cost = |format: FormatOptions| {
        let plan = ublk_integrity::create::plan(&format).unwrap();
        let io = crate::sim::SimStorage::new(crate::sim::Disk::new(plan.data_device_bytes, None, 4096, 1));
        io.disk().trace = Some(Vec::new());
        crate::sim::block_on(&io, ublk_integrity::create::format(&io, &crate::sim::key(), &format)).unwrap();
        let trace: Vec<_> = io.disk().trace.take().unwrap().into_iter().map(|(_, t)| t).collect();
        (written(&trace), trace.len())
    };
    let small = cost(sized(4096, 1 << 20));
    assert_eq!(small, cost(FormatOptions { log_size: None, ..sized(4096, 64 * TIB) }));
    assert_eq!(small, cost(sized(512, 64 * TIB)));
    assert!(small.0.0 <= 4, "the first MiB, two superblocks: {small:?}");
}

#[test]
fn smallest_and_largest_volumes_with_every_block_size() {
    for block_size in [512, 1024, 2048, 4096] {
        for size in [1 << 20, 64 * TIB] {
            let mut lab = Lab::new(&sized(block_size, size), &options());
            let last = lab.volume.blocks() - 1;
            assert_eq!(last + 1, size / u64::from(block_size));
            for block in [0, last] {
                lab.write(block, 1, 1);
                assert!(lab.reads_as(block, 1));
            }
            lab.checkpoint();
            let mut lab = lab.reopened().unwrap();
            assert!(lab.reads_as(0, 1) && lab.reads_as(last, 1) && lab.reads_as(last - 1, 0));
            lab.zero(last, 1);
            let mut lab = lab.reopened().unwrap();
            assert!(lab.reads_as(last, 0) && lab.reads_as(0, 1));
            assert!(matches!(lab.try_write(last, 2, 3), Err(WriteError::BadRange(_))));
            assert!(matches!(lab.try_write(last + 1, 1, 3), Err(WriteError::BadRange(_))));
            assert!(lab.read(last + 1).is_err() && lab.read(u64::MAX).is_err());
        }
    }
}

#[test]
fn no_volume_takes_more_memory_than_was_foretold() {
    let options = OpenOptions { cache_bytes: 1 << 20, max_requests: 40, max_request_bytes: 512 << 10, ..options() };
    let most =
        ublk_integrity::most_memory_bytes(None, options.cache_bytes, options.max_requests, options.max_request_bytes);
    for (block_size, size) in [(4096, 1 << 20), (4096, 64 * TIB), (512, 1 << 20), (512, 64 * TIB)] {
        let format = FormatOptions { log_size: None, ..sized(block_size, size) };
        let takes = Lab::new(&format, &options).volume.memory_bytes();
        assert!(takes <= most, "{size} bytes in blocks of {block_size}: {takes} of {most}");
        if (block_size, size) == (512, 64 * TIB) {
            assert!(takes + (1 << 20) > most, "the worst is no worse than that: {takes} of {most}");
        }
    }
    assert_eq!(ublk_integrity::most_memory_bytes(None, u64::MAX, 1 << 24, 32 << 20), u64::MAX);
}

#[test]
fn an_open_that_may_not_take_its_memory_is_refused_before_it_does() {
    let mut lab = Lab::new(&format_options(512), &options());
    for version in 1..=10 {
        lab.write(0, 100, version);
    }
    let options = lab.options.clone();
    let own = ublk_integrity::most_memory_bytes(
        Some(lab.volume.info()),
        options.cache_bytes,
        options.max_requests,
        options.max_request_bytes,
    );
    let opened = |max_memory_bytes: u64| {
        let io = crate::sim::SimStorage::new(lab.disk().fork(1));
        let writes = io.disk().writes;
        let options = OpenOptions { max_memory_bytes, ..options.clone() };
        let result = Lab::open(io.clone(), &options).map(|mut lab| assert!(lab.reads_as(7, 10)));
        assert!(result.is_ok() || io.disk().writes == writes, "nothing was written");
        result
    };
    // The volume alone; with what the log says, which is known only then.
    for too_little in [0, own - 1, own, own + 10_000] {
        match opened(too_little) {
            Err(OpenError::Memory { needed, available }) => assert!(needed > too_little && available == too_little),
            other => panic!("{other:?}"),
        }
    }
    opened(own + (1 << 20)).unwrap();
}

#[test]
fn discarding_64_tib_is_a_few_entries_and_a_few_pages() {
    for block_size in [512, 4096] {
        let mut lab = Lab::new(&sized(block_size, 64 * TIB), &options());
        let blocks = lab.volume.blocks();
        let places = [0, blocks / 3, blocks - 1];
        places.iter().for_each(|block| lab.write(*block, 1, 1));
        lab.checkpoint();
        let (writes, _) = written(&lab.traced(|lab| lab.zero(0, blocks)));
        assert!(writes as u64 <= blocks.div_ceil(u32::MAX.into()), "{writes} log writes");
        let mut lab = lab.reopened().unwrap();
        assert!(places.iter().all(|block| lab.reads_as(*block, 0)));
        lab.write(places[1], 1, 2);
        lab.zero(0, places[1]);
        let (writes, _) = written(&lab.traced(|lab| lab.checkpoint()));
        assert!(writes <= 6 + 2, "{writes}: a page of each level and two superblocks");
        let mut lab = lab.reopened().unwrap();
        assert!(lab.reads_as(places[1], 2) && lab.reads_as(places[1] - 1, 0) && lab.reads_as(blocks - 1, 0));
    }
}

/// What it costs to open a volume after a crash: operations by kind, and bytes written.
fn opening(size: u64) -> (u8, [usize; 4], usize) {
    let mut lab = Lab::new(&sized(4096, size), &options());
    lab.write(0, 20, 1);
    lab.checkpoint();
    lab.write(5, 20, 2);
    lab.flush();
    lab.zero(200, 3);
    lab.write(7, 1, 3);
    let (io, levels) = (lab.io.clone(), lab.superblock().levels());
    io.disk().trace = Some(Vec::new());
    let mut lab = lab.reopened().unwrap();
    let trace: Vec<_> = io.disk().trace.take().unwrap().into_iter().map(|(_, t)| t).collect();
    assert!(lab.reads_as(0, 1) && lab.reads_as(6, 2) && lab.reads_as(7, 3));
    let count = |kind: fn(&Trace) -> bool| trace.iter().filter(|t| kind(t)).count();
    let data = count(|t| matches!(t, Trace::Read { device: Device::Data, .. }));
    let meta = count(|t| matches!(t, Trace::Read { device: Device::Meta, .. }));
    let syncs = count(|t| matches!(t, Trace::SyncStart(_)));
    let (writes, bytes) = written(&trace);
    (levels, [data, meta, syncs, writes], bytes)
}

#[test]
fn an_open_costs_the_same_at_any_size_but_for_the_trees_height() {
    let (low, small, small_bytes) = opening(1 << 20);
    let (high, large, large_bytes) = opening(64 * TIB);
    assert_eq!((low, high), (2, 6));
    let more = usize::from(high - low);
    let [data, meta, syncs, writes] = small;
    println!("{small:?} {large:?}");
    assert!(large[0] == data && large[2] == syncs, "{small:?} {large:?}");
    assert_eq!(large[3], writes + more, "a page of each level");
    assert_eq!(large_bytes, small_bytes + more * 4096);
    assert!(large[1] <= meta + 4 * more, "the way down to the tag page: {small:?} {large:?}");
}

/// Many writers at once, each with many requests, on a log that holds few of them.
#[test]
fn a_full_log_holds_writers_back_and_lets_all_of_them_end() {
    const WRITERS: usize = 40;
    const EACH: u64 = 25;
    let lab = Lab::new(&format_options(512), &OpenOptions { max_requests: WRITERS + 2, ..options() });
    let (io, volume) = (&lab.io, &lab.volume);
    let done = Cell::new(0);
    let waited = Cell::new(false);
    let mut exec = Executor::new(5);
    exec.spawn(async {
        loop {
            let work = volume.work_wanted().await;
            waited.set(true);
            volume.work(io, work).await.unwrap();
        }
    });
    for w in 0..WRITERS as u64 {
        let mut context = volume.context(0);
        let done = &done;
        exec.spawn(async move {
            let mut buf = Buf::new(128 * 512);
            for i in 0..EACH {
                // Up to one record's worth of tags, on blocks that others want too.
                let range = BlockRange::new(BlockIndex(w * 40 + i), 1 + (w * i) % 120);
                let result;
                (result, buf) = volume.write(io, &mut context, range, buf, Durability::MayBeLost).await;
                result.unwrap();
            }
            done.set(done.get() + 1);
        });
    }
    while done.get() < WRITERS {
        assert_eq!(exec.step(io), Step::Ran, "{} of {WRITERS} writers have ended", done.get());
    }
    drop(exec);
    let status = volume.status();
    assert!(waited.get() && status.counters.checkpoints > 10, "the ring went round: {:?}", status.counters);
}

#[test]
fn a_request_larger_than_a_record_is_split() {
    let mut lab = Lab::new(&format_options(512), &options());
    lab.write(3, 250, 7);
    let runs: Vec<_> = lab.records().into_iter().flat_map(|r| r.entries).collect();
    let runs: Vec<_> = runs
        .iter()
        .map(|e| match e {
            Logged::Tags { first, tags, .. } | Logged::Payload { first, tags, .. } => (*first, tags.len()),
            other => panic!("{other:?}"),
        })
        .collect();
    // (4096 - 104 - 24) / 32 tags in a record.
    assert_eq!(runs, [(3, 124), (127, 124), (251, 2)]);
    let mut lab = lab.reopened().unwrap();
    assert!((3..253).all(|block| lab.reads_as(block, 7)));
    let too_large = lab.options.max_request_bytes as u64 / 512 + 1;
    let range = BlockRange::new(BlockIndex(0), too_large);
    let buf = Buf::new(too_large as usize * 512);
    let (result, _) =
        crate::sim::block_on(&lab.io, lab.volume.write(&lab.io, &mut lab.context, range, buf, Durability::MayBeLost));
    assert_eq!(result, Err(WriteError::BadRange(range)));
}

#[test]
fn more_runs_of_zeros_than_fit_wait_for_a_checkpoint() {
    let mut lab = Lab::new(&sized(512, 8 << 20), &OpenOptions { max_request_bytes: 4096, ..options() });
    lab.write(1, 1, 1);
    let Lab { io, volume, context, .. } = &mut lab;
    for i in 0..6000 {
        let one = BlockRange::new(BlockIndex(2 * i), 1);
        crate::sim::block_on(io, crate::sim::lab::with_checkpoints(volume, io, volume.zero(io, context, one, false)))
            .unwrap();
    }
    assert!(lab.volume.status().counters.checkpoints > 0);
    assert!(lab.reads_as(1, 1) && lab.reads_as(0, 0));
}

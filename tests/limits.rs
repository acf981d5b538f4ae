//! The smallest and the largest volume, a full log, and devices that give up.

mod sim;

use sim::{
    Executor, Lab, Rng,
    disk::{BadRange, Trace},
    exec::Step,
    format_options,
    image::{LOG_OFFSET, Logged, SUPERBLOCKS},
    lab::content,
    open_options,
};
use std::cell::Cell;
use ublk_integrity::{
    BlockIndex, BlockRange, Buf, Device, Durability, Errno, OnMismatch, OpenOptions, WriteError, create::FormatOptions,
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
        let io = sim::SimStorage::new(sim::Disk::new(plan.data_device_bytes, None, 4096, 1));
        io.disk().trace = Some(Vec::new());
        sim::block_on(&io, ublk_integrity::create::format(&io, &sim::key(), &format)).unwrap();
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
    let options = OpenOptions { cache_bytes: 1 << 20, max_slots: 40, max_request_bytes: 512 << 10, ..options() };
    let most =
        ublk_integrity::most_memory_bytes(None, options.cache_bytes, options.max_slots, options.max_request_bytes);
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
    let lab = Lab::new(&format_options(512), &OpenOptions { max_slots: WRITERS + 2, ..options() });
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
        let mut slot = volume.slot(0);
        let done = &done;
        exec.spawn(async move {
            let mut buf = Buf::new(128 * 512);
            for i in 0..EACH {
                // Up to one record's worth of tags, on blocks that others want too.
                let range = BlockRange::new(BlockIndex(w * 40 + i), 1 + (w * i) % 120);
                let result;
                (result, buf) = volume.write(io, &mut slot, range, buf, Durability::MayBeLost).await;
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
            Logged::Tags { first, tags, .. } => (*first, tags.len()),
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
        sim::block_on(&lab.io, lab.volume.write(&lab.io, &mut lab.slot, range, buf, Durability::MayBeLost));
    assert_eq!(result, Err(WriteError::BadRange(range)));
}

#[test]
fn more_runs_of_zeros_than_fit_wait_for_a_checkpoint() {
    let mut lab = Lab::new(&sized(512, 8 << 20), &OpenOptions { max_request_bytes: 4096, ..options() });
    lab.write(1, 1, 1);
    let Lab { io, volume, slot, .. } = &mut lab;
    for i in 0..6000 {
        let one = BlockRange::new(BlockIndex(2 * i), 1);
        sim::block_on(io, sim::lab::with_checkpoints(volume, io, volume.zero(io, slot, one, false))).unwrap();
    }
    assert!(lab.volume.status().counters.checkpoints > 0);
    assert!(lab.reads_as(1, 1) && lab.reads_as(0, 0));
}

#[test]
fn a_failed_log_write_latches_and_wakes_everybody() {
    let mut lab = Lab::new(&format_options(512), &OpenOptions { max_slots: 40, ..options() });
    lab.write(0, 1, 1);
    {
        let (io, volume) = (&lab.io, &lab.volume);
        let failed = Cell::new(0);
        let mut exec = Executor::new(1);
        for w in 1..30 {
            let (mut slot, failed) = (volume.slot(0), &failed);
            exec.spawn(async move {
                // Some lead, some wait for the leader, some for space.
                let range = BlockRange::new(BlockIndex(w * 60), 60);
                let (result, _) = volume.write(io, &mut slot, range, Buf::new(60 * 512), Durability::MayBeLost).await;
                assert!(matches!(result, Err(WriteError::Latched(_))), "{result:?}");
                failed.set(failed.get() + 1);
            });
        }
        let mut slot = volume.slot(0);
        // Whether it comes before the failure is up to the seed; that it ends is not.
        exec.spawn(async move {
            let _ = volume.flush(io, &mut slot).await;
        });
        io.disk().faults.meta_unwritable = true;
        while exec.step(io) == Step::Ran {}
        assert_eq!((failed.get(), exec.running()), (29, 0));
    }
    lab.disk().faults.meta_unwritable = false;
    assert!(lab.volume.status().read_only && lab.volume.status().latched.is_some());
    assert!(lab.reads_as(0, 1), "readers go on");
    assert!(matches!(lab.try_write(0, 1, 2), Err(WriteError::Latched(_))));
    assert!(matches!(lab.try_flush(), Err(WriteError::Latched(_))));
    lab.try_checkpoint().unwrap_err();
    let mut lab = lab.reopened().unwrap();
    assert!(lab.reads_as(0, 1));
    lab.write(0, 1, 2);
}

#[test]
fn any_metadata_write_that_fails_latches() {
    let superblock = Lab::new(&format_options(512), &options()).superblock();
    let pages = superblock.slot_offset(0, 0, 0)..superblock.metadata_end();
    let copy = |i: usize| SUPERBLOCKS[i]..SUPERBLOCKS[i] + 1;
    let log = LOG_OFFSET..pages.start;
    for range in [pages, copy(0), copy(1), log] {
        let mut lab = Lab::new(&format_options(512), &options());
        lab.write(0, 200, 1);
        lab.write(200, 100, 1);
        lab.checkpoint();
        lab.write(5, 1, 2);
        let bad = BadRange { device: Device::Meta, range: range.clone(), reads: None, writes: Some(Errno::EIO) };
        lab.disk().bad_ranges.push(bad);
        // The log's failure shows at once, the others' at the checkpoint.
        let failed = lab.try_write(6, 1, 2).is_err() || lab.try_checkpoint().is_err();
        assert!(failed && lab.volume.latched().is_some(), "{range:?}");
        lab.try_write(7, 1, 2).unwrap_err();
        lab.try_flush().unwrap_err();
        assert!(lab.reads_as(5, 2) && lab.reads_as(4, 1), "{range:?}: readers go on");
        lab.disk().bad_ranges.clear();
        let mut lab = lab.reopened().unwrap();
        assert!(lab.reads_as(5, 2) && lab.reads_as(4, 1) && lab.reads_as(299, 1), "{range:?}");
        lab.write(6, 1, 3);
        assert!(lab.reads_as(6, 3));
    }
}

#[test]
fn metadata_that_cant_be_read_is_an_io_error_and_no_alarm() {
    let mut lab = Lab::new(&format_options(512), &OpenOptions { cache_bytes: 0, ..options() });
    lab.write(0, 200, 1);
    lab.checkpoint();
    let page = lab.superblock().slot_offset(0, 1, 0);
    let bad = BadRange { device: Device::Meta, range: page..page + 8192, reads: Some(Errno::EIO), writes: None };
    lab.disk().bad_ranges.push(bad);
    assert_eq!(lab.read(130).unwrap_err().errno(), Errno::EIO);
    assert!(lab.reads_as(0, 1), "another tag page");
    // It must be changed and can't be read: never from unverified bytes, so the checkpoint fails.
    lab.write(131, 1, 2);
    lab.try_checkpoint().unwrap_err();
    assert!(lab.reads_as(131, 2));
    lab.disk().bad_ranges.clear();
    assert!(lab.reads_as(130, 1));
    let mut lab = lab.reopened().unwrap();
    assert!(lab.reads_as(130, 1) && lab.reads_as(131, 2));
}

/// Where it is not known yet which of a page's two slots is current, both are read; only one of them matters.
#[test]
fn a_slot_that_nobody_needs_may_be_unreadable() {
    let mut lab = Lab::new(&format_options(512), &OpenOptions { cache_bytes: 0, ..options() });
    lab.write(0, 128, 1);
    lab.write(128, 72, 1);
    lab.checkpoint();
    let superblock = lab.superblock();
    // In use for the first time, every page is in slot 0.
    let others = (0..superblock.levels()).map(|level| superblock.slot_offset(level, 0, 1));
    for other in others.chain([superblock.slot_offset(0, 1, 1)]) {
        let bad = BadRange { device: Device::Meta, range: other..other + 512, reads: Some(Errno::EIO), writes: None };
        lab.disk().bad_ranges.push(bad);
        assert!(lab.reads_as(0, 1) && lab.reads_as(130, 1), "with the slot at {other} unreadable");
    }
}

/// Tag pages side by side are one read; what is wrong with one must stay its own.
#[test]
fn a_tag_page_that_cant_be_had_does_not_take_its_neighbours_along() {
    let opening = OpenOptions { cache_bytes: 0, on_mismatch: OnMismatch::Zero, ..options() };
    let mut lab = Lab::new(&format_options(512), &opening);
    lab.write(0, 250, 1);
    lab.write(250, 250, 1);
    lab.checkpoint();
    let page = lab.superblock().pages(&lab.disk()).into_iter().find(|p| (p.level, p.index) == (0, 1)).unwrap();
    let bad =
        |offset| BadRange { device: Device::Meta, range: offset..offset + 512, reads: Some(Errno::EIO), writes: None };
    lab.disk().bad_ranges.push(bad(page.offset));
    assert_eq!(lab.read_range(100, 200).0.unwrap_err().errno(), Errno::EIO);
    assert!(lab.range_reads_as(100, 28, 1) && lab.range_reads_as(256, 200, 1));
    lab.disk().bad_ranges.clear();
    lab.poke(Device::Meta, page.offset + 8, &[0xab; 8]);
    let (result, bytes) = lab.read_range(100, 200);
    result.unwrap();
    for (block, bytes) in (100..).zip(bytes.chunks_exact(512)) {
        let version = if (128..256).contains(&block) { 0 } else { 1 };
        assert!(bytes == content(512, block, version), "block {block}");
    }
    assert_eq!(lab.volume.status().counters.mismatches, 128);
}

#[test]
fn an_old_slot_that_cant_be_read_is_not_missed() {
    let mut lab = Lab::new(&format_options(512), &OpenOptions { cache_bytes: 1 << 20, ..options() });
    lab.write(0, 250, 1);
    lab.write(250, 250, 1);
    lab.checkpoint();
    let page = lab.superblock().pages(&lab.disk()).into_iter().find(|p| (p.level, p.index) == (0, 1)).unwrap();
    let mut lab = lab.reopened().unwrap();
    assert!(lab.reads_as(499, 1), "brings the root");
    let old = lab.superblock().slot_offset(0, 1, 1 - page.slot);
    let bad = BadRange { device: Device::Meta, range: old..old + 4096, reads: Some(Errno::EIO), writes: None };
    lab.disk().bad_ranges.push(bad);
    assert!(lab.range_reads_as(100, 200, 1));
}

#[test]
fn a_damaged_page_that_must_change_loses_its_blocks_and_no_others() {
    let mut lab = Lab::new(&format_options(512), &OpenOptions { cache_bytes: 0, ..options() });
    lab.write(0, 200, 1);
    lab.write(200, 100, 1);
    lab.checkpoint();
    let page = lab.superblock().pages(&lab.disk()).into_iter().find(|p| (p.level, p.index) == (0, 1)).unwrap();
    lab.poke(Device::Meta, page.offset, &[0xab; 512]);
    lab.write(131, 1, 2);
    lab.checkpoint();
    assert_eq!(lab.volume.status().counters.pages_lost, 1);
    let mut lab = lab.reopened().unwrap();
    for block in [128, 130, 255] {
        assert_eq!(lab.read(block).unwrap_err().errno(), Errno::EILSEQ, "lost, and never zeros");
    }
    assert!(lab.reads_as(131, 2) && lab.reads_as(127, 1) && lab.reads_as(256, 1));
    lab.write(130, 1, 3);
    lab.zero(128, 1);
    assert!(lab.reads_as(130, 3) && lab.reads_as(128, 0), "written or zeroed, a lost block is whole again");
}

#[test]
fn a_dead_data_device_is_reported_and_nothing_is_lost() {
    let mut lab = Lab::new(&format_options(512), &options());
    lab.write(0, 2, 1);
    lab.try_flush().unwrap();
    lab.disk().faults.data_dead = true;
    assert_eq!(lab.read(0).unwrap_err().errno(), Errno::EIO);
    assert!(lab.try_write(1, 1, 2).is_err());
    assert!(lab.try_flush().is_err() && lab.volume.latched().is_some());
    lab.disk().faults.data_dead = false;
    assert!(lab.reads_as(0, 1));
    let mut lab = lab.reopened().unwrap();
    assert!(lab.reads_as(0, 1));
    assert!(lab.reads_as(1, 1) || lab.reads_as(1, 2) || lab.read(1).is_err());
}

#[test]
fn a_full_disk_fails_the_write_and_keeps_the_old_block() {
    const ENOSPC: Errno = Errno(28);
    let mut lab = Lab::new(&format_options(512), &options());
    lab.write(0, 2, 1);
    let at = lab.block_offset(1);
    let full = BadRange { device: Device::Data, range: at..u64::MAX, reads: None, writes: Some(ENOSPC) };
    lab.disk().bad_ranges.push(full);
    assert_eq!(lab.try_write(1, 1, 2).unwrap_err().errno(), ENOSPC);
    assert!(lab.volume.latched().is_none(), "one block's failure is no reason to stop");
    lab.try_flush().unwrap();
    assert!(lab.reads_as(1, 1));
    lab.write(0, 1, 2);
    lab.checkpoint();
    assert!(lab.reads_as(0, 2) && lab.reads_as(1, 1));
    let mut lab = lab.reopened().unwrap();
    assert!(lab.reads_as(0, 2) && lab.reads_as(1, 1));
}

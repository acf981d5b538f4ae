//! Reads whose tags are not cached, several at a time: how many reads of metadata they take, and that none waits for one that
//! has failed, was dropped or is another thread's.

use crate::sim::{
    Executor, Lab, Rng, block_on,
    disk::{BadRange, Trace},
    exec::Step,
    format_options,
    lab::content,
    open_options,
};
use std::{
    cell::{Cell, RefCell},
    future::Future,
    pin::{Pin, pin},
    task::{Context, Waker},
};
use ublk_integrity::{
    BlockIndex, BlockRange, Buf, Device, Errno, OpenOptions, ReadError, RequestContext, create::FormatOptions,
};

const TAGS_PER_PAGE: u64 = 128;
const DEPTH: usize = 32;

/// A volume of so many tag pages, opened anew. Of each some blocks hold data.
fn cold(tag_pages: u64, blocks: u64, cache_pages: u64) -> Lab {
    let format = FormatOptions { size: Some(tag_pages * TAGS_PER_PAGE * 512), ..format_options(512) };
    let options = OpenOptions {
        cache_bytes: cache_pages * 4096,
        max_requests: 2 * DEPTH + 1,
        hash_threads: None,
        ..open_options(&mut Rng::new(1))
    };
    let mut lab = Lab::new(&format, &options);
    (0..tag_pages).for_each(|page| lab.write(page * TAGS_PER_PAGE, blocks, 1));
    lab.checkpoint();
    lab.reopened().unwrap()
}

/// Those of one thread.
fn contexts(lab: &Lab) -> Vec<RequestContext> {
    let mut contexts: Vec<_> = (0..DEPTH).map(|_| lab.volume.context(0)).collect();
    RequestContext::work_together(&mut contexts);
    contexts
}

async fn read(lab: &Lab, context: &mut RequestContext, block: u64) {
    let one = BlockRange::new(BlockIndex(block), 1);
    let (result, buf) = lab.volume.read(&lab.io, context, one, Buf::new(512)).await;
    assert!(result.is_ok() && buf[..] == content(512, block, 1), "block {block}: {result:?}");
}

fn is_of_metadata(trace: &Trace) -> bool {
    matches!(trace, Trace::Read { device: Device::Meta, .. })
}

/// Reads of metadata that each read takes, of blocks on any page, in a cache that has been in use. `in_waves`: all that was
/// started comes back before anything new begins, as where a disk is fast.
fn metadata_reads(tag_pages: u64, cache_pages: u64, in_waves: bool) -> f64 {
    const WARM: u32 = 1000;
    const COUNTED: u32 = 4000;
    let mut lab = cold(tag_pages, 1, cache_pages);
    let trace = lab.traced(|lab| {
        let lab = &*lab;
        let (read_so_far, pages) = (&Cell::new(0), &RefCell::new(Rng::new(3)));
        let lane = |mut context: RequestContext| async move {
            while read_so_far.get() < WARM + COUNTED {
                read_so_far.set(read_so_far.get() + 1);
                if read_so_far.get() == WARM {
                    lab.disk().trace = Some(Vec::new());
                }
                let page = pages.borrow_mut().below(tag_pages);
                read(lab, &mut context, page * TAGS_PER_PAGE).await;
            }
        };
        match in_waves {
            false => {
                let mut exec = Executor::new(1);
                contexts(lab).into_iter().for_each(|context| exec.spawn(lane(context)));
                while exec.step(&lab.io) == Step::Ran {}
                assert_eq!(exec.running(), 0, "a deadlock");
            }
            true => {
                let mut lanes: Vec<Pin<Box<dyn Future<Output = ()>>>> = Vec::new();
                contexts(lab).into_iter().for_each(|context| lanes.push(Box::pin(lane(context))));
                let mut cx = Context::from_waker(Waker::noop());
                while !lanes.is_empty() {
                    lanes.retain_mut(|lane| lane.as_mut().poll(&mut cx).is_pending());
                    (0..lab.io.in_flight()).for_each(|_| lab.io.complete(0));
                }
            }
        }
    });
    trace.iter().filter(|t| is_of_metadata(t)).count() as f64 / f64::from(COUNTED)
}

/// With 32 pages of 521, as `benchmark` has it. Each tag page that is in the cache saves a read, and so does each that another read
/// brings just now.
#[test]
fn reads_that_jump_about_take_a_tag_page_each_and_no_more() {
    for in_waves in [true, false] {
        let reads = metadata_reads(512, 32, in_waves);
        assert!((0.85..=0.96).contains(&reads), "{reads}, in waves: {in_waves}");
        // Of a cache that is small beside the tree the pages above the tag pages take half.
        let reads = metadata_reads(512, 16, in_waves);
        assert!((0.9..=1.05).contains(&reads), "{reads} with 16 frames, in waves: {in_waves}");
    }
}

#[test]
fn reads_of_one_tag_page_at_once_load_it_once() {
    let mut lab = cold(512, 32, 64);
    let each = lab.traced(|lab| block_on(&lab.io, read(lab, &mut lab.volume.context(0), 0)));
    let levels = each.iter().filter(|t| is_of_metadata(t)).count();
    assert!(levels == 3, "{each:?}");
    for seed in 0..20 {
        let options = OpenOptions { open_id: Rng::new(seed + 2).bytes(), ..lab.options.clone() };
        lab = Lab::open(lab.io, &options).unwrap();
        let trace = lab.traced(|lab| {
            let (lab, mut exec) = (&*lab, Executor::new(seed));
            for (mut context, block) in contexts(lab).into_iter().zip(0..) {
                exec.spawn(async move { read(lab, &mut context, block).await });
            }
            while exec.step(&lab.io) == Step::Ran {}
            assert_eq!(exec.running(), 0, "a deadlock");
        });
        assert_eq!(trace.iter().filter(|t| is_of_metadata(t)).count(), levels);
    }
}

/// One read begins, the others of its thread wait for it. It fails, or is dropped: each of the others must be read.
#[test]
fn who_waits_for_a_load_that_ends_badly_loads_by_itself() {
    for fails in [true, false] {
        let lab = cold(16, 32, 64);
        let offset = lab.superblock().slot_offset(0, 0, 0);
        let mut contexts = contexts(&lab);
        let (first, others) = contexts.split_first_mut().unwrap();
        let mut cx = Context::from_waker(Waker::noop());
        let mut loads = Box::pin(lab.volume.read(&lab.io, first, BlockRange::new(BlockIndex(0), 1), Buf::new(512)));
        assert!(loads.as_mut().poll(&mut cx).is_pending());
        if fails {
            lab.disk().bad_ranges = vec![BadRange::unreadable(Device::Meta, offset..offset + 8192)];
        }
        lab.disk().trace = Some(Vec::new());
        let mut exec = Executor::new(1);
        for (context, block) in others.iter_mut().zip(1..) {
            let lab = &lab;
            exec.spawn(async move { read(lab, context, block).await });
        }
        // Whatever comes back: the first has not gone on.
        while exec.step(&lab.io) == Step::Ran {}
        let asked = lab.disk().trace.take().unwrap();
        assert_eq!((exec.running(), asked.len()), (DEPTH - 1, DEPTH - 1), "they wait, and have read their data");
        assert!(!asked.iter().any(|(_, trace)| is_of_metadata(trace)));
        match fails {
            true => {
                let failed = block_on(&lab.io, loads).0;
                assert!(matches!(failed, Err(ReadError::Device(e)) if e.errno == Errno::EIO), "{failed:?}");
                lab.disk().bad_ranges.clear();
            }
            false => drop(loads),
        }
        while exec.step(&lab.io) == Step::Ran {}
        assert_eq!(exec.running(), 0, "nobody has told them");
    }
}

/// What is read again may take as long again, and who waits needs none of it.
#[test]
fn who_waits_for_a_load_does_not_wait_for_its_second_try() {
    let lab = cold(16, 32, 64);
    let offset = lab.superblock().slot_offset(0, 1, 0);
    let mut contexts = contexts(&lab);
    let (first, others) = contexts.split_first_mut().unwrap();
    let mut cx = Context::from_waker(Waker::noop());
    let both_pages = BlockRange::new(BlockIndex(TAGS_PER_PAGE - 1), 2);
    let mut loads = Box::pin(lab.volume.read(&lab.io, first, both_pages, Buf::new(1024)));
    assert!(loads.as_mut().poll(&mut cx).is_pending());
    lab.disk().bad_ranges = vec![BadRange::unreadable(Device::Meta, offset..offset + 8192)];
    let mut exec = Executor::new(1);
    exec.spawn(read(&lab, &mut others[0], 1));
    while exec.step(&lab.io) == Step::Ran {}
    assert_eq!(exec.running(), 1, "it waits for the first read of both pages");
    assert!(loads.as_mut().poll(&mut cx).is_pending(), "the other page is read again");
    while exec.step(&lab.io) == Step::Ran {}
    assert_eq!(exec.running(), 0, "it waits on");
}

/// Of another thread nobody knows what it does next.
#[test]
fn a_load_of_another_thread_is_not_waited_for() {
    let lab = cold(16, 32, 64);
    let (mut one, mut other) = (contexts(&lab), contexts(&lab));
    let mut cx = Context::from_waker(Waker::noop());
    let mut loads = pin!(read(&lab, &mut one[0], 0));
    assert!(loads.as_mut().poll(&mut cx).is_pending());
    let started = lab.io.in_flight();
    let mut reads = pin!(read(&lab, &mut other[0], 1));
    assert!(reads.as_mut().poll(&mut cx).is_pending());
    assert_eq!(lab.io.in_flight(), 2 * started);
}

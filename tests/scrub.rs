//! Scrub: it finds what has rotted, says nothing false beside any load, and is in nobody's way.

use crate::sim::{
    Disk, Executor, Lab, Rng, SimStorage, block_on, elsewhere,
    exec::{Step, join},
    faults::{BadRange, Trace},
    format_options, formatted,
    image::{Page, Superblock},
    lab::with_checkpoints,
    open_options,
    oracle::fill_all,
    reopen, tag_algorithm,
    world::MAX_REQUEST,
};
use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    future::{Future, poll_fn},
    num::NonZeroU64,
    pin::pin,
    rc::Rc,
    task::Poll,
    time::Duration,
};
use ublk_integrity::{
    Access, BadReason, BlockIndex, BlockRange, Buf, ByteOffset, Device, Durability, Errno, OpenOptions, PageName,
    RequestContext, Storage, Volume,
    create::FormatOptions,
    scrub::{BadMetadata, MetadataPart, Remedy, Scrub, ScrubControl, ScrubFinding, ScrubReport, ScrubState},
};

/// One pass to its end; what it has told is what it reports.
fn pass(volume: &Volume, io: &SimStorage) -> ScrubReport {
    passed(volume, io)
}

/// The same where no checkpoint comes, for which it would wait.
fn pass_alone(volume: &Volume, io: &SimStorage) -> ScrubReport {
    let control = ScrubControl::new(Scrub::default(), None);
    let waits = polled(volume.scrub(io, &control, |_| {}), io, 400);
    let report = control.report();
    assert_eq!(report.cursor, volume.blocks());
    assert_eq!(waits.is_some(), report.waiting_metadata > 0);
    report
}

fn passed(volume: &Volume, io: &SimStorage) -> ScrubReport {
    let (control, mut told) = (ScrubControl::new(Scrub::default(), None), Vec::new());
    let scrub = async { volume.scrub(io, &control, |finding| told.push(finding)).await };
    let waiting = |report: &ScrubReport| report.bad_metadata.iter().filter(|bad| bad.remedy == Remedy::Waits).count();
    // One comes when the pass waits for it: until then all is as it was.
    let checkpoint = async {
        let mut looks = 0;
        while control.state() == ScrubState::Running {
            let before = waiting(&control.report());
            io.sleep(Duration::from_millis(100)).await.unwrap();
            looks = if before > 0 && waiting(&control.report()) == before { looks + 1 } else { 0 };
            if looks == 50 {
                volume.checkpoint(io).await.unwrap();
            }
        }
    };
    block_on(io, join(scrub, checkpoint));
    let report = control.report();
    assert_eq!((report.state, report.cursor, report.blocks), (ScrubState::Ended, volume.blocks(), volume.blocks()));
    assert_eq!((report.held_at, report.waiting_metadata), (None, 0));
    let blocks = report.bad_runs.iter().map(|run| ScrubFinding::Blocks(*run));
    let all: Vec<_> = blocks.chain(report.bad_metadata.iter().map(|bad| ScrubFinding::Metadata(*bad))).collect();
    let waits = |finding: &&ScrubFinding| matches!(finding, ScrubFinding::Metadata(bad) if bad.remedy == Remedy::Waits);
    let settled = told.len() - told.iter().filter(waits).count();
    assert!(all.len() == settled && all.iter().all(|finding| told.contains(finding)), "{told:?}: {report:?}");
    report
}

fn bad_blocks(report: &ScrubReport) -> BTreeSet<u64> {
    assert_eq!(report.unlisted_runs, 0);
    report.bad_runs.iter().flat_map(|run| run.range.blocks()).map(|block| block.0).collect()
}

/// A volume of which a few blocks are written: some in the tree, one pending.
fn lab(cache: u64) -> Lab {
    let options = OpenOptions { cache_bytes: cache, ..open_options(&mut Rng::new(1)) };
    let mut lab = Lab::new(&format_options(4096), &options);
    lab.write(3, 20, 1);
    lab.write(130, 4, 2);
    lab.checkpoint();
    lab.write(200, 1, 3);
    lab
}

#[test]
fn a_clean_volume_is_clean_and_the_pass_counts_as_no_read() {
    let lab = lab(1 << 20);
    let (before, writes) = (lab.volume.status().counters, lab.disk().writes);
    let report = pass(&lab.volume, &lab.io);
    assert!(report.is_clean() && report.unsettled_blocks == 0, "{report:?}");
    assert_eq!(report.verified_blocks, 25);
    assert_eq!((lab.volume.status().counters, lab.disk().writes), (before, writes));
}

#[test]
fn rotten_blocks_are_named_and_what_reads_as_zeros_is_not_looked_at() {
    let lab = lab(1 << 20);
    for block in [3, 7, 8, 9, 133, 200] {
        lab.poke(Device::Data, lab.block_offset(block) + 100, b"rot");
    }
    lab.poke(Device::Data, lab.block_offset(50), b"never written");
    let unreadable = lab.block_offset(20)..lab.block_offset(21);
    lab.disk().bad_ranges.push(BadRange::unreadable(Device::Data, unreadable));
    let report = pass(&lab.volume, &lab.io);
    assert_eq!(bad_blocks(&report), [3, 7, 8, 9, 20, 133, 200].into());
    assert_eq!((report.bad_blocks, report.unreadable_blocks, report.verified_blocks), (6, 1, 18));
    let runs: Vec<_> = report.bad_runs.iter().map(|run| (run.range.first.0, run.range.count)).collect();
    assert_eq!(runs, [(3, 1), (7, 3), (20, 1), (133, 1), (200, 1)]);
    assert!(matches!(report.bad_runs[2].reason, BadReason::Unreadable { device: Device::Data, .. }));
}

fn tag_page_1(lab: &Lab) -> Page {
    *lab.superblock().pages(&lab.disk()).iter().find(|page| (page.level, page.index) == (0, 1)).unwrap()
}

/// The pages that are found, all of which are mended or none.
fn pages(report: &ScrubReport, mended: bool) -> Vec<(u8, u64)> {
    assert!(report.bad_metadata.iter().all(|bad| (bad.remedy == Remedy::Mended) == mended), "{report:?}");
    assert_eq!(report.bad_pieces(), if mended { 0 } else { report.bad_metadata.len() as u64 });
    let name = |bad: &BadMetadata| match bad.part {
        MetadataPart::TreePage { name } => (name.level, name.index),
        other => panic!("{other:?}"),
    };
    report.bad_metadata.iter().map(name).collect()
}

/// All that was written can be read, and the medium is as it should be, though only after a checkpoint.
fn is_whole(lab: &mut Lab) {
    lab.checkpoint();
    assert!(pass(&lab.volume, &lab.io).bad_metadata.is_empty());
    assert!((3..23).all(|block| lab.reads_as(block, 1)) && (130..134).all(|block| lab.reads_as(block, 2)));
    assert!(lab.reads_as(200, 3) && lab.reads_as(50, 0));
}

#[test]
fn pages_are_read_from_the_medium_and_mended_from_memory() {
    let mut lab = lab(1 << 20);
    assert!(lab.reads_as(130, 2));
    let tree_page = *lab.superblock().pages(&lab.disk()).iter().find(|page| page.level == 1).unwrap();
    let tag_page = tag_page_1(&lab);
    let old = lab.peek(Device::Meta, tag_page.offset, 4096);
    for page in [tree_page, tag_page] {
        lab.poke(Device::Meta, page.offset, &[0xee; 4096]);
    }
    let report = pass(&lab.volume, &lab.io);
    assert_eq!(pages(&report, true), [(1, 0), (0, 1)]);
    assert!(report.is_clean() && report.verified_blocks == 25, "{report:?}");
    is_whole_after(&mut lab, &tag_page, &old);
}

#[test]
fn nothing_is_mended_before_it_is_written() {
    let lab = lab(0);
    lab.checkpoint();
    lab.poke(Device::Meta, 80, b"rot");
    lab.poke(Device::Meta, tag_page_1(&lab).offset, &[1; 512]);
    let control = ScrubControl::new(Scrub::default(), None);
    let Lab { io, volume, .. } = &lab;
    let stands = polled(volume.scrub(io, &control, |_| {}), io, 100).expect("it waits for a checkpoint");
    let report = control.report();
    assert_eq!((report.waiting_metadata, report.mended_metadata, report.cursor), (2, 0, volume.blocks()));
    assert!(!report.is_clean());
    // After a crash it is to look there again; none of this counts as bad for good.
    assert_eq!((control.in_superblock().cursor, control.in_superblock().bad_blocks), (128, 0));
    lab.checkpoint();
    block_on(io, stands);
    let report = control.report();
    assert!(report.is_clean() && report.mended_metadata == 2, "{report:?}");
    assert!(report.bad_metadata.iter().all(|bad| bad.remedy == Remedy::Mended));
    assert!(pass_alone(volume, io).bad_metadata.is_empty());
    // What can't be mended is not forgotten.
    let Lab { io, volume, .. } = &lab;
    lab.poke(Device::Meta, 80, b"rot");
    lab.disk().faults.meta_unwritable = true;
    let control = ScrubControl::new(Scrub::default(), None);
    let checkpoint = async {
        io.sleep(Duration::from_secs(100)).await.unwrap();
        volume.checkpoint(io).await.unwrap_err();
    };
    block_on(io, join(volume.scrub(io, &control, |_| {}), checkpoint));
    assert_eq!((control.report().unmended_metadata, control.in_superblock().bad_blocks), (1, 1));
}

#[test]
fn what_a_pass_has_to_mend_when_it_leaves_the_last_checkpoint_writes() {
    let format = FormatOptions { label: "old".parse().unwrap(), ..format_options(4096) };
    let mut lab = Lab::new(&format, &OpenOptions { cache_bytes: 0, ..open_options(&mut Rng::new(1)) });
    lab.write(130, 4, 2);
    lab.checkpoint();
    lab.poke(Device::Meta, tag_page_1(&lab).offset, &[1; 512]);
    let control = ScrubControl::new(Scrub { pass: 3, ..Scrub::default() }, None);
    let stands = polled(lab.volume.scrub(&lab.io, &control, |_| {}), &lab.io, 50).expect("it waits for a checkpoint");
    control.leave();
    block_on(&lab.io, stands);
    block_on(&lab.io, lab.volume.close(&lab.io)).unwrap();
    let mut lab = lab.reopened().unwrap();
    let said = Scrub { pass: 3, cursor: 128, state: ScrubState::Running, ..Scrub::default() };
    assert_eq!(lab.volume.last_scrub(), Some(said));
    assert!(lab.reads_as(130, 2) && pass(&lab.volume, &lab.io).bad_metadata.is_empty());
}

/// The page is as it was, in its other slot.
fn is_whole_after(lab: &mut Lab, before: &Page, old: &[u8]) {
    lab.checkpoint();
    let now = tag_page_1(lab);
    assert_ne!(now.slot, before.slot);
    let new = lab.peek(Device::Meta, now.offset, 4096);
    assert!((0..4096).all(|i| new[i] == old[i] || i / 32 == 72), "but for block 200");
    is_whole(lab);
}

#[test]
fn tag_pages_are_made_anew_from_the_blocks() {
    for (from, rot) in
        [(9, vec![1; 1]), (64, vec![7; 32 * 6]), (0, vec![0; 512]), (512, vec![3; 1024]), (0, vec![0xff; 4096])]
    {
        let mut lab = lab(0);
        // Of a page that is gone as a whole only what is in place can be told.
        if rot.len() == 4096 {
            lab.checkpoint();
        }
        let page = tag_page_1(&lab);
        let old = lab.peek(Device::Meta, page.offset, 4096);
        lab.poke(Device::Meta, page.offset + from, &rot);
        assert!(lab.read(130).is_err(), "{from}");
        // It is as if it had never been gone, wherever the power fails.
        let settled = lab.disk().writes;
        lab.disk().trace = Some(Vec::new());
        let report = pass(&lab.volume, &lab.io);
        assert_eq!(pages(&report, true), [(0, 1)], "{from}");
        assert!(report.is_clean() && report.verified_blocks == 25, "{report:?}");
        is_whole(&mut lab);
        let trace = lab.disk().trace.take().unwrap();
        let current = |event: &Trace| matches!(event, Trace::WriteStart { offset, .. } if *offset == page.offset);
        assert!(lab.disk().writes > settled && !trace.iter().any(|(_, event)| current(event)), "over what is current");
        let now = tag_page_1(&lab);
        let new = lab.peek(Device::Meta, now.offset, 4096);
        assert!((0..4096).all(|i| new[i] == old[i] || i / 32 == 72), "but for block 200");
    }
}

#[test]
fn a_stopped_pass_tells_what_became_of_what_it_has_found() {
    for (is_mended, leaves) in [(true, false), (false, false), (true, true)] {
        let lab = lab(0);
        lab.checkpoint();
        let page = tag_page_1(&lab);
        lab.poke(Device::Meta, page.offset, &[1; 512]);
        if !is_mended {
            let slot = lab.superblock().slot_offset(0, 1, page.slot ^ 1);
            lab.disk().bad_ranges.push(BadRange::unwritable(Device::Meta, slot..slot + 4096, Errno::EIO));
        }
        let control = ScrubControl::new(Scrub::default(), None);
        let stands = polled(lab.volume.scrub(&lab.io, &control, |_| {}), &lab.io, 200).expect("it waits");
        assert!(control.stop());
        if leaves {
            control.leave();
            block_on(&lab.io, stands);
            assert_eq!((control.state(), control.report().waiting_metadata), (ScrubState::Stopped, 1));
            continue;
        }
        lab.checkpoint();
        block_on(&lab.io, stands);
        let report = control.report();
        assert_eq!((report.state, report.waiting_metadata), (ScrubState::Stopped, 0));
        assert_eq!((report.mended_metadata, report.unmended_metadata), if is_mended { (1, 0) } else { (0, 1) });
    }
}

#[test]
fn a_page_that_waits_for_the_checkpoint_survives_any_crash() {
    for writes in 0.. {
        let lab = lab(0);
        lab.checkpoint();
        let page = tag_page_1(&lab);
        lab.poke(Device::Meta, page.offset, &[1; 512]);
        assert_eq!(pages(&pass_alone(&lab.volume, &lab.io), false), [(0, 1)]);
        let until = lab.disk().writes + writes;
        let ended = {
            let mut checkpoint = pin!(lab.volume.checkpoint(&lab.io));
            let mut ended = false;
            while !ended && lab.disk().writes < until {
                let mut context = std::task::Context::from_waker(std::task::Waker::noop());
                ended = checkpoint.as_mut().poll(&mut context).is_ready();
                if !ended && lab.io.in_flight() > 0 {
                    lab.io.complete_any();
                }
            }
            ended
        };
        lab.disk().power_cut();
        let mut lab = lab.reopened().unwrap();
        let report = pass(&lab.volume, &lab.io);
        assert!(report.is_clean(), "{writes}: {report:?}");
        is_whole(&mut lab);
        if ended {
            assert!(writes > 3, "nothing was written");
            return;
        }
    }
}

/// A tag page waits to be written with its parent, which a checkpoint has just changed: of the new parent nothing
/// is in memory. Returns where it lies.
fn waits_below_a_new_page() -> (Lab, Page) {
    let options = OpenOptions { cache_bytes: 0, ..open_options(&mut Rng::new(1)) };
    let mut lab = Lab::new(&format_options(4096), &options);
    lab.write(3, 20, 1);
    lab.write(130, 4, 2);
    lab.checkpoint();
    lab.write(30, 1, 3);
    let (io, before) = (lab.io.clone(), lab.disk().writes);
    {
        let mut checkpoint = pin!(lab.volume.checkpoint(&lab.io));
        let mut poll = || checkpoint.as_mut().poll(&mut std::task::Context::from_waker(std::task::Waker::noop()));
        while io.disk().writes == before {
            assert!(poll().is_pending());
            io.complete_any();
        }
        lab.poke(Device::Meta, tag_page_1(&lab).offset, &[1; 512]);
        assert_eq!(pages(&pass_alone(&lab.volume, &lab.io), false), [(0, 1)]);
        while poll().is_pending() {
            if io.in_flight() > 0 {
                io.complete_any();
            }
        }
    }
    let parent = *lab.superblock().pages(&lab.disk()).iter().find(|page| page.level == 1).unwrap();
    (lab, parent)
}

/// A checkpoint that is to write a page for the sake of what has rotted can't: nothing is worse for it.
fn nothing_is_worse(mut lab: Lab, is_well_again: impl FnOnce(&Lab)) {
    lab.checkpoint();
    assert_eq!(lab.volume.latched(), None);
    assert_eq!(lab.volume.status().counters.pages_lost, 0);
    is_well_again(&lab);
    assert!((3..23).all(|block| lab.reads_as(block, 1)));
    assert!(lab.read(130).is_err(), "as before");
    assert_eq!(pages(&pass(&lab.volume, &lab.io), true), [(0, 1)], "found once more");
    lab.checkpoint();
    assert!((130..134).all(|block| lab.reads_as(block, 2)));
    assert!(pass(&lab.volume, &lab.io).bad_metadata.is_empty());
}

#[test]
fn a_page_that_nobody_has_changed_is_neither_lost_nor_a_failure() {
    let (lab, parent) = waits_below_a_new_page();
    lab.disk().bad_ranges.push(BadRange::unreadable(Device::Meta, parent.offset..parent.offset + 4096));
    nothing_is_worse(lab, |lab| lab.disk().bad_ranges.clear());
    let (lab, parent) = waits_below_a_new_page();
    let bytes = lab.peek(Device::Meta, parent.offset, 512);
    lab.poke(Device::Meta, parent.offset, &[0xee; 512]);
    nothing_is_worse(lab, |lab| lab.poke(Device::Meta, parent.offset, &bytes));
    let (lab, _) = waits_below_a_new_page();
    let other = tag_page_1(&lab);
    let slot = lab.superblock().slot_offset(0, 1, other.slot ^ 1);
    lab.disk().bad_ranges.push(BadRange::unwritable(Device::Meta, slot..slot + 4096, Errno::EIO));
    nothing_is_worse(lab, |lab| lab.disk().bad_ranges.clear());
}

/// A pass finds tag page 1 while a checkpoint writes what `change` has changed, and waits for the next, before
/// which `meanwhile` comes to the medium and `again` to the volume. Returns what has become of the page.
fn found_beside_a_checkpoint(
    cache: u64,
    change: impl AsyncFn(&Volume, &SimStorage, &mut RequestContext),
    meanwhile: impl FnOnce(&SimStorage),
    again: impl AsyncFn(&Volume, &SimStorage, &mut RequestContext),
) -> (ScrubReport, Lab) {
    let mut lab = lab(cache);
    lab.checkpoint();
    assert!(lab.reads_as(130, 2));
    let (io, page) = (lab.io.clone(), tag_page_1(&lab));
    let control = ScrubControl::new(Scrub::default(), None);
    {
        let Lab { volume, context, .. } = &mut lab;
        block_on(&io, change(volume, &io, context));
        let before = io.disk().writes;
        let mut checkpoint = Box::pin(volume.checkpoint(&io));
        let mut poll = || checkpoint.as_mut().poll(&mut std::task::Context::from_waker(std::task::Waker::noop()));
        while io.disk().writes == before {
            assert!(poll().is_pending());
            io.complete_any();
        }
        io.disk().poke(Device::Meta, page.offset, &[1; 512]);
        let stands = polled(volume.scrub(&io, &control, |_| {}), &io, 200).expect("it waits for a checkpoint");
        assert_eq!(control.report().waiting_metadata, 1, "{:?}", control.report());
        while poll().is_pending() {
            if io.in_flight() > 0 {
                io.complete_any();
            }
        }
        drop(checkpoint);
        meanwhile(&io);
        block_on(&io, again(volume, &io, context));
        block_on(&io, volume.checkpoint(&io)).unwrap();
        block_on(&io, stands);
    }
    (control.report(), lab)
}

#[test]
fn a_page_below_what_is_zeroed_meanwhile_needs_no_mending() {
    let zeroed = async |volume: &Volume, io: &SimStorage, context: &mut RequestContext| {
        volume.zero(io, context, BlockRange::new(BlockIndex(0), volume.blocks()), true).await.unwrap();
    };
    let (report, _) = found_beside_a_checkpoint(1 << 20, zeroed, |_| {}, async |_, _, _| {});
    assert!(report.is_clean() && report.bad_metadata.len() == 1, "{report:?}");
}

#[test]
fn a_page_below_one_that_is_lost_is_not_mended() {
    let written = async |volume: &Volume, io: &SimStorage, context: &mut RequestContext| {
        let (one, buf) = (BlockRange::new(BlockIndex(30), 1), Buf::new(4096));
        volume.write(io, context, one, buf, Durability::Durable).await.0.unwrap();
    };
    let rots = |io: &SimStorage| {
        let superblock = Superblock::newest(&io.disk());
        let parent = *superblock.pages(&io.disk()).iter().find(|page| page.level == 1).unwrap();
        io.disk().poke(Device::Meta, parent.offset, &[0xee; 512]);
    };
    let (report, lab) = found_beside_a_checkpoint(0, written, rots, written);
    assert_eq!(lab.volume.status().counters.pages_lost, 1, "the parent");
    assert_eq!(pages(&report, false), [(0, 1)]);
}

#[test]
fn a_page_waits_with_those_above_it() {
    let mut lab = lab(0);
    lab.poke(Device::Meta, tag_page_1(&lab).offset, &[1; 512]);
    assert_eq!(pages(&pass_alone(&lab.volume, &lab.io), false), [(0, 1)]);
    let parent = *lab.superblock().pages(&lab.disk()).iter().find(|page| page.level == 1).unwrap();
    lab.poke(Device::Meta, parent.offset, &[0xee; 4096]);
    is_whole(&mut lab);
}

/// A pass to its end, beside checkpoints, and whether it came there.
fn goes_on(volume: &Volume, io: &SimStorage, control: &ScrubControl, pass: impl Future<Output = ()>) -> ScrubReport {
    let checkpoints = async {
        while control.state() == ScrubState::Running {
            io.sleep(Duration::from_secs(1)).await.unwrap();
            volume.checkpoint(io).await.unwrap();
        }
    };
    block_on(io, join(pass, checkpoints));
    control.report()
}

#[test]
fn a_tag_page_that_has_rotted_is_found_wherever_a_checkpoint_comes_between() {
    for (steps, cache) in (0..60).flat_map(|steps| [(steps, 0), (steps, 1 << 20)]) {
        let mut lab = lab(cache);
        lab.checkpoint();
        assert!(lab.reads_as(130, 2));
        lab.poke(Device::Meta, tag_page_1(&lab).offset, &[1; 512]);
        let Lab { io, volume, context, .. } = &mut lab;
        let control = ScrubControl::new(Scrub::default(), None);
        let Some(stands) = polled(volume.scrub(io, &control, |_| {}), io, steps) else { break };
        let (one, buf) = (BlockRange::new(BlockIndex(3), 1), Buf::new(4096));
        block_on(io, async { volume.write(io, context, one, buf, Durability::Durable).await.0.unwrap() });
        block_on(io, volume.checkpoint(io)).unwrap();
        let report = goes_on(volume, io, &control, stands);
        assert_eq!(pages(&report, true), [(0, 1)], "{steps} {cache}: {report:?}");
        assert!(report.is_clean(), "{steps} {cache}: {report:?}");
    }
}

#[test]
fn a_page_that_can_not_be_read_for_a_moment_is_not_bad() {
    let mut failed = 0;
    for (level, steps) in [0, 1].into_iter().flat_map(|level| (0..40).map(move |steps| (level, steps))) {
        let lab = lab(0);
        lab.checkpoint();
        let page = *lab.superblock().pages(&lab.disk()).iter().find(|page| page.level == level).unwrap();
        lab.disk().bad_ranges.push(BadRange::unreadable(Device::Meta, page.offset..page.offset + 4096));
        let Lab { io, volume, .. } = &lab;
        let (begun, control) = (io.disk().now(), ScrubControl::new(Scrub::default(), None));
        let Some(stands) = polled(volume.scrub(io, &control, |_| {}), io, steps) else { break };
        // Another path is there by now.
        if io.disk().now() - begun > Duration::from_millis(150) {
            failed += 1;
            continue;
        }
        io.disk().bad_ranges.clear();
        let report = goes_on(volume, io, &control, stands);
        assert!(report.is_clean() && report.bad_metadata.is_empty(), "{level} {steps}: {report:?}");
    }
    assert!(failed > 0, "it is asked again too soon");
}

#[test]
fn more_pages_than_a_checkpoint_takes_are_mended_one_after_the_other() {
    for failing in [false, true] {
        let format = FormatOptions { size: Some(64 << 20), ..format_options(4096) };
        let options = OpenOptions { cache_bytes: 0, ..open_options(&mut Rng::new(1)) };
        let mut lab = Lab::new(&format, &options);
        (0..128).for_each(|page| lab.write(page * 128, 1, 1));
        lab.checkpoint();
        let superblock = lab.superblock();
        let all: Vec<_> = superblock.pages(&lab.disk()).iter().filter(|page| page.level == 0).copied().collect();
        for page in &all {
            lab.poke(Device::Meta, page.offset, &[1; 512]);
            // The first of them have no other place.
            if failing && page.index < 64 {
                let slot = superblock.slot_offset(0, page.index, page.slot ^ 1);
                lab.disk().bad_ranges.push(BadRange::unwritable(Device::Meta, slot..slot + 4096, Errno::EIO));
            }
        }
        let report = pass(&lab.volume, &lab.io);
        let unmended = if failing { 64 } else { 0 };
        assert_eq!((report.mended_metadata, report.unmended_metadata), (128 - unmended, unmended));
        assert_eq!((all.len(), report.verified_blocks, report.bad_blocks), (128, 128, 0));
    }
}

#[test]
fn what_nothing_proves_stays_bad_and_is_no_worse_for_it() {
    let mut lab = lab(0);
    let (page, at) = (tag_page_1(&lab), lab.block_offset(131));
    let (tags, block) = (lab.peek(Device::Meta, page.offset, 512), lab.peek(Device::Data, at, 4096));
    lab.poke(Device::Meta, page.offset, &[0xee; 512]);
    lab.poke(Device::Data, at, b"rot");
    let report = pass(&lab.volume, &lab.io);
    assert_eq!(pages(&report, false), [(0, 1)]);
    let name = PageName { level: 0, index: 1 };
    assert!(report.bad_runs.iter().all(|run| run.reason == BadReason::BadPage { page: name }));
    // What is pending needs no page.
    assert_eq!(bad_blocks(&report), (128..256).filter(|block| *block != 200).collect());
    assert_eq!((report.verified_blocks, report.is_clean()), (21, false));
    // Nothing was made of it: back on the medium it is good.
    lab.poke(Device::Meta, page.offset, &tags);
    lab.poke(Device::Data, at, &block);
    is_whole(&mut lab);
}

#[test]
fn a_tree_page_that_has_rotted_takes_all_below_it() {
    let lab = lab(0);
    let page = *lab.superblock().pages(&lab.disk()).iter().find(|page| page.level == 1).unwrap();
    lab.poke(Device::Meta, page.offset, b"rot");
    let report = pass(&lab.volume, &lab.io);
    let name = PageName { level: 1, index: 0 };
    assert_eq!(pages(&report, false), [(1, 0)]);
    assert_eq!(bad_blocks(&report), (0..256).filter(|block| *block != 200).collect());
    assert!(report.bad_runs.iter().all(|run| run.reason == BadReason::BadPage { page: name }));
}

#[test]
fn superblock_copies_identity_block_and_log_are_mended() {
    let format = FormatOptions { separate_meta: true, ..format_options(4096) };
    let options = OpenOptions { separate_meta: true, ..open_options(&mut Rng::new(1)) };
    // Of the identity block what its checksum covers, and its MAC.
    for (copy, rots_at) in [(0, 20), (1 << 19, 500)] {
        let mut lab = Lab::new(&format, &options);
        lab.write(3, 1, 1);
        assert!(pass(&lab.volume, &lab.io).bad_metadata.is_empty());
        let identity = lab.peek(Device::Data, 0, 512);
        lab.poke(Device::Meta, copy + 80, b"rot");
        lab.poke(Device::Data, rots_at, b"rot");
        let log = lab.records()[0].offset;
        lab.disk().bad_ranges.push(BadRange::unreadable(Device::Meta, log..log + 512));
        let report = pass(&lab.volume, &lab.io);
        let parts: Vec<_> = report.bad_metadata.iter().map(|bad| bad.part).collect();
        assert_eq!(parts[..2], [MetadataPart::Superblock { offset: ByteOffset(copy) }, MetadataPart::Identity]);
        assert!(matches!(parts[2..], [MetadataPart::Log { .. }]), "{parts:?}");
        assert!(report.is_clean() && report.mended_metadata == 3, "{report:?}");
        assert_eq!(lab.peek(Device::Data, 0, 512), identity);
        // Also where nothing is written meanwhile.
        lab.checkpoint();
        assert!(pass(&lab.volume, &lab.io).bad_metadata.is_empty());
        lab.poke(Device::Meta, copy + 80, b"rot");
        assert_eq!(pass(&lab.volume, &lab.io).mended_metadata, 1);
        lab.checkpoint();
        assert!(pass(&lab.volume, &lab.io).bad_metadata.is_empty());
    }
}

#[test]
fn the_identity_block_is_not_written_over_for_a_read_that_fails_once() {
    let format = FormatOptions { separate_meta: true, ..format_options(4096) };
    let options = OpenOptions { separate_meta: true, ..open_options(&mut Rng::new(1)) };
    let mut failed = 0;
    for fails_until in 1..6 {
        let lab = Lab::new(&format, &options);
        lab.disk().bad_ranges.push(BadRange::unreadable(Device::Data, 0..4096));
        lab.disk().trace = Some(Vec::new());
        let control = ScrubControl::new(Scrub::default(), None);
        let stands = polled(lab.volume.scrub(&lab.io, &control, |_| {}), &lab.io, fails_until).expect("it goes on");
        lab.disk().bad_ranges.clear();
        block_on(&lab.io, stands);
        let trace = lab.disk().trace.take().unwrap();
        let identity = |event: &Trace| matches!(event, Trace::Read { device: Device::Data, offset: 0, .. });
        failed += trace.iter().filter(|(_, event)| identity(event)).count() - 1;
        assert!(!trace.iter().any(|(_, event)| matches!(event, Trace::WriteStart { .. })));
        assert!(control.report().is_clean(), "{:?}", control.report());
    }
    assert!(failed > 0, "none has failed");
}

#[test]
fn nothing_is_mended_where_nothing_may_be_written() {
    let lab = lab(1 << 20);
    lab.checkpoint();
    let (superblock, page) = (lab.peek(Device::Meta, 0, 512), tag_page_1(&lab));
    let io = lab.io.clone();
    let options = OpenOptions { access: Access::ReadOnly, ..lab.options.clone() };
    drop(lab);
    io.disk().poke(Device::Meta, 80, b"rot");
    io.disk().poke(Device::Meta, page.offset, b"rot");
    let (volume, writes) = (reopen(&io, &options).unwrap(), io.disk().writes);
    let report = pass(&volume, &io);
    assert_eq!((report.bad_pieces(), report.mended_metadata, io.disk().writes), (2, 0, writes));
    assert_ne!(io.disk().peek(Device::Meta, 0, 512), superblock);
    // It is known what the page is, so nothing is wrong with its blocks.
    assert_eq!((bad_blocks(&report), report.verified_blocks), ([].into(), 25));
}

#[test]
fn a_copy_that_a_crash_has_left_older_is_no_damage() {
    for (copy, checkpoints, is_damage) in [(1 << 19, 1, false), (1 << 19, 2, true), (0, 1, true)] {
        let mut lab = lab(0);
        lab.checkpoint();
        let before = lab.peek(Device::Meta, copy, 4096);
        for version in 0..checkpoints {
            lab.write(3, 1, version);
            lab.checkpoint();
        }
        lab.poke(Device::Meta, copy, &before);
        let io = lab.io.clone();
        let options = OpenOptions { access: Access::ReadOnly, ..lab.options.clone() };
        drop(lab);
        let report = pass(&reopen(&io, &options).unwrap(), &io);
        assert_eq!(!report.is_clean(), is_damage, "{copy} {checkpoints}: {report:?}");
    }
}

#[test]
fn what_holds_nothing_takes_no_time() {
    let format = FormatOptions { size: Some(1 << 40), ..format_options(4096) };
    let mut lab = Lab::new(&format, &open_options(&mut Rng::new(1)));
    let blocks = lab.volume.blocks();
    for block in [0, blocks / 3, blocks - 1] {
        lab.write(block, 1, 1);
    }
    lab.checkpoint();
    for block in [blocks / 2, blocks - 2] {
        lab.write(block, 1, 2);
    }
    let reads = lab.traced(|lab| assert_eq!(pass(&lab.volume, &lab.io).verified_blocks, 5)).len();
    assert!(reads < 100, "{reads}");
}

#[test]
fn a_rate_is_kept() {
    let format = FormatOptions { size: Some(8 << 20), ..format_options(4096) };
    let mut lab = Lab::new(&format, &open_options(&mut Rng::new(1)));
    for first in (0..2048).step_by(16) {
        lab.write(first, 16, 1);
    }
    for are_rotten in [false, true] {
        // What is read once more, alone, counts as well.
        if are_rotten {
            (0..2048).for_each(|block| lab.poke(Device::Data, lab.block_offset(block), b"rot"));
        }
        let control = ScrubControl::new(Scrub::default(), NonZeroU64::new(256 << 10));
        let begun = lab.disk().now();
        block_on(&lab.io, lab.volume.scrub(&lab.io, &control, |_| {}));
        assert_eq!(control.report().verified_blocks, if are_rotten { 0 } else { 2048 });
        let (took, least) = (lab.disk().now() - begun, if are_rotten { 56 } else { 24 });
        assert!(took >= Duration::from_secs(least), "{took:?}, the last 2 MiB at any time");
    }
}

/// Polls a pass by hand until it has come so far, or to its end.
fn polled<'a>(
    pass: impl Future<Output = ()> + 'a,
    io: &'a SimStorage,
    steps: u64,
) -> Option<std::pin::Pin<Box<dyn Future<Output = ()> + 'a>>> {
    let mut pass: std::pin::Pin<Box<dyn Future<Output = ()> + 'a>> = Box::pin(pass);
    for _ in 0..steps {
        if pass.as_mut().poll(&mut std::task::Context::from_waker(std::task::Waker::noop())).is_ready() {
            return None;
        }
        if io.in_flight() > 0 {
            io.complete_any();
        }
    }
    Some(pass)
}

#[test]
fn a_pass_that_goes_on_no_more_holds_up_nobody() {
    for (steps, paused) in (0..60).flat_map(|steps| [(steps, false), (steps, true)]) {
        let mut lab = lab(0);
        lab.poke(Device::Data, lab.block_offset(5), b"rot");
        let Lab { io, volume, context, .. } = &mut lab;
        let control = ScrubControl::new(Scrub::default(), None);
        let Some(stands) = polled(volume.scrub(io, &control, |_| {}), io, steps) else { break };
        assert!(!paused || control.pause());
        let buf = Buf::new(128 << 10);
        let all = async {
            let mut buf = buf;
            for first in (0..volume.blocks()).step_by(32) {
                let written;
                let range = BlockRange::new(BlockIndex(first), 32);
                (written, buf) = volume.write(io, context, range, buf, Durability::Durable).await;
                written.unwrap();
            }
            volume.zero(io, context, BlockRange::new(BlockIndex(0), volume.blocks()), true).await.unwrap();
        };
        block_on(io, with_checkpoints(volume, io, all));
        block_on(io, volume.checkpoint(io)).unwrap();
        assert!(!paused || control.resume());
        block_on(io, stands);
        let report = control.report();
        assert_eq!(report.state, ScrubState::Ended);
        assert!(bad_blocks(&report).is_subset(&[5].into()) && report.unsettled_blocks == 0, "{report:?}");
    }
}

#[test]
fn a_stopped_pass_ends_wherever_it_is() {
    for (steps, paused) in (0..40).flat_map(|steps| [(steps, false), (steps, true)]) {
        let lab = lab(0);
        let control = ScrubControl::new(Scrub::default(), NonZeroU64::new(1));
        let Some(stands) = polled(lab.volume.scrub(&lab.io, &control, |_| {}), &lab.io, steps) else { break };
        assert!(!paused || control.pause());
        assert!(control.stop());
        block_on(&lab.io, stands);
        assert_eq!(control.state(), ScrubState::Stopped);
    }
}

#[test]
fn a_disk_that_is_slow_to_fail_keeps_no_pass_from_ending() {
    let turns: [fn(&ScrubControl); 3] = [|c| assert!(c.stop()), |c| c.leave(), |c| assert!(c.pause())];
    for (nth, turn) in turns.iter().enumerate() {
        let lab = lab(0);
        let all = lab.block_offset(0)..lab.block_offset(256);
        lab.disk().bad_ranges.push(BadRange::unreadable(Device::Data, all));
        let control = ScrubControl::new(Scrub::default(), None);
        let mut pass = pin!(lab.volume.scrub(&lab.io, &control, |_| {}));
        let mut poll = || pass.as_mut().poll(&mut std::task::Context::from_waker(std::task::Waker::noop()));
        while control.report().unreadable_blocks == 0 {
            assert!(poll().is_pending());
            lab.io.complete_any();
        }
        turn(&control);
        lab.disk().trace = Some(Vec::new());
        let mut ended = false;
        for _ in 0..50 {
            ended = ended || poll().is_ready();
            if lab.io.in_flight() > 0 {
                lab.io.complete_any();
            }
        }
        let reads = lab.disk().trace.take().unwrap().len();
        assert!(reads <= 1 && ended == (nth < 2), "{nth}: {reads} reads more");
        // What it has not looked at is still to come.
        let saved = control.in_superblock();
        let state = [ScrubState::Stopped, ScrubState::Running, ScrubState::Paused][nth];
        assert_eq!((saved.state, saved.cursor), (state, 0));
    }
}

#[test]
fn a_pass_that_is_paused_before_it_begins_does_nothing() {
    let format = FormatOptions { separate_meta: true, ..format_options(4096) };
    let options = OpenOptions { separate_meta: true, ..open_options(&mut Rng::new(1)) };
    let mut lab = Lab::new(&format, &options);
    lab.poke(Device::Data, 20, b"rot");
    let control = ScrubControl::new(Scrub { state: ScrubState::Paused, ..Scrub::default() }, None);
    let trace = lab.traced(|lab| assert!(polled(lab.volume.scrub(&lab.io, &control, |_| {}), &lab.io, 20).is_some()));
    assert!(trace.is_empty(), "{trace:?}");
}

#[test]
fn a_pass_that_goes_on_comes_back_to_what_was_being_written() {
    let mut options = open_options(&mut Rng::new(1));
    (options.sync_log, options.write_back_slots) = (true, 4);
    let format = FormatOptions { log_size: Some(512 << 10), ..format_options(4096) };
    let mut lab = Lab::new(&format, &options);
    lab.write(3, 20, 1);
    lab.write(130, 4, 2);
    lab.checkpoint();
    lab.poke(Device::Data, lab.block_offset(5), b"rot");
    let control = ScrubControl::new(Scrub::default(), None);
    let saved = {
        let Lab { io, volume, context, .. } = &mut lab;
        // Somebody is about to write it, all the while.
        let one = BlockRange::new(BlockIndex(5), 1);
        let _admitted = volume.admit(context, one, Durability::MayBeLost).expect("there are slots");
        let mut pass = pin!(volume.scrub(io, &control, |_| {}));
        let mut poll = || pass.as_mut().poll(&mut std::task::Context::from_waker(std::task::Waker::noop()));
        while control.report().cursor < volume.blocks() {
            assert!(poll().is_pending());
            io.complete_any();
        }
        control.in_superblock()
    };
    assert_eq!((saved.state, saved.cursor), (ScrubState::Running, 5));
    let lab = lab.reopened().unwrap();
    let control = ScrubControl::new(saved, None);
    block_on(&lab.io, lab.volume.scrub(&lab.io, &control, |_| {}));
    assert_eq!((bad_blocks(&control.report()), control.report().held_at), ([5].into(), None));
    assert_eq!(control.in_superblock().cursor, lab.volume.blocks());
}

#[test]
fn a_pass_goes_on_where_the_superblock_says() {
    let format = FormatOptions { label: "old".parse().unwrap(), ..format_options(4096) };
    let mut lab = Lab::new(&format, &open_options(&mut Rng::new(1)));
    (3..203).step_by(20).for_each(|first| lab.write(first, 20, 1));
    for block in [5, 140] {
        lab.poke(Device::Data, lab.block_offset(block), b"rot");
    }
    // One that has come half the way, and is paused there.
    let begun = Scrub { pass: 7, begun_seconds: 1000, cursor: 128, bad_blocks: 1, ..Scrub::default() };
    let control = ScrubControl::new(begun, None);
    assert!(control.pause());
    let Lab { io, volume, .. } = &mut lab;
    let stands = polled(volume.scrub(io, &control, |_| {}), io, 100).expect("it is paused");
    assert_eq!(volume.last_scrub(), Some(Scrub::default()));
    // An epoch that changes nothing but that is checkpointed, too; and only once.
    let epoch = |lab: &Lab| lab.superblock().epoch;
    drop(stands);
    lab.checkpoint();
    lab.checkpoint();
    let before = epoch(&lab);
    lab.checkpoint();
    assert_eq!(epoch(&lab), before);
    let paused = Scrub { state: ScrubState::Paused, ..begun };
    assert_eq!(lab.volume.last_scrub(), Some(paused));
    let lab = lab.reopened().unwrap();
    assert_eq!(lab.volume.last_scrub(), Some(paused));
    let control = ScrubControl::new(paused, None);
    assert_eq!(control.state(), ScrubState::Paused);
    assert!(control.resume());
    block_on(&lab.io, lab.volume.scrub(&lab.io, &control, |_| {}));
    let report = control.report();
    assert_eq!((bad_blocks(&report), report.bad_blocks, report.resumed_at), ([140].into(), 2, 128));
    control.ended_at(2000);
    lab.volume.note_scrub(control.in_superblock());
    // An orderly end says it, too.
    block_on(&lab.io, lab.volume.close(&lab.io)).unwrap();
    let lab = lab.reopened().unwrap();
    let ended = Scrub { state: ScrubState::Ended, cursor: 256, bad_blocks: 2, ended_seconds: 2000, ..begun };
    assert_eq!(lab.volume.last_scrub(), Some(ended));
    assert_eq!(lab.volume.recovery().records, 0);
}

#[test]
fn a_volume_of_version_1_stays_one() {
    let lab = lab(0);
    assert!(pass(&lab.volume, &lab.io).is_clean());
    lab.checkpoint();
    assert_eq!(lab.volume.last_scrub(), None);
    // With a sync log it is of version 2 while it is open: it says how far the pass was, but not for good.
    let format = FormatOptions { log_size: Some(512 << 10), ..format_options(4096) };
    let lab = Lab::new(&format, &OpenOptions { sync_log: true, ..open_options(&mut Rng::new(1)) });
    let version = |lab: &Lab| lab.peek(Device::Meta, 8, 1)[0];
    assert!(pass(&lab.volume, &lab.io).is_clean() && version(&lab) == 2);
    lab.checkpoint();
    assert_eq!(lab.volume.last_scrub().map(|scrub| scrub.state), Some(ScrubState::Ended));
    block_on(&lab.io, lab.volume.close(&lab.io)).unwrap();
    assert_eq!(version(&lab), 1);
}

/// A load of writes, zeros, flushes and checkpoints, beside which blocks rot.
struct Load {
    io: SimStorage,
    volume: Volume,
    rng: RefCell<Rng>,
    /// Blocks in play, and how large a request is.
    play: u64,
    most: u64,
    version: Cell<u64>,
    /// By block: requests under way that may change it.
    claims: RefCell<BTreeMap<u64, u32>>,
    /// Blocks that hold data, unless a request is under way.
    written: RefCell<BTreeSet<u64>>,
    /// Blocks that have rotted and have not been written since.
    rotten: RefCell<BTreeSet<u64>>,
    /// Those of them that had when the pass began.
    rotten_at_start: RefCell<BTreeSet<u64>>,
    /// Those that were rotten at some moment of the pass, and those that somebody was to change in it.
    were_rotten: RefCell<BTreeSet<u64>>,
    were_claimed: RefCell<BTreeSet<u64>>,
    ever_rotten: RefCell<BTreeSet<u64>>,
}

impl Load {
    fn new(io: SimStorage, volume: Volume, mut rng: Rng) -> Self {
        let play = [1, 3, 40, 300][rng.index(4)].min(volume.blocks());
        let most = (1 + rng.below(16)).min((MAX_REQUEST / volume.block_size()) as u64);
        Self {
            io,
            volume,
            rng: RefCell::new(rng),
            play,
            most,
            version: Cell::new(0),
            claims: RefCell::default(),
            written: RefCell::default(),
            rotten: RefCell::default(),
            rotten_at_start: RefCell::default(),
            were_rotten: RefCell::default(),
            were_claimed: RefCell::default(),
            ever_rotten: RefCell::default(),
        }
    }

    fn below(&self, n: u64) -> u64 {
        self.rng.borrow_mut().below(n)
    }

    /// A request that changes a range takes it.
    fn claim(&self, range: BlockRange, zero: bool) {
        for block in range.blocks() {
            *self.claims.borrow_mut().entry(block.0).or_default() += 1;
            self.were_claimed.borrow_mut().insert(block.0);
            self.rotten.borrow_mut().remove(&block.0);
            self.rotten_at_start.borrow_mut().remove(&block.0);
            let mut written = self.written.borrow_mut();
            if zero {
                written.remove(&block.0)
            } else {
                written.insert(block.0)
            };
        }
    }

    fn release(&self, range: BlockRange) {
        range.blocks().for_each(|block| *self.claims.borrow_mut().get_mut(&block.0).unwrap() -= 1);
    }

    async fn request(&self, context: &mut RequestContext, mut buf: Buf) -> Buf {
        let first = self.below(self.play);
        let count = (1 + self.below(self.most)).min(self.volume.blocks() - first);
        let range = BlockRange::new(BlockIndex(first), count);
        match self.below(20) {
            0..15 => {
                self.version.set(self.version.get() + 1);
                fill_all(range, self.version.get(), self.volume.block_size(), &mut buf);
                let durability = if self.below(4) == 0 { Durability::Durable } else { Durability::MayBeLost };
                let admitted = if self.below(2) == 0 { self.volume.admit(context, range, durability) } else { None };
                self.claim(range, false);
                let (result, back) = match admitted {
                    Some(admitted) => self.volume.write_back(&self.io, context, admitted, buf, || {}).await,
                    None => self.volume.write(&self.io, context, range, buf, durability).await,
                };
                result.unwrap();
                self.release(range);
                back
            }
            15..17 => {
                self.claim(range, true);
                self.volume.zero(&self.io, context, range, self.below(2) == 0).await.unwrap();
                self.release(range);
                buf
            }
            _ => {
                self.volume.flush(&self.io, context).await.unwrap();
                buf
            }
        }
    }

    async fn checkpoints(&self) {
        loop {
            let work = {
                let (mut wanted, mut sleep) =
                    (pin!(self.volume.work_wanted()), pin!(self.io.sleep(Duration::from_millis(5))));
                poll_fn(|cx| match wanted.as_mut().poll(cx) {
                    Poll::Ready(work) => Poll::Ready(Some(work)),
                    Poll::Pending => sleep.as_mut().poll(cx).map(|_| None),
                })
                .await
            };
            match work {
                Some(work) => self.volume.work(&self.io, work).await.unwrap(),
                None => self.volume.checkpoint(&self.io).await.unwrap(),
            }
        }
    }

    /// Garbage on a block that holds data and that nobody is about to write.
    fn rot(&self) {
        let block = self.below(self.play + self.most).min(self.volume.blocks() - 1);
        let is_claimed = self.claims.borrow().get(&block).is_some_and(|claims| *claims > 0);
        if is_claimed || !self.written.borrow().contains(&block) || !self.rotten.borrow_mut().insert(block) {
            return;
        }
        self.were_rotten.borrow_mut().insert(block);
        self.ever_rotten.borrow_mut().insert(block);
        let info = self.volume.info();
        let at = info.data_device_bytes - info.size + block * self.volume.block_size() as u64;
        let garbage = vec![self.below(255) as u8 + 1; self.volume.block_size()];
        self.io.disk().poke(Device::Data, at, &garbage);
    }
}

const QUEUES: usize = 4;

/// One seed: a pass beside a load, while blocks rot. Returns whether it ended before the power failed, and how
/// many bad blocks it found.
fn beside_a_load(seed: u64, cut: bool) -> (bool, u64) {
    elsewhere::crash();
    let mut rng = Rng::new(seed);
    let mut format = format_options(512 << rng.below(4));
    format.tag = tag_algorithm(seed);
    format.separate_meta = rng.chance(30);
    let sync_log = rng.chance(60);
    if sync_log {
        format.log_size = Some(512 << 10);
    }
    let io = formatted(&format, seed);
    let info = ublk_integrity::create::plan(&format).unwrap();
    io.disk().set_data_from(info.data_device_bytes - info.size);
    let mut options = open_options(&mut rng);
    options.separate_meta = format.separate_meta;
    options.cache_bytes = [0, 4096, 1 << 20][rng.index(3)];
    (options.sync_log, options.write_back_slots) = (sync_log, [0, 4, 8][rng.index(3)]);
    let volume = reopen(&io, &options).unwrap();
    let load = Load::new(io.clone(), volume, Rng::new(rng.next()));
    let (control, rots) = (ScrubControl::new(Scrub::default(), None), rng.chance(70));
    let begins = rng.below(400);
    let cut_at = cut.then(|| begins + rng.below(600));
    let ended = {
        let mut exec = Executor::new(rng.next());
        let memory = || Some((load.volume.context(0), Buf::new(MAX_REQUEST)));
        let queues: Vec<_> = (0..QUEUES).map(|_| Rc::new(RefCell::new(memory()))).collect();
        exec.spawn(load.checkpoints());
        let mut steps = 0;
        loop {
            if steps == begins {
                *load.rotten_at_start.borrow_mut() = load.rotten.borrow().clone();
                *load.were_rotten.borrow_mut() = load.rotten.borrow().clone();
                let claims = load.claims.borrow();
                *load.were_claimed.borrow_mut() = claims.iter().filter(|(_, n)| **n > 0).map(|(b, _)| *b).collect();
                exec.spawn(load.volume.scrub(&load.io, &control, |_| {}));
            }
            if Some(steps) == cut_at || control.state() != ScrubState::Running {
                break control.state() != ScrubState::Running;
            }
            for queue in &queues {
                // Now and then a queue rests.
                let taken = if rng.chance(50) { queue.borrow_mut().take() } else { None };
                if let Some((mut context, buf)) = taken {
                    let (home, load) = (queue.clone(), &load);
                    exec.spawn(async move {
                        let buf = load.request(&mut context, buf).await;
                        *home.borrow_mut() = Some((context, buf));
                    });
                }
            }
            if rots && rng.chance(5) {
                load.rot();
            }
            assert_eq!(exec.step(&load.io), Step::Ran, "deadlock");
            steps += 1;
            assert!(steps < 200_000, "the pass does not come to its end");
        }
    };
    let report = control.report();
    let bad = bad_blocks(&report);
    let Load { volume, rotten_at_start, were_rotten, were_claimed, ever_rotten, .. } = load;
    let (were_rotten, ever_rotten) = (were_rotten.into_inner(), ever_rotten.into_inner());
    assert!(bad.is_subset(&were_rotten), "false: {:?}", bad.difference(&were_rotten));
    assert!(report.bad_metadata.is_empty() && report.unreadable_blocks == 0, "{report:?}");
    assert!(report.unsettled_blocks <= were_claimed.into_inner().len() as u64, "{report:?}");
    if ended {
        let at_start = rotten_at_start.into_inner();
        let missed: Vec<_> = at_start.difference(&bad).collect();
        assert!(
            missed.is_empty(),
            "rotten since before the pass, written by nobody, and not found: {missed:?} {report:?}"
        );
    }
    // It leaves nothing that a crash would bring to light.
    drop(volume);
    let crash = if rng.chance(50) { Disk::power_cut } else { Disk::kill };
    crash(&mut io.disk());
    options.open_id = rng.bytes();
    let volume = reopen(&io, &options).unwrap();
    let report = pass(&volume, &io);
    assert!(bad_blocks(&report).is_subset(&ever_rotten), "after a crash: {report:?}");
    assert!(report.bad_metadata.is_empty() && report.unsettled_blocks == 0, "after a crash: {report:?}");
    (ended, bad.len() as u64)
}

#[test]
fn bad_is_what_has_rotted_and_nobody_rewrote() {
    let seeds = if cfg!(debug_assertions) { 100 } else { 400 };
    let (mut ended, mut bad) = (0, 0);
    let only = std::env::var("SCRUB_SEED").ok().map(|seed| seed.parse().expect("a number"));
    for seed in only.map_or(0..seeds, |seed: u64| seed..seed + 1) {
        let run = std::panic::catch_unwind(|| beside_a_load(seed, seed % 3 == 0));
        let Ok((has_ended, found)) = run else { panic!("seed {seed}: run again with SCRUB_SEED={seed}") };
        (ended, bad) = (ended + u64::from(has_ended), bad + found);
    }
    println!("{ended} passes, {bad} bad blocks");
    assert!(only.is_some() || ended * 3 > seeds && bad > seeds / 10, "{ended} of {seeds} passes, {bad} bad blocks");
}

//! What has rotted meets checkpoints: those that come between, those that write it, and those that can't.

use super::*;

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
    let parent = page_at(&lab, 1, 0);
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
    let parent = page_at(&lab, 1, 0);
    lab.poke(Device::Meta, parent.offset, &[0xee; 4096]);
    is_whole(&mut lab);
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

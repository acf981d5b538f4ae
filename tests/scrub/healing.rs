//! Blocks are healed from a replica that their tags prove, and from no other.

use super::*;
use crate::sim::lab::content;
use ublk_integrity::{Latched, WriteError};

/// Heals one block from these bytes.
fn heal(lab: &mut Lab, block: u64, replica: &[u8]) -> Result<Healed, HealError> {
    let mut buf = Buf::new(MAX_REQUEST);
    buf[..replica.len()].copy_from_slice(replica);
    let Lab { io, volume, context, .. } = lab;
    block_on(io, with_checkpoints(volume, io, volume.heal(io, context, BlockIndex(block), buf))).0
}

fn rot(lab: &Lab, block: u64) {
    lab.poke(Device::Data, lab.block_offset(block), &[0xee; 4096]);
}

#[test]
fn a_bad_block_is_healed_and_stays_so() {
    let mut lab = lab(0);
    // One whose tag is in the tree, one whose tag is pending.
    for (block, version) in [(131, 2), (200, 3)] {
        rot(&lab, block);
        assert!(lab.read(block).is_err());
        assert_eq!(heal(&mut lab, block, &content(4096, block, version)), Ok(Healed::Healed));
        assert!(lab.reads_as(block, version));
    }
    assert_eq!(lab.volume.status().counters.healed_blocks, 2);
    assert!(pass(&lab.volume, &lab.io).is_clean());
    lab.disk().power_cut();
    let mut lab = lab.reopened().unwrap();
    assert!(lab.reads_as(131, 2) && lab.reads_as(200, 3));
    assert!(pass(&lab.volume, &lab.io).is_clean());
}

#[test]
fn nothing_is_written_but_what_the_tag_proves() {
    let mut lab = lab(0);
    lab.write(131, 1, 5);
    rot(&lab, 131);
    let was = lab.peek(Device::Data, lab.block_offset(131), 4096);
    // What it held before, another block's content, garbage.
    for replica in [content(4096, 131, 2), content(4096, 132, 5), vec![7; 4096]] {
        assert_eq!(heal(&mut lab, 131, &replica), Ok(Healed::NotInReplica));
    }
    assert_eq!(lab.peek(Device::Data, lab.block_offset(131), 4096), was);
    let writes = lab.traced(|lab| {
        assert_eq!(heal(lab, 130, &content(4096, 130, 2)), Ok(Healed::WasGood));
        assert_eq!(heal(lab, 50, &content(4096, 50, 2)), Ok(Healed::WasGood), "it reads as zeros");
    });
    assert!(writes.iter().all(|event| matches!(event, Trace::Read { .. })), "{writes:?}");
}

#[test]
fn a_block_that_can_not_be_read_is_healed_by_being_written() {
    let mut lab = lab(0);
    let at = lab.block_offset(131);
    let bad = BadRange { until_written: true, ..BadRange::unreadable(Device::Data, at..at + 512) };
    lab.disk().bad_ranges.push(bad);
    assert!(lab.read(131).is_err());
    assert_eq!(heal(&mut lab, 131, &content(4096, 131, 2)), Ok(Healed::Healed));
    assert!(lab.reads_as(131, 2));
}

#[test]
fn what_can_not_be_healed_is_said() {
    let mut lab = lab(0);
    let tag_page = tag_page_1(&lab);
    lab.poke(Device::Meta, tag_page.offset, &[0xee; 4096]);
    let lost = HealError::TagLost { block: BlockIndex(131), page: PageName { level: 0, index: 1 } };
    assert_eq!(heal(&mut lab, 131, &content(4096, 131, 2)), Err(lost));
    let mut lab = super::lab(0);
    let blocks = lab.volume.blocks();
    let outside = BlockRange::new(BlockIndex(blocks), 1);
    assert_eq!(heal(&mut lab, blocks, &[0; 4096]), Err(WriteError::BadRange(outside).into()));
    lab.options.access = Access::ReadOnly;
    let mut lab = lab.reopened().unwrap();
    assert_eq!(heal(&mut lab, 131, &content(4096, 131, 2)), Err(WriteError::ReadOnly.into()));
    lab.options.access = Access::ReadWrite;
    let mut lab = lab.reopened().unwrap();
    lab.disk().faults.meta_unwritable = true;
    lab.try_write(3, 1, 9).unwrap_err();
    rot(&lab, 131);
    let refused = heal(&mut lab, 131, &content(4096, 131, 2));
    assert!(matches!(refused, Err(HealError::Refused(WriteError::Latched(Latched::Device(_))))), "{refused:?}");
}

#[test]
fn what_is_healed_is_found_no_more() {
    let mut lab = lab(0);
    (5..9).chain([131]).for_each(|block| rot(&lab, block));
    let control = ScrubControl::new(Scrub { pass: 3, ..Scrub::default() }, None);
    block_on(&lab.io, lab.volume.scrub(&lab.io, &control, |_| {}));
    assert_eq!((bad_blocks(&control.report()), control.report().bad_blocks), (BTreeSet::from([5, 6, 7, 8, 131]), 5));
    assert_eq!(heal(&mut lab, 6, &content(4096, 6, 1)), Ok(Healed::Healed));
    assert!(
        control.is_good(BlockIndex(6), true)
            && !control.is_good(BlockIndex(6), true)
            && !control.is_good(BlockIndex(50), true)
    );
    let report = control.report();
    assert_eq!((bad_blocks(&report), report.bad_blocks, report.healed_blocks), (BTreeSet::from([5, 7, 8, 131]), 4, 1));
    assert_eq!(report.bad_runs.len(), 3);
    for block in [5, 7, 8, 131] {
        assert!(control.is_good(BlockIndex(block), true));
    }
    let report = control.report();
    assert!(report.is_clean() && report.bad_runs.is_empty() && report.healed_blocks == 5);
    assert_eq!(control.in_superblock().bad_blocks, 0);
}

#[test]
fn a_report_does_not_grow_with_what_is_healed_in_it() {
    let format = FormatOptions { size: Some(1024 * 4096), ..format_options(4096) };
    let mut lab = Lab::new(&format, &open_options(&mut Rng::new(1)));
    lab.write(0, 16, 4);
    lab.write(16, 14, 4);
    (0..1000).step_by(2).for_each(|first| {
        if first >= 30 {
            lab.write(first, 1, 4);
        }
    });
    lab.checkpoint();
    // A run of 30, and more than are listed of one.
    (0..30).chain((30..1000).step_by(2)).for_each(|block| rot(&lab, block));
    let control = ScrubControl::new(Scrub { pass: 3, ..Scrub::default() }, None);
    block_on(&lab.io, lab.volume.scrub(&lab.io, &control, |_| {}));
    let before = control.report();
    assert!(before.bad_runs.len() == 200 && before.unlisted_runs > 0, "{before:?}");
    for block in (0..30).step_by(2) {
        assert!(control.is_good(BlockIndex(block), true));
    }
    let report = control.report();
    assert_eq!((report.bad_runs.len(), report.healed_blocks), (200, 15));
    assert_eq!(report.bad_blocks, before.bad_blocks - 15);
    assert!(report.unlisted_runs > before.unlisted_runs);
}

#[test]
fn a_write_that_fails_leaves_the_volume_as_it_was() {
    let mut lab = lab(0);
    rot(&lab, 131);
    let at = lab.block_offset(131);
    lab.disk().bad_ranges.push(BadRange::unwritable(Device::Data, at..at + 512, Errno::EIO));
    let failed = heal(&mut lab, 131, &content(4096, 131, 2));
    assert!(matches!(failed, Err(HealError::Refused(WriteError::Device(_)))), "{failed:?}");
    assert_eq!(lab.volume.latched(), None);
    assert!(lab.read(131).is_err() && lab.reads_as(132, 2));
    lab.disk().bad_ranges.clear();
    // What can be written and not be read.
    lab.disk().bad_ranges.push(BadRange::unreadable(Device::Data, at..at + 512));
    let failed = heal(&mut lab, 131, &content(4096, 131, 2));
    assert!(matches!(failed, Err(HealError::StillBad(..))), "{failed:?}");
    lab.disk().bad_ranges.clear();
    assert!(lab.reads_as(131, 2));
}

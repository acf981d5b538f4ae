//! What a pass says: what has rotted, and nothing else.

use super::*;

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

#[test]
fn a_tree_page_that_has_rotted_takes_all_below_it() {
    let lab = lab(0);
    let page = page_at(&lab, 1, 0);
    lab.poke(Device::Meta, page.offset, b"rot");
    let report = pass(&lab.volume, &lab.io);
    let name = PageName { level: 1, index: 0 };
    assert_eq!(pages(&report, false), [(1, 0)]);
    assert_eq!(bad_blocks(&report), (0..256).filter(|block| *block != 200).collect());
    assert!(report.bad_runs.iter().all(|run| run.reason == BadReason::BadPage { page: name }));
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

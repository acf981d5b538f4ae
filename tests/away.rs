//! Opening on a disk that fails in many places, or takes long to fail: whether it is there at all,
//! how long an open bears with it, and what becomes of what was not read.

use crate::sick::{bad, lab, options};
use crate::sim::{
    Lab, SimStorage,
    disk::{BadRange, Faults, Trace},
    format_options,
    lab::content,
};
use std::time::Duration;
use ublk_integrity::{
    Access, Device, OpenOptions, ReadError,
    create::FormatOptions,
    open::{OpenError, UnreadLog, UnreadableBlocks},
};

#[test]
fn a_data_device_that_is_away_is_refused_soon_and_left_as_it_was() {
    let mut lab = lab();
    for first in (0..400).step_by(100) {
        lab.write(first, 100, 1);
    }
    let (io, options) = (lab.io.clone(), lab.options.clone());
    drop(lab);
    // Its identity block can be read yet.
    io.disk().faults.data_dies_after = Some(1);
    let writes = io.disk().writes;
    let before = io.disk().now();
    // To read only: nothing is synced before.
    let refused = Lab::open(io.clone(), &OpenOptions { access: Access::ReadOnly, ..options.clone() });
    assert!(matches!(&refused, Err(OpenError::Away(e)) if e.device == Device::Data));
    assert_eq!(io.disk().writes, writes);
    assert!((io.disk().now() - before).as_secs() < 10, "{:?}", io.disk().now() - before);
    io.disk().faults = Faults::default();
    let mut lab = Lab::open(io, &options).unwrap();
    assert!(lab.range_reads_as(0, 100, 1) && lab.range_reads_as(300, 100, 1));
}

/// What lies there can't be read, and each read takes so long to fail.
fn fails_after(lab: &Lab, takes: Duration, device: Device, at: u64, len: u64) {
    lab.disk().bad_ranges.push(BadRange { takes, ..bad(device, at, len) });
}

/// All blocks can't be read, and the rest of the device can: its identity block, which is read at
/// the beginning.
fn all_blocks_bad(blocks: u64, takes: Duration) -> Lab {
    let format = FormatOptions { separate_meta: true, log_size: Some(1 << 20), ..format_options(512) };
    let mut lab = Lab::new(&format, &OpenOptions { separate_meta: true, ..options() });
    for first in (0..blocks).step_by(100) {
        lab.write(first, 100, 1);
    }
    fails_after(&lab, takes, Device::Data, lab.block_offset(0), blocks * 512);
    lab
}

#[test]
fn a_device_whose_logged_blocks_are_all_bad_is_there() {
    let lab = all_blocks_bad(400, Duration::ZERO);
    let before = lab.disk().now();
    let mut lab = lab.reopened().unwrap();
    let took = lab.disk().now() - before;
    assert!(took.as_secs() < 10, "{took:?}");
    assert_eq!(lab.volume.status().undecided_blocks, 400);
    lab.disk().bad_ranges.clear();
    assert!(lab.range_reads_as(0, 100, 1) && lab.range_reads_as(300, 100, 1));
    let mut lab = lab.reopened().unwrap();
    assert!(lab.range_reads_as(0, 100, 1) && lab.volume.latched().is_none());
}

#[test]
fn where_very_much_cant_be_read_the_rest_is_not_tried_unless_it_would_be_given_up() {
    let lab = all_blocks_bad(1000, Duration::from_secs(5));
    let (io, options) = (lab.io.clone(), lab.options.clone());
    drop(lab);
    let reads = |options: &OpenOptions| {
        let copy = SimStorage::new(io.disk().fork(1));
        copy.disk().bad_ranges.clone_from(&io.disk().bad_ranges);
        copy.disk().trace = Some(Vec::new());
        Lab::open(copy.clone(), options).unwrap();
        let trace = copy.disk().trace.take().unwrap();
        let of_data = |(_, event): &&(u64, Trace)| matches!(event, Trace::Read { device: Device::Data, .. });
        trace.iter().filter(of_data).count()
    };
    assert!((80..200).contains(&reads(&options)), "{}", reads(&options));
    let all = reads(&OpenOptions { unreadable_blocks: UnreadableBlocks::TakeNewest, ..options });
    assert!(all >= 1000, "{all}");
}

/// All blocks can be read, and no tag page that some of them need.
#[test]
fn very_many_tag_pages_that_cant_be_read_have_an_end_too() {
    let format = FormatOptions { separate_meta: true, log_size: Some(1 << 20), ..format_options(512) };
    let mut lab = Lab::new(&format, &OpenOptions { separate_meta: true, ..options() });
    for (version, blocks) in [(1, 400), (2, 400)] {
        lab.checkpoint();
        (0..blocks).step_by(100).for_each(|first| lab.write(first, 100, version));
    }
    for block in 0..400 {
        lab.poke(Device::Data, lab.block_offset(block), &content(512, block, 1));
    }
    let pages = lab.superblock().pages(&lab.disk());
    for page in pages.iter().filter(|page| page.level == 0) {
        fails_after(&lab, Duration::from_secs(5), Device::Meta, page.offset, 4096);
    }
    let before = lab.disk().now();
    let mut lab = lab.reopened().unwrap();
    let took = lab.disk().now() - before;
    assert!(took.as_secs() < 600, "{took:?}");
    assert_eq!(lab.volume.status().undecided_blocks, 400);
    lab.disk().bad_ranges.clear();
    assert!(lab.range_reads_as(0, 100, 1) && lab.range_reads_as(300, 100, 1));
}

#[test]
fn a_bad_sector_that_takes_long_to_fail_is_no_device_that_is_away() {
    for (takes, count) in [(6, 1), (6, 10), (20, 1)] {
        let mut lab = lab();
        lab.write(0, 100, 1);
        fails_after(&lab, Duration::from_secs(takes), Device::Data, lab.block_offset(40), count * 512);
        let mut lab = lab.reopened().unwrap();
        assert_eq!(lab.volume.status().undecided_blocks, count, "{takes} s");
        assert!(lab.reads_as(39, 1) && lab.read(40).is_err());
    }
    // The same of the log: what lies behind its end is a warning.
    let mut lab = lab();
    lab.write(7, 1, 1);
    fails_after(&lab, Duration::from_secs(6), Device::Meta, lab.records()[0].offset + 8192, 200 * 512);
    let mut lab = lab.reopened().unwrap();
    assert!(lab.reads_as(7, 1) && lab.volume.latched().is_none());
}

#[test]
fn a_rescue_passes_over_more_bad_sectors_of_the_log_than_an_open_tries() {
    let mut lab = lab();
    lab.write(8, 1, 1);
    let first = lab.records()[0].offset;
    lab.zero(20, 1);
    lab.write(9, 100, 2);
    let last = lab.records().last().unwrap().offset;
    lab.disk().bad_ranges.push(bad(Device::Meta, first, 512));
    let behind = bad(Device::Meta, last + 8192, 300 * 512);
    lab.disk().bad_ranges.push(behind);
    lab.options = OpenOptions { access: Access::ReadOnly, unread_log: UnreadLog::FailOlder, ..lab.options };
    let mut lab = lab.reopened().unwrap();
    assert!(lab.range_reads_as(9, 100, 2));
    assert!(matches!(lab.read(8), Err(ReadError::MayBeOlder(_))));
}

/// Whether an open finds that the data device is away, and how long after its first answer.
fn away_after(mut lab: Lab, faults: Faults, takes: Duration) -> (bool, Duration) {
    lab.write(0, 10, 1);
    fails_after(&lab, takes, Device::Data, lab.block_offset(0), 10 * 512);
    lab.disk().faults = faults;
    let (io, options) = (lab.io.clone(), OpenOptions { access: Access::ReadOnly, ..lab.options.clone() });
    drop(lab);
    let before = io.disk().now();
    let opened = Lab::open(io.clone(), &options);
    (matches!(opened, Err(OpenError::Away(_))), io.disk().now() - before - takes)
}

#[test]
fn a_data_device_that_takes_long_to_fail_is_away_ten_seconds_after_its_first_error() {
    // The identity block is read, then nothing any more.
    let dies = Faults { data_dies_after: Some(1), ..Faults::default() };
    for takes in [0, 5, 100] {
        let (away, after) = away_after(lab(), dies, Duration::from_secs(takes));
        assert!(away && after.as_secs() <= 10, "{takes} s: {away}, {after:?}");
    }
}

/// A rotating disk: nothing else is answered while it tries, for 12 s and more, to read one sector.
#[test]
fn a_disk_that_is_busy_with_bad_sectors_is_not_away() {
    for takes in [12, 30, 90] {
        let busy = Faults { in_order: true, ..Faults::default() };
        let (away, _) = away_after(lab(), busy, Duration::from_secs(takes));
        assert!(!away, "{takes} s");
        // The same of the log.
        let mut lab = lab();
        lab.write(7, 1, 1);
        fails_after(&lab, Duration::from_secs(takes), Device::Meta, lab.records()[0].offset + 8192, 2 * 512);
        lab.disk().faults.in_order = true;
        let mut lab = lab.reopened().unwrap();
        assert!(lab.reads_as(7, 1) && lab.volume.latched().is_none());
    }
}

/// A volume with one record, and a metadata device whose superblock copy A takes long to fail, and a sector behind the log too.
#[test]
fn a_copy_that_takes_long_to_fail_is_not_asked_whether_the_device_is_there() {
    for (takes, in_order) in [(10, false), (30, true), (60, true)] {
        let mut lab = lab();
        lab.write(7, 1, 1);
        let behind = lab.records()[0].offset + 8192;
        for (at, len) in [(0, 4096), (behind, 512)] {
            fails_after(&lab, Duration::from_secs(takes), Device::Meta, at, len);
        }
        lab.disk().faults.in_order = in_order;
        let options = OpenOptions { access: Access::ReadOnly, ..lab.options.clone() };
        let io = lab.io.clone();
        drop(lab);
        let mut lab = Lab::open(io, &options).unwrap();
        assert!(lab.reads_as(7, 1), "{takes} s");
    }
}

/// What has been sent is waited for: the first 32 blocks, one after the other.
#[test]
fn a_disk_that_is_busy_with_a_bad_region_has_an_end() {
    for (takes, most) in [(5, 250), (30, 1100)] {
        let lab = all_blocks_bad(1000, Duration::from_secs(takes));
        lab.disk().faults.in_order = true;
        let before = lab.disk().now();
        let lab = lab.reopened().unwrap();
        let took = lab.disk().now() - before;
        assert!(took.as_secs() < most, "{takes} s: {took:?}");
        assert_eq!(lab.volume.status().undecided_blocks, 1000);
    }
}

#[test]
fn a_path_that_fails_over_in_eight_seconds_is_waited_for() {
    let mut lab = lab();
    lab.write(0, 100, 1);
    let (io, options) = (lab.io.clone(), lab.options.clone());
    drop(lab);
    io.disk().faults.data_dies_after = Some(1);
    let until = io.disk().now() + Duration::from_secs(8);
    io.disk().faults = Faults { data_dies_after: Some(1), data_dead_until: Some(until), ..Faults::default() };
    let lab = Lab::open(io, &options).unwrap();
    assert_eq!(lab.volume.status().undecided_blocks, 0);
}

#[test]
fn many_bad_sectors_cost_little_time() {
    let mut lab = lab();
    for first in (0..600).step_by(100) {
        lab.write(first, 100, 1);
    }
    // Each second one: the device is there.
    for block in (0..600).step_by(2) {
        let sector = bad(Device::Data, lab.block_offset(block), 512);
        lab.disk().bad_ranges.push(sector);
    }
    let before = lab.disk().now();
    let mut lab = lab.reopened().unwrap();
    let took = lab.disk().now() - before;
    assert!(took.as_secs() < 5, "{took:?}");
    assert_eq!((lab.volume.recovery().unreadable, lab.volume.status().undecided_blocks), (300, 300));
    assert!(lab.reads_as(1, 1) && lab.read(2).is_err());
}

/// A data device that dies after its identity block was read, with fewer blocks to give up than a
/// probe waits for.
#[test]
fn take_newest_of_a_device_that_is_away_writes_nothing() {
    let mut lab = lab();
    lab.write(8, 10, 1);
    lab.flush();
    lab.checkpoint();
    lab.write(8, 10, 2);
    for block in 8..18 {
        let at = lab.block_offset(block);
        lab.poke(Device::Data, at, &content(512, block, 1)); // version 2 never arrived
    }
    let (io, options) = (lab.io.clone(), lab.options.clone());
    drop(lab);
    io.disk().faults.data_dies_after = Some(1);
    let writes = io.disk().writes;
    let newest = OpenOptions { unreadable_blocks: UnreadableBlocks::TakeNewest, open_id: [9; 32], ..options.clone() };
    let opened = Lab::open(io.clone(), &newest);
    let (away, wrote) = (matches!(&opened, Err(OpenError::Away(_))), io.disk().writes - writes);
    drop(opened);
    io.disk().faults = Faults::default();
    let mut lab = Lab::open(io, &OpenOptions { open_id: [11; 32], ..options }).unwrap();
    let lost = (8..18).filter(|block| !lab.reads_as(*block, 1)).count();
    assert_eq!((away, wrote, lost), (true, 0, 0));
}

/// A slow bad sector behind the chain's end, in the same MiB.
#[test]
fn a_very_slow_sector_behind_the_log_is_no_reason_to_refuse_it() {
    let mut lab = lab();
    lab.write(7, 1, 1);
    fails_after(&lab, Duration::from_secs(90), Device::Meta, lab.records()[0].offset + 8192, 512);
    let mut lab = lab.reopened().unwrap();
    assert!(lab.reads_as(7, 1) && lab.volume.latched().is_none());
}

/// A slow bad sector before the live log, in the same 4 KiB: nobody needs it.
#[test]
fn a_very_slow_sector_before_the_log_is_no_reason_to_refuse_it() {
    let mut lab = lab();
    lab.write(7, 1, 1);
    lab.checkpoint();
    lab.write(8, 1, 1);
    let first = lab.records()[0].offset;
    assert_ne!(first % 4096, 0);
    fails_after(&lab, Duration::from_secs(30), Device::Meta, first - 512, 512);
    let mut lab = lab.reopened().unwrap();
    assert!(lab.reads_as(7, 1) && lab.reads_as(8, 1) && lab.volume.latched().is_none());
}

/// One in each MiB of a log of 16 MiB: what lies behind the end of the chain is looked through once, for records that a crash has
/// left.
#[test]
fn slow_sectors_all_over_the_log_hold_an_open_up_for_minutes_at_most() {
    let format = FormatOptions { separate_meta: true, log_size: Some(16 << 20), ..format_options(512) };
    let mut lab = Lab::new(&format, &OpenOptions { separate_meta: true, ..options() });
    lab.write(7, 1, 1);
    let first = lab.records()[0].offset;
    for mib in 0..16 {
        fails_after(&lab, Duration::from_secs(30), Device::Meta, first + 8192 + (mib << 20), 512);
    }
    let before = lab.disk().now();
    let mut lab = lab.reopened().unwrap();
    let took = lab.disk().now() - before;
    assert!(took.as_secs() < 240, "{took:?}");
    assert!(lab.reads_as(7, 1) && lab.volume.latched().is_none());
}

/// After a probe there are no pauses, and three tries all the same.
#[test]
fn what_fails_once_is_not_given_up() {
    let format = FormatOptions { separate_meta: true, log_size: Some(1 << 20), ..format_options(512) };
    let mut lab = Lab::new(&format, &OpenOptions { separate_meta: true, ..options() });
    for first in (0..1000).step_by(100) {
        lab.write(first, 100, 1);
    }
    lab.flush();
    lab.checkpoint();
    for first in (0..1000).step_by(100) {
        lab.write(first, 100, 2);
    }
    for block in 0..1000 {
        let at = lab.block_offset(block);
        lab.poke(Device::Data, at, &content(512, block, 1));
    }
    let io = lab.io.clone();
    let first_block = lab.block_offset(0);
    let options =
        OpenOptions { unreadable_blocks: UnreadableBlocks::TakeNewest, open_id: [9; 32], ..lab.options.clone() };
    drop(lab);
    // The first hundred are really bad: a probe, and no pause after it.
    let format_bad = bad(Device::Data, first_block, 100 * 512);
    io.disk().bad_ranges.push(format_bad);
    io.disk().faults.data_reads = 10;
    let opened = Lab::open(io.clone(), &options);
    let mut lab = opened.unwrap();
    let taken = lab.volume.recovery().unreadable;
    lab.disk().faults = Faults::default();
    lab.disk().bad_ranges.clear();
    let lost = (100..1000).filter(|block| !lab.reads_as(*block, 1)).count();
    // 10 % cubed of 1000 blocks.
    assert!(lost <= 5, "lost {lost}, unreadable {taken}");
}

/// Each block asks for the same page, which takes long to fail.
#[test]
fn a_slow_bad_tag_page_does_not_hold_up_the_open_for_each_block() {
    let format = FormatOptions { separate_meta: true, log_size: Some(1 << 20), ..format_options(512) };
    let mut lab = Lab::new(&format, &OpenOptions { separate_meta: true, ..options() });
    for version in [1, 2] {
        for first in (0..100).step_by(100) {
            lab.write(first, 100, version);
        }
        if version == 1 {
            lab.checkpoint();
        }
    }
    for block in 0..100 {
        let at = lab.block_offset(block);
        lab.poke(Device::Data, at, &content(512, block, 1));
    }
    let pages = lab.superblock().pages(&lab.disk());
    for page in pages.into_iter().filter(|p| p.level == 0) {
        fails_after(&lab, Duration::from_secs(5), Device::Meta, page.offset, 4096);
    }
    let before = lab.disk().now();
    let lab = lab.reopened().unwrap();
    let took = lab.disk().now() - before;
    assert!(took.as_secs() < 120, "{took:?} for {} undecided blocks", lab.volume.status().undecided_blocks);
}

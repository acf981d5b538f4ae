//! Opening on a sick disk: what can't be read is an error or a refusal, never something older, and no decision is made for good
//! without evidence. The random workload on sick disks is in `sim/sick.rs`.

use crate::sim::{Lab, Rng, SimStorage, block_on, disk::BadRange, format_options, lab::content, open_options};
use ublk_integrity::{
    Access, Device, Errno, Latched, OpenOptions, ReadError, WriteError,
    check::check,
    create::FormatOptions,
    open::{OpenError, UnreadLog, UnreadableBlocks},
};

fn options() -> OpenOptions {
    open_options(&mut Rng::new(3))
}

/// Data and metadata apart, so that a bad range of one says nothing of the other.
fn lab() -> Lab {
    let format = FormatOptions { separate_meta: true, ..format_options(512) };
    Lab::new(&format, &OpenOptions { separate_meta: true, ..options() })
}

fn bad(device: Device, at: u64, len: u64) -> BadRange {
    BadRange { device, range: at..at + len, reads: Some(Errno::EIO), writes: None }
}

/// Block 8 was zeros and block 20 was discarded, both flushed; the record that says so can't be read.
fn unreadable_log() -> Lab {
    let mut lab = lab();
    lab.write(20, 2, 1);
    lab.write(30, 1, 1);
    lab.checkpoint();
    lab.write(8, 1, 2);
    lab.zero(20, 1);
    lab.flush();
    let records = lab.records();
    lab.write(30, 1, 3);
    lab.disk().power_cut();
    let record = bad(Device::Meta, records[0].offset, 512);
    lab.disk().bad_ranges.push(record);
    lab
}

#[test]
fn a_log_that_cant_be_read_where_it_goes_on_is_refused() {
    let lab = unreadable_log();
    let (io, options) = (lab.io.clone(), lab.options.clone());
    drop(lab);
    let writes = io.disk().writes;
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let refused = Lab::open(io.clone(), &OpenOptions { access, open_id: [7; 32], ..options.clone() });
        assert!(matches!(refused, Err(OpenError::LogUnreadable(e)) if e.errno == Errno::EIO));
    }
    assert_eq!(io.disk().writes, writes, "nothing was written");
    // Not at the header alone: the record's middle is as good as its beginning.
    let mut lab = lab_with_long_record();
    let record = lab.records()[0].offset;
    for at in [record, record + 512, record + 1024] {
        let copy = SimStorage::new(lab.disk().fork(at));
        copy.disk().bad_ranges.push(bad(Device::Meta, at, 512));
        assert!(matches!(Lab::open(copy, &lab.options), Err(OpenError::LogUnreadable(_))), "{at}");
    }
    assert!(lab.reads_as(0, 1));
    // Readable again, everything is there.
    io.disk().bad_ranges.clear();
    let mut lab = Lab::open(io, &options).unwrap();
    assert!(lab.reads_as(8, 2) && lab.reads_as(20, 0) && lab.reads_as(21, 1) && lab.reads_as(30, 3));
}

fn lab_with_long_record() -> Lab {
    let mut lab = lab();
    lab.write(0, 40, 1);
    lab
}

#[test]
fn rescue_fails_what_may_be_older_and_serves_what_is_newest_for_sure() {
    let lab = unreadable_log();
    let (io, options) = (lab.io.clone(), lab.options.clone());
    drop(lab);
    let rescue = |unread_log| OpenOptions { access: Access::ReadOnly, unread_log, ..options.clone() };
    let mut lab = Lab::open(io.clone(), &rescue(UnreadLog::FailOlder)).unwrap();
    // Version 3 of block 30 and the zeros of block 20 were logged behind what can't be read.
    assert!(lab.reads_as(30, 3) && lab.reads_as(20, 0));
    for block in [8, 21, 100] {
        assert!(matches!(lab.read(block), Err(ReadError::MayBeOlder(_))), "{block}");
    }
    assert!(matches!(lab.volume.latched(), Some(Latched::Device(_))));
    let report = block_on(&lab.io, check(&lab.volume, &lab.io, &mut lab.slot, |_| std::ops::ControlFlow::Continue(())));
    assert_eq!(report.bad_blocks, lab.volume.blocks() - 2, "no block is passed over as zeros");
    let mut lab = Lab::open(io.clone(), &rescue(UnreadLog::ServeOlder)).unwrap();
    assert!(lab.reads_as(30, 3) && lab.reads_as(8, 0) && lab.reads_as(20, 0) && lab.reads_as(21, 1));
    let to_write = OpenOptions { unread_log: UnreadLog::ServeOlder, ..options.clone() };
    assert!(matches!(Lab::open(io.clone(), &to_write), Err(OpenError::Options(_))), "never to write");
    // With a log that can be read, rescue is an ordinary open.
    io.disk().bad_ranges.clear();
    let mut lab = Lab::open(io, &rescue(UnreadLog::FailOlder)).unwrap();
    assert!(lab.reads_as(8, 2) && lab.reads_as(20, 0) && lab.volume.latched().is_none());
}

#[test]
fn a_bad_sector_behind_the_log_is_a_warning() {
    let mut lab = lab();
    lab.write(7, 1, 1);
    let number = lab.records()[0].number;
    let behind = lab.records()[0].offset + 32768;
    lab.disk().bad_ranges.push(bad(Device::Meta, behind, 512));
    let mut lab = lab.reopened().unwrap();
    assert!(lab.reads_as(7, 1) && lab.volume.latched().is_none());
    assert!(lab.volume.warnings().iter().any(|w| w.contains("tag log")), "{:?}", lab.volume.warnings());
    // Two records may have been under way and be hidden there: their numbers are not used again.
    lab.write(8, 1, 2);
    assert_eq!(lab.records()[0].number, number + 3);
}

#[test]
fn a_read_error_that_passes_costs_nothing() {
    let mut lab = lab();
    lab.write(8, 1, 1);
    lab.flush();
    lab.checkpoint();
    let at = lab.block_offset(8);
    lab.write(8, 1, 2);
    lab.poke(Device::Data, at, &content(512, 8, 1)); // version 2 never arrived
    lab.disk().bad_ranges.push(bad(Device::Data, at, 512));
    let writes = lab.disk().writes;
    let mut lab = lab.reopened().unwrap();
    assert_eq!(lab.disk().writes, writes, "nothing is written down");
    assert_eq!(lab.volume.recovery().unreadable_blocks, [8]);
    assert!(matches!(lab.volume.latched(), Some(Latched::Undecided(block)) if block.0 == 8));
    assert_eq!(lab.try_write(9, 1, 3), Err(WriteError::ReadOnly));
    assert_eq!(lab.read(8).unwrap_err().errno(), Errno::EIO);
    assert_eq!(lab.volume.status().undecided_blocks, 1);
    let report = block_on(&lab.io, check(&lab.volume, &lab.io, &mut lab.slot, |_| std::ops::ControlFlow::Continue(())));
    assert_eq!(report.unreadable_blocks, 1);
    // The path is back: the open volume finds out by itself, and the next open takes writes again.
    lab.disk().bad_ranges.clear();
    assert!(lab.reads_as(8, 1));
    assert_eq!(lab.volume.status().undecided_blocks, 0);
    let mut lab = lab.reopened().unwrap();
    assert!(lab.reads_as(8, 1) && lab.volume.latched().is_none());
}

#[test]
fn the_newest_tag_is_taken_only_where_that_is_asked_for() {
    let mut lab = lab();
    lab.write(8, 1, 1);
    lab.checkpoint();
    lab.write(8, 1, 2);
    let at = lab.block_offset(8);
    lab.poke(Device::Data, at, &content(512, 8, 1));
    lab.disk().bad_ranges.push(bad(Device::Data, at, 512));
    lab.options.unreadable_blocks = UnreadableBlocks::TakeNewest;
    let mut lab = lab.reopened().unwrap();
    assert!(lab.volume.latched().is_none());
    lab.disk().bad_ranges.clear();
    assert!(matches!(lab.read(8), Err(ReadError::Mismatch { .. })), "version 2 was chosen, and is not there");
    lab.write(8, 1, 3);
    assert!(lab.reads_as(8, 3));
}

#[test]
fn a_page_that_would_have_decided_and_does_not_verify_leaves_the_block_undecided() {
    let mut lab = Lab::new(&format_options(512), &options());
    lab.write(7, 1, 1);
    lab.checkpoint();
    let page = lab.superblock().pages(&lab.disk()).into_iter().find(|p| p.level == 0).unwrap();
    lab.write(7, 1, 2);
    let at = lab.block_offset(7);
    lab.poke(Device::Data, at, &content(512, 7, 1));
    let good = lab.peek(Device::Meta, page.offset, 8);
    lab.poke(Device::Meta, page.offset, &[0xab; 8]);
    let writes = lab.disk().writes;
    let mut lab = lab.reopened().unwrap();
    assert_eq!(lab.disk().writes, writes, "nothing is written down");
    assert!(matches!(lab.read(7), Err(ReadError::BadPage { .. })));
    lab.poke(Device::Meta, page.offset, &good);
    assert!(lab.reads_as(7, 1));
    assert!(lab.reopened().unwrap().reads_as(7, 1));
}

#[test]
fn a_data_device_that_is_away_is_refused_soon_and_left_as_it_was() {
    let mut lab = lab();
    for first in (0..400).step_by(100) {
        lab.write(first, 100, 1);
    }
    let blocks = bad(Device::Data, lab.block_offset(0), 400 * 512);
    lab.disk().bad_ranges.push(blocks);
    let (io, options) = (lab.io.clone(), lab.options.clone());
    drop(lab);
    io.disk().trace = Some(Vec::new());
    let writes = io.disk().writes;
    let before = io.disk().now();
    let refused = Lab::open(io.clone(), &OpenOptions { open_id: [7; 32], ..options.clone() });
    assert!(matches!(refused, Err(OpenError::Away(e)) if e.device == Device::Data));
    assert_eq!(io.disk().writes, writes);
    assert!((io.disk().now() - before).as_secs() < 10, "{:?}", io.disk().now() - before);
    io.disk().bad_ranges.clear();
    let mut lab = Lab::open(io, &options).unwrap();
    assert!(lab.range_reads_as(0, 100, 1) && lab.range_reads_as(300, 100, 1));
}

#[test]
fn a_data_device_that_takes_for_ever_to_fail_is_away_after_ten_seconds() {
    let mut lab = lab();
    lab.write(0, 10, 1);
    let first = bad(Device::Data, lab.block_offset(0), 10 * 512);
    lab.disk().bad_ranges.push(first);
    // From the first error on, nothing is answered any more before somebody's patience ends.
    lab.disk().faults.slow = 100;
    assert!(matches!(lab.reopened(), Err(OpenError::Away(_))));
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

#[test]
fn another_volume_is_refused_before_anything_is_written() {
    let mut lab = lab();
    lab.write(7, 1, 1);
    let (io, options) = (lab.io.clone(), lab.options.clone());
    drop(lab);
    let writes = io.disk().writes;
    let refused = Lab::open(io.clone(), &OpenOptions { expected_uuid: Some([1; 16]), ..options.clone() });
    assert!(matches!(refused, Err(OpenError::OtherVolume { .. })));
    assert_eq!(io.disk().writes, writes);
    assert!(Lab::open(io, &OpenOptions { expected_uuid: Some([9; 16]), ..options }).is_ok());
}

#[test]
fn a_log_full_of_false_records_is_refused_before_all_are_hashed() {
    let format = FormatOptions { log_size: Some(1 << 20), size: Some(4 << 20), ..format_options(512) };
    let mut lab = Lab::new(&format, &options());
    lab.write(7, 1, 1);
    let offset = lab.records()[0].offset;
    let mut head = lab.peek(Device::Meta, offset, 72);
    // A number far ahead, and the size of the largest record.
    head[16..24].copy_from_slice(&(1u64 << 62).to_le_bytes());
    head[32..36].copy_from_slice(&(60u32 << 10).to_le_bytes());
    for at in (8192..1 << 20).step_by(512) {
        lab.poke(Device::Meta, crate::sim::image::LOG_OFFSET + at, &head);
    }
    assert!(matches!(lab.reopened(), Err(OpenError::Tampered { .. })));
}

#[test]
fn the_log_of_a_volume_that_was_formatted_over_is_no_obstacle() {
    let format = FormatOptions { log_size: Some(256 << 10), ..format_options(512) };
    let mut lab = Lab::new(&format, &options());
    // Records one behind the other, all of its ring.
    for i in 0..450 {
        lab.write(i % 64, 1, i);
    }
    let io = lab.io.clone();
    drop(lab);
    let format = FormatOptions { uuid: [5; 16], ..format };
    block_on(&io, ublk_integrity::create::format(&io, &crate::sim::key(), &format)).unwrap();
    let mut lab = Lab::open(io, &options()).unwrap();
    lab.write(7, 1, 1000);
    assert!(lab.reopened().unwrap().reads_as(7, 1000));
}

//! Recovery where the log holds blocks: the rows of the table that come with them, and volumes that read
//! from the log.

use crate::sim::{
    Disk, Lab, SimStorage, block_on,
    craft::append,
    disk::{BadRange, Trace},
    exec::block_on_steps,
    format_options,
    image::{Logged, SUPERBLOCKS},
    key,
    lab::content,
    logged::{
        bad, forked, found, lab, lies_there, log, log_payload, log_tags, log_zeros, options, payload, payload_at,
        put_data, put_version, read_only, recovered,
    },
};
use ublk_integrity::{
    BlockIndex, Device, Errno, OpenOptions, ReadError,
    check::check,
    create::FormatOptions,
    open::{UnreadableBlocks, open},
};

#[test]
fn row_p1_the_newest_goes_to_its_place_unread() {
    let mut lab = lab();
    lab.write(7, 3, 1);
    lab.checkpoint();
    // Two blocks of one entry, and a third, never written before, in another of the same record.
    let (two, one) = (payload(&lab, 7, &[2, 2]), payload(&lab, 30, &[2]));
    let one = match one {
        Logged::Payload { seq, first, tags, blocks } => Logged::Payload { seq: seq + 1, first, tags, blocks },
        _ => unreachable!(),
    };
    append(&mut lab.disk(), 0, &[two, one]);
    put_data(&lab, 8, &[0xab; 512]);
    let io = lab.io.clone();
    io.disk().trace = Some(Vec::new());
    let (mut lab, found) = recovered(lab);
    let trace = io.disk().trace.take().unwrap();
    assert_order(&trace.into_iter().map(|(_, event)| event).collect::<Vec<_>>(), 3);
    assert_eq!(found, ([3, 0, 0, 0], 3));
    for block in [7, 8, 30] {
        assert!(lies_there(&lab, block, 2) && lab.reads_as(block, 2));
    }
    assert!(lab.reads_as(9, 1));
    let (mut lab, found) = recovered(lab);
    assert_eq!(found, ([0, 0, 0, 0], 0), "nothing is left of it");
    assert!(lab.reads_as(7, 2));
}

/// Blocks go to their places and are durable there before any metadata is written.
fn assert_order(trace: &[Trace], blocks: usize) {
    let last = |what: &dyn Fn(&Trace) -> bool| trace.iter().rposition(what).unwrap();
    let first = |what: &dyn Fn(&Trace) -> bool| trace.iter().position(what).unwrap();
    let data_write = |t: &Trace| matches!(t, Trace::WriteEnd { device: Device::Data, .. });
    assert_eq!(trace.iter().filter(|t| data_write(t)).count(), blocks);
    let placed = last(&data_write);
    let synced = last(&|t| *t == Trace::SyncEnd(Device::Data));
    let sync_began = last(&|t| *t == Trace::SyncStart(Device::Data));
    let metadata = first(&|t| matches!(t, Trace::WriteStart { device: Device::Meta, .. }));
    let read = |t: &&Trace| matches!(t, Trace::Read { device: Device::Data, offset, .. } if *offset > 0);
    assert!(placed < sync_began && synced < metadata, "{trace:?}");
    assert_eq!(trace.iter().filter(read).count(), 0, "what lies there is of no interest");
}

#[test]
fn row_p1_more_than_are_put_in_place_together() {
    let lab = lab();
    for round in 0..5 {
        log(&lab, payload(&lab, 100 + 20 * round, &[round + 1; 20]));
    }
    let (mut lab, found) = recovered(lab);
    assert_eq!(found, ([100, 0, 0, 0], 100));
    assert!((100..200).all(|block| lab.reads_as(block, (block - 100) / 20 + 1)));
}

#[test]
fn row_p1_needs_nothing_of_a_bad_place() {
    let lab = lab();
    log_payload(&lab, 7, 2);
    lab.disk().bad_ranges = vec![bad(&lab, 7)];
    let (lab, found) = recovered(lab);
    assert_eq!((found, lies_there(&lab, 7, 2)), (([1, 0, 0, 0], 1), true));
}

#[test]
fn rows_b_and_c_over_payload() {
    let mut lab = lab();
    lab.write(7, 4, 1);
    lab.checkpoint();
    for block in 7..10 {
        log_payload(&lab, block, 2);
        log_tags(&lab, block, 3);
        log_tags(&lab, block, 4);
    }
    put_version(&lab, 7, 4);
    put_version(&lab, 8, 3);
    // In its place already: it is not written again.
    put_version(&lab, 9, 2);
    let (mut lab, found) = recovered(lab);
    assert_eq!(found, ([1, 2, 0, 0], 0));
    assert!(lab.reads_as(7, 4) && lab.reads_as(8, 3) && lab.reads_as(9, 2));
}

/// The newer data never arrived, and what lies there is older than the payload.
#[test]
fn row_p2_the_base_goes_to_its_place() {
    let mut lab = lab();
    lab.write(7, 3, 1);
    lab.checkpoint();
    log_zeros(&lab, 11);
    log_tags(&lab, 8, 2);
    log_payload(&lab, 9, 2);
    for block in [7, 8, 9, 10, 11] {
        log_payload(&lab, block, 3);
        log_tags(&lab, block, 4);
    }
    // The checkpointed version, a logged one, older payload; what explains anything is a place that
    // was never written (10), or zeroed (11).
    put_version(&lab, 8, 2);
    put_version(&lab, 9, 2);
    put_data(&lab, 10, &[0xab; 512]);
    put_data(&lab, 11, &[0xab; 512]);
    let (mut lab, found) = recovered(lab);
    assert_eq!(found, ([0, 5, 0, 0], 5));
    assert_eq!(lab.volume.recovery().older_blocks, [7, 8, 9, 10, 11]);
    for block in [7, 8, 9, 10, 11] {
        assert!(lies_there(&lab, block, 3) && lab.reads_as(block, 3));
    }
}

/// Nothing explains what lies there: the older version at hand is not passed off as the block.
#[test]
fn row_p3_nothing_is_proved() {
    let mut lab = lab();
    lab.write(7, 1, 1);
    lab.checkpoint();
    log_payload(&lab, 7, 2);
    log_tags(&lab, 7, 3);
    put_data(&lab, 7, &[0xab; 512]);
    let (mut lab, found) = recovered(lab);
    assert_eq!(found, ([0, 0, 1, 0], 0));
    assert_eq!(lab.read(7).unwrap_err().errno(), Errno::EILSEQ);
    assert!(lab.peek(Device::Data, lab.block_offset(7), 512) == [0xab; 512], "it is left as it is");
    // Put there, the newest is right.
    put_version(&lab, 7, 3);
    assert!(lab.reads_as(7, 3));
}

/// Payload is a base: what is older is no candidate any more. What is newer and told durable is
/// another, and payload below it none.
#[test]
fn what_is_older_than_a_base_is_never_chosen() {
    let mut lab = lab();
    lab.write(7, 4, 1);
    lab.checkpoint();
    log_tags(&lab, 7, 2);
    log_payload(&lab, 7, 3);
    put_version(&lab, 7, 2);
    log_payload(&lab, 8, 2);
    let covered = log_tags(&lab, 8, 3);
    let Logged::Tags { seq, .. } = covered.entries[0] else { unreachable!() };
    log(&lab, Logged::Flush { highest: seq, except: vec![] });
    put_version(&lab, 8, 2);
    log_payload(&lab, 9, 2);
    log_zeros(&lab, 9);
    put_version(&lab, 9, 2);
    // A flush that covers what is older than payload says nothing of the block.
    log_tags(&lab, 10, 2);
    log_payload(&lab, 10, 3);
    log_tags(&lab, 10, 4);
    put_version(&lab, 10, 3);
    let (mut lab, found) = recovered(lab);
    // Block 8 has one candidate, which is not read.
    assert_eq!(found, ([2, 1, 0, 0], 1));
    assert!(lab.reads_as(7, 3) && lab.reads_as(9, 0) && lab.reads_as(10, 3));
    assert_eq!(lab.read(8), Err(ReadError::Mismatch { block: BlockIndex(8) }));
}

/// An open that must not write, and what it reads: some blocks in the log, others in their places.
#[test]
fn a_read_only_volume_reads_from_the_log() {
    let mut lab = lab();
    lab.write(6, 5, 1);
    lab.checkpoint();
    log(&lab, payload(&lab, 7, &[2, 2]));
    log_payload(&lab, 9, 2);
    log_tags(&lab, 9, 3);
    log_payload(&lab, 40, 2);
    lab.disk().bad_ranges = vec![bad(&lab, 8)];
    let mut reader = forked(&lab, &read_only()).unwrap();
    assert_eq!((found(&reader), reader.disk().writes), (([3, 1, 0, 0], 0), 0));
    for (block, version) in [(6, 1), (7, 2), (8, 2), (9, 2), (10, 1), (40, 2), (41, 0)] {
        assert!(reader.reads_as(block, version), "block {block}");
    }
    let (result, bytes) = reader.read_range(6, 5);
    let want: Vec<_> =
        [1, 2, 2, 2, 1].iter().zip(6..).flat_map(|(version, block)| content(512, block, *version)).collect();
    assert_eq!((result, bytes == want), (Ok(()), true), "all at one go");
    let report = checked(&mut reader);
    assert_eq!((report.bad_blocks, report.unreadable_blocks, report.in_log, report.data_blocks), (0, 0, 4, 6));
    assert!(lies_there(&reader, 7, 1), "nothing is written");
    // What has rotted in the log since it was read is an error, and so is what can't be read.
    let record = &lab.records()[0];
    reader.poke(Device::Meta, payload_at(record), &[0xee; 512]);
    assert_eq!(reader.read(7), Err(ReadError::Mismatch { block: BlockIndex(7) }));
    let at = payload_at(record) + 512;
    reader.disk().bad_ranges = vec![BadRange::unreadable(Device::Meta, at..at + 512)];
    assert_eq!(reader.read(8).unwrap_err().errno(), Errno::EIO);
    let report = checked(&mut reader);
    assert_eq!((report.bad_blocks, report.unreadable_blocks, report.in_log), (1, 1, 2));
}

fn checked(lab: &mut Lab) -> ublk_integrity::check::CheckReport {
    let Lab { io, volume, context, .. } = lab;
    block_on(io, check(volume, io, context, |_| std::ops::ControlFlow::Continue(())))
}

/// Blocks that are smaller than a sector of the device that holds the log.
#[test]
fn blocks_in_the_log_smaller_than_a_sector() {
    let format = FormatOptions { separate_meta: true, log_size: Some(1 << 20), ..format_options(512) };
    let size = ublk_integrity::create::plan(&format).unwrap();
    let io = SimStorage::new(Disk::new(size.data_device_bytes, size.meta_device_bytes, 4096, 1));
    block_on(&io, ublk_integrity::create::format(&io, &key(), &format)).unwrap();
    io.disk().logical = [512, 4096];
    // The data device writes 512 bytes at once.
    io.disk().set_data_from(u64::MAX);
    let lab = Lab::open(io, &options()).unwrap();
    assert_eq!(lab.superblock().physical, 4096);
    log(&lab, payload(&lab, 7, &[2, 3, 4]));
    let mut reader = forked(&lab, &read_only()).unwrap();
    reader.disk().logical = [512, 4096];
    assert!((7..10).all(|block| reader.reads_as(block, block - 5)));
    let (mut lab, found) = recovered(lab);
    assert_eq!(found, ([3, 0, 0, 0], 3));
    assert!((7..10).all(|block| lab.reads_as(block, block - 5)));
}

/// A block that can't be read stays undecided over its payload too. Once it reads, the log has it.
#[test]
fn undecided_over_payload() {
    let mut lab = lab();
    lab.write(7, 2, 1);
    lab.checkpoint();
    log_payload(&lab, 6, 2);
    for block in [7, 8] {
        log_payload(&lab, block, 2);
        log_tags(&lab, block, 3);
    }
    lab.disk().bad_ranges = vec![bad(&lab, 7), bad(&lab, 8)];
    let before = SUPERBLOCKS.map(|at| lab.peek(Device::Meta, at, 512));
    let mut opened = forked(&lab, &options()).unwrap();
    assert_eq!(found(&opened), ([1, 0, 0, 2], 0));
    assert!(opened.volume.status().read_only && opened.reads_as(6, 2));
    assert!(!lies_there(&opened, 6, 2), "nothing at all is written down");
    assert_eq!(SUPERBLOCKS.map(|at| opened.peek(Device::Meta, at, 512)), before);
    assert_eq!(opened.read(7).unwrap_err().errno(), Errno::EIO);
    opened.disk().bad_ranges.clear();
    put_data(&opened, 8, &[0xab; 512]);
    assert!(opened.reads_as(7, 2), "row P2");
    assert_eq!(opened.read(8).unwrap_err().errno(), Errno::EILSEQ, "row P3");
    assert!(opened.range_reads_as(6, 2, 2));
    // The newest is taken where the user says so.
    let taking = OpenOptions { unreadable_blocks: UnreadableBlocks::TakeNewest, ..options() };
    let mut taken = forked(&lab, &taking).unwrap();
    assert_eq!(found(&taken), ([1, 0, 0, 2], 1));
    taken.disk().bad_ranges.clear();
    assert_eq!(taken.read(7).unwrap_err().errno(), Errno::EILSEQ);
    put_version(&taken, 7, 3);
    assert!(taken.reads_as(7, 3));
}

#[test]
fn a_place_that_cant_be_written_leaves_the_block_in_the_log() {
    let mut lab = lab();
    lab.write(7, 2, 1);
    lab.checkpoint();
    log(&lab, payload(&lab, 7, &[2, 2]));
    let at = lab.block_offset(8);
    lab.disk().bad_ranges = vec![BadRange::unwritable(Device::Data, at..at + 512, Errno::EIO)];
    let before = SUPERBLOCKS.map(|at| lab.peek(Device::Meta, at, 512));
    for _ in 0..2 {
        lab = lab.reopened().unwrap();
        assert_eq!(found(&lab), ([2, 0, 0, 0], 0));
        assert!(lab.volume.latched().is_some() && lab.range_reads_as(7, 2, 2));
        assert!(lies_there(&lab, 7, 2) && lies_there(&lab, 8, 1));
        assert_eq!(SUPERBLOCKS.map(|at| lab.peek(Device::Meta, at, 512)), before, "nothing is written down");
    }
    lab.disk().bad_ranges.clear();
    let (mut lab, found) = recovered(lab);
    assert_eq!(found, ([2, 0, 0, 0], 2));
    assert!(lies_there(&lab, 8, 2) && lab.volume.latched().is_none() && lab.range_reads_as(7, 2, 2));
}

/// Cut short anywhere, by a power cut or a kill, it begins again and comes to the same.
#[test]
fn a_recovery_that_is_cut_short_begins_again() {
    let mut lab = lab();
    lab.write(7, 4, 1);
    lab.checkpoint();
    log(&lab, payload(&lab, 7, &[2, 2]));
    log_payload(&lab, 9, 2);
    log_tags(&lab, 9, 3);
    log_payload(&lab, 10, 2);
    log_tags(&lab, 10, 3);
    put_data(&lab, 10, &[0xab; 512]);
    let mut steps = 0;
    loop {
        let done = (0..4).all(|seed| {
            let io = SimStorage::new(lab.disk().fork(steps * 4 + seed));
            let done = block_on_steps(&io, open(&io, &key(), &options()), steps).is_some();
            if seed == 0 {
                io.disk().kill();
            } else {
                io.disk().power_cut();
            }
            let mut again = Lab::open(io, &OpenOptions { open_id: [9; 32], ..options() }).unwrap();
            for (block, version) in [(7, 2), (8, 2), (9, 2)] {
                assert!(again.reads_as(block, version), "block {block} after {steps} steps");
                assert!(lies_there(&again, block, version), "block {block} after {steps} steps");
            }
            assert_eq!(again.read(10).unwrap_err().errno(), Errno::EILSEQ);
            done
        });
        if done {
            break;
        }
        steps += 1;
    }
    assert!(steps > 12, "{steps}");
}

//! The recovery table, one test a row, each crash state laid out by hand.

use crate::sim::{
    Lab, Rng, SimStorage,
    disk::{BadRange, Trace},
    exec::block_on_steps,
    format_options,
    image::{self, SUPERBLOCKS},
    lab::content,
    open_options,
};
use std::{
    future::Future,
    ops::ControlFlow,
    task::{Context, Waker},
};
use ublk_integrity::{
    Access, BlockIndex, BlockRange, Buf, Device, Durability, Errno, OpenOptions, ReadError, WriteError,
    check::check,
    create::FormatOptions,
    open::{RecoveryReport, open},
};

fn options() -> OpenOptions {
    open_options(&mut Rng::new(3))
}

/// Data and metadata apart, so that a trace tells them apart too.
fn lab() -> Lab {
    let format = FormatOptions { separate_meta: true, ..format_options(512) };
    Lab::new(&format, &OpenOptions { separate_meta: true, ..options() })
}

/// The write to this block never arrived: an older version, or anything, lies there.
fn put_data(lab: &Lab, block: u64, bytes: &[u8]) {
    lab.poke(Device::Data, lab.block_offset(block), bytes);
}
fn put_version(lab: &Lab, block: u64, version: u64) {
    put_data(lab, block, &content(512, block, version));
}
fn unreadable(lab: &Lab, first: u64, count: u64) -> BadRange {
    let at = lab.block_offset(first);
    BadRange::unreadable(Device::Data, at..at + count * 512)
}

fn counts(report: &RecoveryReport) -> [u64; 4] {
    [report.settled, report.older, report.corrupt, report.unreadable]
}

/// Opens again, and says what recovery found: settled, older, corrupt, unreadable.
fn recovered(lab: Lab) -> (Lab, [u64; 4]) {
    let lab = lab.reopened().expect("recovery does not refuse");
    let found = counts(lab.volume.recovery());
    (lab, found)
}

fn data_reads(trace: &[Trace]) -> usize {
    // The identity block is read at every open.
    let read = |t: &&Trace| matches!(t, Trace::Read { device: Device::Data, offset, .. } if *offset > 0);
    trace.iter().filter(read).count()
}

#[test]
fn row_a_one_candidate_is_settled_without_reading() {
    let mut lab = lab();
    lab.write(7, 1, 1);
    lab.write(7, 1, 2);
    lab.write(8, 1, 1);
    lab.zero(8, 1);
    lab.flush();
    put_data(&lab, 7, &[0xab; 512]);
    let io = lab.io.clone();
    io.disk().trace = Some(Vec::new());
    let (mut lab, found) = recovered(lab);
    let trace: Vec<_> = io.disk().trace.take().unwrap().into_iter().map(|(_, t)| t).collect();
    assert_eq!(data_reads(&trace), 0);
    assert_eq!(found, [1, 0, 0, 0], "the newest of block 8 is zeros: nothing to settle");
    assert!(lab.reads_as(8, 0));
    assert_eq!(lab.read(7), Err(ReadError::Mismatch { block: ublk_integrity::BlockIndex(7) }));
    put_version(&lab, 7, 2);
    assert!(lab.reads_as(7, 2));
}

#[test]
fn row_b_the_newest_candidate_is_there() {
    let mut lab = lab();
    lab.write(7, 1, 1);
    lab.checkpoint();
    lab.write(7, 1, 2);
    let (mut lab, found) = recovered(lab);
    assert_eq!(found, [1, 0, 0, 0]);
    assert!(lab.reads_as(7, 2));
}

#[test]
fn row_c_an_older_candidate_is_there() {
    // The checkpointed tag; a logged one; and zeros, logged, are followed by a write that arrived.
    let mut lab = lab();
    lab.write(7, 2, 1);
    lab.checkpoint();
    lab.write(7, 1, 2);
    lab.write(8, 1, 2);
    lab.write(8, 1, 3);
    lab.zero(9, 1);
    lab.write(9, 1, 4);
    lab.write(9, 1, 5);
    put_version(&lab, 7, 1);
    put_version(&lab, 8, 2);
    put_version(&lab, 9, 4);
    let (mut lab, found) = recovered(lab);
    assert_eq!(found, [0, 3, 0, 0]);
    assert_eq!(lab.volume.recovery().older_blocks, [7, 8, 9]);
    assert!(lab.reads_as(7, 1) && lab.reads_as(8, 2) && lab.reads_as(9, 4));
}

#[test]
fn row_d_the_first_data_never_arrived() {
    let mut lab = lab();
    lab.write(7, 1, 1);
    lab.write(8, 1, 1);
    lab.checkpoint();
    lab.zero(8, 1);
    lab.write(8, 1, 2);
    lab.write(9, 1, 3);
    // What lies there is what lay there before the block was ever written, or before it was zeroed.
    put_version(&lab, 8, 1);
    put_data(&lab, 9, &[0xab; 512]);
    let (mut lab, found) = recovered(lab);
    assert_eq!(found, [0, 2, 0, 0]);
    assert!(lab.reads_as(8, 0) && lab.reads_as(9, 0) && lab.reads_as(7, 1));
}

#[test]
fn row_e_nothing_is_proved() {
    let mut lab = lab();
    lab.write(7, 1, 1);
    lab.checkpoint();
    lab.write(8, 1, 1);
    lab.write(8, 1, 2);
    lab.flush();
    lab.write(7, 2, 3);
    put_data(&lab, 7, &[0xab; 512]);
    // Rolled back behind a flush: that version is no candidate any more.
    put_version(&lab, 8, 1);
    let (mut lab, found) = recovered(lab);
    assert_eq!(found, [0, 0, 2, 0]);
    assert_eq!(lab.volume.recovery().corrupt_blocks, [7, 8]);
    for block in [7, 8] {
        assert_eq!(lab.read(block).unwrap_err().errno(), Errno::EILSEQ);
    }
    // The newest tag stays: should its data turn up, it is right; and a write heals the block.
    put_version(&lab, 8, 3);
    assert!(lab.reads_as(8, 3));
    lab.write(7, 1, 4);
    assert!(lab.reads_as(7, 4));
}

#[test]
fn row_f_the_block_cant_be_read() {
    let mut lab = lab();
    lab.write(7, 1, 1);
    lab.write(8, 1, 1);
    lab.write(9, 1, 1);
    put_data(&lab, 8, &[0xab; 512]);
    let bad = unreadable(&lab, 7, 2);
    lab.disk().bad_ranges.push(bad);
    let (mut lab, found) = recovered(lab);
    assert_eq!(found, [1, 0, 0, 2]);
    assert_eq!(lab.volume.recovery().unreadable_blocks, [7, 8]);
    assert!(lab.volume.status().read_only, "nothing is decided, so nothing is written down");
    assert_eq!(lab.read(7).unwrap_err().errno(), Errno::EIO);
    assert!(lab.reads_as(9, 1));
    // When it can be read again it is judged by the other rows: B, and D.
    lab.disk().bad_ranges.clear();
    assert!(lab.reads_as(7, 1) && lab.reads_as(8, 0));
}

#[test]
fn a_failed_write_that_left_the_old_block_is_no_false_alarm() {
    let mut lab = lab();
    lab.write(7, 1, 1);
    lab.checkpoint();
    let at = lab.block_offset(7);
    let bad = BadRange::unwritable(Device::Data, at..at + 1, Errno::EIO);
    lab.disk().bad_ranges.push(bad);
    lab.try_write(7, 1, 2).unwrap_err();
    lab.disk().bad_ranges.clear();
    // The log says version 2 and the flush covers all that went before, but for what is listed.
    lab.write(8, 1, 1);
    lab.flush();
    let (mut lab, found) = recovered(lab);
    assert_eq!(found, [1, 1, 0, 0]);
    assert!(lab.reads_as(7, 1) && lab.reads_as(8, 1));
}

/// A crash state with something for every row but F.
fn crashed() -> Lab {
    let mut lab = lab();
    lab.write(0, 6, 1);
    lab.checkpoint();
    lab.write(0, 3, 2);
    lab.flush();
    lab.write(1, 5, 3);
    lab.write(10, 1, 3);
    put_version(&lab, 1, 2);
    put_version(&lab, 4, 1);
    put_data(&lab, 5, &[0xab; 512]);
    put_data(&lab, 10, &[0xab; 512]);
    lab
}

fn contents(lab: &mut Lab) -> Vec<Result<Vec<u8>, ReadError>> {
    (0..12).map(|block| lab.read(block)).collect()
}

#[test]
fn recovering_again_gives_the_same() {
    let (mut once, found) = recovered(crashed());
    assert_eq!(found, [3, 3, 1, 0]);
    let first = contents(&mut once);
    let (mut twice, found) = recovered(once);
    assert_eq!(found, [0; 4], "the first has written everything down");
    assert_eq!(contents(&mut twice), first);
}

#[test]
fn a_read_only_open_writes_nothing_and_finds_the_same() {
    let lab = crashed();
    let writer = SimStorage::new(lab.disk().fork(1));
    let (io, options) = (lab.io.clone(), lab.options.clone());
    drop(lab);
    io.disk().trace = Some(Vec::new());
    let read_only = OpenOptions { access: Access::ReadOnly, ..options.clone() };
    let mut reader = Lab::open(io.clone(), &read_only).unwrap();
    let seen = contents(&mut reader);
    let report =
        crate::sim::block_on(&io, check(&reader.volume, &io, &mut reader.context, |_| ControlFlow::Continue(())));
    assert_eq!(reader.try_write(0, 1, 9), Err(WriteError::ReadOnly));
    reader.try_flush().unwrap();
    reader.checkpoint();
    let trace = io.disk().trace.take().unwrap();
    assert!(trace.iter().all(|(_, t)| matches!(t, Trace::Read { .. })), "{trace:?}");
    let mut writer = Lab::open(writer, &options).unwrap();
    assert_eq!(reader.volume.recovery(), writer.volume.recovery());
    assert_eq!(seen, contents(&mut writer));
    let bad: Vec<u64> = report.bad_runs.iter().flat_map(|r| r.range.blocks()).map(|b| b.0).collect();
    assert_eq!(bad, reader.volume.recovery().corrupt_blocks);
}

#[test]
fn an_older_superblock_copy_is_made_equal_before_any_page_is_written() {
    let mut lab = lab();
    lab.write(7, 1, 1);
    lab.checkpoint();
    let [_, b] = SUPERBLOCKS;
    let older = lab.peek(Device::Meta, b, 512);
    lab.write(7, 1, 2);
    lab.checkpoint();
    lab.write(8, 1, 1);
    lab.poke(Device::Meta, b, &older);
    let io = lab.io.clone();
    io.disk().trace = Some(Vec::new());
    assert!(lab.reopened().unwrap().reads_as(8, 1));
    let trace = io.disk().trace.take().unwrap();
    let first = trace.iter().find_map(|(_, t)| match t {
        Trace::WriteStart { device: Device::Meta, offset, .. } => Some(*offset),
        _ => None,
    });
    assert_eq!(first, Some(b), "what the older copy names is intact as long as it does");
}

#[test]
fn a_superblock_copy_that_cant_be_written_means_read_only() {
    for at in SUPERBLOCKS {
        let mut lab = lab();
        lab.write(7, 1, 1);
        let bad = BadRange::unwritable(Device::Meta, at..at + 4096, Errno::EIO);
        lab.disk().bad_ranges.push(bad);
        let (mut lab, found) = recovered(lab);
        assert_eq!(found, [1, 0, 0, 0]);
        assert!(lab.volume.status().read_only && lab.volume.latched().is_some());
        lab.try_write(7, 1, 2).unwrap_err();
        lab.try_flush().unwrap_err();
        assert!(lab.reads_as(7, 1));
        lab.disk().bad_ranges.clear();
        let (mut lab, _) = recovered(lab);
        assert!(lab.reads_as(7, 1));
        lab.write(7, 1, 2);
    }
}

/// The superblock copy whose write is under way.
fn being_written(trace: &[(u64, Trace)]) -> Option<u64> {
    let (op, offset) = trace.iter().rev().find_map(|(op, t)| match t {
        Trace::WriteStart { device: Device::Meta, offset, .. } => Some((*op, *offset)),
        _ => None,
    })?;
    let ended = trace.iter().any(|(o, t)| *o == op && matches!(t, Trace::WriteEnd { .. }));
    (SUPERBLOCKS.contains(&offset) && !ended).then_some(offset)
}

#[test]
fn recovery_cut_short_in_the_middle_of_a_superblock_copy() {
    // The crash came between the two copies of a checkpoint: B still names the state before.
    let mut lab = lab();
    lab.write(7, 1, 1);
    lab.checkpoint();
    let [_, b] = SUPERBLOCKS;
    let old = lab.peek(Device::Meta, b, 512);
    lab.write(7, 1, 2);
    lab.checkpoint();
    lab.poke(Device::Meta, b, &old);
    lab.write(8, 1, 3);
    let mut torn = Vec::new();
    for steps in 0.. {
        let io = SimStorage::new(lab.disk().fork(steps));
        io.disk().trace = Some(Vec::new());
        if block_on_steps(&io, open(&io, &crate::sim::key(), &lab.options), steps).is_some() {
            break;
        }
        let Some(at) = being_written(io.disk().trace.as_ref().unwrap()) else { continue };
        io.disk().power_cut();
        io.disk().poke(Device::Meta, at, &[0xab; 512]);
        torn.push(at);
        let mut again = Lab::open(io, &lab.options).unwrap();
        assert!(again.reads_as(7, 2) && again.reads_as(8, 3), "torn at {at} after {steps} steps");
    }
    let [a, b] = SUPERBLOCKS;
    assert_eq!(torn, [b, a, b], "B is made good first; then both move on");
}

#[test]
fn a_damaged_superblock_copy_is_made_good() {
    for at in SUPERBLOCKS {
        let mut lab = lab();
        lab.write(7, 1, 1);
        lab.poke(Device::Meta, at, &[0xab; 512]);
        let (mut lab, _) = recovered(lab);
        assert!(lab.volume.recovery().superblock_repaired);
        assert!(lab.reads_as(7, 1));
        let [a, b] = SUPERBLOCKS.map(|at| lab.peek(Device::Meta, at, 512));
        assert_eq!(a, b);
    }
}

/// Two records under way, of blocks 7 and 8, and a power cut that loses the first of them
/// and keeps the second.
fn stranded() -> Lab {
    let lab = lab();
    let (io, volume) = (&lab.io, &lab.volume);
    let mut contexts = [volume.context(0), volume.context(0)];
    let mut writes: Vec<_> = contexts
        .iter_mut()
        .zip([7, 8])
        .map(|(context, block)| {
            let one = BlockRange::new(BlockIndex(block), 1);
            Box::pin(volume.write(io, context, one, Buf::new(512), Durability::MayBeLost))
        })
        .collect();
    let mut cx = Context::from_waker(Waker::noop());
    for write in &mut writes {
        // To the end of the turn, and on to the record.
        (0..2).for_each(|_| assert!(write.as_mut().poll(&mut cx).is_pending()));
    }
    assert_eq!(io.in_flight(), 2, "a record each");
    io.complete(1);
    (0..2).for_each(|_| writes.iter_mut().for_each(|write| assert!(write.as_mut().poll(&mut cx).is_pending())));
    assert_eq!(io.in_flight(), 1, "no data is sent for a record whose predecessor may be lost");
    drop(writes);
    let superblock = lab.superblock();
    for seed in 0.. {
        let mut disk = lab.disk().fork(seed);
        disk.power_cut();
        let left = image::ring(&disk, &superblock);
        if left.iter().all(|record| record.under_way == 1) {
            assert_eq!(left.len(), 1);
            return Lab::open(SimStorage::new(disk), &lab.options).expect("a crash may leave this");
        }
    }
    unreachable!()
}

#[test]
fn a_record_whose_predecessor_was_lost_says_nothing() {
    let mut lab = stranded();
    assert_eq!(lab.volume.recovery().records, 0);
    assert!(lab.reads_as(7, 0) && lab.reads_as(8, 0));
    let superblock = lab.superblock();
    let number = image::ring(&lab.disk(), &superblock)[0].number;
    // It is still there, and must not be taken for one of this life, which begins with a record in
    // the place of the lost one.
    lab.write(7, 1, 1);
    assert_eq!(lab.records()[0].number, number + 1);
    let mut lab = lab.reopened().unwrap();
    assert!(lab.reads_as(7, 1) && lab.reads_as(8, 0));
}

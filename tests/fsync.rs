//! What is waited for at an fsync, by the trace of both devices: admitted writes, the flush that follows, and the log that may
//! carry them.

mod woken;

use crate::{
    orders::{lab, separate},
    sim::{
        Lab,
        answered::{BeforeAnswer, Beside},
        disk::Trace,
        exec::yield_now,
    },
};
use std::{
    future::Future,
    pin::{Pin, pin},
    task::{Context, Waker},
};
use ublk_integrity::{BlockIndex, BlockRange, Buf, Device, Durability, OpenOptions, create::FormatOptions};

/// One whose log may carry small synchronous writes.
fn lab_with_sync_log() -> Lab {
    let (format, options) = separate();
    let format = FormatOptions { log_size: Some(320 << 10), ..format };
    Lab::new(&format, &OpenOptions { sync_log: true, write_back_slots: 32, ..options })
}

/// A small write as the daemon does it: admitted, and so answered, before it is written back.
fn admitted<'a>(lab: &'a Lab, beside: &mut Beside<'a>, block: u64, blocks: u64) {
    let Lab { io, volume, .. } = lab;
    let mut context = volume.context(0);
    let admitted = volume
        .admit(&context, BlockRange::new(BlockIndex(block), blocks), Durability::MayBeLost)
        .expect("the volume takes writes");
    beside.spawn(async move {
        let buf = Buf::new(blocks as usize * volume.block_size());
        volume.write_back(io, &mut context, admitted, buf, || ()).await.0.unwrap();
    });
}

/// What is waited for at an fsync: the flush that follows such a write at once. It is the same where
/// the block is written again at once, as the tail of a log is.
#[test]
fn without_a_sync_log_an_fsync_of_a_small_write_is_three_operations_in_series() {
    let lab = lab();
    let (mut beside, mut context) = (Beside::default(), lab.volume.context(0));
    for _ in 0..2 {
        admitted(&lab, &mut beside, 3, 1);
        let (flushed, seen) = beside.answer(&lab.io, lab.volume.flush(&lab.io, &mut context));
        flushed.unwrap();
        let record_data_sync = BeforeAnswer { in_series: 3, durable_writes: 1, other_writes: 1, syncs: 1, reads: 0 };
        assert_eq!(seen, record_data_sync);
    }
    beside.end(&lab.io);
}

/// ext4 writes the blocks of its journal, then the commit block with PREFLUSH and FUA: a flush, and
/// a durable write.
#[test]
fn without_a_sync_log_a_commit_of_a_journal_is_six_operations_in_series() {
    let lab = lab();
    let (mut beside, mut context) = (Beside::default(), lab.volume.context(0));
    (0..4).for_each(|n| admitted(&lab, &mut beside, 100 + 2 * n, 2));
    let Lab { io, volume, .. } = &lab;
    let commit = async {
        volume.flush(io, &mut context).await.unwrap();
        let range = BlockRange::new(BlockIndex(108), 1);
        volume.write(io, &mut context, range, Buf::new(512), Durability::Durable).await.0.unwrap();
    };
    let ((), seen) = beside.answer(io, commit);
    beside.end(io);
    assert_eq!((seen.in_series, seen.syncs, seen.reads), (6, 2, 0), "record, data, sync; and once more: {seen:?}");
}

/// One durable write: nothing else is on either device between the write and the flush's answer.
const RECORD: BeforeAnswer = BeforeAnswer { in_series: 1, durable_writes: 1, other_writes: 0, syncs: 0, reads: 0 };

#[test]
fn an_fsync_of_a_small_write_is_one_durable_write() {
    let lab = lab_with_sync_log();
    let (mut beside, mut context) = (Beside::default(), lab.volume.context(0));
    // The same block again, and one that covers half of it.
    for (block, blocks) in [(3, 2), (3, 2), (4, 2)] {
        admitted(&lab, &mut beside, block, blocks);
        let (flushed, seen) = beside.answer(&lab.io, lab.volume.flush(&lab.io, &mut context));
        flushed.unwrap();
        assert_eq!(seen, RECORD);
    }
    lab.volume.end_write_back(0);
    beside.end(&lab.io);
    let counters = lab.volume.status().counters;
    assert_eq!((counters.carried_writes, counters.superseded_writes), (3, 1));
}

/// Those beside get as far as they do without anybody.
fn settled(lab: &Lab, beside: &mut Beside<'_>) {
    beside.answer(&lab.io, async {
        for _ in 0..50 {
            yield_now().await;
        }
    });
}

#[test]
fn a_flush_logs_what_is_held_and_wakes_nobody() {
    let lab = lab_with_sync_log();
    let (mut beside, mut context) = (Beside::default(), lab.volume.context(0));
    // The first of them is written again, twice: it hears that it is waited for.
    for blocks in [vec![3, 5, 7], vec![3], vec![3]] {
        blocks.into_iter().for_each(|block| admitted(&lab, &mut beside, block, 1));
        settled(&lab, &mut beside);
        // Those whose writes they are do nothing meanwhile.
        let (flushed, seen) = Beside::default().answer(&lab.io, lab.volume.flush(&lab.io, &mut context));
        flushed.unwrap();
        assert_eq!(seen, RECORD);
    }
    assert_eq!(lab.volume.status().counters.carried_writes, 2, "no other had to go on");
    lab.volume.end_write_back(0);
    beside.end(&lab.io);
    let counters = lab.volume.status().counters;
    assert_eq!((counters.carried_writes, counters.superseded_writes, counters.write_back_writes), (5, 1, 5));
}

#[test]
fn what_a_flush_has_logged_and_given_up_goes_on_by_itself() {
    let lab = lab_with_sync_log();
    let (mut beside, mut context) = (Beside::default(), lab.volume.context(0));
    admitted(&lab, &mut beside, 3, 1);
    settled(&lab, &mut beside);
    {
        let flush = pin!(lab.volume.flush(&lab.io, &mut context));
        assert!(flush.poll(&mut Context::from_waker(Waker::noop())).is_pending(), "its record has not been written");
    }
    // It is waited for by another write, too.
    admitted(&lab, &mut beside, 3, 1);
    let (flushed, _) = beside.answer(&lab.io, lab.volume.flush(&lab.io, &mut context));
    flushed.unwrap();
    lab.volume.end_write_back(0);
    beside.end(&lab.io);
    assert_eq!(lab.volume.status().counters.carried_writes, 2);
}

#[test]
fn what_a_flush_has_made_durable_goes_in_place_though_the_volume_becomes_read_only() {
    let mut lab = lab_with_sync_log();
    {
        let (mut beside, mut context) = (Beside::default(), lab.volume.context(0));
        admitted(&lab, &mut beside, 3, 1);
        settled(&lab, &mut beside);
        Beside::default().answer(&lab.io, lab.volume.flush(&lab.io, &mut context)).0.unwrap();
        // Answered, and nobody writes it.
        drop(lab.volume.admit(&context, BlockRange::new(BlockIndex(9), 1), Durability::MayBeLost).unwrap());
        assert!(lab.volume.latched().is_some());
        lab.volume.end_write_back(0);
        beside.end(&lab.io);
    }
    lab.read(3).expect("it is in place");
}

/// Polls without anything happening on the devices.
fn poll_alone(mut future: Pin<&mut impl Future>) {
    for _ in 0..9 {
        assert!(future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    }
}

#[test]
fn a_flush_that_is_given_up_while_it_waits_to_lead_does_not_lead() {
    let lab = lab_with_sync_log();
    let Lab { io, volume, .. } = &lab;
    // Of those that wait the flush comes first.
    let (mut flusher, mut writer) = (volume.context(0), volume.context(0));
    let mut beside = Beside::default();
    admitted(&lab, &mut beside, 3, 1);
    settled(&lab, &mut beside);
    // A record is under way that is larger than what gathers meanwhile.
    let large = volume.admit(&writer, BlockRange::new(BlockIndex(20), 32), Durability::Durable).unwrap();
    let mut large = Box::pin(volume.write_back(io, &mut writer, large, Buf::new(32 * 512), || ()));
    poll_alone(large.as_mut());
    poll_alone(pin!(volume.flush(io, &mut flusher)));
    beside.spawn(async {
        large.await.0.unwrap();
    });
    let (flushed, _) = beside.answer(io, volume.flush(io, &mut flusher));
    flushed.unwrap();
    volume.end_write_back(0);
    beside.end(io);
}

#[test]
fn a_commit_of_a_journal_is_two_durable_writes() {
    let lab = lab_with_sync_log();
    let (mut beside, mut context) = (Beside::default(), lab.volume.context(0));
    (0..4).for_each(|n| admitted(&lab, &mut beside, 100 + 2 * n, 2));
    let (flushed, seen) = beside.answer(&lab.io, lab.volume.flush(&lab.io, &mut context));
    flushed.unwrap();
    assert_eq!(seen, RECORD);
    let mut writer = lab.volume.context(0);
    let range = BlockRange::new(BlockIndex(108), 1);
    let commit = lab.volume.admit(&writer, range, Durability::Durable).expect("the volume takes writes");
    let id = commit.id();
    let Lab { io, volume, .. } = &lab;
    beside.spawn(async move {
        volume.write_back(io, &mut writer, commit, Buf::new(512), || ()).await.0.unwrap();
    });
    let (safe, seen) = beside.answer(io, volume.wait_safe(&mut context, id));
    safe.unwrap();
    assert_eq!(seen, RECORD);
    volume.end_write_back(0);
    beside.end(io);
}

/// What no record carries is synced; what one carries is not, before a checkpoint.
#[test]
fn a_flush_syncs_only_what_no_record_carries() {
    let mut lab = lab_with_sync_log();
    lab.write(50, 1, 1);
    {
        let (mut beside, mut context) = (Beside::default(), lab.volume.context(0));
        admitted(&lab, &mut beside, 3, 1);
        let (flushed, seen) = beside.answer(&lab.io, lab.volume.flush(&lab.io, &mut context));
        flushed.unwrap();
        assert_eq!((seen.in_series, seen.durable_writes, seen.other_writes, seen.syncs), (2, 1, 0, 1));
        lab.volume.end_write_back(0);
        beside.end(&lab.io);
    }
    let syncs = |trace: Vec<Trace>| trace.iter().filter(|t| **t == Trace::SyncEnd(Device::Data)).count();
    let flush = lab.traced(|lab| lab.try_flush().unwrap());
    assert_eq!(syncs(flush), 0, "it is in place, and its record is still there");
    let checkpoint = lab.traced(|lab| lab.checkpoint());
    assert_eq!(syncs(checkpoint), 1, "its record is not, afterwards");
}

//! Devices that give up: what fails, what latches, and what readers still get.

use crate::sim::{
    Executor, Lab, Rng, block_on,
    disk::BadRange,
    exec::Step,
    format_options,
    image::{LOG_OFFSET, SUPERBLOCKS},
    lab::content,
    open_options,
    oracle::fill_all,
};
use std::cell::Cell;
use ublk_integrity::{
    BlockIndex, BlockRange, Buf, Device, Durability, Errno, OnMismatch, OpenOptions, ReadError, WriteError,
};

const SOON: Durability = Durability::MayBeLost;

fn options() -> OpenOptions {
    open_options(&mut Rng::new(1))
}

#[test]
fn a_failed_log_write_latches_and_wakes_everybody() {
    let mut lab = Lab::new(&format_options(512), &OpenOptions { max_requests: 40, ..options() });
    lab.write(0, 1, 1);
    {
        let (io, volume) = (&lab.io, &lab.volume);
        let failed = Cell::new(0);
        let mut exec = Executor::new(1);
        for w in 1..30 {
            let (mut context, failed) = (volume.context(0), &failed);
            exec.spawn(async move {
                // Some lead, some wait for the leader, some for space.
                let range = BlockRange::new(BlockIndex(w * 60), 60);
                let (result, _) =
                    volume.write(io, &mut context, range, Buf::new(60 * 512), Durability::MayBeLost).await;
                assert!(matches!(result, Err(WriteError::Latched(_))), "{result:?}");
                failed.set(failed.get() + 1);
            });
        }
        let mut context = volume.context(0);
        // Whether it comes before the failure is up to the seed; that it ends is not.
        exec.spawn(async move {
            let _ = volume.flush(io, &mut context).await;
        });
        io.disk().faults.meta_unwritable = true;
        while exec.step(io) == Step::Ran {}
        assert_eq!((failed.get(), exec.running()), (29, 0));
    }
    lab.disk().faults.meta_unwritable = false;
    assert!(lab.volume.status().read_only && lab.volume.status().latched.is_some());
    assert!(lab.reads_as(0, 1), "readers go on");
    assert!(matches!(lab.try_write(0, 1, 2), Err(WriteError::Latched(_))));
    assert!(matches!(lab.try_flush(), Err(WriteError::Latched(_))));
    lab.try_checkpoint().unwrap_err();
    let mut lab = lab.reopened().unwrap();
    assert!(lab.reads_as(0, 1));
    lab.write(0, 1, 2);
}

#[test]
fn any_metadata_write_that_fails_latches() {
    let superblock = Lab::new(&format_options(512), &options()).superblock();
    let pages = superblock.slot_offset(0, 0, 0)..superblock.metadata_end();
    let copy = |i: usize| SUPERBLOCKS[i]..SUPERBLOCKS[i] + 1;
    let log = LOG_OFFSET..pages.start;
    for range in [pages, copy(0), copy(1), log] {
        let mut lab = Lab::new(&format_options(512), &options());
        lab.write(0, 200, 1);
        lab.write(200, 100, 1);
        lab.checkpoint();
        lab.write(5, 1, 2);
        let bad = BadRange::unwritable(Device::Meta, range.clone(), Errno::EIO);
        lab.disk().bad_ranges.push(bad);
        // The log's failure shows at once, the others' at the checkpoint.
        let failed = lab.try_write(6, 1, 2).is_err() || lab.try_checkpoint().is_err();
        assert!(failed && lab.volume.latched().is_some(), "{range:?}");
        lab.try_write(7, 1, 2).unwrap_err();
        lab.try_flush().unwrap_err();
        assert!(lab.reads_as(5, 2) && lab.reads_as(4, 1), "{range:?}: readers go on");
        lab.disk().bad_ranges.clear();
        let mut lab = lab.reopened().unwrap();
        assert!(lab.reads_as(5, 2) && lab.reads_as(4, 1) && lab.reads_as(299, 1), "{range:?}");
        lab.write(6, 1, 3);
        assert!(lab.reads_as(6, 3));
    }
}

#[test]
fn metadata_that_cant_be_read_is_an_io_error_and_no_alarm() {
    let mut lab = Lab::new(&format_options(512), &OpenOptions { cache_bytes: 0, ..options() });
    lab.write(0, 200, 1);
    lab.checkpoint();
    let page = lab.superblock().slot_offset(0, 1, 0);
    let bad = BadRange::unreadable(Device::Meta, page..page + 8192);
    lab.disk().bad_ranges.push(bad);
    assert_eq!(lab.read(130).unwrap_err().errno(), Errno::EIO);
    assert!(lab.reads_as(0, 1), "another tag page");
    // It must be changed and can't be read: never from unverified bytes, so the checkpoint fails.
    lab.write(131, 1, 2);
    lab.try_checkpoint().unwrap_err();
    assert!(lab.reads_as(131, 2));
    lab.disk().bad_ranges.clear();
    assert!(lab.reads_as(130, 1));
    let mut lab = lab.reopened().unwrap();
    assert!(lab.reads_as(130, 1) && lab.reads_as(131, 2));
}

/// Where it is not known yet which of a page's two slots is current, both are read; only one of
/// them matters.
#[test]
fn a_slot_that_nobody_needs_may_be_unreadable() {
    let mut lab = Lab::new(&format_options(512), &OpenOptions { cache_bytes: 0, ..options() });
    lab.write(0, 128, 1);
    lab.write(128, 72, 1);
    lab.checkpoint();
    let superblock = lab.superblock();
    // In use for the first time, every page is in slot 0.
    let others = (0..superblock.levels()).map(|level| superblock.slot_offset(level, 0, 1));
    for other in others.chain([superblock.slot_offset(0, 1, 1)]) {
        let bad = BadRange::unreadable(Device::Meta, other..other + 512);
        lab.disk().bad_ranges.push(bad);
        assert!(lab.reads_as(0, 1) && lab.reads_as(130, 1), "with the slot at {other} unreadable");
    }
}

/// Tag pages side by side are one read; what is wrong with one must stay its own.
#[test]
fn a_tag_page_that_cant_be_had_does_not_take_its_neighbours_along() {
    let opening = OpenOptions { cache_bytes: 0, on_mismatch: OnMismatch::Zero, ..options() };
    let mut lab = Lab::new(&format_options(512), &opening);
    lab.write(0, 250, 1);
    lab.write(250, 250, 1);
    lab.checkpoint();
    let page = lab.superblock().pages(&lab.disk()).into_iter().find(|p| (p.level, p.index) == (0, 1)).unwrap();
    let bad = |offset| BadRange::unreadable(Device::Meta, offset..offset + 512);
    lab.disk().bad_ranges.push(bad(page.offset));
    assert_eq!(lab.read_range(100, 200).0.unwrap_err().errno(), Errno::EIO);
    assert!(lab.range_reads_as(100, 28, 1) && lab.range_reads_as(256, 200, 1));
    lab.disk().bad_ranges.clear();
    lab.poke(Device::Meta, page.offset + 8, &[0xab; 8]);
    let (result, bytes) = lab.read_range(100, 200);
    result.unwrap();
    for (block, bytes) in (100..).zip(bytes.chunks_exact(512)) {
        let version = if (128..256).contains(&block) { 0 } else { 1 };
        assert!(bytes == content(512, block, version), "block {block}");
    }
    assert_eq!(lab.volume.status().counters.mismatches, 128);
}

#[test]
fn an_old_slot_that_cant_be_read_is_not_missed() {
    let mut lab = Lab::new(&format_options(512), &OpenOptions { cache_bytes: 1 << 20, ..options() });
    lab.write(0, 250, 1);
    lab.write(250, 250, 1);
    lab.checkpoint();
    let page = lab.superblock().pages(&lab.disk()).into_iter().find(|p| (p.level, p.index) == (0, 1)).unwrap();
    let mut lab = lab.reopened().unwrap();
    assert!(lab.reads_as(499, 1), "brings the root");
    let old = lab.superblock().slot_offset(0, 1, 1 - page.slot);
    let bad = BadRange::unreadable(Device::Meta, old..old + 4096);
    lab.disk().bad_ranges.push(bad);
    assert!(lab.range_reads_as(100, 200, 1));
}

#[test]
fn a_damaged_page_that_must_change_loses_its_blocks_and_no_others() {
    let mut lab = Lab::new(&format_options(512), &OpenOptions { cache_bytes: 0, ..options() });
    lab.write(0, 200, 1);
    lab.write(200, 100, 1);
    lab.checkpoint();
    let page = lab.superblock().pages(&lab.disk()).into_iter().find(|p| (p.level, p.index) == (0, 1)).unwrap();
    lab.poke(Device::Meta, page.offset, &[0xab; 512]);
    lab.write(131, 1, 2);
    lab.checkpoint();
    assert_eq!(lab.volume.status().counters.pages_lost, 1);
    let mut lab = lab.reopened().unwrap();
    for block in [128, 130, 255] {
        assert_eq!(lab.read(block).unwrap_err().errno(), Errno::EILSEQ, "lost, and never zeros");
    }
    assert!(lab.reads_as(131, 2) && lab.reads_as(127, 1) && lab.reads_as(256, 1));
    lab.write(130, 1, 3);
    lab.zero(128, 1);
    assert!(lab.reads_as(130, 3) && lab.reads_as(128, 0), "written or zeroed, a lost block is whole again");
}

#[test]
fn a_dead_data_device_is_reported_and_nothing_is_lost() {
    let mut lab = Lab::new(&format_options(512), &options());
    lab.write(0, 2, 1);
    lab.try_flush().unwrap();
    lab.disk().faults.data_dead = true;
    assert_eq!(lab.read(0).unwrap_err().errno(), Errno::EIO);
    assert!(lab.try_write(1, 1, 2).is_err());
    assert!(lab.try_flush().is_err() && lab.volume.latched().is_some());
    lab.disk().faults.data_dead = false;
    assert!(lab.reads_as(0, 1));
    let mut lab = lab.reopened().unwrap();
    assert!(lab.reads_as(0, 1));
    assert!(lab.reads_as(1, 1) || lab.reads_as(1, 2) || lab.read(1).is_err());
}

#[test]
fn a_full_disk_fails_the_write_and_keeps_the_old_block() {
    const ENOSPC: Errno = Errno(28);
    let mut lab = Lab::new(&format_options(512), &options());
    lab.write(0, 2, 1);
    let at = lab.block_offset(1);
    let full = BadRange::unwritable(Device::Data, at..u64::MAX, ENOSPC);
    lab.disk().bad_ranges.push(full);
    assert_eq!(lab.try_write(1, 1, 2).unwrap_err().errno(), ENOSPC);
    assert!(lab.volume.latched().is_none(), "one block's failure is no reason to stop");
    lab.try_flush().unwrap();
    assert!(lab.reads_as(1, 1));
    lab.write(0, 1, 2);
    lab.checkpoint();
    assert!(lab.reads_as(0, 2) && lab.reads_as(1, 1));
    let mut lab = lab.reopened().unwrap();
    assert!(lab.reads_as(0, 2) && lab.reads_as(1, 1));
}

#[test]
fn a_write_that_was_answered_and_fails_is_told_to_every_flush_and_never_read_over() {
    for (first, count, bad_block) in [(5, 1, 5), (4, 3, 6)] {
        let mut lab = Lab::new(&format_options(512), &options());
        lab.write(0, 20, 1);
        let range = BlockRange::new(BlockIndex(first), count);
        let at = lab.block_offset(bad_block);
        let bad = BadRange::unwritable(Device::Data, at..at + 1, Errno::EIO);
        lab.disk().bad_ranges.push(bad);
        let kept = Cell::new(true);
        let mut context = lab.volume.context(0);
        let admitted = lab.volume.admit(&context, range, SOON).expect("nobody is in its way");
        let mut buf = Buf::new(4096);
        fill_all(range, 2, 512, &mut buf);
        let write = lab.volume.write_back(&lab.io, &mut context, admitted, buf, || kept.set(false));
        let (result, buf) = block_on(&lab.io, write);
        assert_eq!(result.unwrap_err().errno(), Errno::EIO);
        let mut whole = Buf::new(4096);
        fill_all(range, 2, 512, &mut whole);
        assert_eq!(*buf, *whole, "what is kept is what was to be written");
        assert!(kept.get() && lab.volume.latched().is_some());
        assert!(lab.volume.admit(&context, BlockRange::new(BlockIndex(15), 1), SOON).is_none());
        assert!(lab.try_flush().is_err() && lab.try_flush().is_err());
        for block in range.blocks() {
            assert_eq!(lab.read(block.0), Err(ReadError::NotInPlace(BlockRange::new(block, 1))));
        }
        assert_eq!(lab.read_range(first - 1, 2).0.unwrap_err().errno(), Errno::EIO);
        assert!(lab.reads_as(first - 1, 1) && lab.reads_as(first + count, 1), "others are what they were");
        // Whoever has kept it writes it again.
        lab.disk().bad_ranges.clear();
        let mut lab = lab.reopened().unwrap();
        lab.write(first, count, 2);
        lab.flush();
        assert!(lab.range_reads_as(first, count, 2) && lab.reads_as(first - 1, 1));
    }
}

#[test]
fn a_log_that_fails_leaves_no_old_block_where_a_write_was_answered() {
    let mut lab = Lab::new(&format_options(512), &options());
    lab.write(0, 20, 1);
    lab.disk().faults.meta_unwritable = true;
    let mut context = lab.volume.context(0);
    let admitted = lab.volume.admit(&context, BlockRange::new(BlockIndex(5), 1), SOON).unwrap();
    let write = lab.volume.write_back(&lab.io, &mut context, admitted, Buf::new(512), || unreachable!());
    assert!(matches!(block_on(&lab.io, write).0, Err(WriteError::Latched(_))));
    assert!(matches!(lab.read(5), Err(ReadError::NotInPlace(_))) && lab.reads_as(6, 1));
}

#[test]
fn a_write_that_was_answered_and_is_dropped_makes_the_volume_read_only() {
    let mut lab = Lab::new(&format_options(512), &options());
    let range = |first, count| BlockRange::new(BlockIndex(first), count);
    let contexts = [(); 4].map(|()| lab.volume.context(0));
    // Its bytes did not come: it has not been answered, and is nobody's.
    lab.volume.admit(&contexts[0], range(5, 2), SOON).unwrap().withdraw();
    assert!(lab.volume.latched().is_none() && lab.try_flush().is_ok());
    lab.write(5, 2, 1);
    let one = lab.volume.admit(&contexts[0], range(5, 2), SOON).unwrap();
    let other = lab.volume.admit(&contexts[1], range(7, 1), SOON).expect("nobody holds its range");
    let behind = lab.volume.admit(&contexts[2], range(6, 1), SOON).expect("it is in line behind one that was answered");
    assert!(one.id().number < behind.id().number);
    behind.withdraw();
    assert!(lab.volume.admit(&contexts[3], range(lab.volume.blocks(), 1), SOON).is_none(), "outside");
    assert_eq!((one.range(), other.range()), (range(5, 2), range(7, 1)));
    // Dropped, nobody would ever write them.
    drop(one);
    assert!(lab.volume.latched().is_some() && lab.volume.admit(&contexts[0], range(0, 1), SOON).is_none());
}

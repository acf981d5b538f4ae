//! Opening on a sick disk: what can't be read is an error or a refusal, never something older, and
//! no decision is made for good without evidence. The random workload on sick disks is in
//! `sim/sick.rs`.

use crate::sim::{Lab, Rng, SimStorage, block_on, disk::BadRange, format_options, lab::content, open_options};
use std::{
    future::Future,
    task::{Context, Waker},
};
use ublk_integrity::{
    Access, BlockIndex, BlockRange, Buf, Device, Errno, Latched, OpenOptions, ReadError, RecordNumber, WriteError,
    check::check,
    create::FormatOptions,
    open::{OpenError, UnreadLog, UnreadableBlocks},
};

pub(crate) fn options() -> OpenOptions {
    open_options(&mut Rng::new(3))
}

/// Data and metadata apart, so that a bad range of one says nothing of the other.
pub(crate) fn lab() -> Lab {
    let format = FormatOptions { separate_meta: true, ..format_options(512) };
    Lab::new(&format, &OpenOptions { separate_meta: true, ..options() })
}

pub(crate) fn bad(device: Device, at: u64, len: u64) -> BadRange {
    BadRange::unreadable(device, at..at + len)
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
    let report =
        block_on(&lab.io, check(&lab.volume, &lab.io, &mut lab.context, |_| std::ops::ControlFlow::Continue(())));
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

/// The numbers that recovery skips, for what may be hidden where nothing can be read, do not count
/// as records that were there.
#[test]
fn a_log_that_ends_before_a_record_that_was_there_is_refused_each_time() {
    let mut lab = lab();
    lab.write(7, 1, 1);
    let record = lab.records().pop().unwrap();
    lab.disk().bad_ranges.push(bad(Device::Meta, record.offset + 32768, 512));
    let (io, options) = (lab.io.clone(), lab.options.clone());
    drop(lab);
    let writes = io.disk().writes;
    let with = |least, id| OpenOptions { first_not_durable: RecordNumber(least), open_id: [id; 32], ..options.clone() };
    for attempt in 0..3 {
        let refused = Lab::open(io.clone(), &with(record.number + 2, 20 + attempt));
        assert!(matches!(refused, Err(OpenError::OlderState { .. })), "attempt {attempt}");
    }
    assert_eq!(io.disk().writes, writes, "nothing was written");
    assert!(Lab::open(io, &with(record.number + 1, 30)).unwrap().reads_as(7, 1));
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
    let report =
        block_on(&lab.io, check(&lab.volume, &lab.io, &mut lab.context, |_| std::ops::ControlFlow::Continue(())));
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

/// The same seed, with other bytes now and then in the place of those that lie there.
fn garbled(lab: &Lab, seed: u64) -> Lab {
    let io = SimStorage::new(lab.disk().fork(seed));
    io.disk().faults.garbled = 60;
    Lab::open(io, &OpenOptions { open_id: [seed as u8 | 1; 32], ..lab.options.clone() }).unwrap()
}

#[test]
fn data_that_comes_wrong_once_is_not_written_down() {
    let mut lab = Lab::new(&format_options(512), &options());
    lab.write(8, 20, 1);
    lab.checkpoint();
    lab.write(8, 20, 2);
    // Row D: never anything but zeros before; row E: all candidates are logged.
    lab.write(40, 20, 3);
    let mut seen = 0;
    for seed in 0..30 {
        let mut copy = garbled(&lab, seed);
        seen += copy.volume.status().undecided_blocks;
        assert_eq!(copy.volume.recovery().older + copy.volume.recovery().corrupt, 0, "seed {seed}");
        // What is wrong while it is served is an error, and nothing but that.
        for (block, version) in (8..28).map(|block| (block, 2)).chain((40..60).map(|block| (block, 3))) {
            assert!(copy.read(block).map_or(true, |bytes| bytes == content(512, block, version)), "seed {seed}");
        }
        copy.disk().faults.garbled = 0;
        assert!(copy.range_reads_as(8, 20, 2) && copy.range_reads_as(40, 20, 3), "seed {seed}");
        let mut copy = copy.reopened().unwrap();
        assert!(copy.range_reads_as(8, 20, 2) && copy.range_reads_as(40, 20, 3), "seed {seed}");
        assert!(copy.volume.latched().is_none());
    }
    assert!(seen > 100, "{seen}");
}

#[test]
fn a_reader_that_gives_up_leaves_an_undecided_block_to_the_next() {
    let mut lab = lab();
    lab.write(8, 1, 1);
    lab.checkpoint();
    lab.write(8, 1, 2);
    let at = lab.block_offset(8);
    lab.disk().bad_ranges.push(bad(Device::Data, at, 512));
    let lab = lab.reopened().unwrap();
    lab.disk().bad_ranges.clear();
    let Lab { io, volume, mut context, .. } = lab;
    let one = BlockRange::new(BlockIndex(8), 1);
    let mut cx = Context::from_waker(Waker::noop());
    let mut other = volume.context(0);
    let mut second = {
        let mut first = Box::pin(volume.read(&io, &mut context, one, Buf::new(512)));
        assert!(first.as_mut().poll(&mut cx).is_pending());
        // The block has been read and is judged: the page that might decide is on its way, or the
        // data.
        let mut second = Box::pin(volume.read(&io, &mut other, one, Buf::new(512)));
        assert!(second.as_mut().poll(&mut cx).is_pending());
        second
    };
    // The first is dropped half done.
    let (result, buf) = block_on(&io, &mut second);
    assert_eq!(result, Ok(()));
    assert_eq!(buf[..512], content(512, 8, 2));
}

/// Block 8 was zeros until version 2. The first of two reads gets other bytes, and not the page
/// that it needs to judge those.
#[test]
fn a_block_that_is_being_judged_is_undecided_for_others() {
    for gives_up in [false, true] {
        let mut lab = lab();
        lab.write(9, 1, 1);
        lab.checkpoint();
        let page = lab.superblock().pages(&lab.disk()).into_iter().find(|p| p.level == 0).unwrap();
        lab.write(8, 1, 2);
        lab.options.cache_bytes = 0;
        let at = lab.block_offset(8);
        lab.disk().bad_ranges.push(bad(Device::Data, at, 512));
        let lab = lab.reopened().unwrap();
        lab.disk().bad_ranges = vec![bad(Device::Meta, page.offset, 4096)];
        lab.poke(Device::Data, at, &[0xab; 512]);
        let Lab { io, volume, .. } = &lab;
        let (one, mut cx) = (BlockRange::new(BlockIndex(8), 1), Context::from_waker(Waker::noop()));
        let mut contexts = [volume.context(0), volume.context(0)];
        let [mut first, mut second] =
            contexts.each_mut().map(|context| Box::pin(volume.read(io, context, one, Buf::new(512))));
        assert!(first.as_mut().poll(&mut cx).is_pending());
        io.complete(0);
        assert!(first.as_mut().poll(&mut cx).is_pending(), "it waits for the page");
        lab.poke(Device::Data, at, &content(512, 8, 2));
        assert!(second.as_mut().poll(&mut cx).is_pending(), "it waits for the first");
        while !gives_up && first.as_mut().poll(&mut cx).is_pending() {
            io.complete(0);
        }
        drop(first);
        lab.disk().bad_ranges.clear();
        let (result, buf) = block_on(io, second);
        assert_eq!((result, &buf[..512]), (Ok(()), &content(512, 8, 2)[..]));
        assert_eq!(volume.status().undecided_blocks, 0);
    }
}

#[test]
fn a_rescue_decides_what_could_not_be_read_before_it_asks_whether_that_may_be_older() {
    let lab = unreadable_log();
    let at = lab.block_offset(30);
    lab.disk().bad_ranges.push(bad(Device::Data, at, 512));
    let options = OpenOptions { access: Access::ReadOnly, unread_log: UnreadLog::FailOlder, ..lab.options.clone() };
    let io = lab.io.clone();
    drop(lab);
    let mut lab = Lab::open(io, &options).unwrap();
    assert_eq!(lab.volume.status().undecided_blocks, 1);
    lab.disk().bad_ranges.pop();
    assert!(lab.reads_as(30, 3));
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

/// One transfer of the log brings one wrong bit; the medium is well. The record that it hits is not
/// the log's end.
#[test]
fn a_log_that_comes_wrong_once_loses_nothing() {
    let mut seen = Vec::new();
    for at in [0, 20, 100] {
        let mut lab = lab();
        lab.write(7, 1, 1);
        lab.try_flush().unwrap(); // answered
        let record = lab.records()[0].offset;
        lab.disk().garbled_once = Some(record + at);
        let (io, options) = (lab.io.clone(), OpenOptions { open_id: [9; 32], ..lab.options.clone() });
        drop(lab);
        match Lab::open(io.clone(), &options) {
            Err(e) => seen.push((at, format!("refused: {e}"))),
            Ok(mut lab) => {
                assert!(lab.disk().garbled_once.is_none());
                if !lab.reads_as(7, 1) {
                    let zeros = lab.reads_as(7, 0);
                    let lab = lab.reopened();
                    let later = lab.is_ok_and(|mut lab| lab.reads_as(7, 1));
                    seen.push((at, format!("zeros: {zeros}, well at the next open: {later}")));
                }
            }
        }
    }
    assert!(seen.is_empty(), "{seen:?}");
}

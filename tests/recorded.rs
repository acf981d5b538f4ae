//! What was acknowledged as durable, by FLUSH or by FUA, is recorded as durable: nothing older is
//! believed after a crash.

use crate::sim::{
    Lab, Rng, SimStorage, block_on,
    disk::Trace,
    format_options,
    image::{Logged, SUPERBLOCKS},
    lab::content,
    open_options,
    oracle::{VersionId, fill_all},
};
use std::{
    future::Future,
    pin::{Pin, pin},
    task::{Context, Poll, Waker},
};
use ublk_integrity::{
    BlockIndex, BlockRange, Buf, CheckpointerWork, Device, Durability, OpenOptions, RequestContext, Volume,
    create::FormatOptions,
};

fn options() -> OpenOptions {
    OpenOptions { max_requests: 600, max_request_bytes: 64 << 10, hash_threads: None, ..open_options(&mut Rng::new(5)) }
}

fn lab() -> Lab {
    Lab::new(&format_options(512), &options())
}

async fn write(
    io: &SimStorage,
    volume: &Volume,
    context: &mut RequestContext,
    range: (u64, u64),
    how: (VersionId, Durability),
) {
    let (range, (version, durability)) = (BlockRange::new(BlockIndex(range.0), range.1), how);
    let mut buf = Buf::new(64 << 10);
    fill_all(range, version, 512, &mut buf);
    volume.write(io, context, range, buf, durability).await.0.unwrap();
}

fn fua(lab: &mut Lab, block: u64, version: VersionId) {
    let Lab { io, volume, context, .. } = lab;
    block_on(io, write(io, volume, context, (block, 1), (version, Durability::Durable)));
}

/// What the checkpoint thread would do next.
fn wanted(volume: &Volume) -> Option<CheckpointerWork> {
    match pin!(volume.work_wanted()).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(work) => Some(work),
        Poll::Pending => None,
    }
}

/// Does all that the checkpoint thread is wanted for.
fn work(lab: &Lab) {
    while let Some(work) = wanted(&lab.volume) {
        block_on(&lab.io, lab.volume.work(&lab.io, work)).unwrap();
    }
}

/// The live log's flush entries.
fn entries(lab: &Lab) -> Vec<(u64, Vec<u64>)> {
    let all = lab.records().into_iter().flat_map(|record| record.entries);
    all.filter_map(|entry| match entry {
        Logged::Flush { highest, except } => Some((highest, except)),
        _ => None,
    })
    .collect()
}

/// A power cut, and this content is put on block 8 before the volume is opened again. Version 2 was
/// recorded there.
fn assert_refused(lab: Lab, instead: &[u8]) -> Lab {
    lab.disk().power_cut();
    lab.poke(Device::Data, lab.block_offset(8), instead);
    let mut lab = lab.reopened().unwrap();
    assert!(lab.read(8).is_err());
    lab
}

/// Version 1 is put back there.
fn assert_older_is_refused(lab: Lab) -> Lab {
    assert_refused(lab, &content(512, 8, 1))
}

/// Block 8 has version 1 in a page, and version 2 that no flush has covered yet.
fn with_two_versions(format: &FormatOptions) -> Lab {
    let mut lab = Lab::new(format, &options());
    lab.write(8, 1, 1);
    lab.flush();
    lab.checkpoint();
    lab.write(8, 1, 2);
    lab
}

#[test]
fn a_flipped_bit_in_a_fua_write_is_an_error_and_no_zeros() {
    let mut lab = lab();
    fua(&mut lab, 8, 2);
    work(&lab);
    let mut rotten = content(512, 8, 2);
    rotten[100] ^= 1;
    assert_refused(lab, &rotten);
}

#[test]
fn an_older_block_put_back_under_a_fua_write_is_an_error() {
    let mut lab = lab();
    lab.write(8, 1, 1);
    lab.flush();
    fua(&mut lab, 8, 2);
    work(&lab);
    assert_older_is_refused(lab);
}

/// Requests that are polled by hand: nothing completes but what the test completes.
struct Requests<'a> {
    io: &'a SimStorage,
    volume: &'a Volume,
    running: Vec<Pin<Box<dyn Future<Output = ()> + 'a>>>,
}

impl<'a> Requests<'a> {
    fn of(lab: &'a Lab) -> Self {
        Self { io: &lab.io, volume: &lab.volume, running: Vec::new() }
    }
    fn write(&mut self, first: u64, count: u64, version: VersionId, durability: Durability) {
        let (io, volume, mut context) = (self.io, self.volume, self.volume.context(0));
        self.start(async move { write(io, volume, &mut context, (first, count), (version, durability)).await });
    }
    /// Writes whose entries fill a record of 64 KiB to the last byte: 104 + 15 * (24 + 128 * 32) +
    /// (24 + 111 * 32) + (24 + 32).
    fn fill_record(&mut self, first: u64) {
        (0..15).for_each(|i| self.write(first + 128 * i, 128, 3, Durability::MayBeLost));
        self.write(first + 2000, 111, 3, Durability::MayBeLost);
        self.write(first + 2200, 1, 3, Durability::MayBeLost);
    }
    /// A flush, two records that are under way, and one that is full to the last byte when the
    /// flush's sync ends.
    fn flush_beside_a_full_record(&mut self, first: u64) {
        self.flush();
        self.write(1000, 1, 3, Durability::MayBeLost);
        self.write(1010, 2, 3, Durability::MayBeLost);
        self.fill_record(first);
        self.complete();
    }
    fn flush(&mut self) {
        let (io, volume, mut context) = (self.io, self.volume, self.volume.context(0));
        self.start(async move { volume.flush(io, &mut context).await.unwrap() });
    }
    fn start(&mut self, request: impl Future<Output = ()> + 'a) {
        self.running.push(Box::pin(request));
        self.poll();
    }
    fn poll(&mut self) {
        for _ in 0..6 {
            self.running
                .retain_mut(|request| request.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        }
    }
    /// The oldest operation ends.
    fn complete(&mut self) {
        self.io.complete(0);
        self.poll();
    }
    /// All records end, and no data.
    fn complete_log(&mut self) {
        self.poll();
        while self.io.complete_of(Device::Meta) {
            self.poll();
        }
    }
    fn end_all(mut self) {
        while !self.running.is_empty() {
            assert!(self.io.in_flight() > 0, "deadlock: {} requests wait", self.running.len());
            self.complete();
        }
    }
}

fn with_a_larger_log() -> Lab {
    let format = FormatOptions { size: Some(16 << 20), log_size: Some(1 << 20), ..format_options(512) };
    with_two_versions(&format)
}

#[test]
fn a_flush_entry_that_finds_no_room_goes_with_the_next_record() {
    for later in [false, true] {
        let mut lab = with_a_larger_log();
        let mut requests = Requests::of(&lab);
        requests.flush_beside_a_full_record(2000);
        requests.end_all();
        assert!(entries(&lab).is_empty(), "the teeth of this test");
        match later {
            false => assert_eq!(wanted(&lab.volume), Some(CheckpointerWork::FlushRecord)),
            true => lab.write(9000, 1, 4),
        }
        assert_eq!(entries(&lab).len(), usize::from(later));
        work(&lab);
        assert_eq!(entries(&lab).len(), 1);
        assert_older_is_refused(lab);
    }
}

/// However many writes there are, the next record that they share has room for the entry.
#[test]
fn a_flush_entry_that_is_owed_finds_room_before_others_do() {
    let lab = with_a_larger_log();
    let mut requests = Requests::of(&lab);
    requests.flush_beside_a_full_record(2000);
    requests.complete();
    requests.fill_record(6000);
    requests.end_all();
    let records = lab.records();
    let runs = |first| move |entry: &Logged| matches!(entry, Logged::Tags { first: f, .. } if *f == first);
    let with = |first| records.iter().find(|record| record.entries.iter().any(runs(first))).unwrap();
    let tells = |first| with(first).entries.iter().any(|entry| matches!(entry, Logged::Flush { .. }));
    assert_eq!(with(2000), with(4200), "one full record");
    assert!(!tells(2000) && tells(6000));
}

/// The epoch ends between the flush and the record that would have told of it.
#[test]
fn a_flush_entry_that_no_record_of_its_epoch_takes_goes_to_the_next_epoch() {
    let mut lab = lab();
    lab.write(8, 1, 1);
    lab.checkpoint();
    lab.write(8, 1, 2);
    let old = lab.peek(Device::Meta, 0, 4096);
    lab.try_flush().unwrap();
    let trace = lab.traced(|lab| lab.checkpoint());
    let syncs = trace.iter().filter(|t| matches!(t, Trace::SyncStart(_))).count();
    assert_eq!(syncs, 1, "that of the pages: the data has been synced by the flush");
    assert_eq!(entries(&lab), []);
    assert_eq!(wanted(&lab.volume), Some(CheckpointerWork::FlushRecord));
    work(&lab);
    assert_eq!(entries(&lab), [(2, vec![])]);
    // The superblock of the ended epoch leads on to it.
    SUPERBLOCKS.iter().for_each(|at| lab.poke(Device::Meta, *at, &old));
    assert_older_is_refused(lab);
}

/// A small log's record lists 496 numbers, and more are in flight.
#[test]
fn a_list_longer_than_a_record_is_said_as_a_lower_number() {
    let lab = with_two_versions(&format_options(512));
    let mut requests = Requests::of(&lab);
    // In flight: records are written, data is not.
    (100..620).for_each(|block| requests.write(block, 1, 3, Durability::MayBeLost));
    requests.complete_log();
    assert_eq!(lab.io.in_flight(), 520, "the data of each");
    requests.flush();
    lab.io.complete(520);
    requests.start(async { lab.volume.work(&lab.io, CheckpointerWork::FlushRecord).await.unwrap() });
    lab.io.complete(520);
    requests.complete_log();
    // Numbers 1 and 2 were given before.
    assert_eq!(entries(&lab), [(498, (3..=498).collect())]);
    drop(requests);
    let mut lab = assert_older_is_refused(lab);
    // Some of the others have arrived.
    assert!((100..620).all(|block| lab.reads_as(block, 0) || lab.reads_as(block, 3)));
}

/// The ring fills up to the last bytes, with a flush after each write: there is no room for the
/// last of them.
#[test]
fn no_record_is_written_that_says_nothing() {
    for first in [0, 1] {
        let mut lab = lab();
        (0..first).for_each(|block| lab.write(block, 1, 1));
        for block in 10..600 {
            let Lab { io, volume, context, .. } = &mut lab;
            let mut one = Box::pin(write(io, volume, context, (block, 1), (1, Durability::MayBeLost)));
            let mut cx = Context::from_waker(Waker::noop());
            // With nothing under way it may only have made room for others.
            let mut turns = 0..100;
            let written = loop {
                match one.as_mut().poll(&mut cx) {
                    Poll::Ready(()) => break true,
                    Poll::Pending if io.in_flight() > 0 => io.complete(0),
                    Poll::Pending if turns.next().is_none() => break false,
                    Poll::Pending => {}
                }
            };
            drop(one);
            // It waited for space.
            if !written {
                break;
            }
            lab.flush();
        }
        let records = lab.records();
        assert!(records.len() > 20, "{}", records.len());
        assert!(records.iter().all(|record| !record.entries.is_empty()), "{first}");
    }
}

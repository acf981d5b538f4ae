//! Real threads, all their locks and atomics under a model checker: it tries interleavings, finds
//! deadlocks and lost wake-ups, and prints a schedule that replays.
//!
//! `RUSTFLAGS='--cfg shuttle' cargo test --profile shuttle --workspace --test
//! interleavings`; without the flag there is nothing here. `SHUTTLE_ITERATIONS=n` sets how
//! many schedules are tried.
#![cfg(shuttle)]

mod anchored;
#[path = "../sim/shared.rs"]
mod shared;

use shared::{
    BLOCK, Memory, check, formatted, formatted_for_sync_log, opened, opened_with, options, range, read, write,
};
use shuttle::{
    future::block_on,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, Ordering},
        mpsc,
    },
    thread,
};
use std::{
    future::{Future, poll_fn},
    pin::pin,
    task::Poll,
};
use ublk_integrity::{
    Buf, Durability, HashThreads, OpenOptions, RequestContext, Volume, hints,
    scrub::{Scrub, ScrubControl},
};

/// Runs `f` on a thread of its own.
fn with<T: Send + 'static>(
    volume: &Arc<Volume>,
    io: &Memory,
    f: impl FnOnce(&Volume, &Memory) -> T + Send + 'static,
) -> thread::JoinHandle<T> {
    let (volume, io) = (volume.clone(), io.clone());
    thread::spawn(move || f(&volume, &io))
}

#[test]
fn ranges_are_taken_whole_across_threads() {
    check(|| {
        let io = formatted();
        let volume = opened(&io, 1);
        let writers = [1, 2].map(|fill| with(&volume, &io, move |v, io| write(v, io, range(3, 2), fill).unwrap()));
        // Reads of zeros hold their range so shortly that a release meets a waiter
        // that is just arriving.
        let reader = with(&volume, &io, |v, io| [(); 3].map(|()| read(v, io, range(3, 2))));
        assert!(reader.join().unwrap().iter().all(|fill| [0, 1, 2].contains(fill)));
        writers.into_iter().for_each(|w| w.join().unwrap());
        assert_ne!(read(&volume, &io, range(3, 2)), 0);
    });
}

#[test]
fn narrow_and_wide_ranges_meet() {
    check(|| {
        let io = formatted();
        let volume = opened(&io, 1);
        // In the last shard and the first; in all of them.
        let writer = with(&volume, &io, |v, io| write(v, io, range(31, 2), 1).unwrap());
        let zeroes = with(&volume, &io, |v, io| block_on(v.zero(io, &mut v.context(0), range(0, 64), false)).unwrap());
        assert!([0, 1].contains(&read(&volume, &io, range(31, 2))));
        [writer, zeroes].into_iter().for_each(|t| t.join().unwrap());
    });
}

#[test]
fn writes_zeros_and_flushes_across_epoch_switches() {
    check(|| {
        let io = formatted();
        let volume = opened(&io, 1);
        let threads = [
            with(&volume, &io, |v, io| {
                write(v, io, range(0, 1), 1).unwrap();
                write(v, io, range(0, 1), 2).unwrap();
            }),
            with(&volume, &io, |v, io| {
                write(v, io, range(1, 1), 3).unwrap();
                block_on(v.zero(io, &mut v.context(0), range(1, 1), false)).unwrap();
                block_on(v.flush(io, &mut v.context(0))).unwrap();
            }),
            with(&volume, &io, |v, io| {
                block_on(v.checkpoint(io)).unwrap();
                block_on(v.checkpoint(io)).unwrap();
            }),
        ];
        threads.into_iter().for_each(|t| t.join().unwrap());
        assert_eq!((read(&volume, &io, range(0, 1)), read(&volume, &io, range(1, 1))), (2, 0));
        // What the log and the tree say together is what was acknowledged.
        let volume = opened(&io, 2);
        let found = volume.recovery();
        assert_eq!((found.older, found.corrupt), (0, 0), "{found:?}");
        assert_eq!((read(&volume, &io, range(0, 1)), read(&volume, &io, range(1, 1))), (2, 0));
    });
}

#[test]
fn reads_of_a_block_that_is_being_written_find_what_was_answered_or_newer() {
    /// What another write has put where the bytes of one that is in place were kept.
    const USED_AGAIN: u8 = 99;
    check(|| {
        let io = formatted();
        let volume = opened(&io, 1);
        write(&volume, &io, range(0, 1), 1).unwrap();
        block_on(volume.checkpoint(&io)).unwrap();
        // So that its tag is looked for among those that are pending.
        write(&volume, &io, range(1, 1), 1).unwrap();
        let (memory, answered) = (Arc::new(AtomicU8::new(0)), Arc::new(AtomicU8::new(1)));
        let writer = {
            let (memory, answered) = (memory.clone(), answered.clone());
            with(&volume, &io, move |v, io| {
                let mut context = v.context(0);
                write(v, io, range(0, 1), 2).unwrap();
                answered.store(2, Ordering::SeqCst);
                for version in [3, 4] {
                    let Some(mut admitted) = v.admit(&context, range(0, 1), Durability::MayBeLost) else { continue };
                    memory.store(version, Ordering::SeqCst);
                    admitted.kept_at(0);
                    answered.store(version, Ordering::SeqCst);
                    let mut buf = Buf::new(BLOCK);
                    buf.fill(version);
                    block_on(v.write_back(io, &mut context, admitted, buf, || ())).0.unwrap();
                    memory.store(USED_AGAIN, Ordering::SeqCst);
                }
                write(v, io, range(0, 1), 5).unwrap();
                answered.store(5, Ordering::SeqCst);
            })
        };
        let context = volume.context(0);
        for _ in 0..3 {
            let before = answered.load(Ordering::SeqCst);
            let mut found = 0;
            let mut copy = |_: u64| {
                found = memory.load(Ordering::SeqCst);
                true
            };
            if !volume.read_kept(&context, range(0, 1), &mut copy) {
                found = read(&volume, &io, range(0, 1));
            }
            assert!((before..=5).contains(&found), "{found}, though {before} had been answered");
        }
        writer.join().unwrap();
    });
}

#[test]
fn a_pass_beside_a_writer_that_comes_and_goes_finds_nothing_bad() {
    check(|| {
        let io = formatted();
        let volume = opened(&io, 1);
        write(&volume, &io, range(0, 1), 1).unwrap();
        // In between it is what it was before: what is looked at may have changed all the same.
        let writer = with(&volume, &io, |v, io| [2, 1, 2].map(|fill| write(v, io, range(0, 1), fill).unwrap()));
        let checkpoints = with(&volume, &io, |v, io| [(); 2].map(|()| block_on(v.checkpoint(io)).unwrap()));
        let control = ScrubControl::new(Scrub::default(), None);
        block_on(volume.scrub(&io, &control, |finding| panic!("a false alarm: {finding}")));
        let report = control.report();
        assert!(report.is_clean() && report.verified_blocks + report.unsettled_blocks == 1, "{report:?}");
        writer.join().unwrap();
        checkpoints.join().unwrap();
    });
}

#[test]
fn group_commits_and_flushes_wake_each_other() {
    check(|| {
        let io = formatted();
        let volume = opened(&io, 1);
        let writers = [0, 1, 2].map(|block| {
            with(&volume, &io, move |v, io| {
                write(v, io, range(block, 1), 7).unwrap();
                block_on(v.flush(io, &mut v.context(0))).unwrap();
            })
        });
        writers.into_iter().for_each(|w| w.join().unwrap());
        assert!([0, 1, 2].iter().all(|block| read(&volume, &io, range(*block, 1)) == 7));
    });
}

#[test]
fn a_flush_waits_for_what_was_answered_before_it() {
    check(|| {
        let io = formatted();
        let volume = opened(&io, 1);
        let [answered, in_place] = [[(); 2]; 2].map(|both| both.map(|()| Arc::new(AtomicBool::new(false))));
        let writers = [0, 1].map(|i| {
            let (answered, in_place) = (answered[i].clone(), in_place[i].clone());
            with(&volume, &io, move |v, io| {
                let mut context = v.context(0);
                let admitted = v.admit(&context, range(i as u64, 1), Durability::MayBeLost).expect("its own block");
                answered.store(true, Ordering::SeqCst);
                let (mut buf, clear) = (Buf::new(BLOCK), || in_place.store(true, Ordering::SeqCst));
                buf.fill(7);
                block_on(v.write_back(io, &mut context, admitted, buf, clear)).0.unwrap();
            })
        });
        let before = answered.each_ref().map(|answered| answered.load(Ordering::SeqCst));
        block_on(volume.flush(&io, &mut volume.context(0))).unwrap();
        assert!(before.iter().zip(&in_place).all(|(before, in_place)| !before || in_place.load(Ordering::SeqCst)));
        writers.into_iter().for_each(|w| w.join().unwrap());
        assert_eq!([0, 1].map(|block| read(&volume, &io, range(block, 1))), [7, 7]);
    });
}

/// The flushes of two threads log what either of them holds. Two writes of one block hear of each other, and the first is kept
/// no longer when the second is.
#[test]
fn flushes_log_what_other_threads_hold() {
    check(|| {
        let io = formatted_for_sync_log();
        let volume = opened_with(&io, OpenOptions { threads: 2, sync_log: true, write_back_slots: 4, ..options(1) });
        let cleared = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
        let (said, admitted) = mpsc::channel();
        let writers = [0, 1].map(|thread| {
            let (cleared, said) = (cleared.clone(), said.clone());
            with(&volume, &io, move |v, io| {
                let mut context = v.context(thread);
                let write = v.admit(&context, range(0, 1), Durability::MayBeLost).expect("in line");
                said.send(()).unwrap();
                let which = write.id().number as usize - 1;
                let clear = || {
                    assert!(!cleared[which].swap(true, Ordering::SeqCst), "cleared twice");
                    assert!(
                        cleared[..which].iter().all(|earlier| earlier.load(Ordering::SeqCst)),
                        "{which} came first"
                    );
                };
                let mut buf = Buf::new(BLOCK);
                buf.fill(which as u8 + 1);
                block_on(v.write_back(io, &mut context, write, buf, clear)).0.unwrap();
            })
        });
        let flusher = with(&volume, &io, |v, io| block_on(v.flush(io, &mut v.context(1))).unwrap());
        let mut context = volume.context(0);
        for _ in 0..2 {
            // The second flush waits for both, and the second write for what the first flush may have logged.
            admitted.recv().unwrap();
            block_on(volume.flush(&io, &mut context)).unwrap();
        }
        flusher.join().unwrap();
        [0, 1].iter().for_each(|thread| volume.end_write_back(*thread));
        writers.into_iter().for_each(|w| w.join().unwrap());
        assert_eq!(read(&volume, &io, range(0, 1)), 2);
    });
}

/// Each is filled with its number, and kept at that.
#[test]
fn of_writes_that_are_answered_in_line_the_last_counts() {
    check(|| {
        let io = formatted();
        let volume = opened(&io, 1);
        let newest = Arc::new(AtomicU8::new(0));
        let writers = [(); 3].map(|()| {
            let newest = newest.clone();
            with(&volume, &io, move |v, io| {
                let mut context = v.context(0);
                let mut admitted =
                    v.admit(&context, range(0, 1), Durability::MayBeLost).expect("nothing else is in line");
                let fill = admitted.id().number as u8;
                admitted.kept_at(fill.into());
                newest.fetch_max(fill, Ordering::SeqCst);
                let mut buf = Buf::new(BLOCK);
                buf.fill(fill);
                block_on(v.write_back(io, &mut context, admitted, buf, || ())).0.unwrap();
            })
        });
        let reader = {
            let newest = newest.clone();
            with(&volume, &io, move |v, io| {
                let (mut context, before) = (v.context(0), newest.load(Ordering::SeqCst));
                let mut found = 0;
                let mut copy = |at: u64| {
                    found = at as u8;
                    true
                };
                if !v.read_kept(&context, range(0, 1), &mut copy) {
                    // It stands in line, for it needs the next block, too.
                    let (result, buf) = block_on(v.read(io, &mut context, range(0, 2), Buf::new(2 * BLOCK)));
                    result.expect("a false alarm");
                    found = buf[0];
                }
                assert!(found >= before, "read {found}, though {before} had been answered");
            })
        };
        let before = newest.load(Ordering::SeqCst);
        block_on(volume.flush(&io, &mut volume.context(0))).unwrap();
        let blocks_at = volume.info().data_device_bytes - volume.info().size;
        let in_place = io.disk.lock().unwrap().image()[blocks_at as usize];
        assert!(
            in_place >= before,
            "{in_place} is in place after the flush, though {before} had been answered before it"
        );
        reader.join().unwrap();
        writers.into_iter().for_each(|w| w.join().unwrap());
        assert_eq!(read(&volume, &io, range(0, 1)), newest.load(Ordering::SeqCst));
    });
}

#[test]
fn readers_under_a_moving_root_see_the_newest() {
    check(|| {
        let io = formatted();
        let volume = opened(&io, 1);
        write(&volume, &io, range(5, 1), 1).unwrap();
        let checkpoint = with(&volume, &io, |v, io| block_on(v.checkpoint(io)).unwrap());
        let reader = with(&volume, &io, |v, io| [(); 2].map(|()| read(v, io, range(5, 1))));
        assert_eq!(reader.join().unwrap(), [1, 1]);
        checkpoint.join().unwrap();
    });
}

#[test]
fn a_device_that_fails_in_the_middle_ends_every_wait() {
    check(|| {
        let io = formatted();
        let volume = opened(&io, 1);
        io.writes_left.store(1, Ordering::SeqCst);
        let writers = [0, 1, 0].map(|block| {
            with(&volume, &io, move |v, io| {
                let written = write(v, io, range(block, 1), 9);
                let flushed = block_on(v.flush(io, &mut v.context(0)));
                assert!(written.is_err() || flushed.is_ok() || v.latched().is_some());
            })
        });
        let worker = with(&volume, &io, |v, io| {
            let _ = block_on(v.checkpoint(io));
        });
        writers.into_iter().for_each(|w| w.join().unwrap());
        worker.join().unwrap();
    });
}

#[test]
fn hints_bring_pages_beside_readers_and_checkpoints() {
    check(|| {
        let io = formatted();
        let volume = opened(&io, 1);
        write(&volume, &io, range(0, 1), 1).unwrap();
        write(&volume, &io, range(130, 1), 3).unwrap();
        block_on(volume.checkpoint(&io)).unwrap();
        // Cold, with room for both tag pages and the root, and a channel that is soon full.
        let (sender, hints) = hints::channel(1);
        let volume = opened_with(&io, OpenOptions { cache_bytes: 3 * 4096, hints: Some(sender), ..options(2) });
        let enough = Arc::new(AtomicBool::new(false));
        let worker = {
            let enough = enough.clone();
            with(&volume, &io, move |v, io| {
                let mut context = v.context(0);
                while !enough.load(Ordering::SeqCst) {
                    // The channel is not instrumented: a worker that waited in it
                    // would stop all threads.
                    match hints.try_recv() {
                        Ok(hint) => block_on(v.prefetch(io, &mut context, hint)),
                        Err(_) => thread::yield_now(),
                    }
                }
            })
        };
        let reader = with(&volume, &io, |v, io| [130, 0, 130, 0].map(|block| read(v, io, range(block, 1))));
        write(&volume, &io, range(0, 1), 2).unwrap();
        block_on(volume.checkpoint(&io)).unwrap();
        let seen = reader.join().unwrap();
        assert!([[3, 1, 3, 1], [3, 1, 3, 2], [3, 2, 3, 2]].contains(&seen), "{seen:?}");
        enough.store(true, Ordering::SeqCst);
        worker.join().unwrap();
        assert_eq!([0, 130].map(|block| read(&volume, &io, range(block, 1))), [2, 3]);
    });
}

/// Runs two futures as tasks of one thread.
async fn both(one: impl Future<Output = ()>, other: impl Future<Output = ()>) {
    let (mut one, mut other, mut ended) = (pin!(one), pin!(other), [false; 2]);
    poll_fn(|cx| {
        ended[0] = ended[0] || one.as_mut().poll(cx).is_ready();
        ended[1] = ended[1] || other.as_mut().poll(cx).is_ready();
        if ended == [true; 2] { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

async fn write_and_read(volume: &Volume, io: &Memory, context: &mut RequestContext, first: u64, count: u64, fill: u8) {
    let mut buf = Buf::new(16 * BLOCK);
    buf.fill(fill);
    let (result, mut buf) = volume.write(io, context, range(first, count), buf, Durability::MayBeLost).await;
    result.unwrap();
    buf.fill(0);
    let (result, buf) = volume.read(io, context, range(first, count), buf).await;
    result.expect("the tags are those of the blocks");
    assert!(buf[..count as usize * BLOCK].iter().all(|byte| *byte == fill));
}

#[test]
fn tags_made_by_other_threads_wake_whoever_waits_for_them() {
    check(|| {
        let io = formatted();
        let elsewhere = HashThreads::new(|job| {
            thread::spawn(move || job.run());
            None
        });
        let volume = opened_with(
            &io,
            OpenOptions { max_request_bytes: 16 * BLOCK, hash_threads: Some(elsewhere), ..options(1) },
        );
        let mut contexts = [volume.context(0), volume.context(0)];
        RequestContext::work_together(&mut contexts);
        let [one, other] = &mut contexts;
        // Handed over, then hashed together.
        for count in [16, 1] {
            let one = write_and_read(&volume, &io, one, 0, count, 1);
            block_on(both(one, write_and_read(&volume, &io, other, 40, count, 2)));
        }
    });
}

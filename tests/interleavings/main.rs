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
mod write_back;

use shared::{BLOCK, Memory, check, formatted, opened, opened_with, options, range, read, write};
use shuttle::{
    future::block_on,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
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

#[test]
fn reads_of_one_tag_page_wait_for_the_first_beside_checkpoints_and_another_thread() {
    check(|| {
        let io = formatted();
        let volume = opened(&io, 1);
        write(&volume, &io, range(0, 2), 1).unwrap();
        block_on(volume.checkpoint(&io)).unwrap();
        // Cold, with room for the tag page and the root.
        let volume = opened_with(&io, OpenOptions { cache_bytes: 2 * 4096, ..options(2) });
        // The page moves while it is loaded: who has waited for it finds nothing, or an older one.
        let checkpoint = with(&volume, &io, |v, io| {
            write(v, io, range(2, 1), 2).unwrap();
            block_on(v.checkpoint(io)).unwrap();
        });
        let reader = with(&volume, &io, |v, io| [0, 1].map(|block| read(v, io, range(block, 1))));
        let mut contexts = [(); 3].map(|()| volume.context(0));
        RequestContext::work_together(&mut contexts);
        let [a, b, c] = &mut contexts;
        let read_one = async |context: &mut RequestContext, block| {
            let (result, buf) = volume.read(&io, context, range(block, 1), Buf::new(2 * BLOCK)).await;
            assert!(result.is_ok() && buf[..BLOCK].iter().all(|byte| *byte == 1), "{result:?}");
        };
        block_on(both(read_one(a, 0), both(read_one(b, 1), read_one(c, 0))));
        assert_eq!(reader.join().unwrap(), [1, 1]);
        checkpoint.join().unwrap();
    });
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

//! Writes that are answered before they are in place, and the reads and flushes that meet them.

use super::{
    shared::{BLOCK, check, formatted, formatted_for_sync_log, opened, opened_with, options, range, read, write},
    with,
};
use shuttle::{
    future::block_on,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, Ordering},
        mpsc,
    },
};
use ublk_integrity::{Buf, Durability, OpenOptions};

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

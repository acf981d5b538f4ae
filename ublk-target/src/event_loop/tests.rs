//! The loop and its ring on a real file.

use super::{
    BATCH, Batch, EventLoop, Executor, OwnRing,
    ring::{DeviceFiles, EnterWait, RingStorage},
};
use crate::huge::LargeApart;
use std::{
    alloc::{GlobalAlloc, Layout},
    cell::Cell,
    fs::File,
    future::{Future, poll_fn},
    mem::replace,
    os::unix::fs::FileExt,
    pin::{Pin, pin},
    rc::Rc,
    task::Poll,
    time::{Duration, Instant},
};
use ublk_integrity::{Buf, ByteOffset, Device, Durability, Errno, Geometry, Phase, Scheduler, Storage};

const BLOCK: usize = 4096;
const SIZE: u64 = 1 << 20;

fn with_file(test: impl FnOnce(&OwnRing, DeviceFiles, &File)) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(SIZE).unwrap();
    let geometry = Geometry { size: SIZE, physical_block: BLOCK as u32, logical_block: 512 };
    let files = DeviceFiles { data: 0, meta: 0, data_geometry: geometry, meta_geometry: geometry };
    test(&OwnRing::new(vec![file.try_clone().unwrap().into()]).unwrap(), files, &file);
}

fn filled(byte: u8) -> Buf {
    let mut buf = Buf::new(BLOCK);
    buf.fill(byte);
    buf
}

#[test]
fn the_batching_delay_is_bounded() {
    with_file(|ring, files, _| {
        let (io, begin) = (ring.storage(files), Instant::now());
        let reads = async {
            for _ in 0..20 {
                let (done, _) = io.read(Device::Data, ByteOffset(0), Buf::new(BLOCK), 0..BLOCK).await;
                assert_eq!(done, Ok(()));
            }
        };
        ring.block_on_expecting(reads, || 100).unwrap();
        assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    });
}

#[test]
fn before_the_hash_batch_what_others_wait_for_has_gone_out() {
    for (phase, gone_out) in [(Phase::Hash, true), (Phase::Commit, false)] {
        with_file(|ring, files, _| {
            let io = &ring.storage(files);
            let request = |waits: bool| async move {
                if waits {
                    io.batch_boundary(phase).await;
                    assert_eq!(!ring.ops.has_started(), gone_out);
                } else {
                    assert_eq!(io.sync(Device::Data).await, Ok(()));
                }
            };
            ring.run_together([true, false].map(request), None).unwrap();
        });
    }
}

#[test]
fn what_goes_out_is_told_before_in_the_middle_of_a_batch_too() {
    with_file(|ring, files, _| {
        let (batch, told) = (Batch::new(2), Cell::new(0));
        let io = RingStorage::new(Rc::clone(&ring.ops), Rc::clone(&batch), files);
        let mut executor = Executor::new(2, ring.ops.doorbell(), &batch);
        executor.spawn(async {
            io.batch_boundary(Phase::Hash).await;
            assert_eq!((told.get(), ring.ops.has_started()), (1, false), "the sync has gone out");
        });
        executor.spawn(async { assert_eq!(io.sync(Device::Data).await, Ok(())) });
        let sending = || told.set(told.get() + u32::from(ring.ops.has_started()));
        let (reap, expected) = (|| ring.ops.reap(), || 1);
        EventLoop { executor: &executor, ops: &ring.ops, reap, expected, sending: &sending, hash_pool: None }
            .drive()
            .unwrap();
    });
}

#[test]
fn before_large_hash_jobs_that_are_left_all_that_has_been_started_goes_out() {
    with_file(|ring, files, _| {
        let io = &ring.storage(files);
        let long = || async {
            io.batch_boundary(Phase::Hash).await;
            assert!(!ring.ops.has_started());
            std::thread::sleep(2 * BATCH);
            io.charge();
        };
        let short = async {
            // The first has hashed. In the next batch, before the second does:
            io.batch_boundary(Phase::Commit).await;
            let mut woken = false;
            poll_fn(|cx| {
                cx.waker().wake_by_ref();
                if replace(&mut woken, true) { Poll::Ready(()) } else { Poll::Pending }
            })
            .await;
            let (done, _) = io.read(Device::Data, ByteOffset(0), Buf::new(BLOCK), 0..BLOCK).await;
            assert_eq!(done, Ok(()));
        };
        let requests: [Pin<Box<dyn Future<Output = ()>>>; 3] = [Box::pin(long()), Box::pin(long()), Box::pin(short)];
        ring.run_together(requests, None).unwrap();
    });
}

#[test]
fn a_look_at_the_ring_that_brings_nothing_is_the_last_of_a_batch() {
    with_file(|ring, files, _| {
        let (batch, looks) = (Batch::new(1), Cell::new(0));
        let mut executor = Executor::new(1, ring.ops.doorbell(), &batch);
        executor.spawn(batch.boundary(Phase::Hash));
        // The ring's memory says that something has come, and goes on to.
        drop(ring.storage(files).sync(Device::Data));
        ring.ops.enter(EnterWait::One).unwrap();
        let reap = || looks.set(looks.get() + 1);
        EventLoop { executor: &executor, ops: &ring.ops, reap, expected: || 1, sending: &|| (), hash_pool: None }
            .drive()
            .unwrap();
        assert_eq!(looks.get(), 1);
    });
}

#[test]
fn operations_start_at_the_call_and_run_together() {
    with_file(|ring, files, file| {
        let io = ring.storage(files);
        ring.block_on(async {
            let writes: Vec<_> = (0..8)
                .map(|i| {
                    let at = ByteOffset(i * BLOCK as u64);
                    let durability = if i % 2 == 0 { Durability::Durable } else { Durability::MayBeLost };
                    io.write(Device::Data, at, filled(i as u8 + 1), 0..BLOCK, durability)
                })
                .collect();
            for write in writes {
                assert_eq!(write.await.0, Ok(()));
            }
            assert_eq!(io.sync(Device::Data).await, Ok(()));
            let (done, buf) = io.read(Device::Meta, ByteOffset(0), Buf::new(3 * BLOCK), BLOCK..3 * BLOCK).await;
            assert_eq!(done, Ok(()));
            assert!(buf[..BLOCK].iter().all(|b| *b == 0), "only the part is touched");
            assert!(buf[BLOCK..2 * BLOCK].iter().all(|b| *b == 1) && buf[2 * BLOCK..].iter().all(|b| *b == 2));
        })
        .unwrap();
        let mut bytes = [0; BLOCK];
        file.read_exact_at(&mut bytes, 7 * BLOCK as u64).unwrap();
        assert_eq!(bytes, [8; BLOCK]);
    });
}

#[test]
fn registered_buffers_move_the_same_bytes_and_only_on_their_ring() {
    with_file(|ring, files, file| {
        let mut bufs = [filled(7), filled(8)];
        ring.register(&mut bufs).unwrap();
        assert!(bufs.iter().all(|buf| buf.mark().is_some()));
        let [first, second] = bufs;
        let io = ring.storage(files);
        let at = ByteOffset(BLOCK as u64);
        let first = ring.block_on(async {
            let write = io.write(Device::Data, at, second, 512..BLOCK, Durability::Durable);
            assert_eq!(write.await.0, Ok(()));
            let (done, first) = io.read(Device::Data, at, first, 0..BLOCK - 512).await;
            assert_eq!(done, Ok(()));
            assert!(first[..BLOCK - 512].iter().all(|b| *b == 8) && first[BLOCK - 512..].iter().all(|b| *b == 7));
            first
        });
        // Another ring does not know it, and must not take its number for that of one of its own.
        let other = OwnRing::new(vec![file.try_clone().unwrap().into()]).unwrap();
        let mut own = [Buf::new(BLOCK)];
        other.register(&mut own).unwrap();
        let io = other.storage(files);
        let write = io.write(Device::Data, ByteOffset(0), first.unwrap(), 0..512, Durability::MayBeLost);
        assert_eq!(other.block_on(write).unwrap().0, Ok(()));
        let mut bytes = [0; 512];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [8; 512]);
    });
}

#[test]
fn the_end_of_the_device_is_an_error() {
    with_file(|ring, files, _| {
        let io = ring.storage(files);
        let read = |at| io.read(Device::Data, ByteOffset(at), Buf::new(2 * BLOCK), 0..2 * BLOCK);
        ring.block_on(async {
            // The first half is there: a short read that is continued, and then fails.
            assert_eq!(read(SIZE - BLOCK as u64).await.0, Err(Errno::EIO));
            assert_eq!(read(SIZE - 2 * BLOCK as u64).await.0, Ok(()));
        })
        .unwrap();
    });
}

#[test]
fn discarded_bytes_read_as_zeros_where_discard_works() {
    with_file(|ring, files, file| {
        file.write_all_at(&[7; 2 * BLOCK], 0).unwrap();
        let io = ring.storage(files);
        let done = ring.block_on(io.discard(Device::Data, ByteOffset(0), BLOCK as u64)).unwrap();
        let mut bytes = [1; 2 * BLOCK];
        file.read_exact_at(&mut bytes, 0).unwrap();
        match done {
            Ok(()) => assert!(bytes[..BLOCK].iter().all(|b| *b == 0) && bytes[BLOCK..].iter().all(|b| *b == 7)),
            Err(e) => assert_eq!(e, Errno::EOPNOTSUPP),
        }
    });
}

#[test]
fn a_dropped_future_does_not_cancel_its_operation() {
    with_file(|ring, files, file| {
        let io = ring.storage(files);
        drop(io.write(Device::Data, ByteOffset(0), filled(9), 0..BLOCK, Durability::MayBeLost));
        ring.block_on(async { io.sleep(Duration::from_millis(50)).await.unwrap() }).unwrap();
        let mut bytes = [0; BLOCK];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [9; BLOCK]);
    });
}

#[test]
fn dropping_the_ring_does_not_wait_for_sleeps() {
    let begun = Instant::now();
    with_file(|ring, files, _| drop(ring.storage(files).sleep(Duration::from_secs(60))));
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_wake_from_another_thread_ends_the_sleep() {
    with_file(|ring, _, _| {
        let (tell, told) = until_told();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            tell.set();
        });
        ring.block_on(told).unwrap();
        thread.join().unwrap();
    });
}

/// A future that another thread completes.
fn until_told() -> (std::sync::Arc<crate::checkpoints::Stop>, impl Future<Output = ()>) {
    let stop = std::sync::Arc::new(crate::checkpoints::Stop::default());
    let waiter = std::sync::Arc::clone(&stop);
    (stop, async move { waiter.wait().await })
}

/// Counts the allocations of threads that ask for it.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<Option<u64>> = const { Cell::new(None) };
}

impl Counting {
    fn count() {
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get().map(|n| n + 1)));
    }
}

// SAFETY: passes every call on to the program's own allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::count();
        // SAFETY: as promised by our caller.
        unsafe { LargeApart.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::count();
        // SAFETY: as promised by our caller.
        unsafe { LargeApart.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: as promised by our caller.
        unsafe { LargeApart.dealloc(place, layout) }
    }
    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        Self::count();
        // SAFETY: as promised by our caller.
        unsafe { LargeApart.realloc(place, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn nothing_is_allocated_once_it_runs() {
    with_file(|ring, files, _| {
        let io = ring.storage(files);
        ring.block_on(async {
            let mut bufs = [filled(1), filled(2)];
            for round in 0..20_000u64 {
                if round == 100 {
                    ALLOCATIONS.set(Some(0));
                }
                let at = |i: u64| ByteOffset((round * 2 + i) * BLOCK as u64 % SIZE);
                let [first, second] = bufs;
                let read = io.read(Device::Data, at(0), first, 0..BLOCK);
                let write = io.write(Device::Data, at(1), second, 0..BLOCK, Durability::MayBeLost);
                let (read, write) = (pin!(read).await, pin!(write).await);
                assert_eq!((read.0, write.0), (Ok(()), Ok(())));
                bufs = [read.1, write.1];
            }
        })
        .unwrap();
        assert_eq!(ALLOCATIONS.take(), Some(0));
    });
}

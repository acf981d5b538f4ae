//! What the counters say is what happened.

use crate::sim::{Lab, Rng, format_options, open_options};
use std::{
    future::Future,
    pin::pin,
    task::{Context, Poll, Waker},
};
use ublk_integrity::{BlockIndex, BlockRange, Buf, Durability, OpenOptions};

/// A read passes a write under way, and can't prove what it has found: the data is the new one by
/// then. It looks at the cache again, where a checkpoint has put the new tag meanwhile.
#[test]
fn a_read_counts_its_look_at_the_cache_once() {
    let options = OpenOptions { hash_threads: None, ..open_options(&mut Rng::new(1)) };
    let mut lab = Lab::new(&format_options(512), &options);
    lab.write(0, 1, 1);
    lab.checkpoint();
    assert!(lab.reads_as(0, 1), "its tag page is in the cache");
    let one = BlockRange::new(BlockIndex(0), 1);
    let (mut writing, mut reading) = (lab.volume.context(0), lab.volume.context(1));
    let (volume, io) = (&lab.volume, &lab.io);
    let before = volume.status().counters;
    let mut cx = Context::from_waker(Waker::noop());
    let mut write = pin!(async {
        let mut buf = Buf::new(512);
        buf.fill(2);
        volume.write(io, &mut writing, one, buf, Durability::MayBeLost).await.0.unwrap();
        volume.checkpoint(io).await.unwrap();
    });
    assert!(write.as_mut().poll(&mut cx).is_pending() && io.in_flight() == 0, "it has its range, and no more");
    let mut read = pin!(volume.read(io, &mut reading, one, Buf::new(512)));
    assert!(read.as_mut().poll(&mut cx).is_pending() && io.in_flight() == 1, "it reads the data");
    let mut patience = 0..10_000;
    while write.as_mut().poll(&mut cx).is_pending() {
        // Not the first, which is the read's.
        (1..io.in_flight()).next_back().into_iter().for_each(|operation| io.complete(operation));
        assert!(patience.next().is_some(), "the write waits for the read");
    }
    let (result, buf) = loop {
        match read.as_mut().poll(&mut cx) {
            Poll::Ready(done) => break done,
            Poll::Pending => (0..io.in_flight().min(1)).for_each(|operation| io.complete(operation)),
        }
        assert!(patience.next().is_some(), "the read waits for nothing");
    };
    assert!(result.is_ok() && buf.iter().all(|byte| *byte == 2), "it has not looked again");
    let after = volume.status().counters;
    let looks = after.cache_hits + after.cache_misses - before.cache_hits - before.cache_misses;
    assert_eq!(looks, 1);
}

//! Who is woken, where a flush logs what others hold: here each task is polled only when it was.

use super::*;
use crate::sim::{
    block_on,
    exec::{Ready, waker_of},
};
use std::task::Poll;
use ublk_integrity::{CheckpointerWork, RequestContext};

struct Task<'a> {
    future: Pin<Box<dyn Future<Output = ()> + 'a>>,
    woken: Ready,
}

impl<'a> Task<'a> {
    fn new(future: impl Future<Output = ()> + 'a) -> Self {
        Self { future: Box::pin(future), woken: Ready::default() }
    }

    /// A write that is admitted, and then written back.
    fn write(lab: &'a Lab, block: u64, blocks: u64, durability: Durability) -> Self {
        let Lab { io, volume, .. } = lab;
        let mut context = volume.context(0);
        let range = BlockRange::new(BlockIndex(block), blocks);
        let admitted = volume.admit(&context, range, durability).expect("the volume takes writes");
        Self::new(async move {
            let buf = Buf::new(blocks as usize * volume.block_size());
            volume.write_back(io, &mut context, admitted, buf, || ()).await.0.unwrap();
        })
    }

    /// One that is held.
    fn held(lab: &'a Lab, block: u64) -> Self {
        let mut write = Self::write(lab, block, 1, Durability::MayBeLost);
        write.waits();
        write
    }

    fn flush(lab: &'a Lab, context: &'a mut RequestContext) -> Self {
        Self::new(async { lab.volume.flush(&lab.io, context).await.unwrap() })
    }

    fn is_woken(&self) -> bool {
        !self.woken.lock().unwrap().is_empty()
    }

    /// Polls it until it waits for somebody else.
    fn waits(&mut self) {
        let waker = waker_of(0, &self.woken);
        loop {
            self.woken.lock().unwrap().clear();
            let polled = self.future.as_mut().poll(&mut Context::from_waker(&waker));
            assert_eq!(polled, Poll::Pending);
            if !self.is_woken() {
                return;
            }
        }
    }
}

/// No more writes come, and these end.
fn end<const N: usize>(lab: &Lab, writes: [Task<'_>; N]) {
    lab.volume.end_write_back(0);
    writes.into_iter().for_each(|write| block_on(&lab.io, write.future));
}

#[test]
fn a_flush_that_is_given_up_is_not_handed_the_lead() {
    let lab = lab_with_sync_log();
    // Of those that wait the flush comes first.
    let mut context = lab.volume.context(0);
    let mut held = Task::held(&lab, 3);
    // A record is under way that is larger than what gathers meanwhile.
    let mut large = Task::write(&lab, 20, 32, Durability::Durable);
    large.waits();
    Task::flush(&lab, &mut context).waits();
    assert!(held.is_woken(), "it is its own again");
    held.waits();
    while lab.io.in_flight() > 0 && !held.is_woken() {
        lab.io.complete_any();
        if large.is_woken() {
            large.waits();
        }
    }
    assert!(held.is_woken(), "it is to write the record");
    end(&lab, [held, large]);
}

#[test]
fn what_a_flush_has_in_hand_hears_afterwards_that_it_is_waited_for() {
    let lab = lab_with_sync_log();
    let mut context = lab.volume.context(0);
    let mut held = Task::held(&lab, 3);
    let mut flush = Task::flush(&lab, &mut context);
    flush.waits();
    let mut again = Task::write(&lab, 3, 1, Durability::MayBeLost);
    again.waits();
    assert!(held.is_woken());
    held.waits();
    block_on(&lab.io, flush.future);
    assert!(held.is_woken(), "its record is durable now");
    end(&lab, [held, again]);
}

#[test]
fn what_a_flush_has_logged_waits_for_the_ticks_once() {
    let lab = lab_with_sync_log();
    let mut context = lab.volume.context(0);
    let held = Task::held(&lab, 3);
    block_on(&lab.io, lab.volume.flush(&lab.io, &mut context)).unwrap();
    assert!(!held.is_woken());
    let mut ticks = 0;
    while !held.is_woken() {
        block_on(&lab.io, lab.volume.work(&lab.io, CheckpointerWork::WriteBack)).unwrap();
        ticks += 1;
        assert!(ticks < 10);
    }
    block_on(&lab.io, held.future);
    assert_eq!(lab.volume.status().counters.write_back_writes, 1, "it is in place");
}

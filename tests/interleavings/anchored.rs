//! Flushes that wait for the anchor, beside whoever tells it and the checkpoints.

use crate::{
    shared::{check, formatted, key, options, range, write},
    with,
};
use shuttle::{
    future::block_on,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};
use std::{
    future::{Future, poll_fn},
    pin::pin,
    task::Poll,
};
use ublk_integrity::{
    AnchorLoss,
    anchor::{Anchor, AnchorBytes, AnchorNote, AnchorPurpose, AnchorUse, Held, Replaced, generation},
    open::VerifiedVolume,
};

/// An anchor that answers, and counts what it was told.
#[derive(Clone, Default)]
struct Told {
    body: Arc<Mutex<Option<AnchorBytes>>>,
    times: Arc<AtomicU64>,
}

impl Anchor for Told {
    async fn load(&self, _: &[u8; 16]) -> Result<Held, String> {
        Ok(Held::of(*self.body.lock().unwrap()))
    }
    async fn replace(&self, _: &[u8; 16], expected: u64, body: &AnchorBytes) -> Replaced {
        let mut there = self.body.lock().unwrap();
        if generation(there.as_ref()) != expected {
            return Replaced::Conflict;
        }
        *there = Some(*body);
        self.times.fetch_add(1, Ordering::SeqCst);
        Replaced::Done
    }
}

#[test]
fn flushes_that_the_anchor_holds_back_are_answered_once_it_covers_them() {
    check(|| {
        let (io, anchor) = (formatted(), Told::default());
        let note = AnchorNote::default();
        let with_anchor = AnchorUse { anchor: &anchor, purpose: AnchorPurpose::Begin, note: note.clone() };
        let opened = block_on(async {
            let verified = VerifiedVolume::read(&io, &key(), &options(1)).await.unwrap();
            verified.open_anchored(&io, &options(1), with_anchor).await.unwrap()
        });
        let (volume, mut keeper) = (Arc::new(opened.0), opened.1);
        keeper.hold_flushes(&volume);
        let told = anchor.clone();
        let ticks = with(&volume, &io, move |v, io| {
            let mut context = v.context(0);
            loop {
                block_on(keeper.flush_waits(v, &context));
                if block_on(keeper.tick((v, io), &mut context, (&told, &note))).is_err() {
                    return;
                }
            }
        });
        let flushers = [0, 1].map(|block| {
            let times = anchor.times.clone();
            with(&volume, &io, move |v, io| {
                for fill in [1, 2] {
                    let before = times.load(Ordering::SeqCst);
                    write(v, io, range(block, 1), fill).unwrap();
                    block_on(v.flush(io, &mut v.context(0))).unwrap();
                    assert!(times.load(Ordering::SeqCst) > before, "answered, and the anchor was told nothing");
                }
            })
        });
        let checkpoints = with(&volume, &io, |v, io| {
            block_on(async {
                // At the end the volume is latched.
                let _ = v.checkpoint(io).await;
                loop {
                    let mut wanted = pin!(v.work_wanted());
                    let work = poll_fn(|cx| match (wanted.as_mut().poll(cx), v.latched()) {
                        (_, Some(_)) => Poll::Ready(None),
                        (polled, None) => polled.map(Some),
                    });
                    let Some(work) = work.await else { return };
                    let _ = v.work(io, work).await;
                }
            });
        });
        flushers.into_iter().for_each(|t| t.join().unwrap());
        // Whoever waits for flushes is woken by the end of the volume, too.
        volume.latch_for_anchor(AnchorLoss::Taken);
        [ticks, checkpoints].into_iter().for_each(|t| t.join().unwrap());
    });
}

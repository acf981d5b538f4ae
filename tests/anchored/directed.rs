//! An anchor that answers: what an open accepts and refuses, one case after the other.

use super::*;
use crate::sim::anchor::Shape;
use ublk_integrity::{
    anchor::{AnchorBytes, AnchorNote, AnchorUse},
    open::VerifiedVolume,
};

/// A small volume with an anchor that answers, and a way to open it.
pub(super) struct Small {
    pub(super) io: SimStorage,
    pub(super) anchor: SimAnchor,
    rng: Rng,
}

impl Small {
    pub(super) fn new() -> Self {
        Self::of(format_options(4096))
    }

    fn of(format: FormatOptions) -> Self {
        Self::shaped(Shape::Store, format)
    }

    pub(super) fn shaped(shape: Shape, format: FormatOptions) -> Self {
        let io = formatted(&format, 1);
        let anchor = SimAnchor::of(shape, &io, 1);
        let mut small = Self { io, anchor, rng: Rng::new(7) };
        drop(small.open(AnchorPurpose::Begin).unwrap());
        small
    }

    pub(super) fn options(&mut self, access: Access) -> OpenOptions {
        OpenOptions { access, ..open_options(&mut self.rng) }
    }

    pub(super) fn open(&mut self, purpose: AnchorPurpose) -> Result<(Volume, AnchorKeeper), OpenError> {
        let options = self.options(Access::ReadWrite);
        block_on(&self.io, open_anchored(&self.io, &key(), &options, (&self.anchor, purpose)))
    }

    fn why_not(&mut self, purpose: AnchorPurpose) -> AnchorError {
        match self.open(purpose).err() {
            Some(OpenError::Anchor(e)) => e,
            other => panic!("{other:?}"),
        }
    }

    fn write(&self, volume: &Volume, context: &mut RequestContext, blocks: u64) {
        for block in 0..blocks {
            let one = BlockRange::new(BlockIndex(block), 1);
            let write = volume.write(&self.io, context, one, Buf::new(4096), Durability::MayBeLost);
            block_on(&self.io, with_checkpoints(volume, &self.io, write)).0.unwrap();
        }
    }

    pub(super) fn snapshot(&self) -> Disk {
        self.io.disk().fork(1)
    }

    pub(super) fn put_back(&self, disk: &Disk) {
        *self.io.disk() = disk.fork(2);
    }
}

/// The old one's bodies have generations that it comes to.
#[test]
fn another_counter_takes_no_body_of_the_one_before() {
    let mut small = Small::shaped(Shape::Counter, format_options(4096));
    let mut older = Vec::new();
    for _ in 0..6 {
        older.push(small.snapshot());
        drop(small.open(AnchorPurpose::Keep).unwrap());
    }
    // It begins where that one did.
    small.anchor.held().value = None;
    assert_eq!(small.why_not(AnchorPurpose::Keep), AnchorError::Absent);
    drop(small.open(AnchorPurpose::Reset).unwrap());
    for _ in 0..8 {
        let (newest, told) = (small.snapshot(), small.anchor.held().told());
        for disk in &older {
            small.put_back(disk);
            let refused = small.why_not(AnchorPurpose::Keep);
            assert!(matches!(refused, AnchorError::Bare { .. } | AnchorError::Older { .. }), "{refused}");
        }
        assert!(small.anchor.held().told() == told, "a refused open leaves the anchor alone");
        small.put_back(&newest);
        drop(small.open(AnchorPurpose::Keep).unwrap());
    }
}

/// Somebody has begun anew with a counter that has come to the same value.
#[test]
fn who_serves_a_volume_notices_that_its_counter_is_another_one() {
    for idle in [true, false] {
        let mut small = Small::shaped(Shape::Counter, format_options(4096));
        let (volume, mut keeper) = small.open(AnchorPurpose::Keep).unwrap();
        block_on(&small.io, keeper.look(&volume, &small.anchor)).unwrap();
        small.anchor.held().era += 1;
        let (mut context, note) = (volume.context(0), note());
        let noticed = if idle {
            block_on(&small.io, keeper.look(&volume, &small.anchor))
        } else {
            small.write(&volume, &mut context, 2);
            let mut ticking = volume.context(1);
            block_on(&small.io, keeper.tick((&volume, &small.io), &mut ticking, (&small.anchor, &note))).map(drop)
        };
        assert!(matches!(noticed, Err(KeepError::Anchor(AnchorError::Taken { .. }))), "{idle}: {noticed:?}");
    }
}

#[test]
fn an_abandoned_branch_that_had_got_further_is_refused() {
    let mut small = Small::new();
    let (volume, mut keeper) = small.open(AnchorPurpose::Keep).unwrap();
    let (mut context, mut ticking) = (volume.context(0), volume.context(0));
    small.write(&volume, &mut context, 2);
    let note = note();
    let tick = keeper.tick((&volume, &small.io), &mut ticking, (&small.anchor, &note));
    assert_eq!(block_on(&small.io, tick).unwrap(), Ticked::Anchored);
    let covered = small.snapshot();
    // This branch goes on without a tick, well past the point of the next.
    for _ in 0..3 {
        small.write(&volume, &mut context, 20);
        block_on(&small.io, volume.checkpoint(&small.io)).unwrap();
    }
    drop((context, ticking, volume));
    let abandoned = small.snapshot();
    small.put_back(&covered);
    drop(small.open(AnchorPurpose::Keep).expect("it holds all that the anchor covers"));
    small.put_back(&abandoned);
    assert!(matches!(small.why_not(AnchorPurpose::Keep), AnchorError::Older { followed_to: None, .. }));
}

#[test]
fn an_anchor_is_needed_begun_once_reset_and_ended() {
    let mut small = Small::new();
    let options = small.options(Access::ReadWrite);
    let needed = reopen(&small.io, &options).err();
    assert!(matches!(needed, Some(OpenError::Anchor(AnchorError::Needed))), "{needed:?}");
    let options = OpenOptions { without_anchor: true, ..small.options(Access::ReadWrite) };
    assert!(reopen(&small.io, &options).is_err(), "to write it is needed whatever is said");
    let options = OpenOptions { without_anchor: true, ..small.options(Access::ReadOnly) };
    assert!(reopen(&small.io, &options).is_ok());
    let empty = SimAnchor::new(&small.io, 2);
    let full = std::mem::replace(&mut small.anchor, empty);
    assert_eq!(small.why_not(AnchorPurpose::Keep), AnchorError::Absent);
    // A new place is no way to have an older disk accepted.
    assert_eq!(small.why_not(AnchorPurpose::Begin), AnchorError::Begun);
    small.anchor = full;
    assert!(matches!(small.why_not(AnchorPurpose::Begin), AnchorError::Present { .. }));
    let older = small.snapshot();
    drop(small.open(AnchorPurpose::Keep).unwrap());
    small.put_back(&older);
    assert!(matches!(small.why_not(AnchorPurpose::Keep), AnchorError::Older { .. }));
    let (volume, keeper) = small.open(AnchorPurpose::Reset).unwrap();
    assert_eq!((keeper.status().resets, keeper.status().reset_seconds), (1, note().seconds));
    drop(volume);
    let (volume, _) = small.open(AnchorPurpose::Keep).unwrap();
    drop(volume);
    let anchored = small.snapshot();
    let (volume, _) = small.open(AnchorPurpose::End).unwrap();
    block_on(&small.io, volume.close(&small.io)).unwrap();
    drop(volume);
    let options = small.options(Access::ReadWrite);
    drop(reopen(&small.io, &options).expect("it has no anchor any more"));
    small.put_back(&anchored);
    assert!(matches!(small.why_not(AnchorPurpose::Keep), AnchorError::MovedAway { .. }));
    assert_eq!(small.why_not(AnchorPurpose::Begin), AnchorError::Begun, "nor is one that was left");
    small.anchor.held().away = true;
    assert!(matches!(small.why_not(AnchorPurpose::Keep), AnchorError::Away(_)));
}

/// Whatever is accepted of a volume's own, what somebody else keeps there stays.
#[test]
fn another_volumes_anchor_is_not_reset() {
    let mut small = Small::new();
    let other = Small::of(FormatOptions { uuid: [7; 16], ..format_options(4096) });
    let (own, body) = (small.anchor.held().body, other.anchor.held().body);
    small.anchor.held().body = body;
    for purpose in [AnchorPurpose::Keep, AnchorPurpose::Begin, AnchorPurpose::Reset] {
        assert!(matches!(small.why_not(purpose), AnchorError::OtherVolume(_)));
    }
    assert!(small.anchor.held().body == body);
    // Its own that is damaged is.
    small.anchor.held().body = own;
    small.anchor.held().body.as_mut().unwrap()[100] ^= 1;
    assert_eq!(small.why_not(AnchorPurpose::Keep), AnchorError::Damaged);
    drop(small.open(AnchorPurpose::Reset).unwrap());
}

/// The counter's value alone says no more than that somebody has incremented it.
#[test]
fn an_increment_by_somebody_else_is_not_taken_for_ours() {
    let mut small = Small::shaped(Shape::Counter, format_options(4096));
    let (volume, mut keeper) = small.open(AnchorPurpose::Keep).unwrap();
    let (mut context, mut ticking) = (volume.context(0), volume.context(0));
    small.write(&volume, &mut context, 2);
    small.anchor.held().is_passed = true;
    let note = note();
    let tick = keeper.tick((&volume, &small.io), &mut ticking, (&small.anchor, &note));
    let ticked = block_on(&small.io, tick);
    assert!(matches!(ticked, Err(KeepError::Anchor(AnchorError::Taken { .. }))), "{ticked:?}");
    assert_eq!(volume.latched(), Some(Latched::Anchor(AnchorLoss::Taken)));
}

/// The body of an open by this host that was cut short as soon as its intent was there.
fn intent_of(small: &mut Small, host: &str) -> AnchorBytes {
    for steps in 0..1000 {
        let copy = SimStorage::new(small.snapshot());
        let theirs = small.anchor.fork(&copy);
        let (before, options, key) = (theirs.held().body, small.options(Access::ReadWrite), key());
        let note = AnchorNote { host: host.into(), ..note() };
        let with = AnchorUse { anchor: &theirs, purpose: AnchorPurpose::Keep, note };
        let open =
            async { VerifiedVolume::read(&copy, &key, &options).await?.open_anchored(&copy, &options, with).await };
        let _ = block_on_steps(&copy, open, steps);
        let there = theirs.held().body;
        if there != before {
            return there.expect("it goes on from the one before");
        }
    }
    panic!("it does not begin");
}

/// What a crash kept from being answered arrives when the next open has looked: the disk is judged by that.
#[test]
fn an_intent_of_before_that_comes_late_is_no_other_host() {
    let mut small = Small::new();
    small.anchor.held().passed_by = Some(intent_of(&mut small, "alpha"));
    drop(small.open(AnchorPurpose::Keep).expect("nobody else has opened it"));
    // One on another host is at its disk by now.
    small.anchor.held().passed_by = Some(intent_of(&mut small, "beta"));
    let taken = small.why_not(AnchorPurpose::Keep);
    assert!(matches!(&taken, AnchorError::Taken { host, .. } if host == "beta"), "{taken:?}");
    drop(small.open(AnchorPurpose::Keep).expect("it was cut short"));
}

/// A snapshot of a fresh volume is of before its anchor began: ids of zeros mean nothing.
#[test]
fn the_disk_of_before_the_anchor_is_refused() {
    let mut small = Small::new();
    let fresh = formatted(&format_options(4096), 1);
    let before = fresh.disk().fork(3);
    small.put_back(&before);
    assert!(matches!(small.why_not(AnchorPurpose::Keep), AnchorError::Older { .. }));
}

/// What was sent and not answered is sent again, the same, and told from somebody else's.
#[test]
fn an_answer_that_does_not_come_is_asked_for() {
    for seed in 0..40 {
        let mut small = Small::new();
        small.anchor = {
            let anchor = SimAnchor::new(&small.io, seed);
            anchor.held().body = small.anchor.held().body;
            anchor
        };
        let (volume, mut keeper) = small.open(AnchorPurpose::Keep).unwrap();
        let (mut context, mut ticking) = (volume.context(0), volume.context(0));
        small.anchor.held().unreliable = 60;
        let mut ticked = 0;
        while ticked < 5 {
            small.write(&volume, &mut context, 1);
            small.anchor.held().land();
            let note = note();
            let tick = keeper.tick((&volume, &small.io), &mut ticking, (&small.anchor, &note));
            match block_on(&small.io, tick) {
                Ok(Ticked::Anchored) => ticked += 1,
                Err(KeepError::Anchor(AnchorError::Away(_))) => {}
                other => panic!("seed {seed}: {other:?}"),
            }
        }
        assert_eq!(volume.latched(), None);
    }
}

/// The record that a tick has written is slow: a checkpoint waits for it, else the next open would find it behind the end of
/// an epoch that is over, and take it for a forgery.
#[test]
fn a_checkpoint_waits_for_the_record_of_a_tick() {
    let mut small = Small::new();
    let (volume, mut keeper) = small.open(AnchorPurpose::Keep).unwrap();
    let (mut context, mut ticking) = (volume.context(0), volume.context(0));
    small.write(&volume, &mut context, 2);
    let (io, anchor, note) = (&small.io.clone(), small.anchor.clone(), note());
    let poll = |future: &mut dyn FnMut(&mut std::task::Context<'_>) -> bool| {
        future(&mut std::task::Context::from_waker(std::task::Waker::noop()))
    };
    let mut tick = std::pin::pin!(keeper.tick((&volume, io), &mut ticking, (&anchor, &note)));
    let mut ticked = |cx: &mut std::task::Context<'_>| tick.as_mut().poll(cx).is_ready();
    // The sync of the data device, then the record, which stays under way.
    assert!(!poll(&mut ticked) && io.complete_of(Device::Data) && !poll(&mut ticked));
    assert_eq!(io.in_flight(), 1, "its record");
    let mut checkpoint = std::pin::pin!(volume.checkpoint(io));
    let mut ended = |cx: &mut std::task::Context<'_>| checkpoint.as_mut().poll(cx).is_ready();
    for _ in 0..500 {
        assert!(!poll(&mut ended), "the checkpoint has ended without the record");
        if io.in_flight() > 1 {
            io.complete(1);
        }
    }
    io.complete(0);
    for _ in 0..500 {
        if poll(&mut ended) {
            break;
        }
        if io.in_flight() > 0 {
            io.complete(0);
        }
    }
    io.disk().power_cut();
    small.open(AnchorPurpose::Keep).map(drop).expect("what a crash leaves opens");
}

/// The power fails as soon as the anchor has a point, while other records are under way.
#[test]
fn a_point_is_durable_when_the_anchor_gets_it() {
    for seed in 0..300 {
        let mut small = Small::new();
        let (volume, mut keeper) = small.open(AnchorPurpose::Keep).unwrap();
        let (volume, done, note) = (&volume, Cell::new(false), note());
        let mut exec = Executor::new(seed);
        exec.spawn(async {
            loop {
                let work = volume.work_wanted().await;
                volume.work(&small.io, work).await.unwrap();
            }
        });
        for writer in 0..4 {
            let (io, mut context) = (&small.io, volume.context(writer % 2));
            exec.spawn(async move {
                for block in 0.. {
                    let one = BlockRange::new(BlockIndex(writer as u64 * 20 + block % 20), 1);
                    let write = volume.write(io, &mut context, one, Buf::new(4096), Durability::MayBeLost);
                    write.await.0.unwrap();
                }
            });
        }
        exec.spawn(async {
            let mut context = volume.context(0);
            let mut anchored = 0;
            while anchored <= seed % 3 {
                let tick = keeper.tick((volume, &small.io), &mut context, (&small.anchor, &note));
                anchored += u64::from(tick.await.unwrap() == Ticked::Anchored);
                yield_now().await;
            }
            done.set(true);
        });
        while !done.get() {
            assert_eq!(exec.step(&small.io), Step::Ran, "deadlock");
        }
        drop(exec);
        small.io.disk().power_cut();
        let opened = small.open(AnchorPurpose::Keep);
        assert!(opened.is_ok(), "seed {seed}: {:?}", opened.err());
    }
}

//! Key slots of a volume with an anchor: an old key area that is put back opens nothing.

mod cut_short;

use super::*;
use crate::{
    key_slots::{AREA, AREAS, Verb, changed, copies, file, new, with_two, word},
    sim::anchor::{Shape, open_unlocked},
};
use std::fmt::Debug;
use ublk_integrity::{
    Credential,
    key_slots::{ChangeError, LockedSlots, SlotError, UnlockedSlots},
    open::VerifiedVolume,
};

/// Slot 0 is opened by `file(1)`, slot 1 by "word".
struct Slots {
    io: SimStorage,
    anchor: SimAnchor,
    rng: Rng,
}

impl Slots {
    fn new(shape: Shape) -> Self {
        let io = with_two(5);
        let anchor = SimAnchor::of(shape, &io, 1);
        let mut slots = Self { io, anchor, rng: Rng::new(7) };
        drop(slots.open_for(&file(1), AnchorPurpose::Begin).unwrap());
        slots
    }

    fn options(&mut self) -> OpenOptions {
        open_options(&mut self.rng)
    }

    fn open_for(
        &mut self,
        credential: &Credential,
        purpose: AnchorPurpose,
    ) -> Result<(Volume, AnchorKeeper), OpenError> {
        let options = self.options();
        block_on(&self.io, open_unlocked(&self.io, credential, &options, (&self.anchor, purpose)))
    }

    fn open(&mut self, credential: &Credential) -> Result<(Volume, AnchorKeeper), OpenError> {
        self.open_for(credential, AnchorPurpose::Keep)
    }

    /// The first of these that opens it. One must, whatever `when` it was.
    fn opener<const N: usize>(&mut self, credentials: [Credential; N], when: impl Debug) -> Credential {
        let opened = credentials.each_ref().map(|credential| self.open(credential).map(drop));
        let first = opened.iter().position(Result::is_ok);
        let first = first.unwrap_or_else(|| panic!("nothing opens it after {when:?}: {opened:?}"));
        credentials.into_iter().nth(first).expect("one of them")
    }

    fn change(&self, verb: Verb) -> Result<(), ChangeError<AnchorError>> {
        self.write(changed(&self.io, verb))
    }

    fn write(&self, slots: UnlockedSlots) -> Result<(), ChangeError<AnchorError>> {
        let write = async {
            let prepared = slots.prepare(&self.io, false).await?;
            prepared.write_anchored(&self.io, (&self.anchor, &note())).await
        };
        block_on(&self.io, write)
    }

    /// By what opens one of them after a change that was done or not.
    fn unlocked(&self) -> UnlockedSlots {
        let read = || block_on(&self.io, LockedSlots::read(&self.io)).unwrap().unwrap();
        [word("word"), word("other"), file(3)].iter().find_map(|credential| read().unlock(credential).ok()).unwrap()
    }

    fn anchor_status(&self) -> ublk_integrity::anchor::AnchorStatus {
        let shown = async {
            let options = open_options(&mut Rng::new(3));
            let verified = VerifiedVolume::read(&self.io, &key(), &options).await.unwrap();
            verified.show_anchor(&self.anchor).await.unwrap()
        };
        block_on(&self.io, shown)
    }

    /// So many steps of it; whether that was all.
    fn change_for(&self, slots: UnlockedSlots, steps: u64) -> bool {
        let write = async {
            let prepared = slots.prepare(&self.io, false).await.unwrap();
            prepared.write_anchored(&self.io, (&self.anchor, &note())).await.unwrap();
        };
        block_on_steps(&self.io, write, steps).is_some()
    }

    fn put_back(&self, areas: &[Vec<u8>; 2]) {
        for (at, area) in AREAS.into_iter().zip(areas) {
            self.io.disk().poke(Device::Meta, at, area);
        }
    }

    /// Neither the one nor the other opens it, and nothing is written.
    fn is_refused(&mut self, credentials: &[Credential]) {
        let (told, writes) = (self.anchor.held().told(), self.io.disk().writes);
        for credential in credentials {
            let refused = self.open(credential).map(drop);
            assert!(matches!(refused, Err(OpenError::Anchor(AnchorError::KeyArea { .. }))), "{refused:?}");
        }
        assert!(self.anchor.held().told() == told && self.io.disk().writes == writes);
    }

    fn fork(&self, seed: u64) -> Self {
        let io = SimStorage::new(self.io.disk().fork(seed));
        let anchor = self.anchor.fork(&io);
        Self { io, anchor, rng: Rng::new(seed ^ 7) }
    }
}

const SHAPES: [Shape; 2] = [Shape::Store, Shape::Counter];

#[test]
fn an_old_key_area_that_is_put_back_opens_nothing() {
    for shape in SHAPES {
        for verb in [Verb::Add, Verb::Change, Verb::Remove] {
            let mut slots = Slots::new(shape);
            let older = copies(&slots.io);
            slots.change(verb).unwrap();
            let newest = copies(&slots.io);
            assert!(older != newest);
            slots.put_back(&older);
            // Who was removed, and who is still there.
            slots.is_refused(&[file(1), word("word")]);
            // Nor is it changed into a new one.
            let mut old = block_on(&slots.io, LockedSlots::read(&slots.io)).unwrap().unwrap().unlock(&file(1)).unwrap();
            old.add(&file(9), &new(&mut Rng::new(1))).unwrap();
            let refused = slots.write(old);
            assert!(matches!(refused, Err(ChangeError::Anchor(AnchorError::KeyArea { .. }))), "{refused:?}");
            assert!(copies(&slots.io) == older, "nothing was changed");
            slots.put_back(&newest);
            let opens = if matches!(verb, Verb::Change) { word("other") } else { word("word") };
            drop(slots.open(&opens).unwrap());
        }
    }
}

/// The key that all of them wrap is not asked where it comes from, unless the anchor has a key area to compare.
#[test]
fn a_key_from_elsewhere_opens_nothing() {
    let mut slots = Slots::new(Shape::Store);
    let options = slots.options();
    let with = (&slots.anchor, AnchorPurpose::Keep);
    let refused = block_on(&slots.io, open_anchored(&slots.io, &key(), &options, with)).map(drop);
    let expected = matches!(refused, Err(OpenError::Anchor(AnchorError::KeyArea { found: None, .. })));
    assert!(expected, "{refused:?}");
}

#[test]
fn what_an_anchor_holds_that_was_told_by_a_program_which_did_not_ask_counts_until_the_next_change() {
    for shape in SHAPES {
        let io = with_two(5);
        let anchor = SimAnchor::of(shape, &io, 1);
        let mut slots = Slots { io, anchor, rng: Rng::new(7) };
        let options = slots.options();
        let begin = (&slots.anchor, AnchorPurpose::Begin);
        // It says nothing of a key area.
        let (_, keeper) = block_on(&slots.io, open_anchored(&slots.io, &key(), &options, begin)).unwrap();
        assert_eq!(keeper.status().key_area_generation, None);
        let older = copies(&slots.io);
        // Such a program can still read what an open has written.
        let (_, keeper) = slots.open(&file(1)).unwrap();
        assert_eq!(keeper.status().key_area_generation, None);
        slots.change(Verb::Remove).unwrap();
        assert_eq!(slots.open(&word("word")).unwrap().1.status().key_area_generation, Some(3));
        slots.put_back(&older);
        slots.is_refused(&[file(1), word("word")]);
    }
}

#[test]
fn while_a_volume_is_served_who_tells_its_anchor_tells_it_of_the_slots_and_each_tick_says_them_again() {
    for shape in SHAPES {
        let mut slots = Slots::new(shape);
        let (volume, mut keeper) = slots.open(&word("word")).unwrap();
        let older = copies(&slots.io);
        let (io, anchor, note) = (slots.io.clone(), slots.anchor.clone(), note());
        let mut ticking = volume.context(1);
        let mut tick = |keeper: &mut AnchorKeeper| {
            let (mut context, one) = (volume.context(0), BlockRange::new(BlockIndex(1), 1));
            let write = volume.write(&io, &mut context, one, Buf::new(volume.block_size()), Durability::MayBeLost);
            block_on(&io, write).0.unwrap();
            assert_eq!(
                block_on(&io, keeper.tick((&volume, &io), &mut ticking, (&anchor, &note))).unwrap(),
                Ticked::Anchored
            );
        };
        tick(&mut keeper);
        let unlocked = changed(&slots.io, Verb::Remove);
        let prepared = block_on(&io, unlocked.prepare(&io, false)).unwrap();
        let change = prepared
            .write_kept(&io, async |found, step| keeper.keep_key_area(&volume, (&anchor, &note), (found, step)).await);
        block_on(&io, change).unwrap();
        assert_eq!(keeper.status().key_area_generation, Some(3));
        tick(&mut keeper);
        assert_eq!(keeper.status().key_area_generation, Some(3));
        // Somebody puts the old one back, and asks for more.
        let newest = copies(&io);
        slots.put_back(&older);
        let mut old = block_on(&io, LockedSlots::read(&io)).unwrap().unwrap().unlock(&file(1)).unwrap();
        old.add(&file(9), &new(&mut Rng::new(1))).unwrap();
        let prepared = block_on(&io, old.prepare(&io, false)).unwrap();
        let change = prepared
            .write_kept(&io, async |found, step| keeper.keep_key_area(&volume, (&anchor, &note), (found, step)).await);
        let refused = block_on(&io, change);
        let expected = matches!(refused, Err(ChangeError::Anchor(KeepError::Anchor(AnchorError::KeyArea { .. }))));
        assert!(expected, "{refused:?}");
        assert_eq!(volume.latched(), None, "it goes on");
        tick(&mut keeper);
        drop(volume);
        io.disk().kill();
        slots.is_refused(&[file(1), word("word")]);
        slots.put_back(&newest);
        drop(slots.open(&word("word")).unwrap());
    }
}

#[test]
fn slots_of_an_anchored_volume_are_not_changed_without_its_anchor() {
    let slots = Slots::new(Shape::Store);
    let before = copies(&slots.io);
    let refused = block_on(&slots.io, changed(&slots.io, Verb::Remove).write(&slots.io, false));
    assert!(matches!(refused, Err(SlotError::Open(OpenError::Anchor(AnchorError::Needed)))), "{refused:?}");
    slots.anchor.held().away = true;
    let refused = slots.change(Verb::Remove);
    assert!(matches!(refused, Err(ChangeError::Anchor(AnchorError::Away(_)))), "{refused:?}");
    assert!(copies(&slots.io) == before && before[0].len() == AREA);
}

#[test]
fn a_reset_takes_the_key_area_that_lies_there_and_a_move_takes_it_along() {
    for shape in SHAPES {
        let mut slots = Slots::new(shape);
        let older = copies(&slots.io);
        slots.change(Verb::Change).unwrap();
        let newest = copies(&slots.io);
        slots.put_back(&older);
        drop(slots.open_for(&file(1), AnchorPurpose::Reset).expect("that is what a reset is for"));
        drop(slots.open(&word("word")).unwrap());
        slots.put_back(&newest);
        slots.is_refused(&[word("other")]);
        slots.put_back(&older);
        let other = SimAnchor::of(Shape::Store, &slots.io, 3);
        let options = slots.options();
        let moved = block_on(&slots.io, async {
            let verified = VerifiedVolume::read(&slots.io, &key(), &options).await.unwrap();
            verified.move_anchor((&slots.anchor, &other), &note()).await
        });
        moved.unwrap();
        slots.anchor = other;
        slots.put_back(&newest);
        slots.is_refused(&[word("other"), file(1)]);
        slots.put_back(&older);
        drop(slots.open(&file(1)).unwrap());
    }
}

//! Volumes of format version 2 that take more than a key file to open: with key slots, with an anchor in a file, with a counter
//! whose bodies lie on the disk. As in `golden.rs` they were written once, and are opened for ever.

use crate::{
    golden::{fill, holds_what_was_written, on_disk, pages_of, tests_folder},
    sim::{
        KEY, Lab, Rng, SimStorage,
        anchor::{Shape, SimAnchor, note, open_anchored},
        block_on, format_options, formatted, key, open_options,
    },
};
use std::{fs, path::PathBuf};
use ublk_integrity::{
    Credential, Device, MasterKey, OpenOptions,
    anchor::{AnchorError, AnchorKeeper, AnchorPurpose, SLOT_BYTES, Slot, Ticked, generation},
    create::{FormatOptions, format_with_slots},
    key_slots::{GuessCost, LockedSlots, NewSlot, Passphrase, UnlockedSlots, first},
    open::{Feature, OpenError, open},
};

fn options() -> (FormatOptions, OpenOptions) {
    (format_options(512), OpenOptions { open_id: [7; 32], ..open_options(&mut Rng::new(1)) })
}

/// The file, which is made if it is not there and that is asked for.
fn golden(name: &str, made_today: &[u8]) -> Vec<u8> {
    let path: PathBuf = tests_folder("golden").join(name);
    if std::env::var_os("GOLDEN_WRITE").is_some() && !path.exists() {
        fs::write(&path, made_today).unwrap();
    }
    let kept = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    // Not a must for ever, but a byte that changes unasked is a format that changes unasked.
    assert!(kept == made_today, "{name}: the bytes have changed");
    kept
}

fn has(io: &SimStorage, feature: Feature) {
    let dump = block_on(io, ublk_integrity::open::dump(io)).unwrap();
    assert!(dump.copies.iter().all(|copy| copy.version == Some(2) && copy.features == [feature]), "{feature:?}");
}

fn key_file(byte: u8) -> Credential {
    Credential::Key(MasterKey::new(&[byte; 32]).unwrap())
}

fn passphrase() -> Credential {
    Credential::Passphrase(Passphrase::new(b"correct horse").unwrap())
}

fn new_slot(label: &str, seed: u64) -> NewSlot {
    let mut rng = Rng::new(seed);
    let [salt, other]: [[u8; 32]; 2] = [rng.bytes(), rng.bytes()];
    let cost = GuessCost { memory_kib: 16, passes: 1, lanes: 1 };
    let nonce = other[..24].try_into().unwrap();
    NewSlot { cost, made_seconds: 1_700_000_000, label: label.parse().unwrap(), salt, nonce }
}

fn unlocked(io: &SimStorage, credential: &Credential) -> UnlockedSlots {
    block_on(io, LockedSlots::read(io)).unwrap().expect("it has slots").unlock(credential).unwrap()
}

/// Slot 0 is opened by a key file, slot 1 by a passphrase; slot 2 was there once.
fn with_slots() -> SimStorage {
    let (format, open) = options();
    let io = on_disk(&format, &[]);
    let slots = first((&format.uuid, &KEY), &key_file(1), &new_slot("file", 1)).unwrap();
    block_on(&io, format_with_slots(&io, slots, &format)).unwrap();
    let mut slots = unlocked(&io, &key_file(1));
    assert_eq!(slots.add(&passphrase(), &new_slot("word", 2)).unwrap(), 1);
    assert_eq!(slots.add(&key_file(3), &new_slot("gone", 3)).unwrap(), 2);
    block_on(&io, slots.write(&io, false)).unwrap();
    let mut slots = unlocked(&io, &key_file(1));
    slots.remove(2).unwrap();
    block_on(&io, slots.write(&io, false)).unwrap();
    let mut lab = Lab::open(io, &open).unwrap();
    fill(&mut lab);
    lab.io
}

#[test]
fn key_slots_open_a_volume_for_ever() {
    let (format, opening) = options();
    let pages = golden("v2-key-slots.pages", &pages_of(&with_slots(), &format));
    for credential in [key_file(1), passphrase()] {
        let io = on_disk(&format, &pages);
        has(&io, Feature::KeyArea);
        let slots = block_on(&io, LockedSlots::read(&io)).unwrap().expect("it has slots");
        assert!(slots.copies_agree() && slots.list().len() == 2, "{:?}", slots.list());
        let volume = block_on(&io, open(&io, &unlocked(&io, &credential).master_key(), &opening)).unwrap();
        holds_what_was_written(&mut Lab::of(io, volume, &opening), "v2-key-slots");
    }
    let io = on_disk(&format, &pages);
    for credential in [key_file(2), key_file(3)] {
        let slots = block_on(&io, LockedSlots::read(&io)).unwrap().expect("it has slots");
        assert!(matches!(slots.unlock(&credential), Err(OpenError::NoSlotOpens { .. })));
    }
}

/// Opens a volume with its anchor.
fn anchored(io: &SimStorage, anchor: &SimAnchor, why: AnchorPurpose, id: u8) -> Result<(Lab, AnchorKeeper), OpenError> {
    let opening = OpenOptions { open_id: [id; 32], ..options().1 };
    let (volume, keeper) = block_on(io, open_anchored(io, &key(), &opening, (anchor, why)))?;
    Ok((Lab::of(io.clone(), volume, &opening), keeper))
}

fn tick(lab: &Lab, keeper: &mut AnchorKeeper, anchor: &SimAnchor) {
    let (mut context, note) = (lab.volume.context(0), note());
    let ticked = keeper.tick((&lab.volume, &lab.io), &mut context, (anchor, &note));
    assert_eq!(block_on(&lab.io, ticked).unwrap(), Ticked::Anchored);
}

/// Writes after the last tick: the power was cut before the next. And what the anchor is, beside the disk: the two slots of a
/// file, or the value of a counter and its era.
fn with_anchor(shape: Shape) -> (SimStorage, Vec<u8>) {
    let (format, _) = options();
    let io = formatted(&format, 1);
    let anchor = SimAnchor::of(shape, &io, 1);
    let (mut lab, mut keeper) = anchored(&io, &anchor, AnchorPurpose::Begin, 7).unwrap();
    let before = anchor.held().body;
    lab.write(7, 1, 9);
    tick(&lab, &mut keeper, &anchor);
    fill(&mut lab);
    let (held, mut beside) = (anchor.held().clone(), Vec::new());
    match shape {
        Shape::Store => {
            beside.resize(2 * SLOT_BYTES, 0);
            let (one, other) = beside.split_at_mut(SLOT_BYTES);
            Slot::fill(one, &held.body.expect("it holds one"));
            Slot::fill(other, &before.expect("it held one"));
        }
        Shape::Counter => beside.extend([held.value.expect("it counts"), held.era].map(u64::to_le_bytes).concat()),
    }
    (io, beside)
}

/// The anchor as it was left.
fn left(shape: Shape, io: &SimStorage, beside: &[u8]) -> SimAnchor {
    let anchor = SimAnchor::of(shape, io, 1);
    match shape {
        Shape::Store => {
            let slots = beside.chunks_exact(SLOT_BYTES).map(|slot| Slot::parse(slot).whole().expect("it is whole"));
            anchor.held().body = slots.max_by_key(|body| generation(Some(body)));
        }
        Shape::Counter => {
            let number = |at: usize| u64::from_le_bytes(beside[at..at + 8].try_into().unwrap());
            anchor.held().value = Some(number(0));
            anchor.held().era = number(8);
        }
    }
    anchor
}

#[test]
fn a_volume_opens_with_its_anchor_for_ever_and_no_older_one_does() {
    let (format, _) = options();
    for (shape, name, beside) in [
        (Shape::Store, "v2-anchored", "v2-anchored.anchor"),
        (Shape::Counter, "v2-anchored-counter", "v2-anchored-counter.value"),
    ] {
        let (today, beside_it) = with_anchor(shape);
        let pages = golden(&format!("{name}.pages"), &pages_of(&today, &format));
        let beside = golden(beside, &beside_it);
        let io = on_disk(&format, &pages);
        has(&io, Feature::Anchored);
        let anchor = left(shape, &io, &beside);
        let (mut lab, mut keeper) = anchored(&io, &anchor, AnchorPurpose::Keep, 8).unwrap();
        holds_what_was_written(&mut lab, name);
        assert!(lab.reads_as(7, 9));
        // Once it has gone on, the disk of before is refused, with its bodies or those of today.
        lab.write(3, 1, 11);
        tick(&lab, &mut keeper, &anchor);
        drop(lab);
        let older = on_disk(&format, &pages);
        if shape == Shape::Counter {
            for at in crate::sim::anchor::BODIES {
                let body = io.disk().peek(Device::Meta, at.start, SLOT_BYTES);
                older.disk().poke(Device::Meta, at.start, &body);
            }
        }
        let refused = anchored(&older, &anchor.at_host(&older), AnchorPurpose::Keep, 9).err();
        assert!(matches!(refused, Some(OpenError::Anchor(AnchorError::Older { .. }))), "{refused:?}");
    }
}

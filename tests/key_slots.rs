//! Key slots: who opens a volume, and that a change of the slots can be cut short anywhere.

use crate::sim::{
    Disk, KEY as VOLUME_KEY, Rng, SimStorage, block_on,
    exec::block_on_steps,
    format_options,
    image::{self, SUPERBLOCK_BYTES, SUPERBLOCKS},
    key, open_options,
};
use sha2::{Digest, Sha256};
use ublk_integrity::{
    Credential, Device, MasterKey,
    create::{FormatOptions, format_with_slots, plan},
    key_slots::{GuessCost, LockedSlots, NewSlot, Passphrase, SlotError, SlotKind, UnlockedSlots, first, unlock},
    open::{OpenError, open},
};

pub(crate) const AREAS: [u64; 2] = [64 << 10, 576 << 10];
pub(crate) const AREA: usize = 32 << 10;
const CHECKSUM: std::ops::Range<usize> = 704..736;

pub(crate) fn file(byte: u8) -> Credential {
    Credential::Key(MasterKey::new(&[byte; 32]).unwrap())
}

pub(crate) fn word(text: &str) -> Credential {
    Credential::Passphrase(Passphrase::new(text.as_bytes()).unwrap())
}

pub(crate) fn new(rng: &mut Rng) -> NewSlot {
    let [salt, other]: [[u8; 32]; 2] = [rng.bytes(), rng.bytes()];
    let cost = GuessCost { memory_kib: 16, passes: 1, lanes: 1 };
    let nonce = other[..24].try_into().unwrap();
    NewSlot { cost, made_seconds: 1, label: "test".parse().unwrap(), salt, nonce }
}

/// A volume whose slot 0 is opened by `file(1)`.
fn formatted(seed: u64) -> SimStorage {
    let options = format_options(512);
    let io = SimStorage::new(Disk::new(plan(&options).unwrap().data_device_bytes, None, 512, seed));
    let slot = new(&mut Rng::new(seed));
    let slots = first((&options.uuid, &VOLUME_KEY), &file(1), &slot).unwrap();
    block_on(&io, format_with_slots(&io, slots, &options)).unwrap();
    io
}

fn locked(io: &SimStorage) -> LockedSlots {
    block_on(io, LockedSlots::read(io)).unwrap().expect("it has slots")
}

fn unlocked(io: &SimStorage, credential: &Credential) -> UnlockedSlots {
    locked(io).unlock(credential).unwrap()
}

pub(crate) fn opens(io: &SimStorage, credential: &Credential) -> bool {
    match locked(io).unlock(credential) {
        Ok(slots) => {
            let options = open_options(&mut Rng::new(3));
            block_on(io, open(io, &slots.master_key(), &options)).unwrap();
            true
        }
        Err(OpenError::NoSlotOpens { .. }) => false,
        Err(e) => panic!("{e}"),
    }
}

pub(crate) fn copies(io: &SimStorage) -> [Vec<u8>; 2] {
    AREAS.map(|at| io.disk().peek(Device::Meta, at, AREA))
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Verb {
    Add,
    Change,
    Remove,
}

/// Slot 0 is opened by `file(1)`, slot 1 by "word"; the second asks.
pub(crate) fn with_two(seed: u64) -> SimStorage {
    let io = formatted(seed);
    let mut slots = unlocked(&io, &file(1));
    assert_eq!(slots.add(&word("word"), &new(&mut Rng::new(seed ^ 1))).unwrap(), 1);
    block_on(&io, slots.write(&io, false)).unwrap();
    io
}

pub(crate) fn changed(io: &SimStorage, change: Verb) -> UnlockedSlots {
    let mut rng = Rng::new(99);
    let mut slots = unlocked(io, &word("word"));
    match change {
        Verb::Add => assert_eq!(slots.add(&file(2), &new(&mut rng)).unwrap(), 2),
        Verb::Change => slots.change(&word("other"), &new(&mut rng)).unwrap(),
        Verb::Remove => slots.remove(0).unwrap(),
    }
    slots
}

/// Which of all credentials open the volume.
fn who(io: &SimStorage) -> [bool; 4] {
    [file(1), file(2), word("word"), word("other")].map(|credential| opens(io, &credential))
}

fn afterwards(change: Verb) -> [bool; 4] {
    match change {
        Verb::Add => [true, true, true, false],
        Verb::Change => [true, false, false, true],
        Verb::Remove => [false, false, true, false],
    }
}

#[test]
fn a_volume_is_opened_by_what_its_slots_say() {
    let io = formatted(1);
    assert_eq!(who(&io), [true, false, false, false]);
    assert!(block_on(&io, unlock(&io, &file(1))).is_ok());
    assert!(matches!(block_on(&io, unlock(&io, &word("word"))), Err(OpenError::NoSlotOpens { .. })));
    let other = MasterKey::new(&[1; 32]).unwrap();
    let options = open_options(&mut Rng::new(3));
    let wrapping_key = block_on(&io, open(&io, &other, &options)).err();
    assert!(matches!(wrapping_key, Some(OpenError::WrongKey { .. })), "what opens a slot is not the volume's key");
    for change in [Verb::Add, Verb::Change, Verb::Remove] {
        let io = with_two(2);
        assert_eq!(who(&io), [true, false, true, false]);
        block_on(&io, changed(&io, change).write(&io, false)).unwrap();
        assert_eq!(who(&io), afterwards(change), "{change:?}");
        let [a, b] = copies(&io);
        assert!(a == b && locked(&io).copies_agree());
    }
}

#[test]
fn a_volume_without_slots_is_opened_by_its_key() {
    let io = crate::sim::formatted(&format_options(512), 1);
    assert!(block_on(&io, LockedSlots::read(&io)).unwrap().is_none());
    let own = Credential::Key(key());
    let found = block_on(&io, unlock(&io, &own)).unwrap();
    block_on(&io, open(&io, &found, &open_options(&mut Rng::new(3)))).unwrap();
    assert!(matches!(block_on(&io, unlock(&io, &word("word"))), Err(OpenError::NoKeySlots)));
}

#[test]
fn a_change_that_is_cut_short_anywhere_is_done_or_not() {
    for change in [Verb::Add, Verb::Change, Verb::Remove] {
        let io = with_two(7);
        let (before, after) = (who(&io), afterwards(change));
        let (mut seen, mut ends) = ([0, 0], false);
        for steps in 0.. {
            for seed in 0..12 {
                let fork = SimStorage::new(io.disk().fork(seed));
                ends = block_on_steps(&fork, changed(&fork, change).write(&fork, false), steps).is_some();
                if seed % 2 == 0 {
                    fork.disk().power_cut()
                } else {
                    fork.disk().kill()
                }
                let now = who(&fork);
                assert!(now == before || now == after, "{change:?} after {steps} steps, seed {seed}: {now:?}");
                seen[usize::from(now == after)] += 1;
                if ends {
                    assert_eq!(now, after);
                }
                // The next change mends what was cut short.
                let asks = if now[2] { word("word") } else { word("other") };
                let mut slots = unlocked(&fork, &asks);
                slots.change(&file(3), &new(&mut Rng::new(seed))).unwrap();
                block_on(&fork, slots.write(&fork, false)).unwrap();
                assert!(locked(&fork).copies_agree() && opens(&fork, &file(3)));
            }
            if ends {
                break;
            }
        }
        assert!(seen.iter().all(|count| *count > 0), "{change:?}: {seen:?}");
    }
}

#[test]
fn what_was_removed_lies_in_neither_copy() {
    let io = with_two(3);
    let slot_0 = copies(&io)[0][768..768 + 160].to_vec();
    let (salt, wrapped) = (&slot_0[56..88], &slot_0[112..160]);
    let holds = |bytes: &[u8]| copies(&io).iter().any(|copy| copy.windows(bytes.len()).any(|window| window == bytes));
    assert!(holds(salt) && holds(wrapped));
    block_on(&io, changed(&io, Verb::Remove).write(&io, false)).unwrap();
    assert!(!holds(salt) && !holds(wrapped));
}

#[test]
fn one_whole_copy_is_enough_and_the_next_change_mends_the_other() {
    for damaged in AREAS {
        let io = with_two(4);
        io.disk().poke(Device::Meta, damaged + 512, &[7; 512]);
        assert!(!locked(&io).copies_agree());
        assert_eq!(who(&io), [true, false, true, false]);
        // The whole one is not written over before the other is whole.
        let fork = SimStorage::new(io.disk().fork(1));
        fork.disk().faults.meta_unwritable = true;
        assert!(matches!(block_on(&fork, changed(&fork, Verb::Add).write(&fork, false)), Err(SlotError::Settle(_))));
        fork.disk().faults.meta_unwritable = false;
        assert_eq!(who(&fork), [true, false, true, false]);
        block_on(&io, changed(&io, Verb::Add).write(&io, false)).unwrap();
        assert!(locked(&io).copies_agree());
    }
    let io = with_two(4);
    AREAS.iter().for_each(|at| io.disk().poke(Device::Meta, *at, &[0; 512]));
    assert!(matches!(block_on(&io, unlock(&io, &file(1))), Err(OpenError::KeyAreaDamaged { .. })));
}

#[test]
fn what_was_changed_meanwhile_is_not_written_over() {
    let io = with_two(8);
    let (one, other) = (changed(&io, Verb::Remove), changed(&io, Verb::Add));
    block_on(&io, one.write(&io, false)).unwrap();
    let writes = io.disk().writes;
    assert!(matches!(block_on(&io, other.write(&io, false)), Err(SlotError::Changed)));
    assert_eq!(io.disk().writes, writes);
    assert!(!who(&io)[0], "what was removed stays so");
    // Another volume has come in between.
    let io = with_two(8);
    let slots = changed(&io, Verb::Add);
    let (options, slot) = (FormatOptions { uuid: [7; 16], ..format_options(512) }, new(&mut Rng::new(5)));
    let others = first((&options.uuid, &[6; 32]), &file(9), &slot).unwrap();
    block_on(&io, format_with_slots(&io, others, &options)).unwrap();
    let before = copies(&io);
    assert!(block_on(&io, slots.write(&io, false)).is_err());
    assert!(copies(&io) == before && opens(&io, &file(9)));
}

#[test]
fn slots_of_a_volume_that_is_not_served_are_left_alone() {
    let io = with_two(9);
    let slots = changed(&io, Verb::Remove);
    let before = copies(&io);
    for at in SUPERBLOCKS {
        let mut copy = io.disk().peek(Device::Meta, at, SUPERBLOCK_BYTES);
        copy[12] |= 1 << 5;
        image::sign_block(&mut copy);
        io.disk().poke(Device::Meta, at, &copy);
    }
    let refused = block_on(&io, slots.write(&io, false));
    assert!(matches!(refused, Err(SlotError::Open(OpenError::NotServed { .. }))), "{refused:?}");
    assert!(copies(&io) == before);
}

#[test]
fn a_passphrase_on_what_is_no_volume_is_told_what_it_is() {
    let io = formatted(1);
    let told = |io: &SimStorage| block_on(io, unlock(io, &word("word"))).map(drop).unwrap_err();
    SUPERBLOCKS.iter().for_each(|at| io.disk().poke(Device::Meta, at + 100, &[1; 4]));
    assert!(matches!(told(&io), OpenError::Damaged));
    SUPERBLOCKS.iter().for_each(|at| io.disk().poke(Device::Meta, *at, &[0; 512]));
    assert!(matches!(told(&io), OpenError::NotAVolume));
}

#[test]
fn a_forged_area_is_refused() {
    // With a checksum that holds.
    let forged = |io: &SimStorage, copy: usize, at: usize| {
        let mut bytes = copies(io)[copy].clone();
        bytes[at] ^= 1;
        bytes[CHECKSUM].fill(0);
        let mac = bytes[736..768].to_vec();
        bytes[736..768].fill(0);
        let sum = Sha256::digest(&bytes);
        bytes[CHECKSUM].copy_from_slice(&sum);
        bytes[736..768].copy_from_slice(&mac);
        io.disk().poke(Device::Meta, AREAS[copy], &bytes);
    };
    let refused = |io: &SimStorage| match block_on(io, unlock(io, &file(1))) {
        Err(e @ OpenError::Tampered { .. }) => e.to_string(),
        other => panic!("{:?}", other.map(|_| ())),
    };
    // Both copies alike; the second slot's name, and its salt.
    for at in [768 + 4000 + 24, 768 + 4000 + 60] {
        let io = with_two(5);
        [0, 1].into_iter().for_each(|copy| forged(&io, copy, at));
        assert!(refused(&io).contains("key area"));
    }
    // Two that contradict each other.
    let io = with_two(5);
    forged(&io, 1, 768 + 4000 + 24);
    assert!(refused(&io).contains("key area"));
    // One of another volume is none.
    let io = with_two(5);
    [0, 1].into_iter().for_each(|copy| forged(&io, copy, 16));
    assert!(matches!(block_on(&io, unlock(&io, &file(1))), Err(OpenError::KeyAreaDamaged { .. })));
}

#[test]
fn slots_have_an_end_and_one_is_always_left() {
    let io = formatted(6);
    let mut slots = unlocked(&io, &file(1));
    assert!(matches!(slots.remove(0), Err(SlotError::Own(0))));
    assert!(matches!(slots.remove(1), Err(SlotError::Empty(1))));
    assert!(matches!(slots.remove(8), Err(SlotError::Empty(8))));
    let mut rng = Rng::new(1);
    for slot in 1..8 {
        assert_eq!(slots.add(&file(10 + slot), &new(&mut rng)).unwrap(), usize::from(slot));
    }
    assert!(matches!(slots.add(&file(20), &new(&mut rng)), Err(SlotError::Full(_))));
    block_on(&io, slots.write(&io, false)).unwrap();
    assert!((11..18).all(|byte| opens(&io, &file(byte))));
    assert_eq!(locked(&io).list().len(), 8);
}

/// Makes the checksum good, as anybody can; not the MAC.
fn with_checksum(area: &mut [u8]) {
    area[CHECKSUM].fill(0);
    let mac = area[736..768].to_vec();
    area[736..768].fill(0);
    let sum = Sha256::digest(&*area);
    area[CHECKSUM].copy_from_slice(&sum);
    area[736..768].copy_from_slice(&mac);
}

/// Where a change says something: the header, or what a slot has before its reserved bytes.
fn any_place(rng: &mut Rng) -> usize {
    match rng.below(10) {
        0..3 => rng.index(48),
        3 => 700 + rng.index(68),
        4 => rng.index(AREA),
        _ => 768 + 4000 * rng.index(3) + rng.index(170),
    }
}

/// Neither a panic nor another key, whatever is in the copies; and no guess that takes more than was ever asked for is begun
/// before all that can be known beforehand is. `KEY_AREA_SEED` replays one, `KEY_AREA_SEEDS` says how many.
#[test]
fn whatever_lies_in_a_key_area_is_an_error_or_opens_by_whom_it_did() {
    let setting = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    let only = setting("KEY_AREA_SEED");
    let seeds = only.map_or(0..setting("KEY_AREA_SEEDS").unwrap_or(3000), |seed| seed..seed + 1);
    let whole = with_two(11);
    let (mut opened, mut refused, mut unread) = (0, 0, 0);
    for seed in seeds {
        let (mut rng, io) = (Rng::new(seed), SimStorage::new(whole.disk().fork(seed)));
        let alike = rng.chance(50);
        let mut copies = copies(&io);
        for area in &mut copies {
            for _ in 0..rng.below(4) {
                let at = any_place(&mut rng);
                area[at] = match rng.below(3) {
                    0 => area[at] ^ (1 << rng.below(8)),
                    1 => 0,
                    _ => rng.below(256) as u8,
                };
            }
            if rng.chance(80) {
                with_checksum(area);
            }
        }
        if alike {
            copies[1] = copies[0].clone();
        }
        AREAS.iter().zip(&copies).for_each(|(at, area)| io.disk().poke(Device::Meta, *at, area));
        let Ok(Some(slots)) = block_on(&io, LockedSlots::read(&io)) else {
            unread += 1;
            continue;
        };
        let mut asked = vec![file(1), file(2)];
        for slot in slots.list() {
            let SlotKind::Passphrase(GuessCost { memory_kib, passes, lanes }) = slot.kind else { continue };
            assert!(memory_kib <= 1 << 20 && (1..=16).contains(&passes) && (1..=16).contains(&lanes), "seed {seed}");
            // What is asked for there may be had, and takes long.
            if memory_kib <= 1 << 10 {
                asked.push(word("word"));
            }
        }
        for credential in &asked {
            match block_on(&io, LockedSlots::read(&io)).unwrap().unwrap().unlock(credential) {
                Ok(slots) => {
                    opened += 1;
                    let options = open_options(&mut Rng::new(3));
                    block_on(&io, open(&io, &slots.master_key(), &options)).unwrap();
                    assert!(
                        copies.iter().any(|copy| *copy == self::copies(&whole)[0]),
                        "seed {seed}: the MAC is of all of it"
                    );
                }
                Err(OpenError::NoSlotOpens { .. } | OpenError::Tampered { .. }) => refused += 1,
                Err(e) => panic!("seed {seed}: {e}"),
            }
        }
    }
    println!("{opened} opened, {refused} opened nothing, {unread} could not be read");
    assert!(only.is_some() || (opened > 0 && refused > 0 && unread > 0));
}

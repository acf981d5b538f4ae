//! Changes of key slots that are cut short, opens in the middle of them, and copies that can't be read: the volume opens.

use super::*;
use crate::sim::faults::BadRange;
use ublk_integrity::anchor::KeyAreaStep;

#[test]
fn a_change_that_is_cut_short_anywhere_leaves_a_volume_that_opens_and_the_next_one_ends_it() {
    for shape in SHAPES {
        for verb in [Verb::Add, Verb::Change, Verb::Remove] {
            let before = Slots::new(shape);
            let older = copies(&before.io);
            let done = before.fork(1);
            done.change(verb).unwrap();
            let newer = copies(&done.io);
            let mut seen = [0, 0];
            for steps in 0..1000 {
                let mut slots = before.fork(steps);
                let is_done = slots.change_for(changed(&slots.io, verb), steps);
                let crash = if steps % 2 == 0 { Disk::power_cut } else { Disk::kill };
                crash(&mut slots.io.disk());
                let as_left = slots.fork(3);
                // What lies there opens it, the first time and the second.
                let opener = slots.opener([word("word"), word("other")], (shape, verb, steps));
                drop(slots.open(&opener).expect("and once more"));
                // Somebody goes on where it was cut short, or looks whether there is something to do.
                let third = file(3);
                for goes_on in [true, false] {
                    let mut next = as_left.fork(4);
                    let mut unlocked = next.unlocked();
                    if goes_on {
                        unlocked.change(&file(3), &new(&mut Rng::new(steps))).unwrap();
                    }
                    next.write(unlocked).unwrap();
                    let [a, now] = copies(&next.io);
                    assert!(a == now);
                    let is_changed = now == newer[0];
                    drop(next.open(if goes_on { &third } else { &opener }).unwrap());
                    // From then on no other opens it.
                    for other in [&older, &newer].into_iter().filter(|other| other[0] != now) {
                        next.put_back(other);
                        let of_it =
                            if matches!(verb, Verb::Change) && other == &newer { word("other") } else { word("word") };
                        next.is_refused(&[of_it]);
                    }
                    seen[usize::from(is_changed)] += usize::from(!goes_on);
                    assert!(is_changed || goes_on || !is_done);
                }
                if is_done {
                    break;
                }
            }
            assert!(seen.iter().all(|count| *count > 0), "{shape:?} {verb:?}: {seen:?}");
        }
    }
}

/// Two commands are killed one after the other, wherever they are; then the power goes. What the first has written may have been in
/// the disk's cache alone.
#[test]
fn changes_that_are_killed_one_after_the_other_leave_a_volume_that_opens() {
    for shape in SHAPES {
        let before = Slots::new(shape);
        for first in 0.. {
            let mut is_done = false;
            for seed in 0..8 {
                let killed = before.fork(seed);
                is_done = killed.change_for(changed(&killed.io, Verb::Change), first);
                killed.io.disk().kill();
                for second in 0.. {
                    let mut slots = killed.fork(second);
                    let mut unlocked = slots.unlocked();
                    unlocked.change(&file(3), &new(&mut Rng::new(second))).unwrap();
                    let both = slots.change_for(unlocked, second);
                    slots.io.disk().power_cut();
                    slots.opener([word("word"), word("other"), file(3)], (shape, first, seed, second));
                    if both {
                        break;
                    }
                }
            }
            if is_done {
                break;
            }
        }
    }
}

/// A daemon dies, and the next one opens the volume, while a command is about to write the slots.
#[test]
fn an_open_in_the_middle_of_a_change_leaves_what_the_anchor_permits_as_it_is() {
    for shape in SHAPES {
        let mut slots = Slots::new(shape);
        let (io, anchor) = (slots.io.clone(), slots.anchor.clone());
        let prepared = block_on(&io, changed(&io, Verb::Change).prepare(&io, false)).unwrap();
        let change = prepared.write_kept(&io, async |found, step| match step {
            KeyAreaStep::Begin(_) => {
                prepared.volume().keep_key_area((&anchor, &note()), (found, step)).await.unwrap();
                drop(slots.open(&word("word")).unwrap());
                Ok(())
            }
            _ => Err("the daemon is gone"),
        });
        assert!(matches!(block_on(&io, change), Err(ChangeError::Behind(_))));
        drop(slots.open(&word("other")).expect("the new slots are permitted"));
        assert_eq!(slots.anchor_status().next_key_area_generation, Some(3));
        let unlocked = slots.unlocked();
        slots.write(unlocked).unwrap();
        assert_eq!(slots.anchor_status().next_key_area_generation, None, "the next command has ended it");
    }
}

/// What a change that was cut short has left: two copies that differ. Now the one can't be read for a moment, now the other.
#[test]
fn of_two_copies_that_differ_each_opens_the_volume_whichever_can_be_read() {
    for shape in SHAPES {
        let slots = Slots::new(shape);
        let older = copies(&slots.io);
        let done = slots.fork(1);
        done.change(Verb::Change).unwrap();
        let newer = copies(&done.io);
        let mut slots = (0..1000)
            .find_map(|n| {
                let fork = slots.fork(n);
                fork.change_for(changed(&fork.io, Verb::Change), n / 8);
                fork.io.disk().kill();
                (copies(&fork.io) == [newer[0].clone(), older[1].clone()]).then_some(fork)
            })
            .expect("one is written before the other");
        let unreadable = |slots: &Slots, copies: &[u64]| {
            let bad = copies.iter().map(|at| BadRange::unreadable(Device::Meta, *at..at + 512));
            slots.io.disk().bad_ranges = bad.collect();
        };
        for (bad, opens) in [(AREAS[0], "word"), (AREAS[1], "other"), (AREAS[0], "word")] {
            unreadable(&slots, &[bad]);
            drop(slots.open(&word(opens)).unwrap());
        }
        // Somebody changes what he can read, and is cut short as soon as the anchor has heard of it.
        for steps in 0.. {
            let mut fork = slots.fork(3);
            unreadable(&fork, &AREAS[..1]);
            fork.io.disk().bad_ranges[0].until_written = true;
            let mut unlocked = fork.unlocked();
            unlocked.change(&file(3), &new(&mut Rng::new(steps))).unwrap();
            let is_done = fork.change_for(unlocked, steps);
            fork.io.disk().power_cut();
            unreadable(&fork, &[]);
            fork.opener([word("word"), word("other"), file(3)], (shape, steps));
            if is_done {
                assert!(steps > 5);
                break;
            }
        }
        // Where the newer one is permitted alone the older one is not written over it.
        let mut done = done.fork(4);
        done.put_back(&[newer[0].clone(), older[1].clone()]);
        unreadable(&done, &AREAS[..1]);
        let unlocked = done.unlocked();
        assert!(matches!(done.write(unlocked), Err(ChangeError::Anchor(AnchorError::KeyArea { .. }))));
        assert!(copies(&done.io) == [newer[0].clone(), older[1].clone()], "nothing was written");
        unreadable(&done, &[]);
        drop(done.open(&word("other")).unwrap());
    }
}

/// Somebody shows opens the slots of before, cuts them short, and keeps the bodies that they have prepared. When a command that was cut
/// short has been ended by the next, none of them counts.
#[test]
fn a_body_that_was_prepared_and_kept_brings_no_removed_slot_back() {
    let before = Slots::new(Shape::Counter);
    let older = copies(&before.io);
    let (mut kept, mut ended, mut tried) = (Vec::new(), 0, 0);
    for steps in 0..1000 {
        let state = before.fork(steps);
        let is_done = state.change_for(changed(&state.io, Verb::Remove), steps);
        state.io.disk().kill();
        let value = state.anchor.held().value;
        for cut in 0..1000 {
            let mut shown = state.fork(cut);
            shown.put_back(&older);
            let (options, opener) = (shown.options(), file(1));
            let open = open_unlocked(&shown.io, &opener, &options, (&shown.anchor, AnchorPurpose::Keep));
            let is_open = block_on_steps(&shown.io, open, cut).is_some();
            shown.io.disk().kill();
            if is_open || shown.anchor.held().value != value {
                break;
            }
            kept.push(shown.io);
        }
        // The same once more: where it was done already there is nothing to do.
        let again = state.unlocked();
        state.write(again).unwrap();
        if opens_nothing(&state, &file(1)) {
            ended += 1;
            for disk in &kept {
                let io = SimStorage::new(disk.disk().fork(3));
                let anchor = state.anchor.fork(&io);
                let mut shown = Slots { io, anchor, rng: Rng::new(steps) };
                assert!(shown.open(&file(1)).is_err(), "after {steps} steps a removed slot opens the volume");
                tried += 1;
            }
        }
        if is_done {
            break;
        }
    }
    assert!(ended > 3 && tried > 100, "{ended}, {tried}");
}

fn opens_nothing(slots: &Slots, credential: &Credential) -> bool {
    block_on(&slots.io, LockedSlots::read(&slots.io)).unwrap().unwrap().unlock(credential).is_err()
}

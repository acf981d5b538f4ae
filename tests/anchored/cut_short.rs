//! What is done with an anchor, cut short at each of its steps: what is there then opens, or the same is done again.

use super::{directed::Small, *};
use crate::sim::anchor::Shape;
use ublk_integrity::{anchor::MoveError, open::VerifiedVolume};

/// Does it with a power cut after so many steps, for each number of steps until it is done; then looks at what is left.
fn at_each_step(purpose: AnchorPurpose, prepare: fn(&mut Small), look: fn(&mut Small, bool)) {
    [Shape::Store, Shape::Counter].into_iter().for_each(|shape| at_each_step_of(shape, purpose, prepare, look));
}

fn at_each_step_of(shape: Shape, purpose: AnchorPurpose, prepare: fn(&mut Small), look: fn(&mut Small, bool)) {
    for steps in 0..1000 {
        let mut small = Small::shaped(shape, format_options(4096));
        prepare(&mut small);
        let options = small.options(Access::ReadWrite);
        let key = key();
        let opened =
            block_on_steps(&small.io, open_anchored(&small.io, &key, &options, (&small.anchor, purpose)), steps);
        let is_done = opened.map(|opened| drop(opened.unwrap())).is_some();
        small.io.disk().power_cut();
        look(&mut small, is_done);
        if is_done {
            assert!(steps > 8, "it took {steps} steps");
            return;
        }
    }
    panic!("it does not end");
}

#[test]
fn a_reset_is_done_or_done_again() {
    let put_back = |small: &mut Small| {
        let older = small.snapshot();
        drop(small.open(AnchorPurpose::Keep).unwrap());
        small.put_back(&older);
    };
    at_each_step(AnchorPurpose::Reset, put_back, |small, is_done| match small.open(AnchorPurpose::Keep) {
        Ok((_, keeper)) => assert_eq!(keeper.status().resets, 1),
        Err(OpenError::Anchor(AnchorError::Older { .. } | AnchorError::Bare { .. })) if !is_done => {
            drop(small.open(AnchorPurpose::Reset).expect("it is done again"));
            drop(small.open(AnchorPurpose::Keep).expect("and counts"));
        }
        Err(e) => panic!("{e}"),
    });
}

#[test]
fn an_anchor_that_ends_is_there_or_is_not_needed() {
    at_each_step(
        AnchorPurpose::End,
        |_| {},
        |small, is_done| {
            let plain = small.options(Access::ReadWrite);
            let ended = match reopen(&small.io, &plain) {
                Ok(_) => true,
                Err(OpenError::Anchor(AnchorError::Needed)) => false,
                Err(e) => panic!("{e}"),
            };
            assert!(ended || !is_done);
            if !ended {
                drop(small.open(AnchorPurpose::Keep).expect("what a crash leaves is not refused"));
                drop(small.open(AnchorPurpose::End).expect("it is done again"));
            }
        },
    );
}

#[test]
fn an_anchor_that_moves_is_in_one_place_at_least_and_in_one_once_it_is_done() {
    for shapes in [(Shape::Store, Shape::Store), (Shape::Store, Shape::Counter), (Shape::Counter, Shape::Store)] {
        moves_at_each_step(shapes);
    }
    // Their bodies would lie in one place.
    let mut small = Small::shaped(Shape::Counter, format_options(4096));
    let (to, options) = (SimAnchor::of(Shape::Counter, &small.io, 3), small.options(Access::ReadOnly));
    let moved = block_on(&small.io, async {
        let verified = VerifiedVolume::read(&small.io, &key(), &options).await.unwrap();
        verified.move_anchor((&small.anchor, &to), &note()).await
    });
    assert!(matches!(moved, Err(MoveError::Counters)) && to.held().told() == (None, None));
    drop(small.open(AnchorPurpose::Keep).expect("nothing was moved"));
}

/// Wherever a volume has been meanwhile, the place that it comes back to goes on from what it holds.
#[test]
fn an_anchor_that_moves_away_and_back_opens_everywhere() {
    for (home, away) in [(Shape::Store, Shape::Store), (Shape::Store, Shape::Counter), (Shape::Counter, Shape::Store)] {
        let mut small = Small::shaped(home, format_options(4096));
        let mut other = SimAnchor::of(away, &small.io, 3);
        for _ in 0..4 {
            let options = small.options(Access::ReadOnly);
            let moved = block_on(&small.io, async {
                let verified = VerifiedVolume::read(&small.io, &key(), &options).await.unwrap();
                verified.move_anchor((&small.anchor, &other), &note()).await
            });
            moved.expect("nobody else is there");
            std::mem::swap(&mut small.anchor, &mut other);
            for _ in 0..20 {
                drop(small.open(AnchorPurpose::Keep).expect("it is the newest state"));
            }
        }
    }
}

fn moves_at_each_step((from, to): (Shape, Shape)) {
    for steps in 0..1000 {
        let mut small = Small::shaped(from, format_options(4096));
        let to = SimAnchor::of(to, &small.io, 3);
        let options = small.options(Access::ReadOnly);
        let key = key();
        let moving = async {
            let verified = VerifiedVolume::read(&small.io, &key, &options).await.unwrap();
            verified.move_anchor((&small.anchor, &to), &note()).await.unwrap();
        };
        let is_done = block_on_steps(&small.io, moving, steps).is_some();
        let from = std::mem::replace(&mut small.anchor, to.clone());
        let moved = small.open(AnchorPurpose::Keep).map(drop);
        // Whoever opens with one leaves the other behind: each is tried on the disk as the power cut has left it.
        if moved.is_err() {
            let is_unknown = matches!(moved, Err(OpenError::Anchor(AnchorError::Absent | AnchorError::Bare { .. })));
            assert!(!is_done && is_unknown, "{moved:?}");
            small.anchor = from;
            drop(small.open(AnchorPurpose::Keep).expect("nothing was moved"));
        } else if is_done {
            small.anchor = from;
            let left = small.open(AnchorPurpose::Keep).map(drop);
            assert!(matches!(left, Err(OpenError::Anchor(AnchorError::MovedAway { .. }))), "{left:?}");
            return;
        }
    }
    panic!("it does not end");
}

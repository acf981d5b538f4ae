//! What an anchor that says no comes to: the exit code, and what to do about it.

use super::{Exit, Failure};
use ublk_integrity::{
    anchor::{AnchorError, KeepError, MoveError},
    key_slots::ChangeError,
};

/// What an anchor that says no stands for.
pub(super) fn exit_of_anchor(e: &AnchorError) -> Exit {
    match e {
        AnchorError::Needed => Exit::Arguments,
        AnchorError::Older { .. } | AnchorError::Bare { .. } | AnchorError::KeyArea { .. } | AnchorError::Damaged => {
            Exit::Integrity
        }
        AnchorError::Taken { .. } | AnchorError::Present { .. } | AnchorError::Begun => Exit::Busy,
        AnchorError::Away(_)
        | AnchorError::Absent
        | AnchorError::Unread(_)
        | AnchorError::Device(_)
        | AnchorError::OtherVolume(_)
        | AnchorError::OtherKey
        | AnchorError::Unknown(_)
        | AnchorError::MovedAway { .. } => Exit::Device,
    }
}

/// What to do about an anchor that says no.
pub(super) fn about_anchor(e: &AnchorError) -> &'static str {
    match e {
        AnchorError::Needed => ": name it with --anchor; what only reads can do --without-anchor",
        AnchorError::Away(_) => ": nothing is opened without it; try again when it is there",
        AnchorError::Absent => ": is it another one? `anchor reset` begins again, with what the devices hold now",
        AnchorError::Begun => {
            ": name that one, or `anchor move` it; if it is lost, or was never begun, `anchor reset` begins again"
        }
        AnchorError::Present { .. } => ": it is begun; of what is no more, `anchor remove` ends it",
        AnchorError::Damaged => ": `anchor reset` begins again, with what the devices hold now",
        AnchorError::OtherVolume(_) | AnchorError::OtherKey => ": name another",
        AnchorError::Unknown(_) => ": a newer program knows it",
        AnchorError::MovedAway { .. } => ": name the place that it is in now",
        AnchorError::Older { .. } | AnchorError::Bare { .. } => {
            ": put back the newest disk; if this state is meant, `anchor reset --accept-rollback` takes it"
        }
        AnchorError::KeyArea { .. } => {
            ": put back the newest disk; if these key slots are meant, `anchor reset --accept-rollback` takes them"
        }
        AnchorError::Device(_) => "",
        AnchorError::Unread(_) => ": what can be read is exported with --without-anchor",
        AnchorError::Taken { .. } => ": nothing was served here",
    }
}

impl From<AnchorError> for Failure {
    fn from(e: AnchorError) -> Self {
        Self::new(exit_of_anchor(&e), format_args!("{e}{}", about_anchor(&e)))
    }
}

impl From<MoveError> for Failure {
    fn from(e: MoveError) -> Self {
        let (of, what_to_do) = match &e {
            MoveError::From(of) | MoveError::To(of) => (of, about_anchor(of)),
            MoveError::Both(of) => (of, ": name the new one from now on, and take the old one away"),
            MoveError::Counters => return Self::new(Exit::Arguments, &e),
        };
        Self::new(exit_of_anchor(of), format_args!("{e}{what_to_do}"))
    }
}

impl From<KeepError> for Failure {
    fn from(e: KeepError) -> Self {
        match e {
            KeepError::Anchor(e) => e.into(),
            KeepError::Latched(why) => why.into(),
        }
    }
}

impl<E: Into<Failure>> From<ChangeError<E>> for Failure {
    fn from(e: ChangeError<E>) -> Self {
        let said = |of: E, change: fn(String) -> ChangeError<String>| {
            let Self { exit, message, .. } = of.into();
            Self::new(exit, change(message))
        };
        match e {
            ChangeError::Slots(e) => e.into(),
            ChangeError::Anchor(of) => said(of, ChangeError::Anchor),
            ChangeError::Behind(of) => said(of, ChangeError::Behind),
        }
    }
}

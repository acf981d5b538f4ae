//! The anchor: a place outside the disk that holds how far a volume has got, so that an older copy of all of the disk is
//! refused.
//!
//! ```text
//!   open:    judge ─> intent ─> recovery's pages, superblock ─> commit ─> served
//!   running: flush ─> its entry in a durable record ─> the point behind it
//!   stop:    close ─> the last point
//! ```
//!
//! `judge.rs` and `moving.rs` decide, without I/O; `opening.rs` and `keeper.rs` ask the anchor. Why that order: `docs/crash-safety.md`,
//! "The anchor". An anchor is a store of bodies, or a counter with room for bodies on the disk (`counter.rs`).

mod counter;
mod error;
mod exchange;
mod judge;
mod keeper;
mod moving;
mod offline;
mod opening;
mod slot;

pub use crate::format::{ANCHOR_BODY_BYTES, KeyAreaMark};
pub use counter::{BodyRoom, Counter, CounterAnchor};
pub use error::AnchorError;
pub use keeper::{AnchorKeeper, AnchorStatus, KeepError, Ticked};
pub use offline::MoveError;
pub(crate) use offline::{keep_key_area, move_to, show};
pub(crate) use opening::Opening;
pub use slot::{SLOT_BYTES, Slot};

use crate::DeviceError;
use std::future::{Future, ready};

/// The body of a volume, as an anchor holds it: signed, so that the anchor need not be believed what it says, only that it keeps it.
pub type AnchorBytes = [u8; ANCHOR_BODY_BYTES];

/// What an anchor is asked for while the key slots are changed. Whatever it is, it must permit the key area that lies there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KeyAreaStep {
    /// To say whether it does.
    Judge,
    /// To permit that one and this, which is about to be written in its place, and no third.
    Begin(KeyAreaMark),
    /// To permit that one alone.
    End,
}

/// What has become of a [`replace`](Anchor::replace).
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Replaced {
    /// The anchor holds the new body, durable.
    Done,
    /// It holds another than the one that was expected: nothing was done.
    Conflict,
    /// It can't be told: the body may be there, or may come yet. Why.
    Unknown(String),
    /// Of a counter alone: the body could not be written to the metadata device, and nothing was counted. What else was written
    /// there may be lost: it is not told again.
    Failed(DeviceError),
}

/// What an anchor holds of a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Held {
    /// Nothing.
    Nothing,
    /// This body.
    Body(AnchorBytes),
    /// Of a counter alone: this body is written, and has not been counted yet. Its generation is one more than the counter's
    /// value.
    Prepared(AnchorBytes),
    /// Of a counter alone: its body is not on the disk.
    Bare {
        /// What the counter says.
        value: u64,
        /// The newest of the bodies that are there instead.
        older: Option<AnchorBytes>,
    },
}

impl Held {
    /// Of a store.
    pub fn of(body: Option<AnchorBytes>) -> Self {
        body.map_or(Self::Nothing, Self::Body)
    }

    /// The body that speaks for the volume.
    pub fn body(&self) -> Option<&AnchorBytes> {
        match self {
            Self::Body(body) | Self::Prepared(body) => Some(body),
            Self::Nothing | Self::Bare { .. } => None,
        }
    }

    /// The generation that a [`replace`](Anchor::replace) has to expect; 0: of none.
    pub fn counted(&self) -> u64 {
        match self {
            Self::Nothing => 0,
            Self::Body(body) => generation(Some(body)),
            Self::Prepared(body) => generation(Some(body)).saturating_sub(1),
            Self::Bare { value, .. } => *value,
        }
    }

    /// Where the first body goes in a store that holds this. Generations go on from what is there: a store of an agent gives the
    /// next body the next one, and what comes late expects less. Where nothing is there they go on from `above`.
    pub fn beginning(&self, above: u64) -> Beginning {
        let expected = self.counted();
        let newest = if expected == 0 { above } else { expected };
        // What is damaged may claim any.
        let newest = Some(newest).filter(|newest| *newest < u64::MAX / 2).unwrap_or(0);
        Beginning { expected, generation: newest + 1, era: 0 }
    }
}

/// Where the bodies of a volume begin in an anchor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Beginning {
    /// The generation that the first [`replace`](Anchor::replace) has to expect; 0: of none.
    pub expected: u64,
    /// The generation of the first body.
    pub generation: u64,
    /// Of a [counter](Counter::era).
    pub era: u64,
}

/// A trusted place with room for a body of each volume, by its UUID. Each call ends: an implementation that asks over a network has a limit of its own.
///
/// What has a default here is for [counters](CounterAnchor): a store does nothing.
pub trait Anchor {
    /// What it holds. The error: why it can't be had now.
    fn load(&self, volume: &[u8; 16]) -> impl Future<Output = Result<Held, String>>;

    /// Has `body` take the place of the one with generation `expected` (0: of none), or leaves things as they are. Never is a
    /// body put in the place of one with another generation, however late the request arrives.
    fn replace(&self, volume: &[u8; 16], expected: u64, body: &AnchorBytes) -> impl Future<Output = Replaced>;

    /// Whether it is a counter: its bodies lie on the volume's disk, as those of another one would.
    fn is_counter(&self) -> bool {
        false
    }

    /// The era of the counter that is there, as [`Counter::era`] has it; 0 where bodies are held.
    fn era(&self, _volume: &[u8; 16]) -> impl Future<Output = Result<u64, String>> {
        ready(Ok(0))
    }

    /// Ends what was begun: the prepared body of this generation counts from then on.
    fn forward(&self, _volume: &[u8; 16], _generation: u64) -> impl Future<Output = Replaced> {
        ready(Replaced::Done)
    }

    /// Gives up a place that nobody goes by any more, and whose body has this generation. A store keeps that body, which says so. The
    /// error: why a counter stays.
    fn retire(&self, _volume: &[u8; 16], _generation: u64) -> impl Future<Output = Result<(), String>> {
        ready(Ok(()))
    }

    /// Has it hold no body that was ever made for the volume, so that the next one is a first; `held` is what it holds now.
    /// A store has nothing to do for that. Where it holds nothing, generations begin above `above`. The error: why it can't be done now.
    fn begin(&self, _volume: &[u8; 16], held: &Held, above: u64) -> impl Future<Output = Result<Beginning, String>> {
        ready(Ok(held.beginning(above)))
    }
}

/// No anchor: for a volume that has none.
#[derive(Clone, Copy, Debug)]
pub enum NoAnchor {}

impl Anchor for NoAnchor {
    async fn load(&self, _: &[u8; 16]) -> Result<Held, String> {
        match *self {}
    }
    async fn replace(&self, _: &[u8; 16], _: u64, _: &AnchorBytes) -> Replaced {
        match *self {}
    }
}

/// What a body says besides, for messages.
#[derive(Clone, Debug, Default)]
pub struct AnchorNote {
    /// The time, in seconds since 1970.
    pub seconds: u64,
    /// The name of this host: its first 64 bytes count.
    pub host: String,
}

/// What an open does with the anchor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AnchorPurpose {
    /// The devices must hold what the anchor says; from then on it says that this open is the newest.
    Keep,
    /// There is none yet: what the devices hold is what it says from now on.
    Begin,
    /// The same where there is one, whatever it says: an older state is accepted, on purpose.
    Reset,
    /// As [`Keep`](Self::Keep), and the volume has no anchor from then on.
    End,
}

/// An anchor, and what an open does with it.
pub struct AnchorUse<'a, A> {
    /// The anchor.
    pub anchor: &'a A,
    /// What for.
    pub purpose: AnchorPurpose,
    /// What its bodies say besides.
    pub note: AnchorNote,
}

/// Of which [counter](Counter::era) a body claims to be.
fn era(body: &AnchorBytes) -> u64 {
    crate::format::claimed_era(body)
}

/// The generation that a body claims to have: what a store compares. 0 for none.
pub fn generation(body: Option<&AnchorBytes>) -> u64 {
    body.map_or(0, crate::format::claimed_generation)
}

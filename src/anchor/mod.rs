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
//! "The anchor".

mod error;
mod exchange;
mod judge;
mod keeper;
mod moving;
mod offline;
mod opening;

pub use crate::format::ANCHOR_BODY_BYTES;
pub use error::AnchorError;
pub use keeper::{AnchorKeeper, AnchorStatus, KeepError, Ticked};
pub use offline::MoveError;
pub(crate) use offline::{move_to, show};
pub(crate) use opening::Opening;

use std::future::Future;

/// The body of a volume, as an anchor holds it: signed, so that the anchor need not be believed what it says, only that it keeps it.
pub type AnchorBytes = [u8; ANCHOR_BODY_BYTES];

/// What has become of a [`replace`](Anchor::replace).
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Replaced {
    /// The anchor holds the new body, durable.
    Done,
    /// It holds another than the one that was expected: nothing was done.
    Conflict,
    /// It can't be told: the body may be there, or may come yet. Why.
    Unknown(String),
}

/// A trusted place with room for a body of each volume, by its UUID. Each call ends: an implementation that asks over a network has a limit of its own.
pub trait Anchor {
    /// The body, if there is one. The error: why it can't be had now.
    fn load(&self, volume: &[u8; 16]) -> impl Future<Output = Result<Option<AnchorBytes>, String>>;

    /// Has `body` take the place of the one with generation `expected` (0: of none), or leaves things as they are. Never is a
    /// body put in the place of one with another generation, however late the request arrives.
    fn replace(&self, volume: &[u8; 16], expected: u64, body: &AnchorBytes) -> impl Future<Output = Replaced>;
}

/// No anchor: for a volume that has none.
#[derive(Clone, Copy, Debug)]
pub enum NoAnchor {}

impl Anchor for NoAnchor {
    async fn load(&self, _: &[u8; 16]) -> Result<Option<AnchorBytes>, String> {
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

/// The generation that a body claims to have: what a store compares. 0 for none.
pub fn generation(body: Option<&AnchorBytes>) -> u64 {
    body.map_or(0, crate::format::claimed_generation)
}

/// The SHA-256 of a body: for a place that keeps several, and has to know which of them is whole.
pub fn checksum(body: &AnchorBytes) -> [u8; 32] {
    use sha2::{Digest as _, Sha256};
    Sha256::digest(body).into()
}

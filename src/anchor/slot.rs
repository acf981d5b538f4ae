//! A slot with a body in it: a file of an anchor has two, and a counter has two on the metadata device. docs/format.md has the
//! bytes.

use super::{ANCHOR_BODY_BYTES, AnchorBytes};
use sha2::{Digest as _, Sha256};

/// Bytes of a slot: what a disk writes at once, or more.
pub const SLOT_BYTES: usize = 4096;

/// A slot as it was read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Slot {
    /// Nothing was ever written.
    Empty,
    /// Its checksum holds.
    Whole(AnchorBytes),
    /// A write was cut short, or it has rotted.
    Damaged(AnchorBytes),
}

impl Slot {
    /// From its [`SLOT_BYTES`] bytes.
    pub fn parse(bytes: &[u8]) -> Self {
        let (body, rest) = bytes.split_first_chunk().expect("a slot is larger than a body");
        let (sum, rest) = rest.split_at(32);
        let zeros = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
        match () {
            () if zeros(bytes) => Self::Empty,
            () if sum == checksum(body) && zeros(rest) => Self::Whole(*body),
            () => Self::Damaged(*body),
        }
    }

    /// The body in it, if that is whole.
    pub fn whole(&self) -> Option<AnchorBytes> {
        if let Self::Whole(body) = self { Some(*body) } else { None }
    }

    /// Writes this body into a slot's bytes.
    pub fn fill(bytes: &mut [u8], body: &AnchorBytes) {
        bytes.fill(0);
        bytes[..ANCHOR_BODY_BYTES].copy_from_slice(body);
        bytes[ANCHOR_BODY_BYTES..][..32].copy_from_slice(&checksum(body));
    }
}

/// So that of two slots the whole one is known without the key.
fn checksum(body: &AnchorBytes) -> [u8; 32] {
    Sha256::digest(body).into()
}

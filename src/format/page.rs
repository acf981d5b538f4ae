//! Tag pages and tree pages.

use super::PageId;
use crate::{
    Epoch,
    crypto::{
        keys::Digest,
        lanes::{self, Groups, Lanes},
        sha256::Ways,
    },
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, little_endian::U64};

/// Label of the digest of a page; fixed width, so that no two inputs can be read two ways.
const PAGE_LABEL: &[u8; 24] = b"ublk-integrity page v1\0\0";

/// What a tree page says of one child: 32 digest + 8 epoch + 1 state + 23 reserved = 64 bytes.
/// All zeros: absent, the whole subtree reads as zeros. All ones: lost, nothing in it verifies.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(crate) struct TreeEntry {
    /// [`digest`] of the child page.
    pub(crate) digest: Digest,
    /// Epoch of the superblock that the child page was written for.
    epoch: U64,
    /// 0 absent, 1 the child is in slot 0, 2 in slot 1, 255 lost. Version 2: 3 and 4, slots of the
    /// second page area.
    state: u8,
    reserved: [u8; 23],
}
const _: () = assert!(size_of::<TreeEntry>() == 64);

/// [`TreeEntry`]'s state, parsed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum EntryState {
    /// The subtree reads as zeros.
    Absent,
    /// The child page is in this slot, 0 or 1.
    Slot(u8),
    /// The subtree was damaged when it had to be changed.
    Lost,
}

impl TreeEntry {
    pub(crate) const ABSENT: Self = Self { digest: [0; 32], epoch: U64::ZERO, state: 0, reserved: [0; 23] };
    pub(crate) const LOST: Self = Self { digest: [0xff; 32], epoch: U64::MAX_VALUE, state: 0xff, reserved: [0xff; 23] };

    /// An entry for a page just written to `slot`.
    pub(crate) fn new(digest: Digest, epoch: Epoch, slot: u8) -> Self {
        Self { digest, epoch: U64::new(epoch.0), state: 1 + slot, reserved: [0; 23] }
    }
    /// Epoch of the child page's writing.
    pub(crate) fn epoch(&self) -> Epoch {
        Epoch(self.epoch.get())
    }
    /// Whether there is a child, and where. An unknown state can only come out of a page that
    /// verified, so it is a program error of a later version: treated as lost.
    pub(crate) fn state(&self) -> EntryState {
        match self.state {
            0 => EntryState::Absent,
            1 => EntryState::Slot(0),
            2 => EntryState::Slot(1),
            _ => EntryState::Lost,
        }
    }
    /// Whether a superblock of this version may name its root so: the states and nothing in the
    /// reserved bytes.
    pub(super) fn known(&self, version: u32) -> bool {
        let areas = if version == 1 { 1 } else { 2 };
        *self == Self::LOST || (self.state <= 2 * areas && self.reserved == [0; 23])
    }
    /// The slot that a new version of the child goes to: never the current one.
    pub(crate) fn other_slot(&self) -> u8 {
        match self.state() {
            EntryState::Slot(0) => 1,
            _ => 0,
        }
    }
}

/// What comes before a page where it is hashed: label ‖ le64(level) ‖ le64(index).
fn prefix(id: PageId) -> [u8; 40] {
    let mut prefix = [0; 40];
    prefix[..24].copy_from_slice(PAGE_LABEL);
    prefix[24..32].copy_from_slice(&u64::from(id.level).to_le_bytes());
    prefix[32..].copy_from_slice(&id.index.to_le_bytes());
    prefix
}

/// SHA-256(label ‖ le64(level) ‖ le64(index) ‖ page).
pub(crate) fn digest(id: PageId, page: &[u8]) -> Digest {
    PageHash(Ways::here()).side_by_side([((), id, page)])[0]
}

/// The digests of many pages; `W` says which one it is.
pub(crate) fn digest_each<'p, W: Copy>(
    pages: impl Iterator<Item = (W, PageId, &'p [u8])>,
    mut with: impl FnMut(W, Digest),
) {
    lanes::each(&PageHash(Ways::here()), pages, |(which, ..), digest| with(which, digest));
}

struct PageHash(Ways);

impl<'p, W: Copy> Lanes<(W, PageId, &'p [u8])> for PageHash {
    type Output = Digest;

    fn groups(&self) -> Groups {
        self.0.groups()
    }

    fn side_by_side<const N: usize>(&self, pages: [(W, PageId, &'p [u8]); N]) -> [Digest; N] {
        let prefixes = pages.map(|(_, id, _)| prefix(id));
        self.0.of(N).prefixed_digests(std::array::from_fn(|i| (&prefixes[i], pages[i].2)))
    }
}

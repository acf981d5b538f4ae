//! The on-disk format, versions 1 and 2: fixed-width little-endian structs, nothing else.
//!
//! `docs/format.md` draws the same bytes for people. The only arithmetic on offsets is [`Layout`]'s.

mod feature;
mod identity;
mod layout;
mod page;
mod places;
mod record;
mod superblock;
mod unknown;
mod version2;

pub use feature::Feature;
pub(crate) use feature::Features;
pub(crate) use identity::{Identity, RawIdentity};
pub(crate) use layout::{Layout, LayoutError, MAX_LEVELS, MAX_LOG, MIN_LOG, PageId};
pub(crate) use page::{EntryState, TAGS_PER_PAGE, TreeEntry, digest, digest_each};
pub(crate) use places::TREE_FANOUT;
pub(crate) use record::{ENTRY_BYTES, Entry, EntryReader, Link, RawRecord, RecordBuilder, RecordHead};
pub(crate) use superblock::{RawSuperblock, SUPERBLOCK_BYTES, Superblock, SuperblockError};
pub use unknown::Unknown;
pub use version2::{Label, Scrub, ScrubState, Version2};

/// Bytes of a tag page, a tree page, and of the place that a superblock copy or identity block takes.
pub(crate) const PAGE_BYTES: usize = 4096;
/// Bytes of a tag.
pub(crate) const TAG_BYTES: usize = 32;

/// A block's tag. All zeros: "reads as zeros". All ones: lost.
pub(crate) type Tag = [u8; TAG_BYTES];
/// The tag of a block of zeros: no HMAC needed, since tags are believed only out of an authenticated page or record.
pub(crate) const ZERO_TAG: Tag = [0; TAG_BYTES];
/// The tag of a block whose tag page was lost: never verifies.
pub(crate) const LOST_TAG: Tag = [0xff; TAG_BYTES];

/// Text form of a UUID (RFC 9562).
pub(crate) fn uuid_text(u: &[u8; 16]) -> String {
    let hex = hex(u);
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

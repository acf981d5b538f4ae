//! The on-disk format, versions 1 and 2: fixed-width little-endian structs, nothing else.
//!
//! `docs/format.md` draws the same bytes for people. The only arithmetic on offsets is [`Layout`]'s.

mod anchor;
mod feature;
mod identity;
mod key_area;
mod known;
mod layout;
mod page;
mod places;
mod record;
mod record_builder;
mod superblock;
mod unknown;
mod version2;

#[cfg(test)]
pub(crate) use anchor::tests::{body as anchor_of_test, mark as key_area_of_test};
pub use anchor::{ANCHOR_BODY_BYTES, KeyAreaMark};
pub(crate) use anchor::{
    AnchorBody, AnchorPoint, AnchorState, BodyError, HostName, OpenId, claimed_era, claimed_generation,
};
pub use feature::Feature;
pub(crate) use feature::Features;
pub(crate) use identity::{Identity, RawIdentity};
pub(crate) use key_area::{KEY_AREA_BYTES, KeyArea, KeySlot, RawKeyArea, master_key};
pub use key_area::{KEY_SLOTS, NewSlot, SlotKind};
pub use known::KnownFormat;
pub(crate) use layout::{LEAST_SYNC_LOG, Layout, LayoutError, MAX_LEVELS, MAX_LOG, MIN_LOG, PageId, tag_pages};
pub(crate) use page::{EntryState, TreeEntry, digest, digest_each};
pub(crate) use places::{TAGS_PER_PAGE, TREE_FANOUT};
pub(crate) use record::{ENTRY_BYTES, Entry, Link, RawRecord, RecordHead, RecordShape, VerifiedRecord};
pub(crate) use record_builder::RecordBuilder;
pub(crate) use superblock::{RawSuperblock, SUPERBLOCK_BYTES, Superblock, SuperblockError};
pub use unknown::Unknown;
pub(crate) use version2::can_be_atomic;
pub use version2::{BadLabel, Label, Scrub, ScrubState, Version2};

/// Bytes of a tag page, a tree page, and of the place that a superblock copy or identity block takes.
pub(crate) const PAGE_BYTES: usize = 4096;
/// Bytes of a tag.
pub(crate) const TAG_BYTES: usize = 32;

/// A block's tag. All zeros: "reads as zeros". All ones: lost.
pub(crate) type Tag = [u8; TAG_BYTES];
/// The tag of a block of zeros: no HMAC needed, since tags are believed only out of an
/// authenticated page or record.
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

/// The bytes of as many hexadecimal digits; `false` where that is not what the text is.
pub fn read_hex(text: &str, into: &mut [u8]) -> bool {
    let digit = |digit: u8| char::from(digit).to_digit(16);
    let bytes = text.as_bytes().chunks(2).map(|pair| match pair {
        [high, low] => Some((digit(*high)? << 4 | digit(*low)?) as u8),
        _ => None,
    });
    text.len() == 2 * into.len()
        && into.iter_mut().zip(bytes).all(|(into, byte)| byte.map(|byte| *into = byte).is_some())
}

#[cfg(test)]
mod tests {
    use super::{hex, read_hex};

    #[test]
    fn hexadecimal_is_read_as_it_is_written() {
        let mut bytes = [0; 3];
        assert!(read_hex(&hex(&[0, 0xa5, 0xff]), &mut bytes) && bytes == [0, 0xa5, 0xff]);
        assert!(read_hex("00A5fF", &mut bytes));
        for text in ["", "00a5f", "00a5ff0", "00a5ff00", "00a5fg", "00 5ff", "0\u{e4}5ff"] {
            assert!(!read_hex(text, &mut bytes), "{text}");
        }
    }

    /// The rows of a section of the byte map that begin with two numbers, or with two sizes.
    fn rows(section: &str) -> Vec<(u64, u64)> {
        let page = include_str!("../../docs/format.md");
        let (_, rest) = page.split_once(&format!("\n## {section}\n")).unwrap_or_else(|| panic!("no section {section}"));
        let section = rest.split("\n## ").next().unwrap_or(rest);
        let bytes = |cell: &str| {
            let (number, unit) = cell.trim().split_once(' ').unwrap_or((cell.trim(), "1"));
            let unit = match unit {
                "1" => 1,
                "KiB" => 1 << 10,
                _ => return None,
            };
            number.parse::<u64>().ok().map(|n| n * unit)
        };
        let row = |line: &str| {
            let mut cells = line.strip_prefix('|')?.split('|');
            Some((bytes(cells.next()?)?, bytes(cells.next()?)?))
        };
        section.lines().filter_map(row).collect()
    }

    /// The page is the only map: nothing in it overlaps, and nothing is left out.
    #[test]
    fn the_byte_map_has_no_gap_and_no_overlap() {
        let area = 32 << 10;
        let structs = [("Superblock", 512), ("Identity block", 512), ("Anchor body", 512), ("Key area", area)];
        for (section, bytes) in structs {
            let rows = rows(section);
            let mut end = 0;
            for (offset, length) in rows {
                assert_eq!(offset, end, "{section}");
                end += length;
            }
            assert_eq!(end, bytes, "{section}");
        }
    }

    #[test]
    fn the_first_mib_holds_all_that_the_map_puts_there() {
        let rows = rows("The first MiB");
        assert_eq!(rows.len(), 6);
        assert!(rows.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "{rows:?}");
        let copies = super::Layout::superblock_offsets().map(|at| (at.0, super::PAGE_BYTES as u64));
        assert!(copies.iter().all(|copy| rows.contains(copy)), "{rows:?}");
        let areas = super::Layout::key_area_offsets().map(|at| (at.0, super::KEY_AREA_BYTES as u64));
        assert!(areas.iter().all(|area| rows.contains(area)), "{rows:?}");
        assert!(rows.iter().all(|(at, bytes)| at + bytes <= super::Layout::reserved_bytes()), "{rows:?}");
    }
}

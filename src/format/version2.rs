//! What version 2 adds to the superblock. All of it that is read is sealed as it was read.

use super::{
    Feature, Features, Unknown,
    places::{PageArea, Places},
};
use arrayvec::ArrayString;
use serde::{Deserialize, Serialize, Serializer};
use std::{fmt, mem::offset_of, str::FromStr};
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout,
    little_endian::{U32, U64},
};

/// Most bytes of a volume's label.
const LABEL_BYTES: usize = 32;

/// The superblock's bytes 232 to 447; all zeros in version 1.
///
/// 8 data offset, 8 log offset, 8 head offset, 2 × 16 page areas: 56. 8 adopted up to, 44 scrub, 4
/// assumed atomic:
/// 56. 8 header copy, 32 label, 64 reserved: 104. Together 216 bytes.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct RawVersion2 {
    data: U64,
    log: U64,
    head: U64,
    areas: [RawPageArea; 2],
    adopted: U64,
    scrub: RawScrub,
    atomic: U32,
    header_copy: U64,
    label: [u8; LABEL_BYTES],
    reserved: [u8; 64],
}
const _: () = assert!(size_of::<RawVersion2>() == 216);
/// Where the superblock has it; the offsets below are those of `docs/format.md`.
pub(super) const AT: usize = 232;
const _: () = assert!(AT + offset_of!(RawVersion2, areas) == 256);
const _: () = assert!(AT + offset_of!(RawVersion2, adopted) == 288);
const _: () = assert!(AT + offset_of!(RawVersion2, scrub) == 296);
const _: () = assert!(AT + offset_of!(RawVersion2, atomic) == 340);
const _: () = assert!(AT + offset_of!(RawVersion2, header_copy) == 344);
const _: () = assert!(AT + offset_of!(RawVersion2, label) == 352);
const _: () = assert!(AT + offset_of!(RawVersion2, reserved) == 384);

/// 8 offset, 8 blocks: 16 bytes.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawPageArea {
    offset: U64,
    blocks: U64,
}

/// 8 pass, 8 cursor, 8 begun, 8 ended, 8 bad, 4 state: 44 bytes.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawScrub {
    pass: U64,
    cursor: U64,
    begun: U64,
    ended: U64,
    bad: U64,
    state: U32,
}

/// The fields of version 2 that are neither features nor places.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Version2 {
    /// Blocks from the first on that a device taken in has tags for; 0 unless one is being taken in.
    pub adopted_blocks: u64,
    /// The last or running verification of the whole volume.
    pub scrub: Scrub,
    /// Bytes that the data device writes atomically as the user says, whatever it says itself.
    pub assumed_atomic_bytes: Option<u32>,
    /// The volume's name; empty where it has none.
    pub label: Label,
}

impl Version2 {
    /// With these features, unless version 1 says as much: what is written is of the oldest version
    /// that does.
    pub(crate) fn if_needed(self, features: Features) -> Option<(Features, Self)> {
        let needed = features.without(Feature::SeparateMeta) != Features::default() || self != Self::default();
        needed.then_some((features, self))
    }
}

/// Whether a device can be said to write so many bytes atomically: at least a sector, and no more
/// than a block may have.
pub(crate) fn can_be_atomic(bytes: u32) -> bool {
    bytes.is_power_of_two() && (512..=4096).contains(&bytes)
}

/// A volume's name: at most 32 bytes of UTF-8 without control characters.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Label(ArrayString<LABEL_BYTES>);

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl Serialize for Label {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

/// Why a text is no label.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadLabel {
    /// More than fits.
    #[error("a label has at most {LABEL_BYTES} bytes, this has {0}")]
    TooLong(usize),
    /// Not fit to be shown.
    #[error("a label has no control characters")]
    Control,
}

impl FromStr for Label {
    type Err = BadLabel;

    fn from_str(text: &str) -> Result<Self, BadLabel> {
        if text.contains(char::is_control) {
            return Err(BadLabel::Control);
        }
        ArrayString::from(text).map(Self).map_err(|_| BadLabel::TooLong(text.len()))
    }
}

impl Label {
    /// Whether the volume has no name.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
    /// UTF-8 up to the first zero, and zeros from there on. A label is shown on terminals before
    /// anything is authenticated: no control characters.
    pub(super) fn parse(bytes: &[u8; LABEL_BYTES]) -> Option<Self> {
        let len = bytes.iter().position(|byte| *byte == 0).unwrap_or(LABEL_BYTES);
        let text = std::str::from_utf8(&bytes[..len]).ok()?;
        let clean = bytes[len..].iter().all(|byte| *byte == 0);
        text.parse().ok().filter(|_| clean)
    }
    pub(super) fn bytes(self) -> [u8; LABEL_BYTES] {
        let mut bytes = [0; LABEL_BYTES];
        bytes[..self.0.len()].copy_from_slice(self.0.as_bytes());
        bytes
    }
}

/// How far a verification of the whole volume is, or how it ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Scrub {
    /// Number of the pass.
    pub pass: u64,
    /// The block that it goes on with.
    pub cursor: u64,
    /// When it began, in seconds since 1970.
    pub begun_seconds: u64,
    /// When it ended, in seconds since 1970.
    pub ended_seconds: u64,
    /// Bad blocks found.
    pub bad_blocks: u64,
    /// Whether it runs.
    pub state: ScrubState,
}

/// Whether a verification of the whole volume runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u32)]
pub enum ScrubState {
    /// There was none.
    #[default]
    None = 0,
    /// It runs, and goes on at the next open.
    Running = 1,
    /// It waits for somebody to let it go on.
    Paused = 2,
    /// It went through.
    Ended = 3,
    /// It was given up.
    Stopped = 4,
}

impl ScrubState {
    pub(super) const ALL: [Self; 5] = [Self::None, Self::Running, Self::Paused, Self::Ended, Self::Stopped];

    fn from_code(code: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|state| *state as u32 == code)
    }
}

/// What [`Unknown`] calls the struct that these fields are in.
pub(super) const OF: &str = "superblock";

/// A field of it that no known version allows.
pub(super) fn odd(field: &'static str) -> Unknown {
    Unknown::Field { of: OF, field }
}

impl RawVersion2 {
    pub(super) const ZERO: Self = Self {
        data: U64::ZERO,
        log: U64::ZERO,
        head: U64::ZERO,
        areas: [RawPageArea { offset: U64::ZERO, blocks: U64::ZERO }; 2],
        adopted: U64::ZERO,
        scrub: RawScrub {
            pass: U64::ZERO,
            cursor: U64::ZERO,
            begun: U64::ZERO,
            ended: U64::ZERO,
            bad: U64::ZERO,
            state: U32::ZERO,
        },
        atomic: U32::ZERO,
        header_copy: U64::ZERO,
        label: [0; LABEL_BYTES],
        reserved: [0; 64],
    };

    pub(super) fn new(fields: &Version2, features: Features, places: &Places) -> Self {
        let Version2 { adopted_blocks, scrub, assumed_atomic_bytes, label } = fields;
        let mut raw = Self {
            head: U64::new(places.head),
            adopted: U64::new(*adopted_blocks),
            scrub: RawScrub {
                pass: U64::new(scrub.pass),
                cursor: U64::new(scrub.cursor),
                begun: U64::new(scrub.begun_seconds),
                ended: U64::new(scrub.ended_seconds),
                bad: U64::new(scrub.bad_blocks),
                state: U32::new(scrub.state as u32),
            },
            atomic: U32::new(assumed_atomic_bytes.unwrap_or(0)),
            header_copy: U64::new(places.header_copy),
            label: label.bytes(),
            ..Self::ZERO
        };
        if features.has(Feature::ExplicitPlaces) {
            raw.data = U64::new(places.data);
            raw.log = U64::new(places.log);
            raw.areas =
                places.areas.map(|area| RawPageArea { offset: U64::new(area.offset), blocks: U64::new(area.blocks) });
        }
        raw
    }

    /// The fields, if all that is set is known and belongs to a feature that is set.
    pub(super) fn parse(&self, features: Features) -> Result<Version2, Unknown> {
        Unknown::refuse_reserved(OF, AT + offset_of!(Self, reserved), &self.reserved)?;
        if features.has(Feature::Adopting) && features.has(Feature::Releasing) {
            return Err(odd("pair of features adopting and releasing"));
        }
        if self.adopted.get() > 0 && !features.has(Feature::Adopting) {
            return Err(odd("count of adopted blocks"));
        }
        let scrub = &self.scrub;
        let atomic = self.atomic.get();
        if atomic != 0 && !can_be_atomic(atomic) {
            return Err(odd("assumed atomic size"));
        }
        Ok(Version2 {
            adopted_blocks: self.adopted.get(),
            scrub: Scrub {
                pass: scrub.pass.get(),
                cursor: scrub.cursor.get(),
                begun_seconds: scrub.begun.get(),
                ended_seconds: scrub.ended.get(),
                bad_blocks: scrub.bad.get(),
                state: ScrubState::from_code(scrub.state.get()).ok_or(odd("scrub state"))?,
            },
            assumed_atomic_bytes: (atomic != 0).then_some(atomic),
            label: Label::parse(&self.label).ok_or(odd("label"))?,
        })
    }

    /// Where the regions are: `computed`, unless the superblock says it.
    pub(super) fn places(&self, features: Features, computed: Places) -> Result<Places, Unknown> {
        let area = |raw: &RawPageArea| PageArea { offset: raw.offset.get(), blocks: raw.blocks.get() };
        let read = Places {
            data: self.data.get(),
            log: self.log.get(),
            areas: [area(&self.areas[0]), area(&self.areas[1])],
            head: self.head.get(),
            header_copy: self.header_copy.get(),
        };
        if features.has(Feature::MovedHead) != (read.head > 0) {
            return Err(odd("head offset"));
        }
        if features.has(Feature::HeaderCopy) != (read.header_copy > 0) {
            return Err(odd("header copy"));
        }
        let none = Places { data: 0, log: 0, areas: [PageArea::default(); 2], ..read };
        match features.has(Feature::ExplicitPlaces) {
            true => Ok(read),
            false if read == none => {
                Ok(Places { data: computed.data, log: computed.log, areas: computed.areas, ..read })
            }
            false => Err(odd("place of a region, where places are computed,")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_is_what_fits_and_can_be_shown() {
        let longest = "é".repeat(LABEL_BYTES / 2);
        for text in ["", "home", "a b", &longest] {
            let label: Label = text.parse().unwrap();
            assert_eq!((label.to_string().as_str(), label.is_empty()), (text, text.is_empty()));
            assert_eq!(Label::parse(&label.bytes()), Some(label), "{text}");
        }
        assert_eq!(format!("{longest}a").parse::<Label>(), Err(BadLabel::TooLong(33)));
        for text in ["a\0b", "a\n", "\x1b[2J", "\u{85}", "\x7f"] {
            assert_eq!(text.parse::<Label>(), Err(BadLabel::Control), "{text:?}");
        }
    }

    #[test]
    fn version_1_is_enough_where_nothing_is_said_besides() {
        let (none, plain) = (Features::default(), Version2::default());
        assert_eq!(plain.if_needed(none), None);
        assert_eq!(plain.if_needed(none.with(Feature::SeparateMeta)), None);
        let fields = [
            Version2 { adopted_blocks: 1, ..plain },
            Version2 { scrub: Scrub { pass: 1, ..Scrub::default() }, ..plain },
            Version2 { assumed_atomic_bytes: Some(512), ..plain },
            Version2 { label: "a".parse().unwrap(), ..plain },
        ];
        assert!(fields.into_iter().all(|fields| fields.if_needed(none) == Some((none, fields))));
        let others = Feature::ALL.into_iter().filter(|feature| *feature != Feature::SeparateMeta);
        assert!(others.map(|feature| none.with(feature)).all(|features| plain.if_needed(features).is_some()));
    }
}

//! The flags of the superblock: what a reader must know to touch the volume.

use super::Unknown;
use serde::{Serialize, Serializer};
use std::fmt;

/// A bit of the superblock's flags. Version 1 has the first only.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Feature {
    /// The metadata is on a device of its own.
    SeparateMeta = 0,
    /// The newest state is held by an anchor too.
    Anchored = 1,
    /// The volume key lies wrapped in the key area.
    KeyArea = 2,
    /// The superblock says where the regions are; else they are computed as in version 1.
    ExplicitPlaces = 3,
    /// The blocks of the data device's first MiB lie elsewhere.
    MovedHead = 4,
    /// A device is being taken in with its content.
    Adopting = 5,
    /// A device is being given back with its content.
    Releasing = 6,
    /// The log may hold blocks (entry kinds 4 and 5).
    SyncLog = 7,
    /// There is a copy of the header.
    HeaderCopy = 8,
}

impl Feature {
    /// All there are, by their bits.
    pub const ALL: [Self; 9] = [
        Self::SeparateMeta,
        Self::Anchored,
        Self::KeyArea,
        Self::ExplicitPlaces,
        Self::MovedHead,
        Self::Adopting,
        Self::Releasing,
        Self::SyncLog,
        Self::HeaderCopy,
    ];

    fn bit(self) -> u32 {
        1 << self as u32
    }
    fn name(self) -> &'static str {
        match self {
            Self::SeparateMeta => "separate metadata",
            Self::Anchored => "anchored",
            Self::KeyArea => "key area",
            Self::ExplicitPlaces => "explicit places",
            Self::MovedHead => "moved head",
            Self::Adopting => "adopting",
            Self::Releasing => "releasing",
            Self::SyncLog => "sync log",
            Self::HeaderCopy => "header copy",
        }
    }
    /// Its name as one word, for programs.
    pub(super) fn word(self) -> String {
        self.name().replace(' ', "_")
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl Serialize for Feature {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.word())
    }
}

impl Feature {
    /// Whether this program does what the feature asks for. It opens no volume with another.
    pub(crate) fn is_served(self) -> bool {
        matches!(self, Self::SeparateMeta | Self::Anchored | Self::KeyArea | Self::ExplicitPlaces | Self::SyncLog)
    }
}

/// The flags of a superblock; all of them are known.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Features(u32);

impl Features {
    /// The flags of a superblock of this version, if it has no others.
    pub(crate) fn parse(flags: u32, known: &[Feature]) -> Result<Self, Unknown> {
        let unknown = flags & !Self::of(known).0;
        if unknown == 0 { Ok(Self(flags)) } else { Err(Unknown::Feature(unknown.trailing_zeros())) }
    }
    pub(crate) fn of(features: &[Feature]) -> Self {
        Self(features.iter().fold(0, |flags, feature| flags | feature.bit()))
    }
    pub(crate) fn bits(self) -> u32 {
        self.0
    }
    pub(crate) fn has(self, feature: Feature) -> bool {
        self.0 & feature.bit() != 0
    }
    pub(crate) fn with(self, feature: Feature) -> Self {
        Self(self.0 | feature.bit())
    }
    pub(crate) fn without(self, feature: Feature) -> Self {
        Self(self.0 & !feature.bit())
    }
    pub(crate) fn iter(self) -> impl Iterator<Item = Feature> {
        Feature::ALL.into_iter().filter(move |feature| self.has(*feature))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_is_set_and_cleared_alone() {
        for feature in Feature::ALL {
            let others: Vec<_> = Feature::ALL.into_iter().filter(|other| *other != feature).collect();
            assert_eq!(Features::of(&others).with(feature), Features::of(&Feature::ALL));
            assert_eq!(Features::of(&Feature::ALL).without(feature), Features::of(&others));
        }
    }

    #[test]
    fn nothing_is_served_but_what_is_done() {
        let served: Vec<_> = Feature::ALL.into_iter().filter(|feature| feature.is_served()).collect();
        let done =
            [Feature::SeparateMeta, Feature::Anchored, Feature::KeyArea, Feature::ExplicitPlaces, Feature::SyncLog];
        assert_eq!(served, done);
    }
}

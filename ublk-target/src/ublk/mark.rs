//! What the kernel remembers a device of ours by.

use crate::{failure::Outcome, random::random};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
use std::{fmt, num::ParseIntError, str::FromStr};

/// Random bits that the kernel keeps for the maker of a device, as long as the device lives
/// (`ublksrv_flags`): any program can read them, and none can change them. So a device that bears
/// them is the one that we have made, even if its number was used by other devices in between.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mark(pub(super) u64);

impl Mark {
    /// That of a new device. Never zero, which is what others leave there.
    pub fn new() -> Outcome<Self> {
        Ok(Self(u64::from_ne_bytes(random()?) | 1))
    }
}

/// As text: programs that read JSON lose bits of large numbers.
impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for Mark {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        u64::from_str_radix(text, 16).map(Self)
    }
}

impl Serialize for Mark {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Mark {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        text.parse().map_err(|_| D::Error::custom(format_args!("{text} is no mark")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bit_survives_the_state_file() {
        let mark = Mark(0xfedc_ba98_7654_3211);
        let json = serde_json::to_string(&mark).unwrap();
        assert_eq!(json, "\"fedcba9876543211\"");
        assert_eq!(serde_json::from_str::<Mark>(&json).unwrap(), mark);
        assert!(serde_json::from_str::<Mark>("\"no\"").is_err());
    }
}

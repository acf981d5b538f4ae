//! The name that an administrator gives a device: `/dev/ublk-integrity/NAME` leads to it.

use serde::{Deserialize, Serialize};
use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

/// The folder of links to devices by their names.
pub const LINKS: &str = "/dev/ublk-integrity";

/// Characters of the longest name: a unit's name has 255, and escapes some of ours with four.
const LONGEST: usize = 48;

/// A device's name. It can stand where a number can, in a path, and in udev's properties as it is.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DeviceName(String);

impl DeviceName {
    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Where udev puts the link to the device.
    pub fn link(&self) -> PathBuf {
        Path::new(LINKS).join(&self.0)
    }
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| Err(format!("{text:?} is no name of a device: {why}"));
        if text.is_empty() || text.len() > LONGEST {
            return wrong(&format!("it must have 1 to {LONGEST} characters"));
        }
        let known = |c: char| c.is_ascii_alphanumeric() || "#+-.:=@_".contains(c);
        if !text.chars().all(known) || !text.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_') {
            return wrong("it is made of letters, digits and #+-.:=@_, and begins with a letter, a digit or _");
        }
        // Or `-n` could not tell which of both is meant.
        let digits = text.strip_prefix("ublkb").unwrap_or(text);
        if digits.bytes().all(|b| b.is_ascii_digit()) {
            return wrong("it would be taken for a device's number");
        }
        if uuid::Uuid::try_parse(text).is_ok() {
            return wrong("it would be taken for the UUID of a volume");
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for DeviceName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<DeviceName> for String {
    fn from(name: DeviceName) -> Self {
        name.0
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_no_number_no_path_and_nothing_that_udev_would_change() {
        for good in ["home", "a", "_x", "vm-1.disk:2@a=b+c#d", "0x", "ublkb0p1", &"n".repeat(48)] {
            assert_eq!(good.parse::<DeviceName>().unwrap().as_str(), good);
        }
        let long = "n".repeat(49);
        for bad in ["", "7", "ublkb7", "ublkb", "a/b", ".", "..", "-n", "#a", "a b", "ä", "a%b", "a\n", "a\\x20", &long]
        {
            assert!(bad.parse::<DeviceName>().is_err(), "{bad}");
        }
        assert!(serde_json::from_str::<DeviceName>("\"a/b\"").is_err());
    }
}

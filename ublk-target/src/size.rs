//! Sizes as people write them: binary units.

use std::{fmt, str::FromStr};

/// A number of bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, unit) = text.split_at(digits);
        let shift = match unit {
            "" | "B" => 0,
            "K" | "k" | "KiB" => 10,
            "M" | "m" | "MiB" => 20,
            "G" | "g" | "GiB" => 30,
            "T" | "t" | "TiB" => 40,
            "P" | "p" | "PiB" => 50,
            _ => return Err("a size is a whole number with K, M, G or T (binary units), like 64M".into()),
        };
        let number: u64 = number.parse().map_err(|_| "a size begins with a whole number, like 64M")?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(|| "the size does not fit in 64 bits".into())
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        indicatif::BinaryBytes(self.0).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn binary_units() {
        assert_eq!("64M".parse(), Ok(Size(64 << 20)));
        assert_eq!("1T".parse(), Ok(Size(1 << 40)));
        assert_eq!("4096".parse(), Ok(Size(4096)));
        for bad in ["", "M", "1.5G", "-1", "1X", "1GB", "99999999P"] {
            assert!(bad.parse::<Size>().is_err(), "{bad}");
        }
    }
}

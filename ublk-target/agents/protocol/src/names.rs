//! What is named in a line: a volume, a body, a secret, a number. There is one way to write each.

use crate::Text;
use std::fmt;
use zeroize::Zeroize;

/// A field of a line is not what it must be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Parse(pub(crate) &'static str);

impl fmt::Display for Parse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Parse {}

impl From<Parse> for Text {
    fn from(error: Parse) -> Self {
        Self::of(error)
    }
}

/// Which volume it is about.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Uuid(pub [u8; 16]);

impl Uuid {
    /// Where the four hyphens are in the text.
    const HYPHENS: [usize; 4] = [8, 13, 18, 23];

    /// From its text: 36 characters, lower case.
    ///
    /// # Errors
    ///
    /// Whatever else it is.
    pub fn parse(text: &[u8]) -> Result<Self, Parse> {
        let wrong = Parse("a UUID has 36 characters: lower-case hex digits in groups of 8-4-4-4-12");
        if text.len() != 36 || Self::HYPHENS.iter().any(|at| text[*at] != b'-') {
            return Err(wrong);
        }
        let mut digits = [0; 32];
        let places = (0..36).filter(|at| !Self::HYPHENS.contains(at));
        digits.iter_mut().zip(places).for_each(|(digit, at)| *digit = text[at]);
        let mut uuid = Self([0; 16]);
        from_hex(&digits, &mut uuid.0).ok_or(wrong)?;
        Ok(uuid)
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.0.iter().enumerate() {
            let hyphen = if matches!(at, 4 | 6 | 8 | 10) { "-" } else { "" };
            write!(f, "{hyphen}{byte:02x}")?;
        }
        Ok(())
    }
}

/// What a store keeps. Only its owner knows what is in it: an agent compares no part of it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Body(pub [u8; Self::BYTES]);

impl Body {
    /// Its length in bytes.
    pub const BYTES: usize = 512;

    /// From 1024 lower-case hex digits.
    ///
    /// # Errors
    ///
    /// Whatever else it is.
    pub fn parse(text: &[u8]) -> Result<Self, Parse> {
        let mut body = Self([0; Self::BYTES]);
        from_hex(text, &mut body.0).ok_or(Parse("a body has 1024 lower-case hex digits"))?;
        Ok(body)
    }
}

impl fmt::Display for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        show_hex(&self.0, f)
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        show_hex(&self.0[..8], f)?;
        f.write_str("...")
    }
}

/// What proves to a counter who asks, and to who asks that it is the counter. It leaves memory when
/// it is dropped, and is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub [u8; Self::BYTES]);

impl Secret {
    /// Its length in bytes.
    pub const BYTES: usize = 32;

    /// From 64 lower-case hex digits.
    ///
    /// # Errors
    ///
    /// Whatever else it is.
    pub fn parse(text: &[u8]) -> Result<Self, Parse> {
        let mut secret = Self([0; Self::BYTES]);
        from_hex(text, &mut secret.0).ok_or(Parse("a secret has 64 lower-case hex digits"))?;
        Ok(secret)
    }

    /// For the one line that carries it.
    pub(crate) fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        show_hex(&self.0, f)
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// A number from its decimal digits, without sign, without zeros in front.
pub(crate) fn number(text: &[u8]) -> Result<u64, Parse> {
    let canonical = text == b"0" || (matches!(text, [b'1'..=b'9', ..]) && text.iter().all(u8::is_ascii_digit));
    let parsed = std::str::from_utf8(text).ok().filter(|_| canonical).and_then(|text| text.parse().ok());
    parsed.ok_or(Parse("a number has decimal digits alone, none of them a zero in front, and is below 2^64"))
}

fn show_hex(bytes: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

/// Fills `bytes` from twice as many lower-case hex digits.
fn from_hex(text: &[u8], bytes: &mut [u8]) -> Option<()> {
    if text.len() != 2 * bytes.len() {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(())
}

fn digit(character: u8) -> Option<u8> {
    match character {
        b'0'..=b'9' => Some(character - b'0'),
        b'a'..=b'f' => Some(character - b'a' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_has_one_text() {
        let text = "00112233-4455-6677-8899-aabbccddeeff";
        let uuid = Uuid::parse(text.as_bytes()).unwrap();
        assert_eq!(uuid.0[..4], [0, 0x11, 0x22, 0x33]);
        assert_eq!(uuid.to_string(), text);
        for wrong in ["", "00112233445566778899aabbccddeeff", &text.to_uppercase(), &text[1..], &text.replace('0', "-")]
        {
            assert!(Uuid::parse(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_number_has_one_text() {
        for right in [0, 1, 10, u64::MAX] {
            assert_eq!(number(right.to_string().as_bytes()), Ok(right));
        }
        for wrong in ["", "+1", "-1", "01", "00", "1 ", "0x1", "18446744073709551616", "1\u{661}"] {
            assert!(number(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_body_has_one_text_and_a_secret_is_not_shown() {
        let body = Body(std::array::from_fn(|at| at as u8));
        assert_eq!(Body::parse(body.to_string().as_bytes()), Ok(body));
        for wrong in [&body.to_string()[2..], &body.to_string().to_uppercase(), &"0g".repeat(512)] {
            assert!(Body::parse(wrong.as_bytes()).is_err());
        }
        assert_eq!(format!("{:?}", Secret([7; 32])), "Secret");
    }
}

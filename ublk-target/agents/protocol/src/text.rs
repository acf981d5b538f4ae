//! A line for people, of bounded length and without allocation.

use std::fmt::{self, Write};

/// Bytes of the longest text: small enough to be passed around by value in an error.
const LONGEST: usize = 120;

/// Printable ASCII, at most 120 bytes. What is longer is cut, what is not printable becomes `?`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Text {
    bytes: [u8; LONGEST],
    length: u8,
}

impl Text {
    /// What `shown` shows.
    pub fn of(shown: impl fmt::Display) -> Self {
        let mut text = Self { bytes: [0; LONGEST], length: 0 };
        // What is too long is cut: writing never fails.
        let _ = write!(text, "{shown}");
        text
    }

    /// What stands in a line that somebody else wrote.
    pub(crate) fn of_bytes(bytes: &[u8]) -> Self {
        let mut text = Self { bytes: [0; LONGEST], length: 0 };
        bytes.iter().for_each(|byte| text.push(*byte));
        text
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.bytes[..self.length.into()]).unwrap_or("?")
    }

    fn push(&mut self, byte: u8) {
        if let Some(place) = self.bytes.get_mut(usize::from(self.length)) {
            *place = if matches!(byte, b' '..=b'~') { byte } else { b'?' };
            self.length += 1;
        }
    }
}

impl Write for Text {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        part.chars().for_each(|c| self.push(u8::try_from(c).unwrap_or(b'?')));
        Ok(())
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_one_short_printable_line() {
        assert_eq!(Text::of("as it is").as_str(), "as it is");
        assert_eq!(Text::of("two\nlines, a \u{1b}, an ü").as_str(), "two?lines, a ?, an ?");
        assert_eq!(Text::of("x".repeat(1000)).as_str().len(), LONGEST);
        assert_eq!(Text::of_bytes(b"\xff\0ok").as_str(), "??ok");
    }
}

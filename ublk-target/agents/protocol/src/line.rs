//! Lines in and out of a socket that never waits, each side in one buffer that is as long as the
//! longest line.

use std::{
    fmt::{self, Write as _},
    io::{self, Read, Write},
};
use zeroize::Zeroize;

/// Bytes of the longest line, its end included. The longest there is, `replace`, has 1054:
/// 8 + 20 + 1 + 1024 + 1.
pub const LINE: usize = 2048;

/// No line end within [`LINE`] bytes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct TooLong;

/// What has come and is not taken yet.
pub(crate) struct Incoming {
    bytes: Box<[u8; LINE]>,
    begin: usize,
    end: usize,
}

impl Incoming {
    pub(crate) fn new() -> Self {
        Self { bytes: Box::new([0; LINE]), begin: 0, end: 0 }
    }

    /// Forgets all of it. A line may have carried a secret.
    pub(crate) fn clear(&mut self) {
        self.bytes.zeroize();
        (self.begin, self.end) = (0, 0);
    }

    /// Takes what has come, as far as there is room. 0: the other side sends no more, or there is no
    /// room.
    pub(crate) fn fill(&mut self, from: &mut impl Read) -> io::Result<usize> {
        self.bytes.copy_within(self.begin..self.end, 0);
        self.bytes[self.end - self.begin..self.end].zeroize();
        (self.begin, self.end) = (0, self.end - self.begin);
        let taken = from.read(&mut self.bytes[self.end..])?;
        self.end += taken;
        Ok(taken)
    }

    /// Where the next line ends, if it is here as a whole.
    fn line_end(&self) -> Result<Option<usize>, TooLong> {
        let found = self.bytes[self.begin..self.end].iter().position(|byte| *byte == b'\n');
        match found {
            None if self.end - self.begin == LINE => Err(TooLong),
            found => Ok(found.map(|at| self.begin + at)),
        }
    }

    /// Whether a line could be taken, or what is here is none.
    pub(crate) fn has_line(&self) -> bool {
        self.line_end() != Ok(None)
    }

    /// Whether nothing is here, not even half a line.
    pub(crate) fn is_empty(&self) -> bool {
        self.begin == self.end
    }

    /// The next line, without its end.
    pub(crate) fn take_line(&mut self) -> Result<Option<&[u8]>, TooLong> {
        let Some(end) = self.line_end()? else { return Ok(None) };
        let line = self.begin..end;
        self.begin = end + 1;
        Ok(Some(&self.bytes[line]))
    }
}

/// One line that goes out.
pub(crate) struct Outgoing {
    bytes: Box<[u8; LINE]>,
    begin: usize,
    end: usize,
}

impl Outgoing {
    pub(crate) fn new() -> Self {
        Self { bytes: Box::new([0; LINE]), begin: 0, end: 0 }
    }

    pub(crate) fn clear(&mut self) {
        self.bytes.zeroize();
        (self.begin, self.end) = (0, 0);
    }

    /// The line that is to go out next; the one before has gone.
    pub(crate) fn put(&mut self, line: impl fmt::Display) {
        self.clear();
        let written = write!(self, "{line}").and_then(|()| self.write_char('\n'));
        debug_assert!(written.is_ok(), "no line of ours is longer than {LINE} bytes");
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.begin == self.end
    }

    /// Sends as much as is taken.
    pub(crate) fn send(&mut self, to: &mut impl Write) -> io::Result<()> {
        while !self.is_empty() {
            match to.write(&self.bytes[self.begin..self.end])? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                sent => self.begin += sent,
            }
        }
        self.clear();
        Ok(())
    }
}

impl fmt::Write for Outgoing {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        let end = self.end + part.len();
        self.bytes.get_mut(self.end..end).ok_or(fmt::Error)?.copy_from_slice(part.as_bytes());
        self.end = end;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_whole_however_they_are_cut() {
        let sent = b"one\n\nthree\nhalf";
        for piece in 1..=sent.len() {
            let (mut incoming, mut lines) = (Incoming::new(), Vec::new());
            for mut bytes in sent.chunks(piece) {
                while !bytes.is_empty() {
                    incoming.fill(&mut bytes).unwrap();
                }
                while let Some(line) = incoming.take_line().unwrap() {
                    lines.push(line.to_vec());
                }
            }
            assert_eq!(lines, [&b"one"[..], b"", b"three"], "in pieces of {piece}");
            assert!(!incoming.is_empty() && !incoming.has_line());
        }
    }

    #[test]
    fn the_longest_line_fits_and_a_longer_one_is_told() {
        let mut incoming = Incoming::new();
        let mut longest = vec![b'x'; LINE];
        longest[LINE - 1] = b'\n';
        assert_eq!(incoming.fill(&mut &longest[..]).unwrap(), LINE);
        assert_eq!(incoming.take_line(), Ok(Some(&longest[..LINE - 1])));
        longest[LINE - 1] = b'x';
        assert_eq!(incoming.fill(&mut &longest[..]).unwrap(), LINE);
        assert!(incoming.has_line());
        assert_eq!(incoming.take_line(), Err(TooLong));
    }

    #[test]
    fn nothing_is_left_of_what_was_said() {
        let (mut incoming, mut outgoing) = (Incoming::new(), Outgoing::new());
        incoming.fill(&mut &b"auth ab\nx"[..]).unwrap();
        incoming.take_line().unwrap();
        incoming.fill(&mut &b""[..]).unwrap();
        assert_eq!(&incoming.bytes[..9], b"x\0\0\0\0\0\0\0\0");
        outgoing.put("auth ab");
        outgoing.send(&mut Vec::new()).unwrap();
        assert!(outgoing.is_empty() && outgoing.bytes.iter().all(|byte| *byte == 0));
    }
}

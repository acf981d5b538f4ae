//! A line to a socket, a line back, within a limit (docs/anchor-protocol.md).

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use std::{
    fmt::{self, Write as _},
    io::{self, ErrorKind, Read, Write},
    os::{fd::AsRawFd, unix::net::UnixStream},
    path::Path,
    time::Instant,
};
use zeroize::Zeroizing;

/// The longest line, with its end.
const LINE: usize = 2048;

/// Why there is no answer. Behind a request that changes something that means that the outcome is not known.
pub(super) type NoAnswer = String;

/// A request with its end. Its memory is never moved, and zeroed when it goes.
pub(super) struct Line(Zeroizing<String>);

impl Line {
    /// Of these words.
    pub(super) fn of(words: fmt::Arguments<'_>) -> Self {
        let mut line = Self::with(LINE);
        let _ = line.0.write_fmt(words);
        line.ended()
    }

    /// Of a word and bytes in hexadecimal.
    pub(super) fn of_bytes(word: &str, bytes: &[u8]) -> Self {
        let mut line = Self::with(word.len() + 2 * bytes.len() + 2);
        line.0.push_str(word);
        line.0.push(' ');
        let digit = |digit: u8| char::from_digit(digit.into(), 16).expect("four bits");
        bytes.iter().for_each(|byte| line.0.extend([digit(byte >> 4), digit(byte & 15)]));
        line.ended()
    }

    fn with(room: usize) -> Self {
        Self(Zeroizing::new(String::with_capacity(room)))
    }

    fn ended(mut self) -> Self {
        self.0.push('\n');
        self
    }
}

/// A connection to an agent.
pub(super) struct Lines {
    stream: UnixStream,
}

impl Lines {
    /// To the socket at this path. An agent that stands still lets some wait, then no more: that is told at once.
    pub(super) fn to(path: &Path) -> Result<Self, NoAnswer> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let made = socket(AddressFamily::Unix, SockType::Stream, flags, None);
        let reached = made.and_then(|made| connect(made.as_raw_fd(), &UnixAddr::new(path)?).map(|()| made));
        let stream = UnixStream::from(reached.map_err(|e| e.desc().to_owned())?);
        stream.set_nonblocking(false).map_err(|e| crate::failure::plain(&e))?;
        Ok(Self { stream })
    }

    /// What an agent has sent that ended meanwhile, or unasked, is no answer.
    pub(super) fn is_quiet(&self) -> bool {
        let looked = self.stream.set_nonblocking(true).and_then(|()| (&self.stream).read(&mut [0]));
        let quiet = matches!(looked, Err(e) if e.kind() == ErrorKind::WouldBlock);
        quiet && self.stream.set_nonblocking(false).is_ok()
    }

    /// The request goes out in one piece with its end, which is why it is given with it: what is copied to be put together stays
    /// in memory, and it may be a secret.
    pub(super) fn exchange(&mut self, request: &Line, deadline: Instant) -> Result<String, NoAnswer> {
        let late = |e: io::Error| match e.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => "no answer in time".into(),
            _ => crate::failure::plain(&e),
        };
        let left = || {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() { Err("no answer in time".to_owned()) } else { Ok(Some(left)) }
        };
        self.stream.set_write_timeout(left()?).map_err(late)?;
        self.stream.write_all(request.0.as_bytes()).map_err(late)?;
        let mut line = Vec::with_capacity(LINE);
        loop {
            self.stream.set_read_timeout(left()?).map_err(late)?;
            let mut bytes = [0; LINE];
            let room = bytes.len() - line.len();
            match self.stream.read(&mut bytes[..room]) {
                Ok(0) => return Err("the agent has closed the connection".into()),
                Ok(count) => line.extend_from_slice(&bytes[..count]),
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => return Err(late(e)),
            }
            match line.iter().position(|byte| *byte == b'\n') {
                Some(end) if end + 1 == line.len() => {
                    line.pop();
                    return String::from_utf8(line).map_err(|_| "its answer is no text".into());
                }
                Some(_) => return Err("it answers more than was asked".into()),
                None if line.len() == LINE => return Err("its answer is too long".into()),
                None => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What grows leaves a copy behind at each step.
    #[test]
    fn a_line_with_a_secret_is_made_in_one_place() {
        let line = Line::of_bytes("auth", &[0x0f; 32]);
        assert_eq!(*line.0, format!("auth {}\n", "0f".repeat(32)));
        assert_eq!(line.0.capacity(), line.0.len());
        assert_eq!(*Line::of(format_args!("increment {}", 7)).0, "increment 7\n");
    }
}

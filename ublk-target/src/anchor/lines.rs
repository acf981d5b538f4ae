//! A line to a socket, a line back, within a limit (docs/anchor-protocol.md).

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use std::{
    io::{self, ErrorKind, Read, Write},
    os::{fd::AsRawFd, unix::net::UnixStream},
    path::Path,
    time::Instant,
};

/// The longest line, with its end.
const LINE: usize = 2048;

/// Why there is no answer. Behind a request that changes something that means that the outcome is not known.
pub(super) type NoAnswer = String;

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

    pub(super) fn exchange(&mut self, request: &str, deadline: Instant) -> Result<String, NoAnswer> {
        let late = |e: io::Error| match e.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => "no answer in time".into(),
            _ => crate::failure::plain(&e),
        };
        let left = || {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() { Err("no answer in time".to_owned()) } else { Ok(Some(left)) }
        };
        self.stream.set_write_timeout(left()?).map_err(late)?;
        self.stream.write_all(format!("{request}\n").as_bytes()).map_err(late)?;
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

//! The client: one connection to an agent, made again when it is lost, and a limit of time for each
//! request. Its answers say whether a change may have happened.

use crate::{
    Body, Incremented, Replaced, Retired, Secret, Text, Uuid, VERSION,
    line::{Incoming, Outgoing},
    message::{Answer, Request, Shape},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with},
};
use std::{
    fmt,
    io::{self, ErrorKind},
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

/// Why there is no answer that could be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Error {
    /// The agent can't be reached, or what it keeps can't. The request has changed nothing.
    Away(Text),
    /// The request went out and its outcome is not known: a change may have happened, or happen yet.
    /// `load` or `read` tells.
    Unknown(Text),
    /// The agent refuses, and will again. The request has changed nothing.
    Refused(Text),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Away(text) => write!(f, "the anchor is away: {text}"),
            Self::Unknown(text) => write!(f, "the anchor's answer is not known: {text}"),
            Self::Refused(text) => write!(f, "the anchor refuses: {text}"),
        }
    }
}

impl std::error::Error for Error {}

/// A client of one agent, for one volume.
pub struct Client {
    address: SocketAddrUnix,
    uuid: Uuid,
    secret: Option<Secret>,
    timeout: Duration,
    connection: Option<(UnixStream, Shape)>,
    incoming: Incoming,
    outgoing: Outgoing,
}

impl Client {
    /// For the agent at `path`, with `timeout` for each request, a new connection included. Nothing
    /// is connected yet; all memory is taken.
    ///
    /// # Errors
    ///
    /// The path is too long for a socket (107 bytes).
    pub fn new(path: &Path, uuid: Uuid, secret: Option<Secret>, timeout: Duration) -> io::Result<Self> {
        let address = SocketAddrUnix::new(path)?;
        let (incoming, outgoing) = (Incoming::new(), Outgoing::new());
        Ok(Self { address, uuid, secret, timeout, connection: None, incoming, outgoing })
    }

    /// What the agent keeps. Connects, if it is not connected.
    ///
    /// # Errors
    ///
    /// [`Error::Away`] or [`Error::Refused`].
    pub fn shape(&mut self) -> Result<Shape, Error> {
        self.connected(Instant::now() + self.timeout)
    }

    /// A store's body and its generation, if there is one.
    ///
    /// # Errors
    ///
    /// [`Error`]; it changes nothing in any case.
    pub fn load(&mut self) -> Result<Option<(u64, Body)>, Error> {
        match self.ask(&Request::Load)? {
            Answer::Body { generation, body } => Ok(Some((generation, body))),
            Answer::Absent => Ok(None),
            other => Err(self.unexpected(other)),
        }
    }

    /// Replaces the body of generation `expected`; the new one's is one more.
    ///
    /// # Errors
    ///
    /// [`Error`]
    pub fn replace(&mut self, expected: u64, body: &Body) -> Result<Replaced, Error> {
        let answer = self.ask(&Request::Replace { expected, body: *body })?;
        self.replaced(answer)
    }

    /// Puts a first body into a store.
    ///
    /// # Errors
    ///
    /// [`Error`]
    pub fn init_store(&mut self, generation: u64, body: &Body) -> Result<Replaced, Error> {
        let answer = self.ask(&Request::InitStore { generation, body: *body })?;
        self.replaced(answer)
    }

    /// Removes a body of generation `expected`, or a counter of that value.
    ///
    /// # Errors
    ///
    /// [`Error`]
    pub fn retire(&mut self, expected: u64) -> Result<Retired, Error> {
        let answer = self.ask(&Request::Retire { expected })?;
        self.replaced(answer)
    }

    /// A counter's value, if there is one.
    ///
    /// # Errors
    ///
    /// [`Error`]; it changes nothing in any case.
    pub fn read(&mut self) -> Result<Option<u64>, Error> {
        match self.ask(&Request::Read)? {
            Answer::Value(value) => Ok(Some(value)),
            Answer::Absent => Ok(None),
            other => Err(self.unexpected(other)),
        }
    }

    /// Which counter it is, if there is one. An agent that has no eras refuses.
    ///
    /// # Errors
    ///
    /// [`Error`]; it changes nothing in any case.
    pub fn era(&mut self) -> Result<Option<u64>, Error> {
        match self.ask(&Request::Era)? {
            Answer::Value(era) => Ok(Some(era)),
            Answer::Absent => Ok(None),
            other => Err(self.unexpected(other)),
        }
    }

    /// Adds one to a counter of value `expected`.
    ///
    /// # Errors
    ///
    /// [`Error`]
    pub fn increment(&mut self, expected: u64) -> Result<Incremented, Error> {
        let answer = self.ask(&Request::Increment { expected })?;
        self.incremented(answer)
    }

    /// Makes a counter.
    ///
    /// # Errors
    ///
    /// [`Error`]
    pub fn init_counter(&mut self) -> Result<Incremented, Error> {
        let answer = self.ask(&Request::InitCounter)?;
        self.incremented(answer)
    }

    fn replaced(&mut self, answer: Answer) -> Result<Replaced, Error> {
        match answer {
            Answer::Done => Ok(Replaced::Done),
            Answer::Conflict => Ok(Replaced::Conflict),
            Answer::Absent => Ok(Replaced::Absent),
            other => Err(self.unexpected(other)),
        }
    }

    fn incremented(&mut self, answer: Answer) -> Result<Incremented, Error> {
        match answer {
            Answer::Value(value) => Ok(Incremented::Done(value)),
            Answer::Conflict => Ok(Incremented::Conflict),
            Answer::Absent => Ok(Incremented::Absent),
            other => Err(self.unexpected(other)),
        }
    }

    /// It does not answer what was asked: whatever has happened, nothing more is expected from it.
    fn unexpected(&mut self, answer: Answer) -> Error {
        self.disconnect();
        Error::Unknown(Text::of(format_args!("the agent answers something that was not asked: {answer}")))
    }

    /// Asks once. No request is sent a second time: whether that is right only its sender knows.
    fn ask(&mut self, request: &Request) -> Result<Answer, Error> {
        let deadline = Instant::now() + self.timeout;
        self.connected(deadline)?;
        let failed = if request.changes() { Error::Unknown } else { Error::Away };
        match self.exchange(request, deadline).map_err(failed)? {
            Answer::Failed(text) => Err(failed(text)),
            Answer::Refused(text) => Err(Error::Refused(text)),
            answer => Ok(answer),
        }
    }

    fn connected(&mut self, deadline: Instant) -> Result<Shape, Error> {
        // What an agent has sent that ended meanwhile, or unasked, is no answer.
        let came = |(stream, _): &(UnixStream, Shape)| ready(stream, PollFlags::IN, Duration::ZERO);
        if !self.incoming.is_empty() || self.connection.as_ref().is_some_and(came) {
            self.disconnect();
        }
        if let Some((_, shape)) = &self.connection {
            return Ok(*shape);
        }
        let away = |error: Errno| Error::Away(Text::of(io::Error::from(error)));
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(away)?;
        // An agent that stands still lets many wait, then no more: that is told at once, by EAGAIN.
        connect(&socket, &self.address).map_err(away)?;
        self.connection = Some((socket.into(), Shape::Store));
        let shape = self.introduce(deadline);
        match (&shape, &mut self.connection) {
            (Ok(shape), Some((_, slot))) => *slot = *shape,
            _ => self.disconnect(),
        }
        shape
    }

    fn introduce(&mut self, deadline: Instant) -> Result<Shape, Error> {
        let hello = Request::Hello { version: VERSION, uuid: self.uuid };
        let (shape, wants_secret) = match self.exchange(&hello, deadline).map_err(Error::Away)? {
            Answer::Hello { shape, wants_secret, .. } => (shape, wants_secret),
            Answer::Failed(text) => return Err(Error::Away(text)),
            Answer::Refused(text) => return Err(Error::Refused(text)),
            _ => return Err(Error::Refused(Text::of("what listens there is no agent of an anchor"))),
        };
        let Some(secret) = self.secret.clone().filter(|_| wants_secret) else { return Ok(shape) };
        match self.exchange(&Request::Auth(secret), deadline).map_err(Error::Away)? {
            Answer::Done => Ok(shape),
            Answer::Refused(text) => Err(Error::Refused(text)),
            other => Err(Error::Away(Text::of(other))),
        }
    }

    /// One line each way. Without an answer the connection ends: a late one would be taken for the
    /// next request's.
    fn exchange(&mut self, request: &Request, deadline: Instant) -> Result<Answer, Text> {
        let answer = self.try_exchange(request, deadline);
        if answer.is_err() {
            self.disconnect();
        }
        answer
    }

    fn try_exchange(&mut self, request: &Request, deadline: Instant) -> Result<Answer, Text> {
        let Some((stream, _)) = &mut self.connection else { return Err(Text::of("not connected")) };
        self.outgoing.put(request);
        while !self.outgoing.is_empty() {
            match self.outgoing.send(stream) {
                Err(e) if e.kind() == ErrorKind::WouldBlock => wait(stream, PollFlags::OUT, deadline)?,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                other => other.map_err(Text::of)?,
            }
        }
        loop {
            if let Some(line) = self.incoming.take_line().map_err(|_| Text::of("its answer is too long"))? {
                return Answer::parse(line).map_err(Text::from);
            }
            wait(stream, PollFlags::IN, deadline)?;
            match self.incoming.fill(stream) {
                Ok(0) => return Err(Text::of("the agent has closed the connection")),
                Err(e) if !matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                    return Err(Text::of(e));
                }
                _ => {}
            }
        }
    }

    fn disconnect(&mut self) {
        self.connection = None;
        self.incoming.clear();
        self.outgoing.clear();
    }
}

fn wait(stream: &UnixStream, wanted: PollFlags, deadline: Instant) -> Result<(), Text> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if ready(stream, wanted, left) {
            return Ok(());
        }
        if left.is_zero() {
            return Err(Text::of("no answer in time"));
        }
    }
}

/// Whether something can be done with it within `left`; an end or an error is something.
fn ready(stream: &UnixStream, wanted: PollFlags, left: Duration) -> bool {
    let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
    poll(&mut [PollFd::new(stream, wanted)], Some(&left)).is_ok_and(|found| found > 0)
}

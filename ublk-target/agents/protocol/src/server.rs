//! Many connections, one thread, one request at a time: the order of requests is the order of what
//! is done, and nothing of an agent needs a lock.

use crate::{
    Backend, Text,
    line::{Incoming, Outgoing, TooLong},
    message::{Answer, Request},
    session::Session,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{FlockOperation, flock},
    io::Errno,
    net::sockopt::socket_peercred,
    process::geteuid,
};
use std::{
    array,
    convert::Infallible,
    fs::{self, File, OpenOptions, Permissions},
    io::{self, ErrorKind},
    os::unix::{
        fs::{FileTypeExt, OpenOptionsExt, PermissionsExt},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

/// Connections at a time. A daemon has one for each of its volumes.
pub const CLIENTS: usize = 64;

/// How long a client may owe something: its `hello`, the rest of a line, the reading of an answer.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// Why an agent can't listen.
#[derive(Debug)]
pub enum StartError {
    /// Another agent serves this socket.
    Taken(PathBuf),
    /// Something else has its name.
    NotASocket(PathBuf),
    /// The system refuses.
    Io {
        /// What was tried, with the path.
        what: String,
        /// Its answer.
        source: io::Error,
    },
}

impl StartError {
    fn io(what: &str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let what = format!("{what} {}", path.display());
        move |source| Self::Io { what, source }
    }

    /// Which exit code tells it: docs/exit-codes.md.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Taken(_) | Self::NotASocket(_) => 5,
            Self::Io { source, .. } if source.kind() == ErrorKind::PermissionDenied => 2,
            Self::Io { .. } => 4,
        }
    }
}

impl std::fmt::Display for StartError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Taken(path) => {
                write!(f, "another agent serves {}: end it first, or name another socket", path.display())
            }
            Self::NotASocket(path) => {
                write!(f, "{} is there and no socket: remove it, or name another one", path.display())
            }
            Self::Io { what, source } => write!(f, "{what}: {source}"),
        }
    }
}

impl std::error::Error for StartError {}

/// The agent's side of a socket.
pub struct Server {
    listener: UnixListener,
    slots: Box<[Slot]>,
    watch: Watch,
    /// Held for as long as this agent lives: what another one's socket is, is not ours to remove.
    _lock: File,
}

impl Server {
    /// Listens on a socket at `path`, which is made anew. All memory is taken here.
    ///
    /// # Errors
    ///
    /// [`StartError`]
    pub fn listen(path: &Path) -> Result<Self, StartError> {
        let lock_path = PathBuf::from(format!("{}.lock", path.display()));
        let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&lock_path);
        let lock = lock.map_err(StartError::io("opening", &lock_path))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(StartError::Taken(path.into())),
            Err(e) => return Err(StartError::io("locking", &lock_path)(e.into())),
        }
        // What an agent that was killed has left.
        match fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => return Err(StartError::NotASocket(path.into())),
            Ok(_) => fs::remove_file(path).map_err(StartError::io("removing", path))?,
            Err(_) => {}
        }
        let listener = UnixListener::bind(path).map_err(StartError::io("listening on", path))?;
        fs::set_permissions(path, Permissions::from_mode(0o600))
            .map_err(StartError::io("setting the mode of", path))?;
        listener.set_nonblocking(true).map_err(StartError::io("listening on", path))?;
        let slots = (0..CLIENTS).map(|_| Slot::empty()).collect();
        Ok(Self { listener, slots, watch: Watch::default(), _lock: lock })
    }

    /// Serves until that fails.
    ///
    /// # Errors
    ///
    /// Waiting for clients has failed.
    pub fn serve(&mut self, backend: &mut Backend<'_>) -> io::Result<Infallible> {
        loop {
            let came = self.wait()?;
            // Not later: what has come while a request took its time is looked at before anybody is
            // taken for late.
            let now = Instant::now();
            if came {
                self.accept();
            }
            for slot in &mut self.slots {
                slot.turn(now, backend, &mut self.watch);
            }
        }
    }

    /// Waits until there is something to do. Whether somebody wants to connect.
    fn wait(&mut self) -> io::Result<bool> {
        let now = Instant::now();
        let left = self.slots.iter().filter_map(|slot| slot.due(now)).min();
        let left = left.map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() });
        let mut fds: [PollFd<'_>; CLIENTS + 1] = array::from_fn(|at| match self.slots.get(at) {
            Some(Slot { connection: Some(connection), outgoing, .. }) => {
                let wanted = if outgoing.is_empty() { PollFlags::IN } else { PollFlags::OUT };
                PollFd::new(&connection.stream, wanted)
            }
            Some(_) => PollFd::new(&self.listener, PollFlags::empty()),
            None => PollFd::new(&self.listener, PollFlags::IN),
        });
        match poll(&mut fds, left.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        let events: [PollFlags; CLIENTS + 1] = array::from_fn(|at| fds[at].revents());
        for (slot, events) in self.slots.iter_mut().zip(events) {
            slot.events = events;
        }
        Ok(!events[CLIENTS].is_empty())
    }

    /// Lets in who may come.
    fn accept(&mut self) {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => continue,
                // Too many open files, or no memory: who waits is still there when that has passed.
                Err(_) => return thread::sleep(Duration::from_millis(100)),
            };
            // Nothing is owed to somebody who can't even be answered without waiting.
            let Ok(()) = stream.set_nonblocking(true) else { continue };
            match admits(&stream) {
                Err(text) => send_away(stream, Answer::Refused(text)),
                Ok(()) => match self.slots.iter_mut().find(|slot| slot.connection.is_none()) {
                    Some(slot) => slot.connection = Some(Connection::new(stream)),
                    None => {
                        send_away(stream, Answer::Failed(Text::of(format_args!("{CLIENTS} clients are connected"))))
                    }
                },
            }
        }
    }
}

/// Root may ask, and who could do anything with this process anyway.
fn admits(stream: &UnixStream) -> Result<(), Text> {
    let peer = socket_peercred(stream).map_err(|e| Text::of(format_args!("who you are is not known: {e}")))?;
    if peer.uid.is_root() || peer.uid == geteuid() {
        return Ok(());
    }
    Err(Text::of(format_args!("only root may ask, and you are user {}", peer.uid.as_raw())))
}

fn send_away(mut stream: UnixStream, answer: Answer) {
    let mut line = Outgoing::new();
    line.put(answer);
    // Who does not get it is sent away without.
    let _ = line.send(&mut stream);
}

struct Connection {
    stream: UnixStream,
    session: Session,
    /// Closed once the last answer has gone.
    ends: bool,
}

impl Connection {
    fn new(stream: UnixStream) -> Self {
        Self { stream, session: Session::default(), ends: false }
    }
}

/// Room for one connection.
struct Slot {
    connection: Option<Connection>,
    incoming: Incoming,
    outgoing: Outgoing,
    events: PollFlags,
    /// Since when its client owes us something.
    owes_since: Option<Instant>,
}

impl Slot {
    fn empty() -> Self {
        let (incoming, outgoing) = (Incoming::new(), Outgoing::new());
        Self { connection: None, incoming, outgoing, events: PollFlags::empty(), owes_since: None }
    }

    fn close(&mut self) {
        self.connection = None;
        self.incoming.clear();
        self.outgoing.clear();
        self.owes_since = None;
    }

    /// In what time something is to be done though nothing comes.
    fn due(&self, now: Instant) -> Option<Duration> {
        self.connection.as_ref()?;
        if self.outgoing.is_empty() && self.incoming.has_line() {
            return Some(Duration::ZERO);
        }
        self.owes_since.map(|since| (since + PATIENCE).saturating_duration_since(now))
    }

    /// Does what can be done without waiting for this client: one request at most.
    fn turn(&mut self, now: Instant, backend: &mut Backend<'_>, watch: &mut Watch) {
        if self.connection.is_none() {
            return;
        }
        // Who has closed hears no answer. What it had still asked for is not begun.
        if self.events.intersects(PollFlags::HUP | PollFlags::ERR) || self.exchange(backend, watch).is_err() {
            return self.close();
        }
        let owes = self.connection.as_ref().is_some_and(|connection| !connection.session.is_open())
            || !self.outgoing.is_empty()
            || !(self.incoming.is_empty() || self.incoming.has_line());
        self.owes_since = if owes { self.owes_since.or(Some(now)) } else { None };
        if self.owes_since.is_some_and(|since| now >= since + PATIENCE) {
            self.close();
        }
    }

    /// An error ends the connection.
    fn exchange(&mut self, backend: &mut Backend<'_>, watch: &mut Watch) -> io::Result<()> {
        let Some(connection) = &mut self.connection else { return Ok(()) };
        if !self.outgoing.is_empty() && !sent(&mut self.outgoing, &mut connection.stream)? {
            return Ok(());
        }
        if connection.ends {
            return Err(ErrorKind::ConnectionAborted.into());
        }
        if !self.incoming.has_line() && self.events.contains(PollFlags::IN) {
            match self.incoming.fill(&mut connection.stream) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(e) => return Err(e),
            }
        }
        let answer = match self.incoming.take_line() {
            Ok(None) => return Ok(()),
            Ok(Some(line)) => connection.session.answer(Request::parse(line), backend),
            Err(TooLong) => {
                connection.ends = true;
                Answer::Refused(Text::of(format_args!("a line has at most {} bytes", crate::LINE)))
            }
        };
        watch.see(&answer);
        self.owes_since = None;
        self.outgoing.put(answer);
        sent(&mut self.outgoing, &mut connection.stream).map(drop)
    }
}

/// Whether all has gone.
fn sent(line: &mut Outgoing, to: &mut UnixStream) -> io::Result<bool> {
    match line.send(to) {
        Ok(()) => Ok(true),
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Tells people when the anchor's place goes away, and when it is back; once a minute at most, for
/// nothing may fill what nobody reads.
#[derive(Default)]
struct Watch {
    away: bool,
    /// Whether that was told, and when something last was.
    tells: bool,
    told: Option<Instant>,
}

impl Watch {
    fn see(&mut self, answer: &Answer) {
        let now = Instant::now();
        match answer {
            Answer::Failed(text) if !self.away => {
                self.away = true;
                self.tells = self.told.is_none_or(|told| now.duration_since(told) >= Duration::from_secs(60));
                if self.tells {
                    self.told = Some(now);
                    eprintln!("away: {text}");
                }
            }
            Answer::Failed(_) | Answer::Refused(_) | Answer::Hello { .. } => {}
            _ if self.away => {
                self.away = false;
                if self.tells {
                    eprintln!("back");
                }
            }
            _ => {}
        }
    }
}

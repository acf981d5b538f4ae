//! The daemon's end of its control socket. One thread serves all clients: it never waits for one of
//! them, and queue threads have no part in it.

use super::{
    protocol::{MOST_BYTES, Request, error, failed, line},
    state,
};
use crate::{
    failure::{Exit, Failure},
    threads::named,
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{getsockopt, sockopt::PeerCredentials},
};
use serde_json::Value;
use std::{
    fs,
    io::{self, ErrorKind, Read, Write},
    os::{
        fd::AsFd,
        unix::{
            fs::{PermissionsExt, chown},
            net::{UnixListener, UnixStream},
        },
    },
    path::Path,
    time::{Duration, Instant},
};

/// Members of this group may ask, where the machine has it; who may change something
/// is not theirs to say.
const READERS: &str = "ublk-integrity";
/// Clients served at a time. One more takes the place of the one that has been silent for longest.
const MOST_CLIENTS: usize = 16;
/// How long a client may take for a request, and for taking its answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Starts answering for device `id`: `respond` knows what a request is answered with that may be asked.
/// `None`: somebody else answers on that connection.
pub fn serve(id: u32, respond: impl Fn(&Request, &UnixStream) -> Option<Value> + Send + 'static) -> io::Result<()> {
    let path = state::socket_path(id);
    let _ = fs::remove_file(&path);
    let listener = UnixListener::bind(&path)?;
    admit_readers(&path)?;
    listener.set_nonblocking(true)?;
    let server = Server { listener, clients: Vec::new(), respond };
    named("control").spawn(move || server.run())?;
    Ok(())
}

/// Only root can connect, and the group of readers where there is one.
fn admit_readers(path: &Path) -> io::Result<()> {
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    let group = group_in(&groups, READERS);
    if let Some(group) = group {
        chown(path, None, Some(group))?;
    }
    let mode = if group.is_some() { 0o660 } else { 0o600 };
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

/// The number of a group in a group(5) file. Not through the C library, which may ask the network.
fn group_in(file: &str, name: &str) -> Option<u32> {
    let mut groups = file.lines().map(|line| line.split(':'));
    groups.find_map(|mut fields| (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok()).flatten())
}

struct Server<F> {
    listener: UnixListener,
    clients: Vec<Client>,
    respond: F,
}

impl<F: Fn(&Request, &UnixStream) -> Option<Value>> Server<F> {
    fn run(mut self) {
        loop {
            self.wait();
            self.accept();
            let respond = &self.respond;
            let answer = |line: &[u8], client: &Client| answer(line, client, respond);
            self.clients.retain_mut(|client| client.is_in_time() && client.go_on(answer));
        }
    }

    /// Until somebody has something to say, can take more of an answer, or has taken too long.
    fn wait(&self) {
        let listening = PollFd::new(self.listener.as_fd(), PollFlags::POLLIN);
        let clients = self.clients.iter().map(Client::polled);
        let mut all: Vec<_> = std::iter::once(listening).chain(clients).collect();
        let next = self.clients.iter().map(|client| client.time_left()).min();
        // Up, so that nobody is looked at a moment too early.
        let timeout = next.map_or(PollTimeout::NONE, |next| {
            PollTimeout::try_from(next + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
        });
        if poll(&mut all, timeout).is_err() {
            // Out of memory: not as fast as it fails.
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn accept(&mut self) {
        match self.listener.accept() {
            Ok((stream, _)) => {
                if self.clients.len() == MOST_CLIENTS {
                    let oldest = self.clients.iter().enumerate().min_by_key(|(_, client)| client.deadline);
                    oldest.map(|(i, _)| i).map(|i| self.clients.swap_remove(i));
                }
                self.clients.extend(Client::new(stream));
            }
            Err(e)
                if matches!(
                    e.kind(),
                    ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::ConnectionAborted
                ) => {}
            // No descriptors left: not as fast as it fails.
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// One connection. It has all the time it takes the others to be served, and no more than
/// [`PATIENCE`] for a request or an answer.
struct Client {
    stream: UnixStream,
    root: bool,
    /// Of a request, as far as it has come; more may follow it.
    received: Vec<u8>,
    /// Of an answer, what is still to be sent.
    unsent: Vec<u8>,
    deadline: Instant,
}

impl Client {
    fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let root = getsockopt(&stream, PeerCredentials)?.uid() == 0;
        Ok(Self { stream, root, received: Vec::new(), unsent: Vec::new(), deadline: Instant::now() + PATIENCE })
    }

    /// One that is not hears why, if it listens: it may be of before there were
    /// requests, and wait for us.
    fn is_in_time(&mut self) -> bool {
        let in_time = Instant::now() < self.deadline;
        if !in_time && self.unsent.is_empty() {
            self.unsent = line(&error(format!("no request within {} s", PATIENCE.as_secs())));
            let _ = self.send();
        }
        in_time
    }

    /// Until we must look at it again, whatever it does.
    fn time_left(&self) -> Duration {
        match self.unsent.is_empty() && self.received.contains(&b'\n') {
            true => Duration::ZERO,
            false => self.deadline.saturating_duration_since(Instant::now()),
        }
    }

    fn polled(&self) -> PollFd<'_> {
        let what = if self.unsent.is_empty() { PollFlags::POLLIN } else { PollFlags::POLLOUT };
        PollFd::new(self.stream.as_fd(), what)
    }

    /// Goes on as far as that is possible without waiting, by one request at most; `false`
    /// where it is over, or somebody else answers. Nothing more is read before an answer
    /// has been taken, so nobody can make us keep many.
    fn go_on(&mut self, answer: impl Fn(&[u8], &Self) -> Option<Value>) -> bool {
        while self.unsent.is_empty() && !self.received.contains(&b'\n') {
            match self.receive() {
                Ok(0) => return false,
                Ok(_) if self.received.len() > MOST_BYTES => {
                    self.unsent = line(&error(format!("a request has at most {MOST_BYTES} bytes")));
                    // Said, if it can be at once. Where the next request would begin nobody knows.
                    let _ = self.send();
                    return false;
                }
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return true,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        if self.unsent.is_empty() {
            let end = self.received.iter().position(|byte| *byte == b'\n').expect("looked for");
            let request: Vec<u8> = self.received.drain(..=end).collect();
            let Some(answer) = answer(&request, self) else { return false };
            self.unsent = line(&answer);
        }
        match self.send() {
            Ok(true) => self.deadline = Instant::now() + PATIENCE,
            Ok(false) => {}
            Err(_) => return false,
        }
        true
    }

    fn receive(&mut self) -> io::Result<usize> {
        let mut bytes = [0; 4096];
        let count = (&self.stream).read(&mut bytes)?;
        self.received.extend_from_slice(&bytes[..count]);
        Ok(count)
    }

    /// Whether all has been sent.
    fn send(&mut self) -> io::Result<bool> {
        while !self.unsent.is_empty() {
            match (&self.stream).write(&self.unsent) {
                Ok(count) => drop(self.unsent.drain(..count)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(true)
    }
}

/// What a request is answered with; `None` where somebody else does that.
fn answer(line: &[u8], client: &Client, respond: impl Fn(&Request, &UnixStream) -> Option<Value>) -> Option<Value> {
    let request = match Request::parse(line) {
        Ok(request) => request,
        Err(why) => return Some(error(why)),
    };
    match permit(request.changes(), client.root) {
        Ok(()) => respond(&request, &client.stream),
        Err(failure) => Some(failed(&failure)),
    }
}

/// Whoever can connect may read.
fn permit(changes: bool, root: bool) -> Result<(), Failure> {
    if changes && !root { Err(Failure::new(Exit::KeyOrPermission, "this is for root")) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::io::{BufRead, BufReader};

    const STATUS: &[u8] = b"{\"verb\":\"status\"}\n";
    const HAND_OVER: &[u8] = b"{\"verb\":\"hand-over\"}\n";

    /// A server in a thread, and where it listens.
    fn started(respond: impl Fn(&Request) -> Value + Send + 'static) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.sock");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        // Whoever takes over hears that it is over.
        let respond = move |request: &Request, mut client: &UnixStream| match request {
            Request::HandOver {} => {
                client.write_all(b"{\"closed\":true}\n").unwrap();
                None
            }
            request => Some(respond(request)),
        };
        let server = Server { listener, clients: Vec::new(), respond };
        std::thread::spawn(move || server.run());
        (dir, path)
    }

    fn connected(path: &Path) -> BufReader<UnixStream> {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        BufReader::new(stream)
    }

    fn ask(client: &mut BufReader<UnixStream>, request: &[u8]) -> Value {
        client.get_mut().write_all(request).unwrap();
        let mut text = String::new();
        client.read_line(&mut text).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn each_line_is_answered_with_one() {
        let (_dir, path) = started(|_| json!({ "reads": 3 }));
        let mut client = connected(&path);
        for _ in 0..3 {
            assert_eq!(ask(&mut client, STATUS)["reads"], 3);
        }
        assert!(ask(&mut client, b"{\"verb\":\"shrink\"}\n")["error"].as_str().unwrap().contains("knows no shrink"));
        assert!(ask(&mut client, b"\n")["error"].is_string(), "and goes on");
        assert_eq!(ask(&mut client, &[STATUS, STATUS].concat())["reads"], 3);
        assert_eq!(ask(&mut client, b"")["reads"], 3, "the second of two at once");
    }

    #[test]
    fn clients_that_say_nothing_or_take_nothing_hold_nobody_up() {
        let (_dir, path) = started(|_| json!({ "filling": "x".repeat(60_000) }));
        let mut silent: Vec<_> = (0..MOST_CLIENTS / 2).map(|_| connected(&path)).collect();
        let greedy: Vec<_> = (0..MOST_CLIENTS * 2)
            .map(|_| {
                let client = connected(&path);
                client.get_ref().set_nonblocking(true).unwrap();
                // More than fits into the socket, and nothing is read.
                while client.get_ref().write(STATUS).is_ok() {}
                client
            })
            .collect();
        let begun = Instant::now();
        assert!(ask(&mut connected(&path), STATUS)["filling"].is_string());
        assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
        let mut text = String::new();
        assert_eq!(silent[0].read_line(&mut text).unwrap(), 0, "who was silent longest has made room");
        drop(greedy);
    }

    #[test]
    fn a_request_without_end_is_refused() {
        let (_dir, path) = started(|_| json!({}));
        let mut client = connected(&path);
        // The other side may have closed before all has been written.
        let _ = client.get_mut().write_all(&vec![b'x'; MOST_BYTES + 4096]);
        let mut text = String::new();
        let _ = client.read_line(&mut text);
        assert!(text.is_empty() || text.contains("65536"), "{text}");
        assert_eq!(ask(&mut connected(&path), STATUS), json!({}));
    }

    #[test]
    fn changes_are_roots() {
        assert!(permit(true, false).is_err());
        for (changes, root) in [(true, true), (false, false), (false, true)] {
            assert!(permit(changes, root).is_ok());
        }
        let (stream, _other) = UnixStream::pair().unwrap();
        let mut client = Client::new(stream).unwrap();
        let respond = |request: &Request, _: &UnixStream| Some(json!({ "changes": request.changes() }));
        let mut asked = |line: &[u8], root| {
            client.root = root;
            answer(line, &client, respond).unwrap()
        };
        assert_eq!(asked(STATUS, false)["changes"], false, "reading is for all who can connect");
        for verb in [HAND_OVER, b"{\"verb\":\"scrub-stop\"}\n", b"{\"verb\":\"clear\"}\n", b"{\"verb\":\"heal\"}\n"] {
            assert_eq!(asked(verb, false)["exit"], Exit::KeyOrPermission as u8);
            assert_eq!(asked(verb, true)["changes"], true);
        }
    }

    #[test]
    fn who_takes_the_device_over_is_answered_by_somebody_else() {
        let (_dir, path) = started(|_| json!({ "reads": 3 }));
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root");
            return;
        }
        let mut client = connected(&path);
        assert_eq!(ask(&mut client, HAND_OVER), json!({ "closed": true }));
        let mut text = String::new();
        assert_eq!(client.read_line(&mut text).unwrap(), 0, "and that was all");
        assert_eq!(ask(&mut connected(&path), STATUS)["reads"], 3, "others go on");
    }

    #[test]
    fn the_group_is_found_in_the_file_alone() {
        let file = "root:x:0:\nublk-integrity:x:991:monitor\nublk-integrity2:x:5:\n";
        assert_eq!(group_in(file, "ublk-integrity"), Some(991));
        assert_eq!(group_in(file, "integrity"), None);
        assert_eq!(group_in("ublk-integrity:x\n", "ublk-integrity"), None);
    }
}

//! Asking a daemon, which may be stopped, stuck or gone: no question takes longer than
//! [`ANSWERS_WITHIN`], or what is said with it.

use super::protocol::{ANSWERS_WITHIN, HandOver, MOST_BYTES, Refusal, Request};
use crate::failure::{Exit, Failure, plain};
use nix::{
    errno::Errno,
    sys::{
        socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt::SendTimeout},
        time::{TimeVal, TimeValLike},
    },
};
use serde::Serialize;
use serde_json::Value;
use std::{
    fmt::Display,
    io::{self, ErrorKind, Read, Write},
    net::Shutdown,
    os::{fd::AsRawFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// How long a daemon may take for an answer for which it has to read and write.
const CONVERSES_WITHIN: Duration = Duration::from_secs(60);

/// Why there is no answer.
#[derive(Debug)]
pub enum Unanswered {
    /// Not within the time.
    Late,
    /// The daemon can't be reached, has hung up, or is about to leave: the next one may answer.
    Absent(Failure),
    /// The daemon says why, or is not for us to ask: that is final.
    Refused(Failure),
}

impl Unanswered {
    /// Whether it would be so again.
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Refused(_))
    }

    /// What a command fails with, where `late` is said of a daemon that has not answered within the time.
    pub fn failure(self, late: impl FnOnce() -> Failure) -> Failure {
        match self {
            Self::Absent(failure) | Self::Refused(failure) => failure,
            Self::Late => late(),
        }
    }
}

/// The answer of the daemon whose socket is at `path`.
pub fn ask(path: &Path, request: &Request) -> Result<Value, Unanswered> {
    let deadline = Instant::now() + ANSWERS_WITHIN;
    let answer = asked(path, request).and_then(|mut stream| answer(&mut stream, deadline));
    granted(path, &answer.map_err(|e| unanswered(path, &e))?)
}

/// A connection on which one line after the other is asked and answered.
pub struct Conversation {
    stream: UnixStream,
    path: PathBuf,
}

impl Conversation {
    /// Begins with a request, and how that was answered.
    pub fn begin(path: &Path, request: &Request) -> Result<(Self, Value), Unanswered> {
        let stream = asked(path, request).map_err(|e| unanswered(path, &e))?;
        let mut begun = Self { stream, path: path.to_owned() };
        let answer = begun.answer()?;
        Ok((begun, answer))
    }

    /// Asks more.
    pub fn ask(&mut self, what: &impl Serialize) -> Result<Value, Unanswered> {
        self.stream.write_all(&line(what)).map_err(|e| unanswered(&self.path, &e))?;
        self.answer()
    }

    /// A disk may take its time.
    fn answer(&mut self) -> Result<Value, Unanswered> {
        let said = answer(&mut self.stream, Instant::now() + CONVERSES_WITHIN);
        granted(&self.path, &said.map_err(|e| unanswered(&self.path, &e))?)
    }
}

/// What a command fails with whose conversation with the daemon at `path` ends so.
pub fn not_conversed(path: &Path, why: Unanswered) -> Failure {
    why.failure(|| {
        let seconds = CONVERSES_WITHIN.as_secs();
        Failure::new(Exit::Busy, format_args!("{}: it has not answered within {seconds} s", cant_reach(path)))
    })
}

/// How a daemon that was asked to hand over has answered within `limit`, if it has. Where it has not,
/// it can no more: nobody listens then, and it goes on. The process of that daemon is `pid`.
pub fn hand_over(limit: Duration, path: &Path, pid: u32) -> Result<HandOver, Unanswered> {
    let deadline = Instant::now() + limit;
    let asked = asked(path, &Request::HandOver {});
    let line = asked.and_then(|mut stream| match answer(&mut stream, deadline) {
        Err(e) if is_late(&e) => given_up(&mut stream)?.ok_or(e),
        done => done,
    });
    let line = line.map_err(|e| unanswered(path, &e))?;
    Ok(HandOver::of(&parsed(path, &line)?, pid))
}

/// Listens no more. What has been said before this, if anything: what comes later the other side can't
/// say, and knows that.
fn given_up(stream: &mut UnixStream) -> io::Result<Option<Vec<u8>>> {
    stream.shutdown(Shutdown::Read)?;
    let said = answer(stream, Instant::now() + ANSWERS_WITHIN)?;
    Ok((!said.is_empty()).then_some(said))
}

fn is_late(e: &io::Error) -> bool {
    matches!(e.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock)
}

fn unanswered(path: &Path, e: &io::Error) -> Unanswered {
    match e.kind() {
        _ if is_late(e) => Unanswered::Late,
        ErrorKind::PermissionDenied => {
            let what = format!("{}: {}", cant_reach(path), plain(e));
            Unanswered::Refused(Failure::new(Exit::KeyOrPermission, what))
        }
        _ => Unanswered::Absent(failed(path, &plain(e))),
    }
}

/// The first line of an answer; more may follow.
fn parsed(path: &Path, answer: &[u8]) -> Result<Value, Unanswered> {
    if answer.is_empty() {
        return Err(Unanswered::Absent(failed(path, &"it has closed the connection")));
    }
    let line = answer.split(|byte| *byte == b'\n').next().unwrap_or_default();
    // A line that its writer did not end is one that has hung up, too.
    let cut = line.len() == answer.len();
    serde_json::from_slice(line).map_err(|e| match failed(path, &e) {
        failure if cut && e.is_eof() => Unanswered::Absent(failure),
        failure => Unanswered::Refused(failure),
    })
}

/// The same, unless it says what is wrong.
fn granted(path: &Path, answer: &[u8]) -> Result<Value, Unanswered> {
    let answer = parsed(path, answer)?;
    let Some(why) = answer["error"].as_str() else { return Ok(answer) };
    // One that it has an exit code for was understood.
    let failure = match answer["exit"].as_u64().and_then(|code| u8::try_from(code).ok()) {
        Some(code) => Failure::new(Exit::from_code(code), why),
        None => failed(path, &why),
    };
    Err(if Refusal::is_of_leaving(&answer) { Unanswered::Absent(failure) } else { Unanswered::Refused(failure) })
}

fn failed(path: &Path, why: &dyn Display) -> Failure {
    Failure::new(Exit::Device, format_args!("{}: {why}", cant_reach(path)))
}

fn cant_reach(path: &Path) -> String {
    format!("can't reach the daemon at {}", path.display())
}

fn line(what: &impl Serialize) -> Vec<u8> {
    let mut text = serde_json::to_vec(what).expect("plain data");
    text.push(b'\n');
    text
}

/// A connection by which that was asked.
fn asked(path: &Path, request: &Request) -> io::Result<UnixStream> {
    let mut stream = connected(path)?;
    match stream.write_all(&line(request)) {
        // A daemon of before there were requests: it has said all it has to say and closed.
        Err(e) if e.kind() == ErrorKind::BrokenPipe => {}
        done => done?,
    }
    Ok(stream)
}

/// At least a line, or all until the other side closes.
fn answer(stream: &mut UnixStream, deadline: Instant) -> io::Result<Vec<u8>> {
    let mut answer = Vec::new();
    let mut bytes = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Zero would mean without end.
        stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        match stream.read(&mut bytes) {
            Ok(0) => return Ok(answer),
            Ok(count) => answer.extend_from_slice(&bytes[..count]),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            // Closed before our request was read, by such a daemon.
            Err(e) if e.kind() == ErrorKind::ConnectionReset && !answer.is_empty() => return Ok(answer),
            Err(e) => return Err(e),
        }
        if answer.contains(&b'\n') {
            return Ok(answer);
        }
        if answer.len() > MOST_BYTES || left.is_zero() {
            return Err(if left.is_zero() { ErrorKind::TimedOut } else { ErrorKind::InvalidData }.into());
        }
    }
}

/// To connect waits, too, where others wait already and nobody accepts them.
fn connected(path: &Path) -> io::Result<UnixStream> {
    let descriptor = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&descriptor, SendTimeout, &TimeVal::milliseconds(ANSWERS_WITHIN.as_millis() as i64))?;
    loop {
        match connect(descriptor.as_raw_fd(), &UnixAddr::new(path)?) {
            Err(Errno::EINTR) => {}
            done => return Ok(done.map(|()| descriptor.into())?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{os::unix::net::UnixListener, thread};

    fn late(path: &Path) -> Duration {
        let begun = Instant::now();
        assert!(matches!(ask(path, &Request::Status {}), Err(Unanswered::Late)));
        begun.elapsed()
    }

    #[test]
    fn a_daemon_that_does_not_answer_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.sock");
        let listener = UnixListener::bind(&path).unwrap();
        assert!(late(&path) < ANSWERS_WITHIN * 5, "nobody accepts");
        // One that says a little from time to time, and never all.
        thread::spawn(move || {
            for client in listener.incoming() {
                let mut client = client.unwrap();
                while client.write_all(b" ").is_ok() {
                    thread::sleep(Duration::from_millis(100));
                }
            }
        });
        assert!(late(&path) < ANSWERS_WITHIN * 5, "word by word");
    }

    #[test]
    fn where_the_queue_of_callers_is_full_nobody_waits_either() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.sock");
        let _listener = UnixListener::bind(&path).unwrap();
        // As many as the kernel lets wait: the next one would.
        let mut waiting = Vec::new();
        while let Ok(stream) = connected_within(&path, 50) {
            waiting.push(stream);
        }
        assert!(!waiting.is_empty());
        assert!(late(&path) < ANSWERS_WITHIN * 5);
    }

    fn connected_within(path: &Path, milliseconds: i64) -> nix::Result<std::os::fd::OwnedFd> {
        let descriptor = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        setsockopt(&descriptor, SendTimeout, &TimeVal::milliseconds(milliseconds))?;
        connect(descriptor.as_raw_fd(), &UnixAddr::new(path)?)?;
        Ok(descriptor)
    }

    #[test]
    fn answers_and_errors_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let answers = [
            "{\"reads\":3}\n",
            "{\"error\":\"knows no status\"}\n",
            "{\"reads\":4}",
            "garbage\n",
            "{\"error\":\"at work\",\"exit\":5}\n",
            "{\"error\":\"stops\",\"exit\":5,\"leaving\":true}\n",
            "",
            "{\"reads\":",
        ];
        thread::spawn(move || {
            for answer in answers {
                let mut client = listener.accept().unwrap().0;
                client.write_all(answer.as_bytes()).unwrap();
                // Closed before the request is there: as a daemon of before there were any.
            }
        });
        let status = || ask(&path, &Request::Status {});
        assert_eq!(status().unwrap()["reads"], 3);
        assert!(matches!(status(), Err(Unanswered::Refused(failure)) if failure.message.contains("knows no status")));
        assert_eq!(status().unwrap()["reads"], 4);
        assert!(matches!(status(), Err(Unanswered::Refused(failure)) if failure.exit == Exit::Device));
        let at_work = status().unwrap_err();
        assert!(at_work.is_final());
        let at_work = at_work.failure(|| panic!("it has answered"));
        assert_eq!((at_work.exit, at_work.message.as_str()), (Exit::Busy, "at work"));
        // The next daemon may answer.
        assert!(matches!(status(), Err(Unanswered::Absent(failure)) if failure.message == "stops"));
        assert!(matches!(status(), Err(Unanswered::Absent(_))), "it has hung up");
        assert!(matches!(status(), Err(Unanswered::Absent(_))), "it has hung up in the middle of a line");
        assert!(matches!(ask(&dir.path().join("none"), &Request::Status {}), Err(Unanswered::Absent(_))));
    }

    #[test]
    fn a_hand_over_that_is_given_up_can_not_come_and_one_that_came_is_heard() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let begin = |limit: u64| {
            let path = path.clone();
            let asked = thread::spawn(move || hand_over(Duration::from_millis(limit), &path, 7));
            (listener.accept().unwrap().0, asked)
        };
        let (mut client, asked) = begin(60_000);
        client.write_all(b"{\"closing\":true}\n{\"closed\":true}\n").unwrap();
        assert_eq!(asked.join().unwrap().unwrap(), HandOver::Closing);

        let (mut client, asked) = begin(20);
        assert!(matches!(asked.join().unwrap(), Err(Unanswered::Late)));
        assert!(client.write_all(b"{\"closing\":true}\n").is_err(), "it knows that nobody waits");

        let (client, asked) = begin(60_000);
        drop(client);
        assert!(matches!(asked.join().unwrap(), Err(Unanswered::Absent(_))), "it may be dying");
    }

    #[test]
    fn what_was_said_before_nobody_listened_is_found() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"{\"closing\":true}\n").unwrap();
        assert_eq!(given_up(&mut ours).unwrap().unwrap(), b"{\"closing\":true}\n");
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        assert_eq!(given_up(&mut ours).unwrap(), None);
        assert!(theirs.write_all(b"{\"closing\":true}\n").is_err(), "though our end is open yet");
    }
}

//! An agent whose store and counter are in memory, its clients, and what no client should do.

mod backends;
mod client;

use backends::{Memory, Number};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::{
    io::{BufRead, BufReader, ErrorKind, Read, Write},
    net::Shutdown,
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;
use ublk_anchor_protocol::{
    Backend, Body, CLIENTS, Client, Error, Incremented, LINE, PATIENCE, Replaced, Secret, Server, StartError, Text,
    Uuid,
    message::{Answer, Shape},
};

const UUID: &str = "00112233-4455-6677-8899-aabbccddeeff";
const TIMEOUT: Duration = Duration::from_secs(10);

fn uuid() -> Uuid {
    Uuid::parse(UUID.as_bytes()).unwrap()
}

fn body(byte: u8) -> Body {
    Body([byte; Body::BYTES])
}

/// An agent in a thread of this process.
struct Agent {
    path: PathBuf,
    _dir: TempDir,
}

impl Agent {
    fn serving(serve: impl FnOnce(Server) + Send + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent");
        let server = Server::listen(&path).unwrap();
        thread::spawn(move || serve(server));
        Self { path, _dir: dir }
    }

    fn store() -> Self {
        Self::serving(|mut server| drop(server.serve(&mut Backend::Store(&mut Memory::default()))))
    }

    fn counter(mut number: Number) -> Self {
        Self::serving(move |mut server| drop(server.serve(&mut Backend::Counter(&mut number))))
    }

    fn client(&self, secret: Option<Secret>) -> Client {
        Client::new(&self.path, uuid(), secret, TIMEOUT).unwrap()
    }

    /// A connection that says what it likes.
    fn raw(&self) -> Raw {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        Raw { reader: BufReader::new(stream.try_clone().unwrap()), stream }
    }

    /// One that has said `hello`.
    fn open(&self) -> Raw {
        let mut raw = self.raw();
        assert_eq!(raw.ask(&format!("hello 1 {UUID}")), "ok store");
        raw
    }
}

struct Raw {
    reader: BufReader<UnixStream>,
    stream: UnixStream,
}

impl Raw {
    fn say(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).unwrap();
    }

    /// The next line, or nothing where the agent has closed.
    fn hear(&mut self) -> String {
        let mut line = String::new();
        match self.reader.read_line(&mut line) {
            // Closed with lines of ours unread.
            Err(e) if e.kind() == ErrorKind::ConnectionReset => {}
            other => drop(other.expect("the agent answers or closes in time")),
        }
        line.trim_end_matches('\n').to_owned()
    }

    fn ask(&mut self, line: &str) -> String {
        self.say(format!("{line}\n"));
        self.hear()
    }
}

#[test]
fn a_store_keeps_what_is_put_where_it_was_expected() {
    let agent = Agent::store();
    let (mut one, mut two) = (agent.client(None), agent.client(None));
    assert_eq!(one.shape(), Ok(Shape::Store));
    assert_eq!(one.load(), Ok(None));
    assert_eq!(one.replace(1, &body(1)), Ok(Replaced::Absent));
    assert_eq!(one.init_store(1, &body(1)), Ok(Replaced::Done));
    assert_eq!(two.init_store(1, &body(9)), Ok(Replaced::Conflict));
    assert_eq!(two.load(), Ok(Some((1, body(1)))));
    assert_eq!(two.replace(1, &body(2)), Ok(Replaced::Done));
    assert_eq!(one.replace(1, &body(3)), Ok(Replaced::Conflict));
    assert_eq!(one.load(), Ok(Some((2, body(2)))));
    assert_eq!(one.retire(1), Ok(Replaced::Conflict));
    assert_eq!(one.retire(2), Ok(Replaced::Done));
    assert_eq!(two.retire(2), Ok(Replaced::Absent));
    assert_eq!(two.load(), Ok(None));
    assert!(matches!(two.read(), Err(Error::Refused(_))));
    let mut other = Client::new(&agent.path, Uuid([1; 16]), None, TIMEOUT).unwrap();
    assert_eq!(one.init_store(5, &body(5)), Ok(Replaced::Done));
    assert_eq!(other.load(), Ok(None), "each volume has a body of its own");
}

#[test]
fn a_counter_wants_its_secret_and_counts_from_what_is_expected() {
    let agent = Agent::counter(Number { value: Arc::default(), held: None });
    let mut client = agent.client(Some(Secret([7; 32])));
    assert_eq!(client.shape(), Ok(Shape::Counter));
    assert_eq!(client.read(), Ok(None));
    assert_eq!(client.increment(0), Ok(Incremented::Absent));
    assert_eq!(client.init_counter(), Ok(Incremented::Done(1)));
    assert_eq!(client.init_counter(), Ok(Incremented::Conflict));
    assert_eq!(client.increment(0), Ok(Incremented::Conflict));
    assert_eq!(client.increment(1), Ok(Incremented::Done(2)));
    assert_eq!(client.read(), Ok(Some(2)));
    // `err` to a change says nothing about it.
    assert_eq!(client.retire(2), Err(Error::Unknown(Text::of("not today"))));
    assert_eq!(agent.client(Some(Secret([8; 32]))).read(), Err(Error::Refused(Text::of("a wrong secret"))));
    assert_eq!(agent.client(None).read(), Err(Error::Refused(Text::of("no secret"))));
}

/// The conversations that the document shows, word by word.
#[test]
fn the_documents_transcripts_are_what_is_said() {
    let document = include_str!("../../../../../docs/anchor-protocol.md");
    for shape in ["store", "counter"] {
        let begin = format!("```anchor {shape}\n");
        let transcript = document.split_once(&begin).and_then(|(_, rest)| rest.split_once("```")).unwrap().0;
        let agent = match shape {
            "store" => Agent::store(),
            _ => Agent::counter(Number { value: Arc::default(), held: None }),
        };
        let mut raw = agent.raw();
        for line in transcript.lines() {
            let mut line = line.replace("SECRET", &"07".repeat(32));
            for number in 1..=3 {
                line = line.replace(&format!("BODY{number}"), &body(number).to_string());
            }
            match line.split_at(2) {
                ("> ", said) => raw.say(format!("{said}\n")),
                ("< ", heard) => assert_eq!(raw.hear(), heard),
                _ => panic!("{line}"),
            }
        }
    }
}

#[test]
fn garbage_is_refused_and_the_next_line_is_understood() {
    let agent = Agent::store();
    let mut raw = agent.raw();
    for line in
        ["load", "", "hello", "hello 1", "hello 2 00112233-4455-6677-8899-aabbccddeeff", "\u{1}\u{2}ÿ", "ok store"]
    {
        assert!(raw.ask(line).starts_with("refused "), "{line:?}");
    }
    raw.say([0xff, 0, b'\r', b'\n']);
    assert!(raw.hear().starts_with("refused "));
    assert_eq!(raw.ask(&format!("hello 1 {UUID}")), "ok store");
    assert!(raw.ask(&format!("hello 1 {UUID}")).starts_with("refused "), "a second hello");
    for line in ["replace 1", "replace 1 00", "init", "read", "increment 1", "load\r", " load", "retire -1", "auth 00"]
    {
        assert!(raw.ask(line).starts_with("refused "), "{line:?}");
    }
    assert_eq!(raw.ask("load"), "absent");
    // Many lines at once are answered one after the other.
    raw.say("load\nlo\nload\n".repeat(100));
    for _ in 0..100 {
        assert_eq!(raw.hear(), "absent");
        assert!(raw.hear().starts_with("refused "));
        assert_eq!(raw.hear(), "absent");
    }
}

/// Random pieces of lines that mean something, cut and changed anywhere, from many clients at once. No
/// answer is anything but an answer, and who asks properly beside them is answered.
#[test]
fn a_storm_of_almost_lines_changes_nothing_that_was_not_asked_for() {
    let agent = Agent::store();
    let mut sane = agent.client(None);
    assert_eq!(sane.init_store(1, &body(1)), Ok(Replaced::Done));
    let hello = format!("hello 1 {UUID}\n");
    // None of them is for the generation that is there, whatever becomes of one of its characters.
    let lines = [hello.clone(), "load\n".into(), format!("replace 999000 {}\n", body(2)), "retire 999000\n".into()];
    let mut random = Random(20261130);
    for _ in 0..300 {
        let mut raw = agent.raw();
        raw.say(&hello);
        let mut said = Vec::new();
        for _ in 0..random.below(8) {
            let line = lines[random.below(lines.len())].as_bytes();
            match random.below(4) {
                0 => said.extend_from_slice(line),
                1 => said.extend_from_slice(&line[random.below(line.len())..]),
                2 => said.extend_from_slice(&line[..random.below(line.len())]),
                _ => {
                    let at = random.below(line.len());
                    said.extend_from_slice(&line[..at]);
                    said.push(random.below(256) as u8);
                    said.extend_from_slice(&line[at + 1..]);
                }
            }
        }
        // It may have closed at an overlong line.
        let _ = raw.stream.write_all(&said);
        let _ = raw.stream.shutdown(Shutdown::Write);
        assert_eq!(raw.hear(), "ok store");
        loop {
            let heard = raw.hear();
            let known = Answer::parse(heard.as_bytes());
            assert!(
                heard.is_empty() || matches!(known, Ok(Answer::Body { .. } | Answer::Conflict | Answer::Refused(_))),
                "{heard}"
            );
            if heard.is_empty() {
                break;
            }
        }
        assert_eq!(sane.load(), Ok(Some((1, body(1)))));
    }
}

/// Numbers that look random: xorshift.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

#[test]
fn the_longest_line_is_answered_and_a_longer_one_ends_the_connection() {
    let agent = Agent::store();
    let mut raw = agent.open();
    assert!(raw.ask(&"x".repeat(LINE - 1)).starts_with("refused "));
    assert_eq!(raw.ask("load"), "absent");
    raw.say("x".repeat(LINE));
    assert_eq!(raw.hear(), format!("refused a line has at most {LINE} bytes"));
    assert_eq!(raw.hear(), "", "the connection ends");
    // Without end, however much it is.
    let mut raw = agent.open();
    let _ = raw.stream.write_all(&vec![b'y'; 1 << 20]);
    assert!(raw.hear().starts_with("refused "));
    assert_eq!(raw.hear(), "");
    assert_eq!(agent.open().ask("load"), "absent");
}

#[test]
fn who_says_half_a_line_or_none_is_sent_away_and_who_owes_nothing_stays() {
    let agent = Agent::store();
    let since = Instant::now();
    let (mut idle, mut half, mut silent, mut deaf) = (agent.open(), agent.open(), agent.raw(), agent.open());
    half.say("loa");
    // Its answers are read by nobody, and more of them than a socket takes are asked for.
    deaf.say(format!("init 1 {}\n", body(1)));
    assert_eq!(deaf.hear(), "ok");
    deaf.stream.set_write_timeout(Some(Duration::from_millis(100))).unwrap();
    while deaf.stream.write_all(b"load\n").is_ok() {}
    assert_eq!(agent.client(None).load(), Ok(Some((1, body(1)))), "nobody waits for them");
    assert_eq!(silent.hear(), "");
    assert_eq!(half.hear(), "");
    let took = since.elapsed();
    assert!(took >= PATIENCE && took < PATIENCE * 2, "{took:?}");
    // To read before it has closed would make room for more.
    let limit = Timespec { tv_sec: 10, tv_nsec: 0 };
    assert_eq!(poll(&mut [PollFd::new(&deaf.stream, PollFlags::empty())], Some(&limit)), Ok(1), "it is sent away, too");
    let mut rest = Vec::new();
    let _ = deaf.stream.read_to_end(&mut rest);
    assert!(!rest.is_empty(), "what was answered before is there");
    assert!(idle.ask("load").starts_with("ok 1 "));
    // A line in two pieces is one.
    idle.say("lo");
    thread::sleep(Duration::from_millis(50));
    assert!(idle.ask("ad").starts_with("ok 1 "));
}

#[test]
fn as_many_clients_as_there_is_room_for_are_served_and_one_more_is_told() {
    let agent = Agent::store();
    let mut clients: Vec<Raw> = (0..CLIENTS).map(|_| agent.open()).collect();
    let mut late = agent.raw();
    assert_eq!(late.hear(), format!("err {CLIENTS} clients are connected"));
    assert_eq!(late.hear(), "");
    assert_eq!(agent.client(None).load(), Err(Error::Away(Text::of(format!("{CLIENTS} clients are connected")))));
    // All at once, and each hears its own.
    assert_eq!(clients[0].ask(&format!("init 1 {}", body(1))), "ok");
    clients.iter_mut().for_each(|raw| raw.say(format!("replace 1 {}\n", body(2))));
    let done = clients.iter_mut().map(Raw::hear).filter(|answer| answer == "ok").count();
    assert_eq!(done, 1, "one of them replaces generation 1");
    clients.pop();
    let since = Instant::now();
    while agent.client(None).load() != Ok(Some((2, body(2)))) {
        assert!(since.elapsed() < TIMEOUT, "there is room again");
    }
}

#[test]
fn what_was_asked_by_who_has_gone_is_not_begun() {
    let ((begun, has_begun), (go_on, may_go_on)) = (mpsc::channel(), mpsc::channel());
    let value = Arc::new(Mutex::new(Some(5)));
    let agent = Agent::counter(Number { value: value.clone(), held: Some((begun, may_go_on)) });
    let opening = format!("hello 1 {UUID}\nauth {}\n", "07".repeat(32));
    let opened = || {
        let mut raw = agent.raw();
        raw.say(&opening);
        assert_eq!([raw.hear(), raw.hear()], ["ok counter auth", "ok"]);
        raw
    };
    let (mut holder, mut gone) = (opened(), opened());
    holder.say("increment 5\n");
    has_begun.recv().unwrap();
    // The other one asks for the next value, and goes before the agent comes to it.
    gone.say("increment 6\n");
    drop(gone);
    go_on.send(()).unwrap();
    assert_eq!(holder.hear(), "ok 6");
    assert_eq!(holder.ask("read"), "ok 6");
    assert!(has_begun.recv_timeout(Duration::from_millis(300)).is_err());
    assert_eq!(*value.lock().unwrap(), Some(6));
    // Who says no more, and listens, is answered.
    let mut half = agent.raw();
    half.say(format!("{opening}read\n"));
    half.stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!([half.hear(), half.hear(), half.hear()], ["ok counter auth", "ok", "ok 6"]);
}

#[test]
fn another_user_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent");
    let mut server = Server::listen(&path).unwrap();
    thread::spawn(move || server.serve(&mut Backend::Store(&mut Memory::default())));
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can become another user");
        return;
    }
    // So that it is not the permissions that keep it out.
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o711)).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o666)).unwrap();
    let nobody = thread::spawn(move || {
        let nobody = rustix::process::Uid::from_raw(65534);
        rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
        let mut heard = String::new();
        BufReader::new(UnixStream::connect(&path).unwrap()).read_to_string(&mut heard).unwrap();
        heard
    });
    assert_eq!(nobody.join().unwrap(), "refused only root may ask, and you are user 65534\n");
}

#[test]
fn a_socket_has_one_agent_and_what_a_dead_one_left_is_taken_over() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent");
    let first = Server::listen(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(matches!(Server::listen(&path), Err(e @ StartError::Taken(_)) if e.exit_code() == 5));
    drop(first);
    assert!(path.exists());
    drop(Server::listen(&path).unwrap());
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "mine").unwrap();
    assert!(matches!(Server::listen(&path), Err(e @ StartError::NotASocket(_)) if e.exit_code() == 5));
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    assert!(
        matches!(Server::listen(Path::new("/nowhere/agent")), Err(e @ StartError::Io { .. }) if e.exit_code() == 4)
    );
}

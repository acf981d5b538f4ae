//! An anchor that an agent keeps: a process that answers on a Unix socket (docs/anchor-protocol.md). Each call ends within a limit.
//!
//! Of an agent that keeps counters the bodies lie on the metadata device.

use super::{
    lines::{Line, Lines, NoAnswer},
    meta_device::MetaDevice,
};
use crate::wait::Wait;
use std::{
    fmt,
    path::{Path, PathBuf},
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};
use ublk_integrity::{
    anchor::{Anchor, AnchorBytes, Beginning, BodyRoom, Counter, CounterAnchor, Held, Replaced, generation},
    hex, read_hex,
};
use zeroize::Zeroizing;

/// An anchor that an agent keeps.
pub struct AgentAnchor {
    path: PathBuf,
    /// For each request, a new connection included.
    timeout: Duration,
    /// How long a counter is waited for at an open.
    wait: Duration,
    connection: Mutex<Option<Connection>>,
    /// What it said at first. An agent has one shape for good.
    shape: OnceLock<Shape>,
    /// Whether the one that was connected last tells one counter from another.
    has_eras: AtomicBool,
    /// What a counter needs of the volume.
    own: OnceLock<Own>,
}

/// What an agent keeps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Shape {
    /// Bodies.
    Store,
    /// A number that only grows.
    Counter,
}

/// What a counter needs of the volume.
struct Own {
    secret: Zeroizing<[u8; 32]>,
    room: BodyRoom<MetaDevice>,
}

/// A connection that has said hello for a volume.
struct Connection {
    lines: Lines,
    volume: [u8; 16],
    shape: Shape,
}

impl AgentAnchor {
    /// At this socket; nothing is connected yet.
    pub fn at(path: &Path, timeout: Duration) -> Self {
        let (wait, connection, shape, has_eras, own) = Default::default();
        Self { path: path.into(), timeout, wait, connection, shape, has_eras, own }
    }

    /// The same, and a counter that does not answer at first is waited for.
    pub fn patient(self, wait: Duration) -> Self {
        Self { wait, ..self }
    }

    /// One request and its answer. Without one the connection ends: a late answer would be taken for the next request's.
    fn ask(&self, volume: &[u8; 16], request: fmt::Arguments<'_>) -> Result<String, NoAnswer> {
        let request = Line::of(request);
        let deadline = Instant::now() + self.timeout;
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = connection.take().filter(|kept| kept.volume == *volume && kept.lines.is_quiet());
        let answer = kept.map_or_else(|| self.connect(volume, deadline), Ok).and_then(|mut made| {
            let answer = made.lines.exchange(&request, deadline)?;
            *connection = Some(made);
            Ok(answer)
        });
        answer.map_err(|why| format!("{}: {why}", self.path.display()))
    }

    /// Whether it keeps counters. The error: what it keeps can't be had.
    pub fn keeps_counters(&self, volume: &[u8; 16]) -> Result<bool, NoAnswer> {
        Ok(self.shape(volume)? == Shape::Counter)
    }

    /// Tells one that keeps counters what it has to know: the volume's secret for them, and where the bodies are. What was told
    /// before stays.
    pub fn introduce(&self, secret: &[u8; 32], device: MetaDevice) {
        self.own.get_or_init(|| Own { secret: Zeroizing::new(*secret), room: BodyRoom::new(device) });
        // A connection that was made before does not know us.
        *self.connection.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// What the agent keeps.
    fn shape(&self, volume: &[u8; 16]) -> Result<Shape, NoAnswer> {
        if let Some(shape) = self.shape.get() {
            return Ok(*shape);
        }
        let deadline = Instant::now() + self.timeout;
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        let made = self.connect(volume, deadline).map_err(|why| self.odd(&why))?;
        let shape = made.shape;
        *connection = Some(made);
        Ok(shape)
    }

    /// Whether it can say something of a volume. A counter asks for the key before it does.
    pub fn answers(&self, volume: &[u8; 16]) -> Result<(), NoAnswer> {
        match self.shape(volume)? {
            Shape::Store => self.answers_to(volume, format_args!("load")),
            Shape::Counter => Ok(()),
        }
    }

    /// Waits for what is behind one that keeps counters, once it knows the volume. Whoever asks it next says what is wrong.
    pub fn wait_for_counter(&self, volume: &[u8; 16]) {
        let mut wait = Wait::up_to(self.wait, format_args!("the counter behind {}", self.path.display()));
        while self.answers_to(volume, format_args!("read")).is_err() && wait.pause() {}
    }

    /// Whether it can say something to this now. What it refuses, it refuses for good.
    fn answers_to(&self, volume: &[u8; 16], request: fmt::Arguments<'_>) -> Result<(), NoAnswer> {
        let answer = self.ask(volume, request)?;
        if answer.starts_with("err") { Err(self.odd(&answer)) } else { Ok(()) }
    }

    /// As an anchor that is a counter.
    fn counted(&self) -> Result<CounterAnchor<'_, Self, MetaDevice>, NoAnswer> {
        let own = self.own.get().ok_or_else(|| self.odd("it keeps counters, and the volume is not known"))?;
        Ok(CounterAnchor { counter: self, room: &own.room })
    }

    /// Whether anybody listens.
    pub fn is_there(&self) -> Result<(), NoAnswer> {
        Lines::to(&self.path).map(drop).map_err(|why| self.odd(&why))
    }

    fn connect(&self, volume: &[u8; 16], deadline: Instant) -> Result<Connection, NoAnswer> {
        let hello = Line::of(format_args!("hello 1 {}", uuid::Uuid::from_bytes(*volume)));
        let mut made = Connection { lines: Lines::to(&self.path)?, volume: *volume, shape: Shape::Store };
        let answer = made.lines.exchange(&hello, deadline)?;
        let mut words = answer.split(' ');
        made.shape = match (words.next(), words.next()) {
            (Some("ok"), Some("store")) => Shape::Store,
            (Some("ok"), Some("counter")) => Shape::Counter,
            (Some("err" | "refused"), _) => return Err(answer),
            _ => return Err("what listens there is no agent of an anchor".into()),
        };
        if *self.shape.get_or_init(|| made.shape) != made.shape {
            return Err("the agent keeps something else than before".into());
        }
        let (mut wants_secret, mut has_eras) = (false, false);
        words.for_each(|word| {
            wants_secret |= word == "auth";
            has_eras |= word == "era";
        });
        self.has_eras.store(has_eras, Ordering::Relaxed);
        // Before the volume's key is known nothing is asked but what it keeps.
        if let Some(own) = self.own.get().filter(|_| wants_secret) {
            match made.lines.exchange(&Line::of_bytes("auth", &*own.secret), deadline)?.as_str() {
                "ok" => {}
                other => return Err(other.to_owned()),
            }
        }
        Ok(made)
    }
}

/// A body and its generation, as `ok GENERATION BODY` has them.
fn body_in(words: &str) -> Option<AnchorBytes> {
    let (number, text) = words.split_once(' ')?;
    let number: u64 = number.parse().ok()?;
    let mut body: AnchorBytes = [0; 512];
    let is_read = !text.bytes().any(|byte| byte.is_ascii_uppercase()) && read_hex(text, &mut body);
    // What it compares is what the body says.
    (is_read && generation(Some(&body)) == number).then_some(body)
}

impl AgentAnchor {
    fn odd(&self, what: &str) -> String {
        format!("{}: {what}", self.path.display())
    }

    /// What became of a change.
    fn changed(&self, answer: Result<String, NoAnswer>, is_done: impl FnOnce(&str) -> bool) -> Replaced {
        match answer {
            Ok(answer) if is_done(&answer) => Replaced::Done,
            Ok(answer) if answer == "conflict" || answer == "absent" => Replaced::Conflict,
            Ok(answer) => Replaced::Unknown(self.odd(&answer)),
            Err(why) => Replaced::Unknown(why),
        }
    }
}

impl Anchor for AgentAnchor {
    async fn load(&self, volume: &[u8; 16]) -> Result<Held, String> {
        if self.shape(volume)? == Shape::Counter {
            return self.counted()?.load(volume).await;
        }
        let answer = self.ask(volume, format_args!("load"))?;
        match answer.split_once(' ') {
            None if answer == "absent" => Ok(Held::Nothing),
            Some(("ok", words)) => body_in(words).map(Held::Body).ok_or_else(|| self.odd("what it holds is no body")),
            _ => Err(self.odd(&answer)),
        }
    }

    async fn replace(&self, volume: &[u8; 16], expected: u64, body: &AnchorBytes) -> Replaced {
        match self.shape(volume) {
            Ok(Shape::Store) => {}
            Ok(Shape::Counter) => {
                return match self.counted() {
                    Ok(counted) => counted.replace(volume, expected, body).await,
                    Err(why) => Replaced::Unknown(why),
                };
            }
            Err(why) => return Replaced::Unknown(why),
        }
        let body_words = hex(body);
        let answer = match expected {
            0 => self.ask(volume, format_args!("init {} {body_words}", generation(Some(body)))),
            _ => self.ask(volume, format_args!("replace {expected} {body_words}")),
        };
        self.changed(answer, |answer| answer == "ok")
    }

    fn is_counter(&self) -> bool {
        self.shape.get() == Some(&Shape::Counter)
    }

    async fn era(&self, volume: &[u8; 16]) -> Result<u64, String> {
        if self.is_counter() { Counter::era(self, volume).await } else { Ok(0) }
    }

    async fn forward(&self, volume: &[u8; 16], generation: u64) -> Replaced {
        if !self.is_counter() {
            return Replaced::Done;
        }
        match self.counted() {
            Ok(counted) => counted.forward(volume, generation).await,
            Err(why) => Replaced::Unknown(why),
        }
    }

    async fn retire(&self, volume: &[u8; 16], generation: u64) -> Result<(), String> {
        if !self.is_counter() {
            return Ok(());
        }
        match self.ask(volume, format_args!("retire {generation}"))?.as_str() {
            "ok" | "absent" => Ok(()),
            other => Err(self.odd(other)),
        }
    }

    async fn begin(&self, volume: &[u8; 16], held: &Held, above: u64) -> Result<Beginning, String> {
        match self.is_counter() {
            true => self.counted()?.begin(volume, held, above).await,
            false => {
                let beginning = held.beginning(above);
                // It has a generation that no volume gets to, and would keep the next body under the one behind that.
                let fits = beginning.expected == 0 || beginning.generation == beginning.expected.saturating_add(1);
                fits.then_some(beginning).ok_or_else(|| self.odd("what it holds is no body: take it away there"))
            }
        }
    }
}

impl Counter for AgentAnchor {
    async fn read(&self, volume: &[u8; 16]) -> Result<Option<u64>, String> {
        let answer = self.ask(volume, format_args!("read"))?;
        match value_in(&answer) {
            None if answer == "absent" => Ok(None),
            None => Err(self.odd(&answer)),
            value => Ok(value),
        }
    }

    async fn era(&self, volume: &[u8; 16]) -> Result<u64, String> {
        // It was connected to read the value, which comes first.
        if !self.has_eras.load(Ordering::Relaxed) {
            return Ok(0);
        }
        let answer = self.ask(volume, format_args!("era"))?;
        match value_in(&answer) {
            None if answer == "absent" => Ok(0),
            None => Err(self.odd(&answer)),
            Some(era) => Ok(era),
        }
    }

    async fn increment(&self, volume: &[u8; 16], expected: u64) -> Replaced {
        let answer = self.ask(volume, format_args!("increment {expected}"));
        // Whatever else it says it has now, it is not what was to become of it.
        self.changed(answer, |answer| value_in(answer).is_some() && value_in(answer) == expected.checked_add(1))
    }

    async fn init(&self, volume: &[u8; 16]) -> Result<u64, String> {
        let answer = self.ask(volume, format_args!("init"))?;
        value_in(&answer).ok_or_else(|| self.odd(&answer))
    }
}

/// The value in `ok VALUE`.
fn value_in(answer: &str) -> Option<u64> {
    answer.strip_prefix("ok ")?.parse().ok()
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use crate::{
        anchor::asked,
        device::{Backings, Use},
    };
    use std::{
        io::{BufRead, BufReader, Write},
        os::unix::net::UnixListener,
        thread,
    };

    const VOLUME: [u8; 16] = [1; 16];
    const SOON: Duration = Duration::from_millis(300);

    fn body(generation: u64, fill: u8) -> AnchorBytes {
        let mut body = [fill; 512];
        body[32..40].copy_from_slice(&generation.to_le_bytes());
        body[336..344].fill(0);
        body
    }

    /// An agent that answers the lines that come by `answers`, one after the other, over as many connections as it takes. An
    /// answer is a text, or where it begins with a number so many milliseconds late. `-`: none, and the connection ends.
    fn agent(answers: &'static [&'static str]) -> (tempfile::TempDir, AgentAnchor, thread::JoinHandle<Vec<String>>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let served = thread::spawn(move || {
            let (mut asked, mut answers) = (Vec::new(), answers.iter());
            'connections: while let Ok((mut stream, _)) = listener.accept() {
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
                while let Some(Ok(line)) = lines.next() {
                    asked.push(line);
                    let Some(answer) = answers.next() else { break 'connections };
                    if *answer == "-" {
                        continue 'connections;
                    }
                    let (late, text) = match answer.split_once("ms ") {
                        Some((late, text)) => (late.parse().unwrap(), text),
                        None => (0, *answer),
                    };
                    thread::sleep(Duration::from_millis(late));
                    let _ = stream.write_all(format!("{text}\n").as_bytes());
                    if answers.as_slice().is_empty() {
                        break 'connections;
                    }
                }
            }
            asked
        });
        (folder, AgentAnchor::at(&path, SOON), served)
    }

    #[test]
    fn a_store_is_asked_line_by_line() {
        let one = body(1, 7);
        let line: &'static str = Box::leak(format!("ok 1 {}", hex(&one)).into_boxed_str());
        let answers: &'static [&str] = Box::leak(vec!["ok store", "absent", "ok", line, "conflict"].into_boxed_slice());
        let (_folder, anchor, served) = agent(answers);
        assert_eq!(asked(anchor.load(&VOLUME)), Ok(Held::Nothing));
        assert_eq!(asked(anchor.replace(&VOLUME, 0, &one)), Replaced::Done);
        assert_eq!(asked(anchor.load(&VOLUME)), Ok(Held::Body(one)));
        assert_eq!(asked(anchor.replace(&VOLUME, 1, &body(2, 8))), Replaced::Conflict);
        let lines = served.join().unwrap();
        assert_eq!(lines[0], "hello 1 01010101-0101-0101-0101-010101010101");
        assert_eq!((lines[1].as_str(), lines[3].as_str()), ("load", "load"));
        assert_eq!(lines[2], format!("init 1 {}", hex(&one)));
        assert_eq!(lines[4], format!("replace 1 {}", hex(&body(2, 8))));
    }

    /// It keeps what replaces a body as the next one: a body that says otherwise could not be read again.
    #[test]
    fn a_store_that_holds_something_goes_on_from_there() {
        let (_folder, anchor, served) = agent(&["ok store", "absent"]);
        assert_eq!(asked(anchor.load(&VOLUME)), Ok(Held::Nothing));
        let begin = |held: Held, above| asked(anchor.begin(&VOLUME, &held, above));
        assert_eq!(begin(Held::Body(body(11, 1)), 500), Ok(Beginning { expected: 11, generation: 12, era: 0 }));
        assert_eq!(begin(Held::Nothing, 500), Ok(Beginning { expected: 0, generation: 501, era: 0 }));
        assert!(begin(Held::Body(body(u64::MAX, 1)), 0).unwrap_err().contains("take it away"));
        assert_eq!(served.join().unwrap().len(), 2);
    }

    #[test]
    fn an_answer_that_comes_late_twice_or_never_is_none() {
        // Late: it is not taken for that of the next request, for there is another connection by then.
        let (_folder, anchor, served) = agent(&["ok store", "900ms ok", "ok store", "absent"]);
        let late = asked(anchor.replace(&VOLUME, 1, &body(2, 1)));
        assert!(matches!(&late, Replaced::Unknown(why) if why.contains("in time")), "{late:?}");
        let patient = AgentAnchor { timeout: Duration::from_secs(5), ..anchor };
        assert_eq!(asked(patient.load(&VOLUME)), Ok(Held::Nothing));
        assert_eq!(served.join().unwrap().len(), 4);
        // Twice.
        let (_folder, anchor, served) = agent(&["ok store", "ok\nok", "ok store", "absent"]);
        let twice = asked(anchor.replace(&VOLUME, 1, &body(2, 1)));
        assert!(matches!(&twice, Replaced::Done | Replaced::Unknown(_)), "{twice:?}");
        assert_eq!(asked(anchor.load(&VOLUME)), Ok(Held::Nothing), "the second is not the answer to this");
        drop(served.join());
        // Never.
        let (_folder, anchor, served) = agent(&["ok store", "-", "ok store", "absent"]);
        assert!(
            matches!(asked(anchor.replace(&VOLUME, 1, &body(2, 1))), Replaced::Unknown(why) if why.contains("closed"))
        );
        assert_eq!(asked(anchor.load(&VOLUME)), Ok(Held::Nothing));
        drop(served.join());
    }

    #[test]
    fn a_counter_is_asked_line_by_line_once_the_volume_is_known() {
        let meta = tempfile::NamedTempFile::new().unwrap();
        meta.as_file().set_len(1 << 20).unwrap();
        let backings = Backings::open(meta.path(), None, Use::Exclusive, Duration::ZERO).unwrap();
        let (_folder, anchor, served) = agent(&[
            "ok counter auth era", // Only to see what it keeps.
            "ok counter auth era",
            "ok",
            "absent",
            "ok 7",
            "ok 77", // Its era.
            "ok 8",
            "ok 8",
            "ok 77",
            "ok 9",
            "ok 9",
            "ok 77",
            "ok 9",
            "ok 9",
            "ok 78", // Of another counter.
            "ok",
            "refused the owner's password",
        ]);
        assert_eq!(anchor.answers(&VOLUME), Ok(()));
        assert!(anchor.is_counter());
        anchor.introduce(&[0xab; 32], MetaDevice::of(&backings).unwrap());
        assert_eq!(asked(anchor.load(&VOLUME)), Ok(Held::Nothing));
        let beginning = asked(anchor.begin(&VOLUME, &Held::Nothing, 100));
        assert_eq!(beginning, Ok(Beginning { expected: 8, generation: 9, era: 77 }), "whatever its first value is");
        let of_era = |mut body: AnchorBytes| {
            body[336..344].copy_from_slice(&77_u64.to_le_bytes());
            body
        };
        assert_eq!(asked(anchor.replace(&VOLUME, 8, &of_era(body(9, 1)))), Replaced::Done);
        assert_eq!(asked(anchor.load(&VOLUME)), Ok(Held::Body(of_era(body(9, 1)))));
        assert_eq!(asked(anchor.replace(&VOLUME, 8, &of_era(body(9, 2)))), Replaced::Conflict);
        assert_eq!(asked(anchor.replace(&VOLUME, 9, &of_era(body(10, 2)))), Replaced::Conflict, "of another counter");
        assert_eq!(asked(anchor.retire(&VOLUME, 9)), Ok(()));
        assert!(asked(anchor.retire(&VOLUME, 9)).unwrap_err().contains("password"));
        let lines = served.join().unwrap();
        assert_eq!(lines[2], format!("auth {}", "ab".repeat(32)));
        let asked_for =
            ["read", "init", "era", "increment 7", "read", "era", "increment 8", "read", "era", "read", "read", "era"];
        assert_eq!(lines[3..15], asked_for);
        assert_eq!(lines[15..], ["retire 9", "retire 9"]);
        let written = std::fs::read(meta.path()).unwrap();
        let places: Vec<usize> = (0..written.len()).filter(|at| written[*at] != 0).collect();
        assert!(places.first() >= Some(&(256 << 10)) && places.last() < Some(&(264 << 10)), "it writes nowhere else");
    }

    #[test]
    fn what_is_behind_an_agent_is_waited_for_where_it_may_come() {
        let (_folder, anchor, served) = agent(&["ok store", "err no member answers", "absent", "refused no body"]);
        assert!(anchor.answers(&VOLUME).unwrap_err().contains("no member"));
        assert_eq!((anchor.answers(&VOLUME), anchor.answers(&VOLUME)), (Ok(()), Ok(())));
        drop(served.join());
        let (_folder, anchor, served) = agent(&["ok counter", "err it is busy", "err it is busy", "ok 3", "err busy"]);
        let anchor = anchor.patient(Duration::from_secs(20));
        anchor.wait_for_counter(&VOLUME);
        // Not without end.
        let anchor = anchor.patient(Duration::ZERO);
        anchor.wait_for_counter(&VOLUME);
        assert_eq!(served.join().unwrap()[1..], ["read"; 4]);
    }

    #[test]
    fn what_is_no_store_is_named() {
        for (answer, word) in [
            ("ok counter auth", "the volume is not known"),
            ("refused this agent speaks version 2 alone", "version 2"),
            ("HTTP/1.1 400", "no agent"),
        ] {
            let answers: &'static [&str] = Box::leak(vec![answer].into_boxed_slice());
            let (_folder, anchor, served) = agent(answers);
            assert!(asked(anchor.load(&VOLUME)).unwrap_err().contains(word), "{answer}");
            drop(served.join());
        }
        let (_folder, anchor, served) = agent(&["ok store", "ok 1 00"]);
        assert!(asked(anchor.load(&VOLUME)).unwrap_err().contains("no body"));
        drop(served.join());
        let nobody = AgentAnchor::at(Path::new("/nonexistent/socket"), SOON);
        assert!(asked(nobody.load(&VOLUME)).unwrap_err().contains("/nonexistent/socket"));
    }
}

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
mod tests;

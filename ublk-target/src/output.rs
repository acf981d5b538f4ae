//! What commands say: the one way to standard output and standard error.
//!
//! `println!` and `eprintln!` panic where nothing can be written, on a full disk or to a pipe that
//! nobody reads any more. Here that is a failure like any other, with a line and an exit code.

use crate::failure::{Exit, Failure, Outcome, plain};
use serde::Serialize;
use serde_json::{Value, json};
use std::{
    fmt,
    fs::File,
    io::{self, Write},
    sync::atomic::{AtomicBool, Ordering},
};

/// By which `--json` is to be read (docs/json.md). Another number means that a field that was there
/// has gone or means something else.
const SCHEMA: u32 = 1;

static EXPECTS_JSON: AtomicBool = AtomicBool::new(false);
static HAS_SPOKEN: AtomicBool = AtomicBool::new(false);

/// What a command has to say on standard output; nothing is out before it is printed.
#[derive(Default)]
#[must_use = "nothing is said before it is printed"]
pub struct Output(String);

impl Output {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A value as JSON; an object says by which schema it is to be read.
    pub fn json(value: &impl Serialize) -> Self {
        let mut value = serde_json::to_value(value).expect("plain data");
        match &mut value {
            Value::Array(all) => all.iter_mut().for_each(mark),
            one => mark(one),
        }
        let mut output = Self::new();
        output.line(format_args!("{value:#}"));
        output
    }

    /// One more line.
    pub fn line(&mut self, line: impl fmt::Display) {
        use fmt::Write;
        writeln!(self.0, "{line}").expect("a string takes everything");
    }

    /// All lines of another.
    pub fn append(&mut self, other: Self) {
        self.0 += &other.0;
    }

    /// Itself behind some text.
    pub fn after(self, text: &str) -> Self {
        Self(text.to_owned() + &self.0)
    }

    /// Writes it out, all at once.
    pub fn print(self) -> Outcome {
        bytes(self.0.as_bytes())
    }

    /// Writes it out beside what the command found, which counts more than whether it could be said.
    pub fn print_with(self, verdict: Outcome) -> Outcome {
        match (verdict, self.print()) {
            (Err(found), Err(unsaid)) => Err(Failure { message: format!("{found}; {unsaid}"), ..found }),
            (Err(found), Ok(())) => Err(found),
            (Ok(()), printed) => printed,
        }
    }
}

fn mark(value: &mut Value) {
    if let Value::Object(fields) = value {
        fields.insert("schema".into(), SCHEMA.into());
    }
}

/// Notes whether standard output is for a program that reads JSON.
pub fn expects_json(is_so: bool) {
    EXPECTS_JSON.store(is_so, Ordering::Relaxed);
}

/// A failure for that program, if nothing else was said to it.
pub fn tell_json(failure: &Failure) {
    if EXPECTS_JSON.load(Ordering::Relaxed) && !HAS_SPOKEN.load(Ordering::Relaxed) {
        let error = json!({ "exit": failure.exit as u8, "kind": failure.exit, "message": failure.message });
        let _ = Output::json(&json!({ "error": error })).print();
    }
}

#[cfg(test)]
impl Output {
    /// What would be written.
    pub fn text(&self) -> &str {
        &self.0
    }
}

/// One line, to standard output.
pub fn line(line: impl fmt::Display) -> Outcome {
    bytes(format!("{line}\n").as_bytes())
}

/// Bytes as they are, to standard output.
pub fn bytes(bytes: &[u8]) -> Outcome {
    HAS_SPOKEN.store(true, Ordering::Relaxed);
    // Not through `stdout()` itself, whose buffer would keep a copy: it may be a key.
    let out = nix::unistd::dup(io::stdout()).map(File::from).map_err(io::Error::from);
    out.and_then(|mut out| out.write_all(bytes)).map_err(|e| unwritable("standard output", &e))
}

/// Output that went nowhere.
pub fn unwritable(to: impl fmt::Display, e: &io::Error) -> Failure {
    Failure::new(Exit::Output, format_args!("can't write to {to}: {}", plain(e)))
}

/// A line on standard error, as far as anybody is there to read it.
pub fn tell(line: impl fmt::Display) {
    // One call, so that lines of several processes stay whole.
    let _ = io::stderr().write_all(format!("ublk-integrity: {line}\n").as_bytes());
}

/// The same of what is not as it should be, but goes on.
pub fn warn(line: impl fmt::Display) {
    tell(format_args!("warning: {line}"));
}

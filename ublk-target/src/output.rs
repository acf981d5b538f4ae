//! What commands say: the one way to standard output and standard error.
//!
//! `println!` and `eprintln!` panic where nothing can be written, on a full disk or to a pipe that
//! nobody reads any more. Here that is a failure like any other, with a line and an exit code.

use crate::failure::{Exit, Failure, Outcome, plain};
use serde::Serialize;
use std::{
    fmt,
    fs::File,
    io::{self, Write},
};

/// What a command has to say on standard output; nothing is out before it is printed.
#[derive(Default)]
#[must_use = "nothing is said before it is printed"]
pub struct Output(String);

impl Output {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A value as JSON.
    pub fn json(value: &impl Serialize) -> Self {
        let mut output = Self::new();
        output.line(serde_json::to_string_pretty(value).expect("plain data"));
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

#[cfg(test)]
impl Output {
    /// What would be written.
    pub fn text(&self) -> &str {
        &self.0
    }
}

/// Bytes as they are, to standard output.
pub fn bytes(bytes: &[u8]) -> Outcome {
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

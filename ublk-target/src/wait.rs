//! Waiting, with an end that is known and, when it takes long, with a word.

use crate::{interrupt, os, output};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::Signal,
        signalfd::{SfdFlags, SignalFd},
    },
};
use std::{
    fmt::Display,
    fs::File,
    os::fd::AsFd,
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

/// After so long it is told what is waited for, unless the end is as near anyway.
pub const WORD_AFTER: Duration = Duration::from_secs(2);

/// How long a lock may be waited for, or a device that somebody is about to let go of.
pub const LONGEST: Duration = Duration::from_secs(30);

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(20);

type Tell = Box<dyn Fn(&str) + Send + Sync>;
type LastWords = Box<dyn Fn(Signal, &str) + Send + Sync>;

/// Who hears of waits in this process; standard error where nothing else was said.
static LISTENER: OnceLock<Tell> = OnceLock::new();

/// Who hears which signal has ended a wait; the same.
static LAST_WORDS: OnceLock<LastWords> = OnceLock::new();

/// Has this process tell of its waits by `tell`. Once: a daemon whose command listens.
pub fn tell_by(tell: impl Fn(&str) + Send + Sync + 'static) {
    let _ = LISTENER.set(Box::new(tell));
}

/// Tells of a wait.
pub fn tell(line: &str) {
    match LISTENER.get() {
        Some(tell) => tell(line),
        None => output::tell(line),
    }
}

/// Has this process say by `say` which signal has ended it, and what it was waiting for. Once, as
/// [`tell_by`].
pub fn ended_by(say: impl Fn(Signal, &str) + Send + Sync + 'static) {
    let _ = LAST_WORDS.set(Box::new(say));
}

/// A wait that is under way. A signal that ends the process says what it waited for.
pub struct Wait {
    begun: Instant,
    limit: Duration,
    what: String,
    told: bool,
    signals: Option<Held>,
}

impl Wait {
    /// Begins to wait for `what`, `limit` at most.
    pub fn up_to(limit: Duration, what: impl Display) -> Self {
        Self { begun: Instant::now(), limit, what: what.to_string(), told: false, signals: None }
    }

    /// Lets a moment pass before the next look; `false` where the limit is reached.
    pub fn pause(&mut self) -> bool {
        self.pause_or_tell(tell)
    }

    fn pause_or_tell(&mut self, tell: impl Fn(&str)) -> bool {
        let waited = self.begun.elapsed();
        if waited >= self.limit {
            return false;
        }
        if waited >= WORD_AFTER && self.limit >= 2 * WORD_AFTER && !self.told {
            self.told = true;
            tell(&format!("waiting for {}, at most {} s", self.what, self.limit.as_secs()));
        }
        if self.signals.is_none() && !interrupt::is_expected() {
            self.signals = Held::begin();
        }
        let pause = PAUSE.min(self.limit - waited);
        match &self.signals {
            Some(held) => held.came_within(pause).into_iter().for_each(|signal| die_waiting(signal, &self.what)),
            None => thread::sleep(pause),
        }
        true
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        let came = self.signals.as_ref().and_then(|held| held.came_within(Duration::ZERO));
        came.into_iter().for_each(|signal| die_waiting(signal, &self.what));
    }
}

/// The signals that would end this process without a word, held back. Only where no thread takes
/// them.
struct Held {
    // First: what has come by then is no longer for the descriptor.
    _blocked: os::Blocked,
    signals: SignalFd,
}

impl Held {
    fn begin() -> Option<Self> {
        let ends = os::heeded(&[Signal::SIGINT, Signal::SIGTERM]);
        let signals = SignalFd::with_flags(&ends, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).ok()?;
        Some(Self { _blocked: os::Blocked::hold(&ends).ok()?, signals })
    }

    /// The signal that has come, or comes within this time.
    fn came_within(&self, time: Duration) -> Option<Signal> {
        let timeout = PollTimeout::try_from(time).unwrap_or(PollTimeout::ZERO);
        let _ = poll(&mut [PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)], timeout);
        let came = self.signals.read_signal().ok().flatten()?;
        Signal::try_from(came.ssi_signo as i32).ok()
    }
}

fn die_waiting(signal: Signal, what: &str) {
    match LAST_WORDS.get() {
        Some(say) => say(signal, what),
        None => output::tell(format_args!("{signal} came while waiting for {what}")),
    }
    interrupt::die_of(signal);
}

/// Takes a lock, or waits for it as long as `wait` allows. What is not to be had by then is told
/// with EWOULDBLOCK.
pub fn lock_within(mut file: File, how: FlockArg, wait: &mut Wait) -> nix::Result<Flock<File>> {
    loop {
        file = match Flock::lock(file, how) {
            Ok(locked) => return Ok(locked),
            Err((file, Errno::EWOULDBLOCK)) if wait.pause() => file,
            Err((_, e)) => return Err(e),
        };
    }
}

/// The same of a lock that stays until the last descriptor of the opened file is
/// closed, whoever has it.
pub fn locked_within(lock: impl Fn() -> nix::Result<()>, wait: &mut Wait) -> nix::Result<()> {
    loop {
        match lock() {
            Err(Errno::EWOULDBLOCK) if wait.pause() => {}
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[test]
    fn a_wait_ends_and_says_what_for_once_and_only_if_it_is_long() {
        let told = RefCell::new(Vec::new());
        let mut short = Wait::up_to(Duration::from_millis(50), "a moment");
        while short.pause_or_tell(|line| told.borrow_mut().push(line.to_owned())) {}
        assert!(told.borrow().is_empty());
        let mut long = Wait::up_to(Duration::from_secs(30), "the lock on x");
        long.begun -= WORD_AFTER;
        for _ in 0..3 {
            assert!(long.pause_or_tell(|line| told.borrow_mut().push(line.to_owned())));
        }
        assert_eq!(*told.borrow(), ["waiting for the lock on x, at most 30 s"]);
        long.begun -= Duration::from_secs(28);
        assert!(!long.pause_or_tell(|_| panic!("told")));
    }
}

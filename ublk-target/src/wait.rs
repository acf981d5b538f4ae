//! Waiting, with an end that is known and, when it takes long, with a word.

use crate::{os, output};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use std::{
    fmt::Display,
    fs::File,
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

/// Who hears of waits in this process; standard error where nothing else was said.
static LISTENER: OnceLock<Tell> = OnceLock::new();

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

/// A wait that is under way.
pub struct Wait {
    begun: Instant,
    limit: Duration,
    /// For what; `None` once that was told.
    untold: Option<String>,
}

impl Wait {
    /// Begins to wait for `what`, `limit` at most.
    pub fn up_to(limit: Duration, what: impl Display) -> Self {
        Self { begun: Instant::now(), limit, untold: Some(what.to_string()) }
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
        if waited >= WORD_AFTER && self.limit >= 2 * WORD_AFTER {
            if let Some(what) = self.untold.take() {
                tell(&format!("waiting for {what}, at most {} s", self.limit.as_secs()));
            }
        }
        thread::sleep(PAUSE.min(self.limit - waited));
        true
    }
}

/// Takes a lock, or waits for it as long as `wait` allows. What is not to be had by then is told with EWOULDBLOCK.
pub fn lock_within(mut file: File, how: FlockArg, wait: &mut Wait) -> nix::Result<Flock<File>> {
    loop {
        file = match Flock::lock(file, how) {
            Ok(locked) => return Ok(locked),
            Err((file, Errno::EWOULDBLOCK)) if wait.pause() => file,
            Err((_, e)) => return Err(e),
        };
    }
}

/// The same of a lock that stays until the last descriptor of the opened file is closed, whoever has it.
pub fn lock_open_within(file: &File, how: FlockArg, wait: &mut Wait) -> nix::Result<()> {
    loop {
        match os::flock(file, how) {
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

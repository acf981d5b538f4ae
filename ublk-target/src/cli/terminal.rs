//! The terminal as one screen, for as long as a command shows something there that changes.

use crate::{
    failure::{Context, Outcome},
    os, output,
    watch::table::Room,
};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal, raise},
        signalfd::{SfdFlags, SignalFd},
        termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr},
    },
    unistd::read,
};
use std::{
    io,
    os::fd::AsFd,
    time::{Duration, Instant},
};
use terminal_size::{Height, Width, terminal_size};

/// The other screen that terminals have, which leaves the lines before as they are; no cursor.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";

/// Why a wait is over.
pub(super) enum Wake {
    /// The time has come.
    Time,
    /// A key was pressed.
    Key(u8),
    /// The window has another size, or is there again.
    Shown,
    /// This process is to end.
    End(Signal),
}

/// The terminal is as it was before when this is dropped.
pub(super) struct Screen {
    signals: SignalFd,
    /// As standard input was found; `None` where that is no terminal, so there are no keys.
    found: Option<Termios>,
}

impl Screen {
    /// Before any other thread is started.
    pub(super) fn enter() -> Outcome<Self> {
        let ends = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT];
        let mut heeded = os::heeded(&ends);
        [Signal::SIGWINCH, Signal::SIGTSTP].into_iter().for_each(|signal| heeded.add(signal));
        heeded.thread_block().doing("can't block signals")?;
        let signals = SignalFd::with_flags(&heeded, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK);
        let signals = signals.doing("can't wait for signals")?;
        let screen = Self { signals, found: tcgetattr(io::stdin()).ok() };
        screen.take()?;
        Ok(screen)
    }

    /// Keys come one by one and are not shown.
    fn take(&self) -> Outcome {
        if let Some(found) = &self.found {
            let mut now = found.clone();
            now.local_flags.remove(LocalFlags::ICANON | LocalFlags::ECHO);
            tcsetattr(io::stdin(), SetArg::TCSANOW, &now).doing("can't set the terminal")?;
        }
        output::bytes(ENTER.as_bytes())
    }

    fn leave(&self) {
        let _ = output::bytes(LEAVE.as_bytes());
        if let Some(found) = &self.found {
            let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, found);
        }
    }

    /// The size of the window now.
    pub(super) fn room(&self) -> Room {
        let (Width(columns), Height(lines)) = terminal_size().unwrap_or((Width(80), Height(24)));
        Room { columns: columns.into(), lines: lines.into() }
    }

    /// Shows these lines, of which the window has room for all.
    pub(super) fn draw(&self, lines: &[String]) -> Outcome {
        // Each is cleared from its end on, and what is below the last.
        let text = format!("\x1b[H{}\x1b[K\x1b[J", lines.join("\x1b[K\n"));
        output::bytes(text.as_bytes())
    }

    /// Until this time, or until something comes.
    pub(super) fn wait(&mut self, until: Instant) -> Outcome<Wake> {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Wake::Time);
            }
            let stdin = io::stdin();
            let mut from = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
            if self.found.is_some() {
                from.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
            }
            // Up, so that the time has come.
            let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            match poll(&mut from, timeout) {
                Err(Errno::EINTR) => continue,
                done => done.doing("can't wait for keys")?,
            };
            let has_key = from.get(1).is_some_and(|keys| keys.any() == Some(true));
            if let Some(signal) = self.signals.read_signal().doing("can't wait for signals")? {
                return self.heed(Signal::try_from(signal.ssi_signo as i32).doing("an unknown signal")?);
            }
            if !has_key {
                continue;
            }
            let mut key = [0];
            match read(&stdin, &mut key) {
                Ok(0) | Err(Errno::EIO) => return Ok(Wake::End(Signal::SIGHUP)),
                Ok(_) => return Ok(Wake::Key(key[0])),
                Err(_) => {}
            }
        }
    }

    fn heed(&self, signal: Signal) -> Outcome<Wake> {
        match signal {
            Signal::SIGWINCH => {}
            Signal::SIGTSTP => {
                self.leave();
                // Until the shell lets us go on.
                raise(Signal::SIGSTOP).doing("can't stop")?;
                self.take()?;
            }
            end => return Ok(Wake::End(end)),
        }
        Ok(Wake::Shown)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.leave();
        let mut others = SigSet::empty();
        [Signal::SIGWINCH, Signal::SIGTSTP].into_iter().for_each(|signal| others.add(signal));
        let _ = others.thread_unblock();
    }
}

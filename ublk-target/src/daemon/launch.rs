//! Becoming a daemon, and telling whoever waits for us how it went.
//!
//! The daemon writes lines to a pipe: `I text` and `W text` for people, at last `L number` (live) or
//! `F code text` (failed). The command that was typed reads them, and exits with what it reads. One
//! that is to follow a daemon which still lives says `R version` before: it is ready.

use super::notify::Notify;
use crate::{
    failure::{Context, Exit, Failure, Outcome},
    os,
    output::{self, Output},
    threads::named,
    ublk,
    wait::{WORD_AFTER, Wait},
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::Signal,
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid, chdir, dup2_stderr, dup2_stdin, dup2_stdout, pipe2, setsid},
};
use std::{
    fs::{File, OpenOptions},
    io::{self, BufRead, BufReader, Write},
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

/// Who waits to hear that the device is live.
enum Listener {
    /// A person, at our own stdout and stderr.
    Terminal,
    /// The command that started us.
    Parent(File),
    /// A ublksrv tool, which wants a number on its eventfd.
    Ublksrv(File),
}

/// Tells the listener how the start goes. Only the first outcome counts.
pub struct Reporter {
    listener: Mutex<Listener>,
    done: AtomicBool,
    /// systemd, where it has started us.
    notify: Notify,
}

/// The two sides of a fork.
pub enum Side {
    /// The command, and what it hears from.
    Parent(Listening),
    /// The daemon.
    Daemon(Reporter),
}

impl Reporter {
    /// For a process that stays in the foreground.
    pub fn terminal() -> Self {
        Self { notify: Notify::from_environment(), ..Self::new(Listener::Terminal) }
    }

    /// For a daemon that ublksrv's tool has started, and that answers on `descriptor`.
    pub fn ublksrv(descriptor: File) -> Self {
        Self::new(Listener::Ublksrv(descriptor))
    }

    /// For a process that somebody has started with a pipe as its output, to be a daemon.
    pub fn successor() -> Outcome<Self> {
        let pipe = io::stdout().as_fd().try_clone_to_owned().doing("can't keep the pipe to whoever started us")?;
        Ok(Self::new(Listener::Parent(File::from(pipe))))
    }

    fn new(listener: Listener) -> Self {
        Self { listener: Mutex::new(listener), done: AtomicBool::new(false), notify: Notify::nobody() }
    }

    /// A line about what will be.
    pub fn info(&self, text: &str) {
        self.line('I', text);
    }

    /// A line about what is not as it should be.
    pub fn warn(&self, text: &str) {
        self.line('W', text);
    }

    /// Everything that can be done beforehand is done.
    pub fn ready(&self) {
        self.line('R', env!("CARGO_PKG_VERSION"));
    }

    /// The device answers.
    pub fn live(&self, number: u32) {
        if self.done.swap(true, Ordering::SeqCst) {
            return;
        }
        let path = ublk::block_path(number);
        self.notify.say(&format!("READY=1\nSTATUS=serving {}", path.display()));
        match &mut *self.listener() {
            Listener::Terminal => {
                let mut out = io::stdout();
                drop(writeln!(out, "{}", path.display()).and_then(|()| out.flush()));
            }
            Listener::Parent(pipe) => drop(writeln!(pipe, "L {number}")),
            Listener::Ublksrv(eventfd) => {
                // The caller's terminal is no longer ours.
                let _ = null_stdio();
                drop(eventfd.write_all(&(u64::from(number) + 1).to_ne_bytes()));
            }
        }
    }

    /// It does not, and never will.
    pub fn failed(&self, failure: &Failure) {
        if self.done.swap(true, Ordering::SeqCst) {
            return;
        }
        self.notify.status(&failure.to_string());
        match &mut *self.listener() {
            Listener::Terminal => drop(writeln!(io::stderr(), "ublk-integrity: {failure}")),
            Listener::Parent(pipe) => drop(writeln!(pipe, "F {} {failure}", failure.exit as u8)),
            Listener::Ublksrv(eventfd) => {
                let _ = writeln!(io::stderr(), "ublk-integrity: {failure}");
                drop(eventfd.write_all(&UBLKSRV_FAILED.to_ne_bytes()));
            }
        }
    }

    /// While the volume is opened, systemd shall wait: how long recovery takes is up to
    /// the log and the disks.
    pub fn extend_start(reporter: &Arc<Self>) {
        if !reporter.notify.is_heard() {
            return;
        }
        let reporter = Arc::clone(reporter);
        let extend = move || {
            while !reporter.done.load(Ordering::SeqCst) {
                reporter.notify.say(&format!("EXTEND_TIMEOUT_USEC={}", (3 * EXTEND_EVERY).as_micros()));
                thread::sleep(EXTEND_EVERY);
            }
        };
        // Without a thread for it the unit's own limit counts.
        let _ = named("notify").spawn(extend);
    }

    /// The device has been stopped; the volume is being closed.
    pub fn stopping(&self) {
        self.notify.say("STOPPING=1\nSTATUS=closing the volume");
    }

    fn line(&self, kind: char, text: &str) {
        if !self.done.load(Ordering::SeqCst) {
            self.notify.status(text);
        }
        match &mut *self.listener() {
            Listener::Terminal | Listener::Ublksrv(_) => {
                let mark = if kind == 'W' { "warning: " } else { "" };
                drop(writeln!(io::stderr(), "ublk-integrity: {mark}{text}"));
            }
            // The command may have been killed; the device goes on.
            Listener::Parent(pipe) => drop(writeln!(pipe, "{kind} {text}")),
        }
    }

    fn listener(&self) -> std::sync::MutexGuard<'_, Listener> {
        self.listener.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// How often systemd is told to wait on, and a third of how long it does.
const EXTEND_EVERY: Duration = Duration::from_secs(10);

/// What ublksrv's tools read as failure (an eventfd can't hold all ones).
const UBLKSRV_FAILED: u64 = u64::MAX - 1;

/// Forks. The daemon's side keeps no descriptor of the caller, and has /dev/null for 0 to 2.
pub fn fork() -> Outcome<Side> {
    let (read, write) = pipe2(nix::fcntl::OFlag::O_CLOEXEC).doing("can't make a pipe")?;
    match os::fork_single_threaded().doing("can't fork")? {
        ForkResult::Parent { child } => {
            drop(write);
            Ok(Side::Parent(Listening::of(read, child)))
        }
        ForkResult::Child => {
            drop(read);
            let reporter = Reporter::new(Listener::Parent(File::from(write)));
            match detach() {
                Ok(()) => Ok(Side::Daemon(reporter)),
                Err(failure) => {
                    reporter.failed(&failure);
                    Err(failure)
                }
            }
        }
    }
}

fn detach() -> Outcome {
    leave_session()?;
    null_stdio()
}

/// Leaves the caller's terminal and folder.
pub fn leave_session() -> Outcome {
    match setsid() {
        // The leader of its session has left the caller's already.
        Ok(_) | Err(nix::Error::EPERM) => {}
        Err(e) => return Err(e).doing("can't leave the session"),
    }
    chdir("/").doing("can't change to /")
}

/// Puts /dev/null on descriptors 0 to 2.
pub fn null_stdio() -> Outcome {
    let what = "can't open /dev/null";
    let null = OpenOptions::new().read(true).write(true).open("/dev/null").doing(what)?;
    dup2_stdin(&null).and_then(|()| dup2_stdout(&null)).and_then(|()| dup2_stderr(&null)).doing(what)
}

/// Whether the daemon says nothing for two seconds. How long an open takes depends on the devices
/// and the log; what can stand still in it is watched by the daemon itself.
fn is_silent(pipe: &File) -> bool {
    poll(&mut [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)], PollTimeout::from(2000u16)) == Ok(0)
}

/// The command's end of the pipe.
pub struct Listening {
    lines: BufReader<File>,
    daemon: Pid,
}

/// What a daemon says that counts.
enum Word {
    Ready(String),
    Live(String),
}

impl Listening {
    /// To the daemon that has the other end of this pipe, a child of ours.
    pub fn of(pipe: OwnedFd, daemon: Pid) -> Self {
        Self { lines: BufReader::new(File::from(pipe)), daemon }
    }

    /// Passes lines on until the outcome comes, and prints the device's path. `what` it opens.
    pub fn outcome(mut self, what: &str) -> Outcome {
        let path = self.live(what)?;
        let mut out = Output::new();
        out.line(&path);
        out.print().doing(format_args!("{path} is there, but"))
    }

    /// Passes lines on until the device answers. Its path.
    pub fn live(&mut self, what: &str) -> Outcome<String> {
        let daemon = self.daemon;
        if self.lines.buffer().is_empty() && is_silent(self.lines.get_ref()) {
            output::tell(format_args!(
                "waiting for the daemon (pid {daemon}) to open {what}, as long as that goes on: `kill {daemon}` gives it up"
            ));
        }
        loop {
            match self.word()? {
                Some(Word::Live(number)) => return Ok(format!("/dev/ublkb{number}")),
                Some(Word::Ready(_)) => {}
                None => return Err(died(daemon)),
            }
        }
    }

    /// Passes lines on until the daemon is ready to follow another. The version of its program;
    /// `None` where it has ended without a word.
    pub fn ready(&mut self) -> Outcome<Option<String>> {
        Ok(match self.word()? {
            Some(Word::Ready(version)) => Some(version),
            _ => None,
        })
    }

    fn word(&mut self) -> Outcome<Option<Word>> {
        let mut line = String::new();
        while self.lines.read_line(&mut line).doing("can't hear from the daemon")? > 0 {
            match line.trim_end_matches('\n').split_at_checked(2) {
                Some(("I ", text)) => output::tell(text),
                Some(("W ", text)) => output::warn(text),
                Some(("R ", version)) => return Ok(Some(Word::Ready(version.into()))),
                Some(("L ", number)) => return Ok(Some(Word::Live(number.into()))),
                Some(("F ", rest)) => {
                    let (code, text) = rest.split_once(' ').unwrap_or((rest, ""));
                    return Err(Failure::new(Exit::from_code(code.parse().unwrap_or(4)), text));
                }
                _ => {}
            }
            line.clear();
        }
        Ok(None)
    }
}

/// The daemon has closed its end without a word of its outcome.
fn died(daemon: Pid) -> Failure {
    let mut wait = Wait::up_to(WORD_AFTER, "its end");
    let ended = loop {
        match waitpid(daemon, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) if wait.pause() => {}
            ended => break ended,
        }
    };
    match ended {
        // Later ones are taken by a thread, and told.
        Ok(WaitStatus::Signaled(_, signal @ (Signal::SIGINT | Signal::SIGTERM), _)) => {
            let message = format!("{signal} ended the daemon (pid {daemon}) before it had begun: nothing was done");
            Failure::new(Exit::Interrupted, message)
        }
        _ => Failure::new(Exit::Device, "the daemon died before the device was live; the system log may tell why"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_daemon_that_a_signal_has_ended_was_interrupted() {
        for (signal, exit) in [("TERM", Exit::Interrupted), ("INT", Exit::Interrupted), ("KILL", Exit::Device)] {
            let mut daemon = Command::new("sh").args(["-c", &format!("kill -{signal} $$")]).spawn().unwrap();
            assert_eq!(died(Pid::from_raw(daemon.id() as i32)).exit, exit, "{signal}");
            // Waited for already.
            let _ = daemon.wait();
        }
    }
}

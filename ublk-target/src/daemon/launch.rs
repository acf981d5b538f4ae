//! Becoming a daemon, and telling whoever waits for us how it went.
//!
//! The daemon writes lines to a pipe: `I text` and `W text` for people, at last `L number` (live) or
//! `F code text` (failed). The command that was typed reads them, and exits with what it reads. One
//! that is to follow a daemon which still lives says `R version` before: it is ready.

use super::{notify::Notify, sink::Sink};
use crate::{
    event::Severity,
    failure::{Context, Exit, Failure, Outcome},
    os, output, ublk,
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
    io::{self, Read, Write},
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
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
    /// Whether that hears nothing of the start: of one that follows another it may not believe
    /// anything yet.
    follows: bool,
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

    /// For a process that somebody has started with a pipe as its output, to be a daemon: the main
    /// process of a unit, or of nobody's.
    pub fn successor(of_unit: bool) -> Outcome<Self> {
        let pipe = io::stdout().as_fd().try_clone_to_owned().doing("can't keep the pipe to whoever started us")?;
        let notify = if of_unit { Notify::from_environment() } else { Notify::nobody() };
        Ok(Self { notify, follows: true, ..Self::new(Listener::Parent(File::from(pipe))) })
    }

    fn new(listener: Listener) -> Self {
        let (done, notify) = (AtomicBool::new(false), Notify::nobody());
        Self { listener: Mutex::new(listener), done, notify, follows: false }
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
        if !self.follows {
            self.notify.say(&format!("READY=1\nSTATUS=serving {}", path.display()));
        }
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
        self.status(&failure.to_string());
        match &mut *self.listener() {
            Listener::Terminal => drop(writeln!(io::stderr(), "ublk-integrity: {failure}")),
            Listener::Parent(pipe) => {
                // Whoever waited may have gone, and left the device to us.
                if writeln!(pipe, "F {} {failure}", failure.exit as u8).is_err() {
                    Sink::system().line(Severity::Crit, failure);
                }
            }
            Listener::Ublksrv(eventfd) => {
                let _ = writeln!(io::stderr(), "ublk-integrity: {failure}");
                drop(eventfd.write_all(&UBLKSRV_FAILED.to_ne_bytes()));
            }
        }
    }

    /// While the volume is opened, systemd shall wait: how long recovery takes is up to
    /// the log and the disks.
    pub fn extend_start(reporter: &Arc<Self>) {
        if !reporter.follows {
            let this = Arc::clone(reporter);
            reporter.notify.extend_until(move || this.done.load(Ordering::SeqCst));
        }
    }

    /// The device has been stopped; the volume is being closed.
    pub fn stopping(&self) {
        self.notify.say("STOPPING=1\nSTATUS=closing the volume");
    }

    fn status(&self, text: &str) {
        if !self.follows {
            self.notify.status(text);
        }
    }

    fn line(&self, kind: char, text: &str) {
        if !self.done.load(Ordering::SeqCst) {
            self.status(text);
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

/// How long a daemon may say nothing, which `late` is said of then. One that opens a volume has a line
/// whenever its devices have answered for a while.
#[derive(Clone, Copy)]
pub struct Silence {
    /// So long.
    pub most: Duration,
    /// What it has not done.
    pub late: &'static str,
}

/// The command's end of the pipe. Whoever has the other end may leave it to others, and stay silent:
/// nothing here waits for the end of the pipe.
pub struct Listening {
    pipe: File,
    received: Vec<u8>,
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
        Self { pipe: File::from(pipe), received: Vec::new(), daemon }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.daemon.as_raw() as u32
    }

    /// Passes lines on until the outcome comes, and prints the device's path. `what` it opens.
    pub fn outcome(mut self, what: &str) -> Outcome {
        let path = self.live(what, None)?;
        output::line(&path).doing(format_args!("{path} is there, but"))
    }

    /// Passes lines on until the device answers. Its path.
    pub fn live(&mut self, what: &str, silence: Option<Silence>) -> Outcome<String> {
        let daemon = self.daemon;
        // How long an open takes depends on the devices and the log; what can stand still in it is
        // watched by the daemon itself.
        if self.received.is_empty() && !self.speaks_within(Some(WORD_AFTER)) {
            output::tell(format_args!(
                "waiting for the daemon (pid {daemon}) to open {what}, as long as that goes on: `kill {daemon}` gives it up"
            ));
        }
        loop {
            match self.word(silence)? {
                Some(Word::Live(number)) => return Ok(format!("/dev/ublkb{number}")),
                Some(Word::Ready(_)) => {}
                None => return Err(died(daemon)),
            }
        }
    }

    /// Passes lines on until the daemon is ready to follow another. The version of its program;
    /// `None` where it has ended without a word.
    pub fn ready(&mut self, silence: Silence) -> Outcome<Option<String>> {
        Ok(match self.word(Some(silence))? {
            Some(Word::Ready(version)) => Some(version),
            _ => None,
        })
    }

    fn word(&mut self, silence: Option<Silence>) -> Outcome<Option<Word>> {
        while let Some(line) = self.line(silence)? {
            match line.split_at_checked(2) {
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
        }
        Ok(None)
    }

    /// The next line; `None` where there is none any more.
    fn line(&mut self, silence: Option<Silence>) -> Outcome<Option<String>> {
        let begun = Instant::now();
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                return Ok(Some(String::from_utf8_lossy(&line[..end]).into_owned()));
            }
            let left = silence.map(|silence| silence.most.saturating_sub(begun.elapsed()));
            if let (false, Some(silence)) = (self.speaks_within(left), silence) {
                let message = format!("{}, and has said nothing for {} s", silence.late, silence.most.as_secs());
                return Err(Failure::new(Exit::Device, message));
            }
            let mut bytes = [0; 4096];
            match self.pipe.read(&mut bytes) {
                Ok(0) => return Ok(None),
                Ok(count) => self.received.extend_from_slice(&bytes[..count]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e).doing("can't hear from the daemon"),
            }
        }
    }

    /// Whether there is something to read, or the end of it, within this time.
    fn speaks_within(&self, time: Option<Duration>) -> bool {
        let until = time.map(|time| Instant::now() + time);
        loop {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            // Up, so that nobody is looked at a moment too early.
            let timeout = left.map_or(PollTimeout::NONE, |left| {
                PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
            });
            match poll(&mut [PollFd::new(self.pipe.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(0) if left.is_some_and(|left| left.is_zero()) => return false,
                Ok(0) | Err(nix::Error::EINTR) => {}
                // What is wrong with it is found out by who reads.
                _ => return true,
            }
        }
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
            // Who runs these tests in the background may have INT ignored.
            let kill = format!("kill -{signal} $$");
            let mut daemon = Command::new("env").args(["--default-signal", "sh", "-c", &kill]).spawn().unwrap();
            assert_eq!(died(Pid::from_raw(daemon.id() as i32)).exit, exit, "{signal}");
            // Waited for already.
            let _ = daemon.wait();
        }
    }

    #[test]
    fn a_line_is_heard_in_parts_and_silence_has_an_end_though_the_pipe_has_none() {
        let (read, write) = pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        let mut listening = Listening::of(read, Pid::from_raw(1));
        let silence = Silence { most: Duration::from_millis(30), late: "it is late" };
        let mut pipe = File::from(write);
        pipe.write_all(b"R 1.2.3\nL").unwrap();
        assert_eq!(listening.ready(silence).unwrap().as_deref(), Some("1.2.3"));
        let begun = Instant::now();
        let late = listening.ready(silence).unwrap_err();
        assert!(late.message.starts_with("it is late") && begun.elapsed() >= silence.most, "{late}");
        pipe.write_all(b" 7\n").unwrap();
        assert_eq!(listening.live("it", Some(silence)).unwrap(), "/dev/ublkb7");
        drop(pipe);
        assert_eq!(listening.ready(silence).unwrap(), None);
    }
}

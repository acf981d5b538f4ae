//! How a daemon ends, other than by the device being stopped: signals, panics, a kernel that never answers.

use super::{
    launch::Reporter,
    log::{Event, Log, Sink},
    workers::named,
};
use crate::{
    cli::stop::{self, When},
    failure::{Context, Exit, Failure, Outcome},
    ublk,
};
use nix::{
    sys::signal::{SigSet, Signal},
    unistd::alarm,
};
use std::{
    io::{self, Read},
    process::{self, Child},
    sync::{Arc, mpsc},
    time::Duration,
};

/// How long the kernel may take to add or start a device: some kernels never come back.
const KERNEL_PATIENCE: Duration = Duration::from_secs(30);

/// How many seconds a panic may take to say what it has to say.
const WORDS: u32 = 5;

/// A thread that panics leaves requests that nobody completes: better no daemon, which the kernel notices.
pub fn abort_on_panic() {
    let told = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        // Whoever reads standard error may wait for our device: this ends us even so.
        alarm::set(WORDS);
        told(panic);
        Sink::syslog().line(panic);
        process::abort();
    }));
}

/// Signals that ask us to stop.
const STOP: [Signal; 2] = [Signal::SIGTERM, Signal::SIGINT];
/// Signals that would end us where nobody has asked for that: a terminal that goes, tools that have logs written anew.
const HEEDLESS: [Signal; 3] = [Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2];

/// Blocks the signals that somebody sends us, in this thread and all that it starts.
pub fn block_signals() -> Outcome<SigSet> {
    let set: SigSet = STOP.into_iter().chain(HEEDLESS).collect();
    set.thread_block().doing("can't block signals")?;
    Ok(set)
}

/// The first signal stops the device as soon as nobody uses it: under a mounted file system a disk that goes takes what was
/// not written yet with it. The second one stops it whoever uses it, in good order. The third ends this process: requests
/// under way may wait for a device that never answers.
///
/// Whoever uses it is looked for, and the device stopped, by other processes (see [`stop`]).
pub fn stop_on_signals(number: u32, signals: SigSet, log: Log) -> io::Result<()> {
    let serve = move || {
        next_stop(&signals, &log);
        let (child, told) = (stop::start(number, When::Left), log.clone());
        let _ = named("stop").spawn(move || stop_when_left(number, child, &told));
        next_stop(&signals, &log);
        log.tell(Event::StopsNow);
        let child = stop::start_forced_del(number);
        let _ = named("stop now").spawn(move || stop_ourselves(number, child));
        next_stop(&signals, &log);
        process::exit(Exit::Busy as i32);
    };
    named("signals").spawn(serve).map(drop)
}

/// Waits for a signal that asks us to stop.
fn next_stop(signals: &SigSet, log: &Log) {
    loop {
        match signals.wait() {
            Ok(signal) if HEEDLESS.contains(&signal) => log.tell(Event::SignalIgnored(signal)),
            _ => return,
        }
    }
}

/// Hears from the process that waits for the last user, and does what that would where it can't be had (its libraries may be
/// out of reach in our mount namespace).
fn stop_when_left(number: u32, child: io::Result<Child>, log: &Log) {
    let stopped = child.and_then(|mut child| {
        // It says a line when it begins to wait, and closes its output when it ends.
        let mut words = [0; 64];
        if child.stdout.take().is_some_and(|mut said| said.read(&mut words).is_ok_and(|count| count > 0)) {
            log.tell(Event::StopWaits);
        }
        child.wait()
    });
    if !stopped.is_ok_and(|status| status.success()) && ublk::exists(number) {
        let _ = stop::stop(number, When::Left);
    }
}

/// Where that process could not do it, it is up to us.
fn stop_ourselves(number: u32, child: io::Result<Child>) {
    if let Ok(mut child) = child {
        let _ = child.wait();
    }
    // We still live: either the device has been stopped and the last checkpoint is on its way, or nothing was done.
    let _ = ublk::stop(number);
}

/// Ends the process when the kernel does not come back from a command.
pub struct Watchdog {
    done: mpsc::Sender<()>,
}

impl Watchdog {
    /// `clean_up` runs before the process ends.
    pub fn start(command: &'static str, reporter: &Arc<Reporter>, clean_up: impl FnOnce() + Send + 'static) -> Self {
        let reporter = Arc::clone(reporter);
        Self::after(KERNEL_PATIENCE, move || {
            let seconds = KERNEL_PATIENCE.as_secs();
            let message = format!(
                "the kernel has not come back from {command} within {seconds} s (a bug of some 6.17 kernels): see dmesg, use another kernel"
            );
            reporter.failed(&Failure::new(Exit::Device, message));
            clean_up();
            process::exit(Exit::Device as i32);
        })
    }

    fn after(patience: Duration, expired: impl FnOnce() + Send + 'static) -> Self {
        let (done, waited) = mpsc::channel();
        // Without a thread for it we go unwatched.
        let _ = named("watchdog").spawn(move || {
            if waited.recv_timeout(patience) == Err(mpsc::RecvTimeoutError::Timeout) {
                expired();
            }
        });
        Self { done }
    }

    pub fn disarm(self) {
        let _ = self.done.send(());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the watchdog does within half a second, if it waits for a tenth.
    fn watched(hold: impl FnOnce(Watchdog)) -> Result<(), mpsc::RecvTimeoutError> {
        let (tell, told) = mpsc::channel();
        hold(Watchdog::after(Duration::from_millis(100), move || tell.send(()).unwrap()));
        told.recv_timeout(Duration::from_millis(500))
    }

    #[test]
    fn a_command_that_never_ends_is_ended() {
        assert_eq!(watched(std::mem::forget), Ok(()));
    }

    #[test]
    fn one_that_ends_in_time_or_fails_is_not() {
        assert!(watched(Watchdog::disarm).is_err());
        assert!(watched(drop).is_err());
    }
}

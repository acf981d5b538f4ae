//! How a daemon ends, other than by the device being stopped: signals, panics, a kernel that never answers.

use super::{launch::Reporter, log::Sink, workers::named};
use crate::{
    cli::stop,
    failure::{Context, Exit, Failure, Outcome},
    ublk,
};
use nix::{
    sys::signal::{SigSet, Signal},
    unistd::alarm,
};
use std::{
    io,
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

/// Blocks the signals that stop us, in this thread and all that it starts.
pub fn block_stop_signals() -> Outcome<SigSet> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.add(Signal::SIGINT);
    set.thread_block().doing("can't block signals")?;
    Ok(set)
}

/// The first signal stops the device in good order, from another process (see [`stop`]). The second ends this one:
/// requests under way may wait for a device that never answers.
pub fn stop_on_signals(number: u32, signals: SigSet) -> io::Result<()> {
    let wait = move || {
        let _ = signals.wait();
        let child = stop::start_forced_del(number);
        let _ = named("stop").spawn(move || stop_ourselves(number, child));
        let _ = signals.wait();
        process::exit(Exit::Busy as i32);
    };
    named("signals").spawn(wait).map(drop)
}

/// Where that process could not do it (its libraries may be out of reach in our mount namespace), it is up to us.
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

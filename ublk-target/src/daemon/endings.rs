//! How a daemon ends, other than by somebody stopping the device: panics, a kernel that never
//! answers, and what signals ask for.

use super::{
    launch::Reporter,
    log::{Event, Log, Sink},
    state::State,
};
use crate::{
    cli::stop::{self, When},
    event::Severity,
    failure::{Exit, Failure},
    notice::Notice,
    ublk,
};
use nix::unistd::alarm;
use std::{
    io::{self, Read},
    process::{self, Child},
    sync::Arc,
    time::Duration,
};

/// How long the kernel may take to add or start a device: some kernels never come back.
const KERNEL_PATIENCE: Duration = Duration::from_secs(30);

/// After how long a word is said of a stop under way: that the device is in use has been said by
/// then.
const STOPS_WITHIN: Duration = Duration::from_secs(10);

/// How many seconds a panic may take to say what it has to say.
const WORDS: u32 = 5;

/// A thread that panics leaves requests that nobody completes: better no daemon, which the kernel
/// notices.
pub fn abort_on_panic() {
    let told = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        // Whoever reads standard error may wait for our device: this ends us even so.
        alarm::set(WORDS);
        told(panic);
        Sink::system().line(Severity::Crit, panic);
        process::abort();
    }));
}

/// Hears from the process that waits for the last user, and does what that would where it can't be
/// had (its libraries may be out of reach in our mount namespace).
pub fn stop_when_left(state: &State, child: io::Result<Child>, log: &Log) {
    let slow = log.clone();
    let word = Notice::after(STOPS_WITHIN, move || slow.tell(Event::StopIsSlow));
    let stopped = child.and_then(|mut child| {
        // It says a line when it begins to wait, and closes its output when it ends.
        let mut words = [0; 64];
        if child.stdout.take().is_some_and(|mut said| said.read(&mut words).is_ok_and(|count| count > 0)) {
            drop(word);
            log.tell(Event::StopWaits);
        }
        child.wait()
    });
    if !stopped.is_ok_and(|status| status.success()) && ublk::exists(state.id) {
        let _ = stop::stop(state.proof(), When::Left, true);
    }
}

/// Where that process could not do it, it is up to us.
pub fn stop_ourselves(state: &State, child: io::Result<Child>) {
    if let Ok(mut child) = child {
        let _ = child.wait();
    }
    // We still live: either the device has been stopped and the last checkpoint is on its way (its
    // number may be another's by now), or nothing was done.
    let _ = state.proof().stop();
}

/// Ends the process when the kernel does not come back from a command.
pub struct Watchdog(Notice);

impl Watchdog {
    /// `clean_up` runs before the process ends.
    pub fn start(command: &'static str, reporter: &Arc<Reporter>, clean_up: impl FnOnce() + Send + 'static) -> Self {
        let reporter = Arc::clone(reporter);
        Self(Notice::after(KERNEL_PATIENCE, move || {
            let seconds = KERNEL_PATIENCE.as_secs();
            let message = format!(
                "the kernel has not come back from {command} within {seconds} s (a bug of some 6.17 kernels): see dmesg, use another kernel"
            );
            reporter.failed(&Failure::new(Exit::Device, message));
            clean_up();
            process::exit(Exit::Device as i32);
        }))
    }

    /// It has come back.
    pub fn disarm(self) {
        drop(self.0);
    }
}

//! How a daemon ends, other than by somebody stopping the device: panics, and what signals ask for.

use super::{
    log::{Event, Log, Sink},
    state::State,
};
use crate::{
    cli::stop::{self, When},
    event::Severity,
    notice::Notice,
    ublk,
};
use nix::unistd::alarm;
use std::{
    io::{self, Read},
    process::{self, Child},
    time::Duration,
};

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

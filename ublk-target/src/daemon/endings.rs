//! How a daemon ends, other than by the device being stopped: signals, panics, a kernel that never answers.

use super::{launch::Reporter, log::Sink, workers::named};
use crate::{
    cli::stop,
    failure::{Context, Exit, Failure, Outcome},
};
use nix::sys::signal::{SigSet, Signal};
use std::{
    io, process,
    sync::{Arc, mpsc},
    time::Duration,
};

/// How long the kernel may take to add or start a device: some kernels never come back.
const KERNEL_PATIENCE: Duration = Duration::from_secs(30);

/// A thread that panics leaves requests that nobody completes: better no daemon, which the kernel notices.
pub fn abort_on_panic() {
    let told = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
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
        if stop::start_forced_del(number).is_ok() {
            let _ = signals.wait();
        }
        process::exit(Exit::Busy as i32);
    };
    named("signals").spawn(wait).map(drop)
}

/// Ends the process when the kernel does not come back from a command.
pub struct Watchdog {
    done: mpsc::Sender<()>,
}

impl Watchdog {
    pub fn start(command: &'static str, reporter: &Arc<Reporter>) -> Self {
        let (done, waited) = mpsc::channel();
        let reporter = Arc::clone(reporter);
        let watch = move || {
            if waited.recv_timeout(KERNEL_PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
                let seconds = KERNEL_PATIENCE.as_secs();
                let message = format!(
                    "the kernel has not come back from {command} within {seconds} s (a bug of some 6.17 kernels): see dmesg, use another kernel"
                );
                reporter.failed(&Failure::new(Exit::Device, message));
                process::exit(Exit::Device as i32);
            }
        };
        // Without a thread for it we go unwatched.
        let _ = named("watchdog").spawn(watch);
        Self { done }
    }

    pub fn disarm(self) {
        let _ = self.done.send(());
    }
}

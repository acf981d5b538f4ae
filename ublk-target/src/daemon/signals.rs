//! What signals do to a daemon, from its start to its end.
//!
//! ```text
//!   alone      no thread yet, nothing done that the kernel would not undo: SIGTERM and SIGINT end the process, as any other; one
//!              that waits says what for (`wait`)
//!   opening    what is under way on the devices ends first, or is cut off: recovery may be, at any moment
//!   starting   the kernel makes the device: the signal is remembered until that answers
//!   live       the device is stopped, as soon as nobody uses it
//!   left       the device is the next daemon's: nothing is stopped any more
//! ```

use super::{
    endings::{stop_ourselves, stop_when_left},
    launch::Reporter,
    log::{Event, Log},
    state::State,
};
use crate::{
    cli::stop::{self, When},
    failure::{Context, Exit, Failure, Outcome},
    interrupt,
    notice::Notice,
    threads::named,
    wait::{self, LONGEST, WORD_AFTER},
};
use nix::sys::signal::{SigSet, Signal};
use std::{
    process,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

/// Signals that ask us to stop.
const STOP: [Signal; 2] = [Signal::SIGTERM, Signal::SIGINT];
/// Signals that would end us where nobody has asked for that: a terminal that goes, tools that have
/// logs written anew.
const HEEDLESS: [Signal; 3] = [Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2];

/// Blocks the signals that end nobody, in this thread and all that it starts.
pub fn block_heedless() -> Outcome {
    HEEDLESS.into_iter().collect::<SigSet>().thread_block().doing("can't block signals")
}

/// How far the daemon has come, as far as a signal is concerned.
enum Phase {
    Opening,
    /// A signal came while it was opening: there will be no device.
    Ended,
    Starting,
    Live(Box<State>, Log),
    /// A signal came: the device is stopped, or will be.
    Stopping(Log),
    /// The device is to be another daemon's.
    Left,
}

impl Phase {
    fn may_leave(&self) -> Result<(), &'static str> {
        match self {
            Self::Live(..) => Ok(()),
            Self::Opening | Self::Ended | Self::Starting => Err("it is being started yet"),
            Self::Stopping(_) => Err("a signal has asked its daemon to stop it"),
            Self::Left => Err("it is another daemon's already"),
        }
    }
}

/// The thread that takes signals, as the daemon sees it.
pub struct Signals {
    phase: Mutex<Phase>,
    changed: Condvar,
}

impl Signals {
    /// From here on this process has a thread that takes them: after all that must be done before
    /// any other is started. `early` says what a signal means that comes before there is a device.
    pub fn watch(
        reporter: &Arc<Reporter>,
        early: impl Fn(Signal) -> Failure + Send + Sync + 'static,
    ) -> Outcome<Arc<Self>> {
        let set: SigSet = STOP.into_iter().chain(HEEDLESS).collect();
        set.thread_block().doing("can't block signals")?;
        interrupt::expect();
        let signals = Arc::new(Self { phase: Mutex::new(Phase::Opening), changed: Condvar::new() });
        let (watched, reporter) = (Arc::clone(&signals), Arc::clone(reporter));
        let serve = move || {
            let signal = watched.next_stop(&set);
            if !watched.is_too_late_to_end() {
                watched.end_opening(&set, signal, move || reporter.failed(&early(signal)));
            }
            let (state, log) = watched.wait_until_live(|| {
                wait::tell(&format!("{signal}: the device is being started, and is stopped as soon as it answers"));
            });
            watched.stop_live(&set, state, &log);
        };
        named("signals").spawn(serve).doing("can't start the signal thread")?;
        Ok(signals)
    }

    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The kernel is about to make the device: fails where a signal has come before.
    pub fn begin_start(&self) -> Outcome {
        let mut phase = self.phase();
        if matches!(*phase, Phase::Ended) {
            return Err(interrupt::failure());
        }
        *phase = Phase::Starting;
        Ok(())
    }

    /// The device answers.
    pub fn live(&self, state: State, log: Log) {
        *self.phase() = Phase::Live(Box::new(state), log);
        self.changed.notify_all();
    }

    /// Whether the device can be left to another daemon: why not, in words.
    pub fn may_leave(&self) -> Result<(), &'static str> {
        self.phase().may_leave()
    }

    /// Leaves the device to another daemon, as soon as `say` has told that: between the two no
    /// signal comes. From then on none stops the device.
    pub fn leave(&self, say: impl FnOnce() -> bool) -> Result<(), &'static str> {
        let mut phase = self.phase();
        phase.may_leave()?;
        if !say() {
            return Err("nobody takes it over");
        }
        *phase = Phase::Left;
        Ok(())
    }

    /// Whether there is a device, or nearly one. Else there never will be.
    fn is_too_late_to_end(&self) -> bool {
        let mut phase = self.phase();
        let opening = matches!(*phase, Phase::Opening | Phase::Ended);
        if opening {
            *phase = Phase::Ended;
        }
        !opening
    }

    /// What runs on the devices is asked to end, and the process with it. `failed` tells whoever
    /// waits for us, where that takes too long.
    fn end_opening(&self, set: &SigSet, signal: Signal, failed: impl Fn() + Send + Sync + 'static) -> ! {
        let cut_off = Arc::new(move || {
            failed();
            // The kernel may keep the process until a sync under way has ended.
            interrupt::die_of(signal);
        });
        interrupt::come(signal);
        let _word = Notice::after(WORD_AFTER, move || {
            let seconds = LONGEST.as_secs();
            wait::tell(&format!(
                "{signal}: waiting for what is under way on the devices, at most {seconds} s; a second signal gives it up at once"
            ));
        });
        let at_last = Arc::clone(&cut_off);
        let _end = Notice::after(LONGEST, move || at_last());
        self.next_stop(set);
        cut_off();
        process::exit(Exit::Interrupted as i32)
    }

    /// Waits for the device, with a word if it does not answer yet. From then on it is to be stopped.
    /// Never returns where it was left to another daemon: this process is about to end.
    fn wait_until_live(&self, word: impl FnOnce()) -> (State, Log) {
        let mut phase = self.phase();
        let mut word = Some(word);
        loop {
            match &*phase {
                Phase::Live(state, log) => {
                    let (state, log) = ((**state).clone(), log.clone());
                    *phase = Phase::Stopping(log.clone());
                    return (state, log);
                }
                Phase::Left => {}
                _ => word.take().into_iter().for_each(|word| word()),
            }
            phase = self.changed.wait(phase).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The first signal stops the device as soon as nobody uses it: under a mounted file system a
    /// disk that goes takes what was not written yet with it. The second one stops it whoever uses
    /// it, in good order. The third ends this process: requests under way may wait for a device
    /// that never answers.
    ///
    /// Whoever uses it is looked for, and the device stopped, by other processes (see [`stop`]).
    fn stop_live(&self, set: &SigSet, state: State, log: &Log) {
        let (child, told, of) = (stop::start(state.id, When::Left), log.clone(), state.clone());
        let _ = named("stop").spawn(move || stop_when_left(&of, child, &told));
        self.next_stop(set);
        log.tell(Event::StopsNow);
        let child = stop::start_forced_del(state.id);
        let _ = named("stop now").spawn(move || stop_ourselves(&state, child));
        self.next_stop(set);
        process::exit(Exit::Busy as i32);
    }

    /// Waits for a signal that asks us to stop.
    fn next_stop(&self, set: &SigSet) -> Signal {
        loop {
            match set.wait() {
                Ok(signal) if HEEDLESS.contains(&signal) => {
                    let ignored = Event::SignalIgnored(signal);
                    match &*self.phase() {
                        Phase::Live(_, log) | Phase::Stopping(log) => log.tell(ignored),
                        _ => wait::tell(&ignored.to_string()),
                    }
                }
                Ok(signal) => return signal,
                // It fails only for a set that is none.
                Err(_) => return Signal::SIGTERM,
            }
        }
    }
}

#[cfg(test)]
impl Signals {
    /// Those of a daemon that opens, without a thread that takes them.
    pub fn of_test() -> Arc<Self> {
        Arc::new(Self { phase: Mutex::new(Phase::Opening), changed: Condvar::new() })
    }

    /// A signal has come.
    pub fn come_in_test(&self) {
        drop(self.wait_until_live(|| {}));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{sync::mpsc, time::Duration};

    #[test]
    fn one_that_comes_before_the_device_prevents_it() {
        let signals = Signals::of_test();
        assert!(!signals.is_too_late_to_end());
        assert!(signals.begin_start().is_err(), "whoever is opening finds out before anything is made");
        assert!(!signals.is_too_late_to_end());
    }

    #[test]
    fn one_that_comes_while_it_starts_waits_until_it_answers() {
        let signals = Signals::of_test();
        signals.begin_start().unwrap();
        assert!(signals.is_too_late_to_end());
        let (tell, told) = mpsc::channel();
        let (waiting, word) = (Arc::clone(&signals), tell.clone());
        let thread = std::thread::spawn(move || {
            let (state, _) = waiting.wait_until_live(move || word.send(0).unwrap());
            tell.send(state.id).unwrap();
        });
        assert_eq!(told.recv(), Ok(0), "it is told");
        assert!(told.recv_timeout(Duration::from_millis(100)).is_err(), "there is no device to stop yet");
        let state = State::of_test(7);
        signals.live(state, Log::of_test());
        assert_eq!(told.recv(), Ok(7));
        thread.join().unwrap();
    }

    #[test]
    fn a_device_is_left_or_stopped_and_never_both() {
        let signals = Signals::of_test();
        assert!(signals.leave(|| panic!("said")).unwrap_err().contains("started"));
        signals.begin_start().unwrap();
        assert!(signals.may_leave().is_err(), "the kernel is making it");
        signals.live(State::of_test(7), Log::of_test());
        assert!(signals.leave(|| false).is_err(), "nobody heard it");
        assert_eq!(signals.may_leave(), Ok(()), "it goes on");
        signals.wait_until_live(|| panic!("told though there is nothing to wait for"));
        assert!(signals.leave(|| panic!("said")).unwrap_err().contains("stop"));

        let signals = Signals::of_test();
        signals.live(State::of_test(7), Log::of_test());
        assert_eq!(signals.leave(|| true), Ok(()));
        assert!(signals.leave(|| panic!("said")).is_err() && signals.may_leave().is_err());
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || tell.send(signals.wait_until_live(|| panic!("told")).0.id));
        assert!(told.recv_timeout(Duration::from_millis(100)).is_err(), "a signal stops nothing any more");
    }
}

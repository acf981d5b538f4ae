//! Asking whoever serves a device, while another daemon may be about to.
//!
//! Between two daemons nobody answers, and one that is about to leave begins nothing any more. Neither is an answer to a
//! command as long as another one holds the right to give the device its next daemon ([`Change`]): that is asked then. What a
//! daemon says that serves is final, whoever holds that right: it may be for something else, and no other daemon come.

use super::{
    client::{self, Unanswered},
    protocol::{ANSWERS_WITHIN, Request},
    state::{Change, State, socket_path},
};
use crate::{
    failure::{Exit, Failure, Outcome},
    ublk,
    wait::Wait,
};
use serde_json::Value;
use std::time::Duration;

/// How long it may take to give a device another daemon: to close the volume, to open it, and once more where the program of
/// before has it back.
pub const WITHIN: Duration = Duration::from_secs(180);

/// What comes of an attempt that hangs on the daemon of device `id`. Where it has met nobody (`is_absent`) it is made anew while
/// the device is about to have another daemon.
pub fn anew<T>(id: u32, attempt: impl FnMut() -> T, is_absent: impl Fn(&T) -> bool) -> T {
    let device = ublk::block_path(id);
    let mut wait =
        Wait::up_to(WITHIN, format_args!("the next daemon of {}, to which it is handed over", device.display()));
    anew_while(|| Change::is_under_way(id), &mut wait, attempt, is_absent)
}

fn anew_while<T>(
    changes: impl Fn() -> bool,
    wait: &mut Wait,
    mut attempt: impl FnMut() -> T,
    is_absent: impl Fn(&T) -> bool,
) -> T {
    loop {
        // Looked at before, too: where the next daemon has come since, it was not the one that was asked.
        let changed = changes();
        let done = attempt();
        if !is_absent(&done) || !(changed || changes()) || !wait.pause() {
            return done;
        }
    }
}

/// The same of an attempt that is answered, or not.
pub fn answered<T>(id: u32, attempt: impl FnMut() -> Result<T, Unanswered>) -> Result<T, Unanswered> {
    anew(id, attempt, is_unanswered)
}

fn is_unanswered<T>(done: &Result<T, Unanswered>) -> bool {
    done.as_ref().is_err_and(|why| !why.is_final())
}

/// The device `id`, if it has a daemon that lives, or is about to have one.
pub fn alive(id: u32) -> Outcome<State> {
    let look = || State::load(id).map(|state| (state.is_alive(), state));
    let (lives, state) = anew(id, look, |looked| looked.as_ref().is_ok_and(|(lives, _)| !lives))?;
    if lives { Ok(state) } else { Err(state.daemon_is_dead()) }
}

/// The answer of the daemon that serves the device of `state`, by now.
pub fn answer(state: &State, request: &Request) -> Result<Value, Unanswered> {
    answered(state.id, || client::ask(&socket_path(state.id), request))
}

/// The same for who has nothing more to say of one that comes too late.
pub fn ask(state: &State, request: &Request) -> Outcome<Value> {
    answer(state, request).map_err(|why| why.failure(|| late(state)))
}

/// What is said of a daemon that has not answered within the time.
fn late(state: &State) -> Failure {
    let (id, pid, seconds) = (state.id, state.anew().pid, ANSWERS_WITHIN.as_secs());
    Failure::new(Exit::Busy, format_args!("the daemon of device {id} (pid {pid}) has not answered within {seconds} s"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    fn wait() -> Wait {
        Wait::up_to(Duration::from_secs(60), "the next daemon")
    }

    #[test]
    fn what_fails_between_two_daemons_is_asked_of_the_next() {
        let asked = Cell::new(0);
        let attempt = |good_from: u32| {
            asked.set(0);
            let asked = &asked;
            move || {
                asked.set(asked.get() + 1);
                if asked.get() >= good_from { Ok(asked.get()) } else { Err("nobody is there") }
            }
        };
        let anew_while =
            |changes: &dyn Fn() -> bool, attempt| anew_while(changes, &mut wait(), attempt, Result::is_err);
        assert_eq!(anew_while(&|| true, attempt(4)), Ok(4));
        assert_eq!(anew_while(&|| false, attempt(4)), Err("nobody is there"), "none comes");
        assert_eq!(asked.get(), 1);
        // It ends between a look and the attempt, or begins there.
        let looks = |ends: bool| {
            let looks = Cell::new(0);
            move || looks.replace(looks.get() + 1) == u32::from(!ends)
        };
        assert_eq!(anew_while(&looks(true), attempt(2)), Ok(2), "the next one has come meanwhile");
        assert_eq!(anew_while(&looks(false), attempt(2)), Ok(2));
    }

    /// `key` holds the right to change for as long as it writes, and so does a unit that takes a daemon for its own.
    #[test]
    fn what_a_daemon_refuses_that_serves_is_not_asked_again() {
        let attempts = |why: fn(Failure) -> Unanswered| {
            let mut asked = 0;
            let attempt = || {
                asked += 1;
                if asked > 3 { Ok(()) } else { Err(why(Failure::new(Exit::Busy, "a pass is under way"))) }
            };
            let done = anew_while(|| true, &mut wait(), attempt, is_unanswered);
            (asked, done.is_ok())
        };
        assert_eq!(attempts(Unanswered::Refused), (1, false));
        assert_eq!(attempts(Unanswered::Absent), (4, true), "the next one does it");
        assert_eq!(attempts(|_| Unanswered::Late), (4, true));
    }

    #[test]
    fn a_next_daemon_that_does_not_come_is_not_waited_for_for_ever() {
        let mut short = Wait::up_to(Duration::from_millis(50), "the next daemon");
        let nobody = || Err::<(), _>("nobody is there");
        assert_eq!(anew_while(|| true, &mut short, nobody, Result::is_err), Err("nobody is there"));
    }
}

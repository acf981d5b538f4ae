//! Asking whoever serves a device, while another daemon may be about to.
//!
//! Between two daemons nobody answers, and one that is about to leave begins nothing any more. Neither is an answer to a
//! command as long as another one holds the right to give the device its next daemon ([`Change`]): that is asked then.

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

/// What comes of an attempt that hangs on the daemon of device `id`, made anew while that is about to have another one.
pub fn anew<T, E>(id: u32, attempt: impl FnMut() -> Result<T, E>) -> Result<T, E> {
    let device = ublk::block_path(id);
    let mut wait =
        Wait::up_to(WITHIN, format_args!("the next daemon of {}, to which it is handed over", device.display()));
    anew_while(|| Change::is_under_way(id), &mut wait, attempt)
}

fn anew_while<T, E>(
    changes: impl Fn() -> bool,
    wait: &mut Wait,
    mut attempt: impl FnMut() -> Result<T, E>,
) -> Result<T, E> {
    loop {
        // Looked at before, too: where the next daemon has come since, it was not the one that was asked.
        let changed = changes();
        match attempt() {
            Err(_) if (changed || changes()) && wait.pause() => {}
            done => return done,
        }
    }
}

/// The device `id`, if it has a daemon that lives, or is about to have one.
pub fn alive(id: u32) -> Outcome<State> {
    anew(id, || State::load_alive(id))
}

/// The answer of the daemon that serves the device of `state`, by now.
pub fn answer(state: &State, request: &Request) -> Result<Value, Unanswered> {
    anew(state.id, || client::ask(&socket_path(state.id), request))
}

/// The same for who has nothing more to say of one that comes too late.
pub fn ask(state: &State, request: &Request) -> Outcome<Value> {
    answer(state, request).map_err(|why| match why {
        Unanswered::Failed(failure) => failure,
        Unanswered::Late => {
            let (id, pid, seconds) = (state.id, state.anew().pid, ANSWERS_WITHIN.as_secs());
            Failure::new(
                Exit::Busy,
                format_args!("the daemon of device {id} (pid {pid}) has not answered within {seconds} s"),
            )
        }
    })
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
        assert_eq!(anew_while(|| true, &mut wait(), attempt(4)), Ok(4));
        assert_eq!(anew_while(|| false, &mut wait(), attempt(4)), Err("nobody is there"), "none comes");
        assert_eq!(asked.get(), 1);
        // It ends between a look and the attempt, or begins there.
        let looks = |ends: bool| {
            let looks = Cell::new(0);
            move || looks.replace(looks.get() + 1) == u32::from(!ends)
        };
        assert_eq!(anew_while(looks(true), &mut wait(), attempt(2)), Ok(2), "the next one has come meanwhile");
        assert_eq!(anew_while(looks(false), &mut wait(), attempt(2)), Ok(2));
    }

    #[test]
    fn a_next_daemon_that_does_not_come_is_not_waited_for_for_ever() {
        let mut short = Wait::up_to(Duration::from_millis(50), "the next daemon");
        assert_eq!(anew_while(|| true, &mut short, || Err::<(), _>("nobody is there")), Err("nobody is there"));
    }
}

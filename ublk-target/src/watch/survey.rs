//! All devices, each asked once, at the same time: one that does not answer holds no other up.

use crate::{
    daemon::{
        client::{self, Unanswered},
        followed,
        protocol::Request,
        state::{State, socket_path},
    },
    failure::Failure,
};
use serde_json::Value;
use std::thread;

/// A device as it was found.
pub struct Seen {
    /// What its state file says.
    pub state: State,
    /// What its daemon says.
    pub daemon: Daemon,
}

impl Seen {
    /// State and counters, if its daemon answers.
    pub fn status(&self) -> Option<&Value> {
        match &self.daemon {
            Daemon::Answers(status) => Some(status),
            _ => None,
        }
    }
}

/// What the daemon of a device says.
#[derive(Debug)]
pub enum Daemon {
    /// State and counters.
    Answers(Value),
    /// It lives, and has not answered in time.
    Late,
    /// It lives, and can't be asked, or is about to leave.
    Unasked(Failure),
    /// It lives, and has refused.
    Refused(Failure),
    /// It is dead, and the kernel has the device yet.
    Dead,
}

/// Looks at all devices, as they are at this moment.
pub fn all() -> Vec<Seen> {
    each(look)
}

/// The same for who looks once: at one that is handed over when it has its next daemon.
pub fn all_settled() -> Vec<Seen> {
    each(look_settled)
}

fn each(look: impl Fn(State) -> Option<Seen> + Copy + Send) -> Vec<Seen> {
    thread::scope(|scope| {
        let looks: Vec<_> = State::all().into_iter().map(|state| scope.spawn(move || look(state))).collect();
        looks.into_iter().filter_map(|look| look.join().ok().flatten()).collect()
    })
}

/// Looks at one; `None` if it is gone.
pub fn look(state: State) -> Option<Seen> {
    let daemon = ask(&state).or_else(|| state.has_device().then_some(Daemon::Dead))?;
    Some(Seen { state, daemon })
}

/// The same, once it has its next daemon, where it is handed over.
pub fn look_settled(state: State) -> Option<Seen> {
    let is_absent = |seen: &Option<Seen>| {
        seen.as_ref().is_some_and(|seen| matches!(seen.daemon, Daemon::Dead | Daemon::Unasked(_)))
    };
    followed::anew(state.id, || look(state.anew()), is_absent)
}

/// What the daemon says, if it lives.
fn ask(state: &State) -> Option<Daemon> {
    if !state.is_alive() {
        return None;
    }
    match client::ask(&socket_path(state.id), &Request::Status {}) {
        Ok(status) => Some(Daemon::Answers(status)),
        Err(Unanswered::Late) => Some(Daemon::Late),
        // It may have ended while it was asked.
        Err(Unanswered::Absent(failure)) => state.is_alive().then_some(Daemon::Unasked(failure)),
        Err(Unanswered::Refused(failure)) => state.is_alive().then_some(Daemon::Refused(failure)),
    }
}

#[cfg(test)]
impl Seen {
    /// A device whose daemon answers with this, and what each answer has.
    pub fn answering(id: u32, more: &Value) -> Self {
        let state = State::of_test(id);
        let mut status = serde_json::json!(state);
        status["on_mismatch"] = "fail".into();
        status["read_only"] = false.into();
        for (name, value) in more.as_object().expect("fields") {
            status[name] = value.clone();
        }
        Self { state, daemon: Daemon::Answers(status) }
    }
}

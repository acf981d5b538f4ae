//! What the unit of a device runs to be reloaded: see [`wish`](super::wish).

use super::{
    new_program::NewProgram,
    take_over::{TakenOver, take_over},
    wish::Wished,
};
use crate::{
    daemon::{notify::Notify, state::State},
    failure::{Context, Outcome},
    output,
};
use std::time::Duration;

/// Has the program that somebody wants serve device `id`, or `ours`; and tells systemd who does.
pub(super) fn run(id: u32, ours: NewProgram) -> Outcome {
    let wished = Wished::find(id);
    let new = match &wished {
        Some((_, wish)) => NewProgram::wished(wish)?,
        None => ours,
    };
    let manager = Notify::from_environment();
    // A reload has no more time than a start, and would be killed in the middle. Each step has an end of its own.
    manager.extend_until(|| false);
    let new = new.in_reload(manager);
    let done = take_over(id, &new, false);
    // Whoever that is by now.
    if let Ok(state) = State::load_alive(id) {
        new.say_who_serves(id, state.pid);
    }
    if let Some((wished, _)) = wished {
        let waited = |done: &Option<TakenOver>| done.as_ref().map_or(Duration::ZERO, |done| done.waited);
        wished.answer(done.as_ref().map(waited)).doing("can't say how it went")?;
    }
    done.map_err(|undone| undone.failure)?.map_or(Ok(()), |done| output::line(done.in_words()))
}

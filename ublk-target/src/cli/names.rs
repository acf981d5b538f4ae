//! Devices by their names.

use crate::{
    daemon::state::State,
    failure::{Exit, Failure, Outcome},
    name::DeviceName,
    ublk,
};

/// The device that has this name, whether its daemon lives or not.
pub(super) fn find(name: &DeviceName) -> Option<State> {
    pick(name, State::all())
}

/// The same among these, which must have it.
pub(super) fn of(name: &DeviceName, all: Vec<State>) -> Outcome<State> {
    pick(name, all).ok_or_else(|| {
        Failure::new(Exit::Device, format_args!("no device here has the name {name}: `ublk-integrity list` shows them"))
    })
}

/// What a dead daemon has left of a device that is gone has no name any more.
fn pick(name: &DeviceName, all: Vec<State>) -> Option<State> {
    let mut named = all.into_iter().filter(|state| state.settings.name.as_ref() == Some(name));
    named.find(|state| state.is_alive() || ublk::exists(state.id))
}

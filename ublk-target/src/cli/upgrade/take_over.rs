//! From one program to the other, for one device.
//!
//! ```text
//!   successor started: all that can be looked at beforehand; it is ready, and nothing has happened yet
//!     ─> the daemon hands over, or is killed where it is too old for that │ busy: it goes on, the successor ends
//!          │  from here on nobody gives up: what goes wrong ends with a daemon, or with what to type
//!          ├─ it closes its volume for too long: the successor stays, and follows when that ends
//!          └─> the successor serves
//!               └─ it can't: the program of before, whose file is still open here, recovers the device
//!                    └─ nor can that: the device waits, as after any death of a daemon
//! ```

use super::{Device, Undone, daemon_before::DaemonBefore, new_program::NewProgram, unit::Unit, wish};
use crate::{
    daemon::{
        lock_memory,
        state::{Change, State},
    },
    failure::{Exit, Failure},
    os, output, ublk,
};
use nix::sys::signal::Signal;
use std::time::{Duration, Instant};

/// A device that another daemon serves.
pub(super) struct TakenOver {
    device: String,
    before: String,
    version: String,
    /// How long requests waited.
    pub(super) waited: Duration,
}

impl TakenOver {
    /// A line about it.
    pub(super) fn in_words(&self) -> String {
        let Self { device, before, version, waited } = self;
        format!("{device}: {before} → {version}, {}", in_words(*waited))
    }
}

/// How long requests waited.
pub(in crate::cli) fn in_words(waited: Duration) -> String {
    format!("requests waited {:.2} s", waited.as_secs_f64())
}

/// Gives the device a daemon of the new program. `None` where it has one already,
/// and `new_only` says to leave that alone.
pub(super) fn take_over(id: u32, new: &NewProgram, new_only: bool) -> Result<Option<TakenOver>, Undone> {
    let device = ublk::block_path(id).display().to_string();
    let stays = |failure: Failure| failure.context(format_args!("{device} goes on as before"));
    let state = State::load(id)?;
    if !new.is_in_reload() && state.is_alive() {
        match Unit::of(state.pid) {
            Some(Unit::Reloads(unit)) => return by_reload(&unit, &state, new, new_only),
            Some(Unit::Restarts(unit)) => return Err(restarts(&device, &unit).into()),
            None => {}
        }
    }
    let _change = Change::follow(id)?;
    // It may have another daemon since then.
    let state = State::load(id)?;
    let before = DaemonBefore::of(&state).map_err(|failure| failure.context(&device))?;
    if new_only && before.runs(new.file()) {
        return Ok(None);
    }
    before.refuse().map_err(|failure| failure.context(&device))?;
    let mut successor = new.start(id, before.known_format()).map_err(stays)?;
    let place = before.make_room_for(successor.pid());
    let version = match successor.ready() {
        Ok(version) => version,
        Err(failure) => {
            successor.dismiss();
            return Err(stays(failure).into());
        }
    };
    // Requests wait from here on, those for our own pages among them.
    lock_memory(output::warn);
    let held = before.hold_program();
    if let Err(e) = &held {
        output::warn(format_args!("can't hold the program of before in memory: {e}"));
    }
    // To the end, whatever asks us to stop: else nobody might serve.
    let _held = os::Blocked::hold(&os::heeded(&[Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]));
    let begun = Instant::now();
    let ended = before.end();
    if ended.is_ok() {
        new.say_who_serves(id, successor.pid());
    }
    if let Err(undone) = ended {
        match undone.device {
            // Nobody serves it until the successor does.
            Device::IsClosed => drop(successor),
            _ => successor.dismiss(),
        }
        return Err(undone);
    }
    let died = || Failure::new(Exit::Device, "it died as soon as it served; the system log may tell why");
    let served = successor.serve(&state.settings.paths_in_words());
    let served = served.and_then(|()| state.follower().map(drop).ok_or_else(died));
    let Err(why) = served else {
        let (before, waited) = (before.version().to_owned(), begun.elapsed());
        return Ok(Some(TakenOver { device, before, version, waited }));
    };
    // It lets go of the devices first.
    if !successor.end() {
        output::warn(format_args!("the new daemon of {device} was killed, and has not ended yet"));
    }
    if state.follower().is_none() && before.recover(new.key(), place.as_ref()) {
        let context = format!(
            "{device} is served by the program of before, {}: {} could not take over",
            in_words(begun.elapsed()),
            new.name()
        );
        return Err(why.context(context).into());
    }
    Err(nobody_or_another(&state, new.name(), &why))
}

/// By the reload of the unit whose main process the daemon is.
fn by_reload(unit: &str, state: &State, new: &NewProgram, new_only: bool) -> Result<Option<TakenOver>, Undone> {
    let device = ublk::block_path(state.id).display().to_string();
    let runs_it = || DaemonBefore::of(state).map(|before| before.runs(new.file()));
    if new_only && runs_it().map_err(|failure| failure.context(&device))? {
        return Ok(None);
    }
    let waited = wish::ask(unit, state.id, &new.wish()?)?;
    let words = |state: &State| state.version.clone().unwrap_or_else(|| "an older version".into());
    let version = State::load(state.id).map_or_else(|_| "another".into(), |now| words(&now));
    Ok(Some(TakenOver { device, before: words(state), version, waited }))
}

/// What is to be done about a unit that can't hand over.
fn restarts(device: &str, unit: &str) -> Failure {
    let message = format!(
        "{device}: systemd started its daemon and starts the next one, too: `systemctl kill --signal=SIGKILL {unit}` has it do so, with the program that is installed"
    );
    Failure::new(Exit::Busy, message)
}

/// Neither program serves it as far as we know: whether another daemon does, and else what to type.
fn nobody_or_another(state: &State, new: &str, why: &Failure) -> Undone {
    let device = ublk::block_path(state.id);
    let device = device.display();
    if let Some(pid) = state.follower() {
        let message = format!("{device} has another daemon (pid {pid}) by now, which is not what was wanted: {why}");
        return Failure::new(why.exit, message).into();
    }
    let (exists, kernel_state) = (ublk::exists(state.id), ublk::kernel_state(state.id));
    let what = what_to_type(state.id, exists, kernel_state);
    let message =
        format!("{device} {what}: {new} could not serve it ({why}), nor could the program of before (see above)");
    Undone { failure: Failure::new(Exit::Device, message), device: Device::Waits }
}

/// What has become of a device without a daemon, and what to do.
fn what_to_type(id: u32, exists: bool, kernel_state: Option<&str>) -> String {
    match kernel_state {
        _ if !exists => "is gone, somebody has ended it: `add` makes a new one".into(),
        Some("stopped") => format!("was stopped by somebody: `del -n {id}`, then `add`"),
        _ => format!("waits for a daemon: `recover -n {id}`"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_to_type_depends_on_what_the_kernel_has_left() {
        assert!(what_to_type(7, true, Some("waits for a daemon")).ends_with("`recover -n 7`"));
        assert!(what_to_type(7, true, None).ends_with("`recover -n 7`"));
        assert!(what_to_type(7, true, Some("stopped")).contains("`del -n 7`"));
        assert!(what_to_type(7, false, None).contains("`add`"));
    }
}

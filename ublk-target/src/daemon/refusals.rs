//! What speaks against a daemon before anything is touched.

use super::{
    Origin,
    settings::Settings,
    state::{Identity, State},
};
use crate::{
    device::{DYING, stack},
    failure::{Exit, Failure, Outcome},
    ublk::Whose,
};
use std::time::Duration;

/// Refuses a device that is not ours to serve, or would lie on itself.
pub(super) fn unfit(settings: &Settings, origin: Origin) -> Outcome {
    refuse_foreign_device(origin)?;
    match origin {
        Origin::Recovered(number) => refuse_own_stack(settings, number),
        Origin::New(_) => Ok(()),
    }
}

/// The number may have gone to another program's device since. (Asked here, not in the command that
/// forked us: a process that has asked the kernel can't fork for a while.)
fn refuse_foreign_device(origin: Origin) -> Outcome {
    let Origin::Recovered(number) = origin else { return Ok(()) };
    let state = State::load(number)?;
    let message = match state.whose()? {
        Whose::Ours => return Ok(()),
        Whose::Nobodys => format!("device {number} is gone: `add` makes a new one"),
        Whose::Anothers(Some(pid)) => {
            format!("device {number} is another program's by now (process {pid}): `add` makes a new one")
        }
        Whose::Anothers(None) => format!("device {number} is another program's by now: `add` makes a new one"),
    };
    // Its name, too, is free: who comes by that must not be led here again.
    state.remove();
    Err(Failure::new(Exit::Device, message))
}

/// A recovered device exists already: its devices may lie on it by now. Asked before anything is
/// read of them, which would wait for the device's next daemon.
pub fn refuse_own_stack(settings: &Settings, number: u32) -> Outcome {
    for path in settings.paths() {
        if stack::lies_on_ublk(path, number, State::below) {
            let message =
                format!("{} lies on /dev/ublkb{number} itself: every request would wait for itself", path.display());
            return Err(Failure::new(Exit::Device, message));
        }
    }
    settings.anchor.as_ref().map_or(Ok(()), |anchor| anchor.place.refuse_above(number))
}

/// How long to wait for the devices: only a daemon that is dead already can be about to let go of
/// them.
pub(super) fn patience(settings: &Settings, origin: Origin) -> Outcome<Duration> {
    if matches!(origin, Origin::Recovered(_)) {
        return Ok(DYING);
    }
    let mut patience = Duration::ZERO;
    for state in State::all() {
        let Some(path) = settings.shared_device(&state.settings) else { continue };
        let (path, id) = (path.display(), state.id);
        if state.is_alive() {
            let message = format!("{path} is in use by /dev/ublkb{id} (pid {}): `del -n {id}` ends that", state.pid);
            return Err(Failure::new(Exit::Busy, message));
        }
        if state.whose()? == Whose::Ours {
            // Requests wait in it that would land on what others have written since.
            let message =
                format!("{path} belongs to /dev/ublkb{id}, whose daemon is dead: `recover -n {id}` or `del -n {id}`");
            return Err(Failure::new(Exit::Busy, message));
        }
        patience = DYING;
    }
    Ok(patience)
}

/// A device that waits for a daemon holds requests for one volume, which may have grown. The paths
/// that led to it may lead to another by now.
pub(super) fn other_volume(settings: &Settings, origin: Origin, found: &Identity) -> Outcome {
    let Origin::Recovered(number) = origin else { return Ok(()) };
    let expected = State::load(number)?.volume;
    if expected.may_become(found) {
        return Ok(());
    }
    let message = format!(
        "/dev/ublkb{number} is of volume {}, {} now holds {} ({} bytes in blocks of {}): nothing done",
        expected.uuid,
        settings.meta_path().display(),
        found.uuid,
        found.size,
        found.block_size
    );
    Err(Failure::new(Exit::Device, message))
}

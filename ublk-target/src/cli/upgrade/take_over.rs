//! From one program to the other, for one device.
//!
//! ```text
//!   successor started: all that can be looked at beforehand; it is ready, and nothing has happened yet
//!     ─> the daemon hands over, or is killed where it is too old for that │ busy: it goes on, the successor ends
//!     ─> the successor serves
//!          └─ it can't: the program of before, whose file is still open here, recovers the device
//!               └─ nor can that: the device waits, as after any death of a daemon
//! ```

use super::{Undone, daemon_before::DaemonBefore, new_program::NewProgram};
use crate::{
    daemon::state::{Change, State},
    failure::{Exit, Failure},
    os, ublk,
};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use std::time::Instant;

/// Gives the device a daemon of the new program. A line about it.
pub(super) fn take_over(state: &State, new: &NewProgram) -> Result<String, Undone> {
    let (id, device) = (state.id, ublk::block_path(state.id).display().to_string());
    let stays = |failure: Failure| failure.context(format_args!("{device} goes on as before"));
    let _change = Change::follow(id)?;
    let before = DaemonBefore::of(state).map_err(|failure| failure.context(&device))?;
    let mut successor = new.start(id, before.known_format()).map_err(stays)?;
    let version = successor.ready().map_err(stays)?;
    // From here on to the end, whatever asks us to stop: else nobody might serve.
    let _held = HeldSignals::hold();
    let begun = Instant::now();
    before.end()?;
    let served = successor.serve(&state.settings.paths_in_words());
    let waited = || format!("requests waited {:.2} s", begun.elapsed().as_secs_f64());
    let Err(why) = served else {
        return Ok(format!("{device}: {} → {version}, {}", before.version(), waited()));
    };
    // It lets go of the devices first.
    successor.end();
    if before.recover(new.key()) {
        let context =
            format!("{device} is served by the program of before, {}: {} could not take over", waited(), new.name());
        return Err(why.context(context).into());
    }
    let message = format!(
        "{device} waits for a daemon: {} could not serve it ({why}), nor could the program of before (see above): `recover -n {id}`",
        new.name()
    );
    Err(Undone { failure: Failure::new(Exit::Device, message), waits: true })
}

/// Signals that would end us, held back as long as this lives.
struct HeldSignals(SigSet);

impl HeldSignals {
    fn hold() -> Option<Self> {
        let ends = os::heeded(&[Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
        ends.thread_swap_mask(SigmaskHow::SIG_BLOCK).ok().map(Self)
    }
}

impl Drop for HeldSignals {
    fn drop(&mut self) {
        let _ = self.0.thread_set_mask();
    }
}

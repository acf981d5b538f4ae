//! `del`: end a device.

use super::one_or_all;
use super::stop::{self, When};
use crate::{
    daemon::{
        clear_stillborn,
        state::{Change, State},
    },
    device::Backings,
    failure::{Context, Exit, Failure, Outcome},
    output,
    ublk::{self, Whose},
    wait::{LONGEST, Wait},
    write_back_file,
};
use std::{io::Read, process::Child, time::Duration};

/// End a device: returns when its daemon is gone, the volume is clean and the node removed
#[derive(clap::Args)]
#[command(mut_group("device", |group| group.arg("all")))]
pub struct Args {
    #[command(flatten)]
    device: Option<super::OneDevice>,
    /// All devices of ublk-integrity
    #[arg(short, long)]
    all: bool,
    /// Even while it is open, mounted or below another device; what its users have not written yet
    /// is lost
    #[arg(long)]
    force: bool,
}

/// How long the requests under way, the last checkpoint and the removal of the node may take.
const PATIENCE: Duration = Duration::from_secs(120);

pub fn run(args: &Args) -> Outcome {
    clear_stillborn();
    let states = match one_or_all(args.device.as_ref(), args.all)? {
        Some(number) => vec![State::load(number)?],
        None => State::all_top_down(),
    };
    end_all(&states, args.force)
}

/// Ends devices, each whatever becomes of the others.
pub(super) fn end_all(states: &[State], force: bool) -> Outcome {
    let mut first: Option<Failure> = None;
    for state in states {
        let Err(failure) = end(state, force) else { continue };
        // With -a: go on, and end as the first that failed.
        match &first {
            None => first = Some(failure),
            Some(_) => output::tell(failure),
        }
    }
    first.map_or(Ok(()), Err)
}

fn end(state: &State, force: bool) -> Outcome {
    refuse_foreign(state)?;
    let _change = Change::end(state.id)?;
    // It may have another daemon by now.
    let state = &state.anew();
    stop_device(state, force)?;
    let ended = remove_remains(state)?;
    if !State::all().iter().any(|other| other.is_alive() && other.settings.shared_device(&state.settings).is_some()) {
        // I/O that a killed daemon left behind may hold the locks yet.
        Backings::wait_until_free(&state.settings.data, state.settings.meta.as_deref())?;
    }
    let left = write_back_file::waiting_for(&state.open_id);
    if ended.is_none() && left > 0 {
        let left = write_back_file::writes(left);
        output::warn(format_args!(
            "{left} that the daemon had answered are in memory alone until `add` puts them in place"
        ));
    }
    match ended {
        Some(why) => {
            let id = state.id;
            let message = format!(
                "/dev/ublkb{id} is gone, but the volume was not closed in good order: {why}. What was synced is safe; the next `add` recovers"
            );
            Err(Failure::new(Exit::Device, message))
        }
        None => Ok(()),
    }
}

/// Somebody else's tool may have deleted our device, and the number gone to another.
fn refuse_foreign(state: &State) -> Outcome {
    if !matches!(state.whose()?, Whose::Anothers(_)) {
        return Ok(());
    }
    if !state.is_alive() {
        state.remove();
    }
    state.proof().ours()
}

/// Stops the device, and waits for the end of its daemon. Unless forced, only where nobody uses it.
fn stop_device(state: &State, force: bool) -> Outcome {
    let id = state.id;
    let life = state.watch();
    if life.is_none() && !ublk::exists(id) {
        return Ok(());
    }
    let when = if force { When::Now } else { When::Unused };
    let mut stop = stop::start(id, when).doing("can't start a process that stops the device")?;
    let what = if life.is_some() { "the last checkpoint" } else { "what its dead daemon has left" };
    let mut wait = Wait::up_to(PATIENCE, format_args!("the requests of /dev/ublkb{id} and {what}"));
    let stopped = loop {
        match stop.try_wait().doing("can't wait for the process that stops the device")? {
            Some(status) => break status,
            None if wait.pause() => {}
            None => return Err(too_late(state, life.is_some())),
        }
    };
    if stopped.code() == Some(Exit::Busy as i32) {
        return Err(in_use(id, stop));
    }
    match life.is_none_or(|life| life.wait_for_end(&mut wait)) {
        true => Ok(()),
        false => Err(too_late(state, true)),
    }
}

/// What the process that was to stop the device has said of its users.
fn in_use(id: u32, stop: Child) -> Failure {
    let mut said = String::new();
    let read = stop.stdout.map(|mut out| out.read_to_string(&mut said));
    if !matches!(read, Some(Ok(count)) if count > 0) {
        said = format!("/dev/ublkb{id} is in use");
    }
    Failure::new(Exit::Busy, said.trim_end())
}

fn too_late(state: &State, alive: bool) -> Failure {
    let (id, pid, seconds) = (state.id, state.pid, PATIENCE.as_secs());
    let message = if alive {
        format!("the daemon of device {id} (pid {pid}) has not ended within {seconds} s")
    } else {
        let on = state.settings.paths_in_words();
        format!(
            "the kernel has not stopped /dev/ublkb{id} within {seconds} s: what its dead daemon (pid {pid}) has begun on {on} may be under way yet; try again when it has ended"
        )
    };
    Failure::new(Exit::Busy, message)
}

/// Takes away what a daemon left that is dead now: nothing where it ended in good order. The
/// device's number may belong to somebody else already. Returns what the daemon said of its end, if
/// it was not in order.
fn remove_remains(state: &State) -> Outcome<Option<String>> {
    let id = state.id;
    let left = State::load(id).ok().filter(|now| now.pid == state.pid);
    // A daemon that had time to say how it ended has deleted its device too.
    if left.as_ref().is_some_and(|left| left.ended.is_none()) {
        state.proof().delete();
    }
    let mut wait = Wait::up_to(LONGEST, format_args!("the last user of /dev/ublkb{id}"));
    while !has_successor(state) && state.whose()? == Whose::Ours {
        if !wait.pause() {
            let message = format!("/dev/ublkb{id} is still held open; it goes when its last user closes it");
            return Err(Failure::new(Exit::Busy, message));
        }
    }
    state.remove();
    Ok(left.and_then(|left| left.ended))
}

fn has_successor(state: &State) -> bool {
    State::load(state.id).is_ok_and(|now| now.pid != state.pid)
}

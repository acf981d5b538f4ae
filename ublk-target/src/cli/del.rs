//! `del`: end a device.

use super::stop;
use crate::{
    daemon::state::State,
    device::{Backings, users},
    failure::{Context, Exit, Failure, Outcome},
    kept, output, ublk,
};
use std::time::{Duration, Instant};

/// End a device: returns when its daemon is gone, the volume is clean and the node removed
#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("devices").required(true).args(["number", "all"]))]
pub struct Args {
    /// The device: its number, or /dev/ublkbN
    #[arg(short, long, value_name = "N", value_parser = super::device_number)]
    number: Option<u32>,
    /// All devices of ublk-integrity
    #[arg(short, long)]
    all: bool,
    /// Even while it is open or mounted; what its users have not written yet is lost
    #[arg(long)]
    force: bool,
}

/// How long the requests under way, the last checkpoint and the removal of the node may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long a deletion may take once the last opener is gone.
const DELETE_PATIENCE: Duration = Duration::from_secs(30);

pub fn run(args: &Args) -> Outcome {
    let states = match args.number {
        Some(number) => vec![State::load(number)?],
        None => State::all(),
    };
    let mut outcome = Ok(());
    for state in states {
        let ended = end(&state, args.force);
        // With -a: go on, and answer with the first failure.
        outcome = outcome.and(ended);
    }
    outcome
}

fn end(state: &State, force: bool) -> Outcome {
    let id = state.id;
    if !is_ours(state) {
        // Somebody else's tool has deleted it, and the number has gone to another device.
        state.remove();
        return Err(Failure::new(
            Exit::Device,
            format_args!("/dev/ublkb{id} is another program's by now; nothing done"),
        ));
    }
    if !force && users::has_users(&ublk::block_path(id)) {
        let message =
            format!("/dev/ublkb{id} is open or mounted: unmount it, or use --force and lose what is not written yet");
        return Err(Failure::new(Exit::Busy, message));
    }
    if let Some(life) = state.watch() {
        stop::start(id).doing("can't start a process that stops the device")?;
        if !life.wait_for_end(PATIENCE) {
            let seconds = PATIENCE.as_secs();
            let message = format!("the daemon of device {id} (pid {}) has not ended within {seconds} s", state.pid);
            return Err(Failure::new(Exit::Busy, message));
        }
    }
    let ended = remove_remains(state)?;
    if !State::all().iter().any(|other| other.is_alive() && other.settings.shares_devices(&state.settings)) {
        // I/O that a killed daemon left behind may hold the locks yet.
        Backings::wait_until_free(&state.settings.data, state.settings.meta.as_deref())?;
    }
    let left = kept::waiting_for(&state.settings.data);
    if ended.is_none() && left > 0 {
        let left = kept::writes(left);
        output::warn(format_args!(
            "{left} that the daemon had answered are in memory alone until `add` puts them in place"
        ));
    }
    match ended {
        Some(why) => {
            let message = format!(
                "/dev/ublkb{id} is gone, but the volume was not closed in good order: {why}. What was synced is safe; the next `add` recovers"
            );
            Err(Failure::new(Exit::Device, message))
        }
        None => Ok(()),
    }
}

/// Takes away what a daemon left that is dead now: nothing where it ended in good order. The device's number may
/// belong to somebody else already. Returns what the daemon said of its end, if it was not in order.
fn remove_remains(state: &State) -> Outcome<Option<String>> {
    let id = state.id;
    let left = State::load(id).ok().filter(|now| now.pid == state.pid);
    // A daemon that had time to say how it ended has deleted its device too.
    if left.as_ref().is_some_and(|left| left.ended.is_none()) && is_ours(state) {
        ublk::delete(id);
    }
    let deadline = Instant::now() + DELETE_PATIENCE;
    while ublk::exists(id) && is_ours(state) && !has_successor(state) {
        if Instant::now() > deadline {
            let message = format!("/dev/ublkb{id} is still held open; it goes when its last user closes it");
            return Err(Failure::new(Exit::Busy, message));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    state.remove();
    Ok(left.and_then(|left| left.ended))
}

/// Whether the kernel's device of this number can be the one that this daemon served.
fn is_ours(state: &State) -> bool {
    ublk::daemon_of(state.id).is_none_or(|pid| pid == state.pid)
}

fn has_successor(state: &State) -> bool {
    State::load(state.id).is_ok_and(|now| now.pid != state.pid)
}

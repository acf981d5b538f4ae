//! `del`: end a device.

use super::stop;
use crate::{
    daemon::state::State,
    device::{Backings, users},
    failure::{Context, Exit, Failure, Outcome},
    ublk,
};
use std::time::Duration;

/// End a device: returns when its daemon is gone, the volume is clean and the node removed
#[derive(clap::Args)]
pub struct Args {
    /// Number of the device
    #[arg(short, long, value_name = "N", conflicts_with = "all", required_unless_present = "all")]
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
    // Deleted by its daemon already, unless that was killed.
    ublk::delete(id)?;
    state.remove();
    if State::all().iter().any(|other| other.is_alive() && other.settings.shares_devices(&state.settings)) {
        return Ok(());
    }
    // I/O that a killed daemon left behind may hold the locks yet.
    Backings::wait_until_free(&state.settings.data, state.settings.meta.as_deref())
}

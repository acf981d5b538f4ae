//! `upgrade`: another program for devices in use, without unmounting.

mod daemon_before;
mod new_program;
mod take_over;

use super::OneDevice;
use crate::{
    daemon::state::State,
    failure::{Failure, Outcome},
    key::OptionalKeyArgs,
    output::{self, Output},
    ublk,
};
use new_program::NewProgram;
use std::path::PathBuf;
use take_over::take_over;

/// Have another program serve a device in use: requests wait a moment, nothing is unmounted
#[derive(clap::Args)]
#[command(mut_group("device", |group| group.arg("all")))]
pub struct Args {
    #[command(flatten)]
    device: Option<OneDevice>,
    /// All devices of ublk-integrity that run another program yet, one after the other
    #[arg(short, long)]
    all: bool,
    /// The program that is to serve [default: this one]
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,
    #[command(flatten)]
    key: OptionalKeyArgs,
}

/// Why a device is not served by the new program.
struct Undone {
    failure: Failure,
    /// Whether nobody serves it now.
    waits: bool,
}

impl From<Failure> for Undone {
    fn from(failure: Failure) -> Self {
        Self { failure, waits: false }
    }
}

pub fn run(args: &Args) -> Outcome {
    let new = NewProgram::of(args.binary.as_deref(), args.key.source()?)?;
    match &args.device {
        // --all is in the same group, so that there may be a device without a name.
        Some(device) if !args.all => {
            let done = take_over(&State::load(device.number()?)?, &new).map_err(|undone| undone.failure)?;
            say(done)
        }
        _ => all(&new),
    }
}

/// One after the other, each whatever becomes of the others. What is served by the program already
/// stays as it is.
fn all(new: &NewProgram) -> Outcome {
    let (mut upgraded, mut already, mut undone) = (0, 0, Vec::new());
    for state in State::all().iter().filter(|state| state.is_alive() || ublk::exists(state.id)) {
        if state.is_alive() && new.is_run_by(state.pid) {
            already += 1;
            continue;
        }
        match take_over(state, new) {
            Ok(line) => {
                upgraded += 1;
                say(line)?;
            }
            Err(one) => {
                output::tell(&one.failure);
                undone.push(one);
            }
        }
    }
    let summary = format!("upgraded {upgraded}, up to date {already}, not upgraded {}", undone.len());
    let mut out = Output::new();
    out.line(summary);
    out.print_with(worst(undone).map_or(Ok(()), |one| Err(one.failure.told())))
}

/// A device that nobody serves is worst, then the first that was refused.
fn worst(mut undone: Vec<Undone>) -> Option<Undone> {
    undone.sort_by_key(|one| !one.waits);
    undone.into_iter().next()
}

fn say(line: String) -> Outcome {
    let mut out = Output::new();
    out.line(line);
    out.print()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::Exit;

    #[test]
    fn a_device_that_nobody_serves_is_worst() {
        let one = |exit, waits| Undone { failure: Failure::new(exit, ""), waits };
        let exit_of = |undone| worst(undone).map(|one| one.failure.exit);
        assert_eq!(exit_of(vec![one(Exit::Busy, false), one(Exit::Device, true)]), Some(Exit::Device));
        assert_eq!(exit_of(vec![one(Exit::Busy, false), one(Exit::KeyOrPermission, false)]), Some(Exit::Busy));
        assert_eq!(exit_of(Vec::new()), None);
    }
}

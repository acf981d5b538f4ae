//! `upgrade`: another program for devices in use, without unmounting.

mod daemon_before;
mod in_reload;
mod new_program;
mod take_over;
mod unit;
mod wish;

use super::{OneDevice, one_or_all};
use crate::{
    daemon::state::State,
    failure::{Failure, Outcome},
    key::{KeySource, OptionalKeyArgs},
    output::{self, Output},
    ublk,
};
use new_program::NewProgram;
use serde::{Deserialize, Serialize};
use std::{
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};
pub(super) use take_over::in_words;
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
    /// What the unit of a device runs to be reloaded
    #[arg(long, hide = true, conflicts_with_all = ["all", "binary"])]
    reload: bool,
}

/// Between two looks whether a process has ended.
const PAUSE: Duration = Duration::from_millis(5);

/// Whether something has ended within so long.
fn within(limit: Duration, mut has_ended: impl FnMut() -> bool) -> bool {
    let begun = Instant::now();
    while !has_ended() {
        if begun.elapsed() >= limit {
            return false;
        }
        thread::sleep(PAUSE);
    }
    true
}

/// Why a device is not served by the new program.
struct Undone {
    failure: Failure,
    device: Device,
}

/// Who serves it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
enum Device {
    /// Nobody, until somebody does something about it.
    Waits,
    /// Nobody, until its daemon has closed the volume: then the new one.
    IsClosed,
    /// Whoever has served it, or another program than was wanted.
    Served,
}

impl From<Failure> for Undone {
    fn from(failure: Failure) -> Self {
        Self { failure, device: Device::Served }
    }
}

pub fn run(args: &Args) -> Outcome {
    let new = NewProgram::of(args.binary.as_deref(), args.key.source()?)?;
    match one_or_all(args.device.as_ref(), args.all)? {
        Some(number) if args.reload => in_reload::run(number, new),
        Some(number) => {
            let done = take_over(number, &new, false).map_err(|undone| undone.failure)?;
            done.map_or(Ok(()), |done| output::line(done.in_words()))
        }
        None => all(&new),
    }
}

/// Has a daemon of this program follow that of the device, and the volume be of `size` bytes from then
/// on. How long requests waited, unless it was served so already.
pub(super) fn serve_larger(id: u32, key: Option<KeySource>, size: u64) -> Outcome<Option<Duration>> {
    let new = NewProgram::of(None, key)?.growing(size);
    let done = take_over(id, &new, false).map_err(|undone| undone.failure)?;
    Ok(done.map(|done| done.waited))
}

/// One after the other, those that lie on others first. What is served by the program already stays
/// as it is, and so do all after one that nobody serves: what has befallen it may befall them.
fn all(new: &NewProgram) -> Outcome {
    let states = State::all_top_down().into_iter().filter(|state| state.is_alive() || ublk::exists(state.id));
    let devices: Vec<u32> = states.map(|state| state.id).collect();
    let tally = one_by_one(&devices, |id| Ok(take_over(id, new, true)?.map(|done| done.in_words())))?;
    let mut out = Output::new();
    out.line(tally.in_words());
    out.print_with(worst(tally.undone).map_or(Ok(()), |one| Err(one.failure.told())))
}

/// How it went with several devices.
#[derive(Default)]
struct Tally {
    upgraded: usize,
    already: usize,
    undone: Vec<Undone>,
    left_alone: usize,
}

impl Tally {
    fn in_words(&self) -> String {
        let mut words =
            format!("upgraded {}, up to date {}, not upgraded {}", self.upgraded, self.already, self.undone.len());
        if self.left_alone > 0 {
            words += &format!(", not tried {}", self.left_alone);
        }
        words
    }
}

fn one_by_one(devices: &[u32], take_over: impl Fn(u32) -> Result<Option<String>, Undone>) -> Outcome<Tally> {
    let mut tally = Tally::default();
    for (tried, id) in devices.iter().enumerate() {
        match take_over(*id) {
            Ok(None) => tally.already += 1,
            Ok(Some(line)) => {
                tally.upgraded += 1;
                output::line(line)?;
            }
            Err(one) => {
                output::tell(&one.failure);
                let is_served = one.device == Device::Served;
                tally.undone.push(one);
                if !is_served {
                    tally.left_alone = devices.len() - tried - 1;
                    break;
                }
            }
        }
    }
    Ok(tally)
}

/// A device that nobody serves is worst, then the first that was refused.
fn worst(undone: Vec<Undone>) -> Option<Undone> {
    undone.into_iter().min_by_key(|one| one.device)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::Exit;

    #[test]
    fn a_device_that_nobody_serves_is_worst() {
        let one = |exit, device| Undone { failure: Failure::new(exit, ""), device };
        let exit_of = |undone| worst(undone).map(|one| one.failure.exit);
        assert_eq!(
            exit_of(vec![one(Exit::Busy, Device::Served), one(Exit::Device, Device::Waits)]),
            Some(Exit::Device)
        );
        assert_eq!(
            exit_of(vec![one(Exit::Busy, Device::Served), one(Exit::KeyOrPermission, Device::Served)]),
            Some(Exit::Busy)
        );
        assert_eq!(exit_of(Vec::new()), None);
    }
    #[test]
    fn after_one_that_nobody_serves_no_other_is_tried() {
        let failed = |device| Err(Undone { failure: Failure::new(Exit::Device, "it failed"), device });
        let tally = |second: Device| {
            let done = one_by_one(&[4, 5, 6, 7], |id| match id {
                4 => Ok(None),
                5 => failed(second),
                _ => Ok(Some(format!("device {id}"))),
            });
            done.unwrap().in_words()
        };
        assert_eq!(tally(Device::Served), "upgraded 2, up to date 1, not upgraded 1");
        for second in [Device::Waits, Device::IsClosed] {
            assert_eq!(tally(second), "upgraded 0, up to date 1, not upgraded 1, not tried 2");
        }
    }
}

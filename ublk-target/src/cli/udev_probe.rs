//! `udev-probe`, not in the help: what a block device is, as udev's properties. The rules in
//! `dist/udev` call it.

use crate::{
    boot::probe::probe,
    daemon::state::State,
    failure::{Context, Exit, Failure, Outcome},
    output::Output,
    ublk::Whose,
};
use std::path::{Path, PathBuf};

/// Print udev's properties of a block device
#[derive(clap::Args)]
pub struct Args {
    /// The device, or a file
    #[arg(value_name = "DEVNODE")]
    device: PathBuf,
}

pub fn run(args: &Args) -> Outcome {
    let path = &args.device;
    let served = served(path);
    // One without a daemon would let us wait for it.
    let waits = served.as_ref().is_some_and(|state| !state.is_alive());
    let found = if waits { None } else { probe(path).doing(format_args!("can't look at {}", path.display()))? };
    let mut out = Output::new();
    if let Some(state) = &served {
        out.line(format_args!("UBLK_INTEGRITY_UUID={}", state.volume.uuid));
        state.settings.name.iter().for_each(|name| out.line(format_args!("UBLK_INTEGRITY_NAME={name}")));
    }
    if waits {
        // Nobody shall look at what is on it: a read would wait for its next daemon.
        out.line("UBLK_INTEGRITY_WAITS=1");
    }
    for (name, value) in found.iter().flat_map(|found| found.properties()) {
        out.line(format_args!("{name}={value}"));
    }
    if served.is_none() && found.is_none() {
        let message = format!("{} holds nothing of a ublk-integrity volume", path.display());
        return Err(Failure::new(Exit::Device, message));
    }
    out.print()
}

/// What is known of the device, if it is one that we serve.
fn served(path: &Path) -> Option<State> {
    let number = path.to_str()?.strip_prefix("/dev/ublkb")?;
    let state = number.parse().ok().and_then(|number| State::load(number).ok())?;
    // The number may be another program's by now: links would lead to what nobody has verified.
    (state.ended.is_none() && state.whose().is_ok_and(|whose| whose == Whose::Ours)).then_some(state)
}

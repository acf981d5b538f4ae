//! `claimed`, not in the help: whether somebody has claimed a block device, asked by a process of
//! its own: see `device/claim.rs`.

use crate::{
    device::claim,
    failure::{Exit, Failure, Outcome},
};
use std::{
    io::{self, Write},
    path::PathBuf,
};

#[derive(clap::Args)]
pub struct Args {
    /// The device
    #[arg(value_name = "DEVICE")]
    device: PathBuf,
}

/// Busy where somebody has. Says a byte just before it opens the device.
pub fn run(args: &Args) -> Outcome {
    let mut out = io::stdout();
    let _ = out.write_all(b"\n").and_then(|()| out.flush());
    match claim::is_claimed(&args.device) {
        true => Err(Failure::new(Exit::Busy, format_args!("{} is claimed", args.device.display()))),
        false => Ok(()),
    }
}

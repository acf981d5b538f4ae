//! `stop`, not in the help: the kernel's STOP_DEV and nothing else, in a process of its own.
//!
//! STOP_DEV waits in the kernel for all requests, and can't be interrupted. A daemon with a thread in
//! there can't be killed any more: the process holds its descriptors as long as the thread lives, the
//! kernel gives requests back when the descriptors are closed, and the thread waits for the requests.

use crate::{failure::Outcome, ublk};
use std::{
    io,
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
};

#[derive(clap::Args)]
pub struct Args {
    /// The device: its number, or /dev/ublkbN
    #[arg(short, long, value_name = "N", value_parser = super::device_number)]
    number: u32,
}

pub fn run(args: &Args) -> Outcome {
    ublk::stop(args.number)
}

/// Starts `stop` for a device.
pub fn start(number: u32) -> io::Result<Child> {
    run_ourselves(&["stop", "-n", &number.to_string()])
}

/// Starts what a signal to a daemon means: `del --force`.
pub fn start_forced_del(number: u32) -> io::Result<Child> {
    run_ourselves(&["del", "--force", "-n", &number.to_string()])
}

/// Runs this program once more, out of reach of the caller's terminal.
fn run_ourselves(args: &[&str]) -> io::Result<Child> {
    Command::new("/proc/self/exe")
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
}

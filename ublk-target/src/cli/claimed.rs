//! `claimed`, not in the help: whether somebody has claimed a block device, asked by a process of
//! its own.
//!
//! The kernel keeps whoever opens a device waiting while it looks for partitions there, and nobody
//! who waits for that can be ended. Its look waits for the device's daemon, which may be dead.

use crate::failure::{Exit, Failure, Outcome};
use std::{
    fs::OpenOptions,
    io,
    os::unix::{fs::OpenOptionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

#[derive(clap::Args)]
pub struct Args {
    /// The device
    #[arg(value_name = "DEVICE")]
    device: PathBuf,
}

/// Busy where somebody has.
pub fn run(args: &Args) -> Outcome {
    match is_claimed(&args.device) {
        true => Err(Failure::new(Exit::Busy, format_args!("{} is claimed", args.device.display()))),
        false => Ok(()),
    }
}

/// Mounted, swapped on, or under device-mapper or md: they all claim a device for themselves.
pub fn is_claimed(path: &Path) -> bool {
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(path);
    opened.is_err_and(|e| e.raw_os_error() == Some(libc::EBUSY))
}

/// Starts it for a device.
pub fn start(device: &Path) -> io::Result<Child> {
    Command::new("/proc/self/exe")
        .arg("claimed")
        .arg(device)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
}

//! `claimed`, not in the help: whether somebody has claimed a block device, asked by a process of
//! its own.
//!
//! The kernel keeps whoever opens a device waiting while it looks for partitions there, or while
//! sync(2) waits for what was written to it, and nobody who waits for that can be ended. Both wait
//! for the device's daemon, which may be dead.

use crate::failure::{Exit, Failure, Outcome};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::{
    fs::OpenOptions,
    io::{self, Write},
    os::{
        fd::AsFd,
        unix::{fs::OpenOptionsExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
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

/// That process, as the one who asks sees it.
pub struct Look(Child);

impl Look {
    /// Starts it for a device.
    pub fn start(device: &Path) -> io::Result<Self> {
        let mut look = Command::new("/proc/self/exe");
        look.arg("claimed").arg(device).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        look.process_group(0).spawn().map(Self)
    }

    /// Whether it is at the device, or past it.
    pub fn has_begun(&self) -> bool {
        let Some(said) = &self.0.stdout else { return true };
        poll(&mut [PollFd::new(said.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Its end, if it has come to that.
    pub fn end(&mut self) -> io::Result<Option<ExitStatus>> {
        self.0.try_wait()
    }

    /// Ends it as soon as the kernel lets go of it. It holds a claim on the device meanwhile: a
    /// mount may find that in its way.
    pub fn give_up(mut self) {
        let _ = self.0.kill();
        let _ = self.0.try_wait();
    }
}

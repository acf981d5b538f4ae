//! Whether somebody has claimed a block device.
//!
//! The kernel keeps whoever opens a device waiting while it looks for partitions there, or while
//! sync(2) waits for what was written to it, and nobody who waits for that can be ended. Both wait
//! for the device's daemon, which may be dead: then another process looks.

use crate::{
    failure::Exit,
    ourselves,
    wait::{LONGEST, Wait},
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::{
    ffi::OsStr,
    fs::OpenOptions,
    io,
    os::{fd::AsFd, unix::fs::OpenOptionsExt},
    path::Path,
    process::{Child, ExitStatus, Stdio},
    time::Duration,
};

/// How long the kernel may take to open a device. No promise hangs on it: what is held up is
/// stopped only where nothing can be lost.
const OPENS_WITHIN: Duration = Duration::from_secs(5);

/// Whether somebody has claimed a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Claim {
    /// Nobody has.
    Free,
    /// Somebody has.
    Taken,
    /// Nobody can open it: the kernel holds the lock for that and waits for the device itself. It
    /// looks for partitions, or sync(2) waits for what was written. Who uses the device nobody can
    /// tell then: one who is closing it has no descriptor any more, and writes what is left first.
    HeldUp,
}

/// Whether somebody has claimed a device whose daemon is dead, asked by another process: it may
/// never come back, and is left behind then.
pub fn claim(path: &Path) -> Claim {
    let Ok(mut look) = Look::start(path) else { return claim_here(path) };
    let mut begins = Wait::up_to(LONGEST, format_args!("a process that opens {}", path.display()));
    while !look.has_begun() && begins.pause() {}
    drop(begins);
    let mut opens = Wait::up_to(OPENS_WITHIN, format_args!("{} to be opened", path.display()));
    loop {
        match look.end() {
            Ok(None) if opens.pause() => {}
            Ok(None) => {
                look.give_up();
                return Claim::HeldUp;
            }
            Ok(Some(status)) if status.success() => return Claim::Free,
            Ok(Some(status)) if status.code() == Some(Exit::Busy as i32) => return Claim::Taken,
            _ => return claim_here(path),
        }
    }
}

/// The same, asked here, which waits for the device's daemon. Where there can be no such process
/// (its libraries may be out of reach in our mount namespace) it must do.
pub(super) fn claim_here(path: &Path) -> Claim {
    if is_claimed(path) { Claim::Taken } else { Claim::Free }
}

/// Mounted, swapped on, or under device-mapper or md: they all claim a device for themselves.
pub fn is_claimed(path: &Path) -> bool {
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(path);
    opened.is_err_and(|e| e.raw_os_error() == Some(libc::EBUSY))
}

/// The process that looks (`claimed`), as the one who asks sees it.
struct Look(Child);

impl Look {
    /// Starts it for a device.
    fn start(device: &Path) -> io::Result<Self> {
        ourselves::run([OsStr::new("claimed"), device.as_os_str()], Stdio::piped()).map(Self)
    }

    /// Whether it is at the device, or past it.
    fn has_begun(&self) -> bool {
        let Some(said) = &self.0.stdout else { return true };
        poll(&mut [PollFd::new(said.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Its end, if it has come to that.
    fn end(&mut self) -> io::Result<Option<ExitStatus>> {
        self.0.try_wait()
    }

    /// Ends it as soon as the kernel lets go of it. It holds a claim on the device meanwhile: a
    /// mount may find that in its way.
    fn give_up(mut self) {
        let _ = self.0.kill();
        let _ = self.0.try_wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_can_have_claimed_is_free() {
        assert_eq!(claim_here(Path::new("/dev/null")), Claim::Free);
    }
}

//! Files that are locked before they have a name: nobody ever finds one that is not.

use nix::{
    fcntl::{AT_FDCWD, AtFlags, Flock, FlockArg},
    unistd::linkat,
};
use std::{
    fs::{File, OpenOptions},
    io,
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::Path,
};

/// A new file that only its owner may open, in the file system of `folder`. It goes with the
/// process unless it gets a name.
pub fn locked(folder: &Path) -> io::Result<Flock<File>> {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(folder)?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| e.into())
}

/// Gives it a name that is free.
pub fn name(file: &File, path: &Path) -> io::Result<()> {
    let own = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(linkat(AT_FDCWD, own.as_str(), AT_FDCWD, path, AtFlags::AT_SYMLINK_FOLLOW)?)
}

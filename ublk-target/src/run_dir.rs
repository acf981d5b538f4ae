//! The folder of what must outlive a daemon.

use crate::{
    failure::{Context, Exit, Failure, Outcome},
    wait::{LONGEST, Wait, lock_within},
};
use nix::fcntl::{Flock, FlockArg};
use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
};

/// Where what must outlive a daemon is.
pub const FOLDER: &str = "/run/ublk-integrity";

/// Makes it.
pub fn make_folder() -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o755).create(FOLDER)
}

/// For short work that one process does at a time, in a file of that name. Whoever holds it waits
/// for no device.
pub fn lock_alone(name: &str) -> Outcome<Flock<File>> {
    let path = Path::new(FOLDER).join(name);
    let shown = path.display();
    let what = format!("can't lock {shown}");
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path).doing(&what)?;
    let mut wait = Wait::up_to(LONGEST, format_args!("{shown}, which another `add` or `recover` holds"));
    match lock_within(file, FlockArg::LockExclusiveNonblock, &mut wait) {
        Err(nix::Error::EWOULDBLOCK) => {
            let seconds = LONGEST.as_secs();
            let message = format!(
                "another `add` or `recover` has held {shown} for {seconds} s: `fuser {shown}` names it; try again when it has ended"
            );
            Err(Failure::new(Exit::Busy, message))
        }
        locked => locked.doing(&what),
    }
}

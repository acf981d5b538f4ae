//! Devices that were added, and whose daemon died before it had written down that they are ours.
//!
//! A device gets its number from the kernel, and its state file bears that number: between the two a daemon that is killed
//! would leave a device that nobody knows to be ours. So the mark that the device will bear is written down first, in a file
//! that the daemon holds locked. A file that nobody holds speaks of a dead daemon, and the device with that mark can go:
//! it was never started, so nobody can have it open.

use super::state::State;
use crate::{
    failure::{Context, Outcome},
    run_dir::{FOLDER, make_folder},
    ublk::{self, Mark},
    unnamed,
};
use nix::fcntl::{Flock, FlockArg};
use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

const PREFIX: &str = "added-";

/// Says that a device with a certain mark is being made, until its state file does.
pub(super) struct Birth {
    path: PathBuf,
    _lock: Flock<File>,
}

impl Birth {
    /// Writes it down, before the device is added.
    pub(super) fn announce(mark: Mark) -> Outcome<Self> {
        let what = format!("can't keep state in {FOLDER}");
        make_folder().doing(&what)?;
        announce_in(Path::new(FOLDER), mark).doing(what)
    }

    /// The state file knows the device now.
    pub(super) fn registered(self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Locked before it has a name: what others find unlocked is a dead daemon's.
fn announce_in(folder: &Path, mark: Mark) -> io::Result<Birth> {
    let (lock, path) = (unnamed::locked(folder)?, folder.join(format!("{PREFIX}{mark}")));
    unnamed::name(&lock, &path)?;
    Ok(Birth { path, _lock: lock })
}

/// Deletes what daemons have left that died between adding a device and writing down its state.
pub fn clear_stillborn() {
    let known: Vec<Mark> = State::all().iter().filter_map(|state| state.mark).collect();
    for (path, mark) in unheld(Path::new(FOLDER)) {
        // Where the state file knows the device, `list` shows it and `del` ends it.
        if !known.contains(&mark) && ublk::delete_marked(mark).is_err() {
            continue;
        }
        let _ = fs::remove_file(path);
    }
}

/// The files that nobody holds, and the marks that they name.
fn unheld(folder: &Path) -> Vec<(PathBuf, Mark)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let files = entries.filter_map(|entry| {
        let mark = entry.file_name().to_str()?.strip_prefix(PREFIX)?.parse().ok()?;
        Some((entry.path(), mark))
    });
    files.filter(|(path, _)| is_unheld(path)).collect()
}

fn is_unheld(path: &Path) -> bool {
    File::open(path).is_ok_and(|file| Flock::lock(file, FlockArg::LockSharedNonblock).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_dead_daemon_announced_is_cleared() {
        let folder = tempfile::tempdir().unwrap();
        let (dead, alive) = (Mark::new().unwrap(), Mark::new().unwrap());
        let left = announce_in(folder.path(), dead).unwrap();
        let path = left.path.clone();
        drop(left);
        let held = announce_in(folder.path(), alive).unwrap();
        fs::write(folder.path().join("0.json"), "{}").unwrap();
        assert_eq!(unheld(folder.path()), [(path, dead)]);
        held.registered();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}

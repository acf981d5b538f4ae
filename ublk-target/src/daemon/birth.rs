//! Devices that were added, and whose daemon died before it had written down that they are ours.
//!
//! A device gets its number from the kernel, and its state file bears that number: between the two
//! a daemon that is killed would leave a device that nobody knows to be ours. So the mark that the
//! device will bear is written down first, in a file that the daemon holds locked. A file that
//! nobody holds speaks of a dead daemon, and the device with that mark can go: it was never
//! started, so nobody can have it open.

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
    for Stillborn { path, mark, _lock } in stillborn(Path::new(FOLDER)) {
        // Asked under the lock: who has registered meanwhile is known. Such a device `list` shows,
        // and `del` ends it.
        let is_known = State::all().iter().any(|state| state.mark == Some(mark));
        if is_known || ublk::delete_marked(mark).is_ok() {
            let _ = fs::remove_file(path);
        }
    }
}

/// What a dead daemon has announced, held by us, so that nobody else clears it.
struct Stillborn {
    path: PathBuf,
    mark: Mark,
    _lock: Flock<File>,
}

fn stillborn(folder: &Path) -> impl Iterator<Item = Stillborn> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| {
        let (path, mark) = (entry.path(), entry.file_name().to_str()?.strip_prefix(PREFIX)?.parse().ok()?);
        let lock = Flock::lock(File::open(&path).ok()?, FlockArg::LockExclusiveNonblock).ok()?;
        // One that has registered has removed its file before it let go.
        path.exists().then_some(Stillborn { path, mark, _lock: lock })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        collections::HashSet,
        sync::{
            Mutex,
            atomic::{AtomicBool, Ordering},
        },
        time::{Duration, Instant},
    };

    #[test]
    fn only_what_a_dead_daemon_announced_is_cleared() {
        let folder = tempfile::tempdir().unwrap();
        let (dead, alive) = (Mark::new().unwrap(), Mark::new().unwrap());
        let left = announce_in(folder.path(), dead).unwrap();
        let path = left.path.clone();
        drop(left);
        let held = announce_in(folder.path(), alive).unwrap();
        fs::write(folder.path().join("0.json"), "{}").unwrap();
        let found: Vec<_> = stillborn(folder.path()).collect();
        assert_eq!(found.iter().map(|one| (&one.path, one.mark)).collect::<Vec<_>>(), [(&path, dead)]);
        assert_eq!(stillborn(folder.path()).count(), 0, "one at a time clears it");
        drop(found);
        held.registered();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_daemon_that_registers_meanwhile_is_no_dead_one() {
        let folder = tempfile::tempdir().unwrap();
        let published = Mutex::new(HashSet::new());
        let end = AtomicBool::new(false);
        std::thread::scope(|s| {
            s.spawn(|| {
                while !end.load(Ordering::SeqCst) {
                    let mark = Mark::new().unwrap();
                    let birth = announce_in(folder.path(), mark).unwrap();
                    published.lock().unwrap().insert(mark.to_string());
                    birth.registered();
                }
            });
            let begin = Instant::now();
            while begin.elapsed() < Duration::from_secs(1) {
                for one in stillborn(folder.path()) {
                    assert!(published.lock().unwrap().contains(&one.mark.to_string()));
                }
            }
            end.store(true, Ordering::SeqCst);
        });
    }
}

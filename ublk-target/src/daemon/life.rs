//! Whether a daemon lives: it holds a lock on a file for as long as it does, whatever becomes of
//! its pid.
//!
//! Only root can open that file. A lock needs no permission to write, so on one that all may read
//! any user could take it, and a dead daemon would look alive.

use crate::wait::{LONGEST, Wait, lock_within};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::signal::kill,
    unistd::Pid,
};
use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
    time::Duration,
};

/// A daemon that lived when this was made. Stays bound to it even when the file is removed.
pub struct Life(Held);

enum Held {
    /// Its lock.
    Lock(File),
    /// Where that is not for us to open, or of an older version: its process, which another may follow
    /// under this number.
    Process(Pid),
}

impl Life {
    /// That of the daemon `pid` whose own lock is at `path`; `None` if it is dead: nobody but who follows
    /// it takes that away.
    pub fn of(path: &Path, pid: u32) -> Option<Self> {
        if path.try_exists().is_ok_and(|there| !there) { None } else { Self::of_older(path, pid) }
    }

    /// The same of a version that has the number's lock at `path` at most.
    pub(super) fn of_older(path: &Path, pid: u32) -> Option<Self> {
        let life = Self(match File::open(path) {
            Ok(file) => Held::Lock(file),
            Err(_) => Held::Process(Pid::from_raw(i32::try_from(pid).ok().filter(|pid| *pid > 0)?)),
        });
        life.goes_on().then_some(life)
    }

    /// Whether the daemon still lives.
    pub fn goes_on(&self) -> bool {
        match &self.0 {
            // Where there is no descriptor for a look, it is not known to be dead.
            Held::Lock(file) => file.try_clone().map_or(true, |file| {
                matches!(Flock::lock(file, FlockArg::LockSharedNonblock), Err((_, Errno::EWOULDBLOCK)))
            }),
            Held::Process(pid) => kill(*pid, None) != Err(Errno::ESRCH),
        }
    }

    /// Waits until the daemon has ended; `false` if it still lives when the wait is over.
    pub fn wait_for_end(self, wait: &mut Wait) -> bool {
        while self.goes_on() {
            if !wait.pause() {
                return false;
            }
        }
        true
    }
}

/// The lock of a new daemon, on the file that its name leads to: a daemon that ends removes its
/// own, and whoever waited for that would otherwise hold one that nobody can find.
pub(super) fn lock_current(path: &Path) -> io::Result<Flock<File>> {
    // Held for moments by those who look, and until its end by a daemon whose device is gone already.
    let mut wait = Wait::up_to(LONGEST, format_args!("the lock on {}", path.display()));
    lock_current_within(path, FlockArg::LockExclusiveNonblock, &mut wait)
}

/// The same of either kind, as long as `wait` allows.
pub fn lock_current_within(path: &Path, how: FlockArg, wait: &mut Wait) -> io::Result<Flock<File>> {
    loop {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        let file = lock_within(file, how, wait)?;
        if is_current(&file, path) {
            return Ok(file);
        }
    }
}

/// The lock of a daemon that is dead, as long as nobody has followed it.
pub(super) fn lock_of_dead(path: &Path) -> Option<Flock<File>> {
    let file = OpenOptions::new().write(true).open(path).ok()?;
    let file = lock_within(file, FlockArg::LockExclusiveNonblock, &mut Wait::up_to(Duration::ZERO, "nothing")).ok()?;
    is_current(&file, path).then_some(file)
}

/// Whether an opened file is the one that its name leads to.
pub(super) fn is_current(file: &File, path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|there| file.metadata().is_ok_and(|ours| ours.ino() == there.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{os::unix::fs::PermissionsExt, process, time::Instant};

    #[test]
    fn a_lock_that_was_waited_for_is_on_the_file_that_others_find() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.lock");
        let old = lock_current(&path).unwrap();
        std::thread::scope(|s| {
            let waiting = s.spawn(|| lock_current(&path).unwrap());
            std::thread::sleep(Duration::from_millis(100));
            // The end of a daemon whose number is free already.
            fs::remove_file(&path).unwrap();
            drop(old);
            let new = waiting.join().unwrap();
            assert_eq!(fs::metadata(&path).unwrap().ino(), new.metadata().unwrap().ino());
        });
    }

    #[test]
    fn only_root_can_open_the_lock_and_nobody_waits_for_it_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.lock");
        let held = lock_current(&path).unwrap();
        assert_eq!(held.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let begun = Instant::now();
        let mut wait = Wait::up_to(Duration::from_millis(200), "it");
        let second = lock_current_within(&path, FlockArg::LockExclusiveNonblock, &mut wait);
        assert_eq!(second.unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert!(begun.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn a_daemon_lives_as_long_as_it_holds_its_lock() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.lock");
        let held = lock_current(&path).unwrap();
        let life = Life::of(&path, 1).expect("it lives");
        assert!(lock_of_dead(&path).is_none());
        assert!(!life.wait_for_end(&mut Wait::up_to(Duration::from_millis(50), "its end")));
        drop(held);
        assert!(Life::of(&path, 1).is_none(), "whatever process has that number");
        assert!(lock_of_dead(&path).is_some());
    }

    #[test]
    fn without_the_lock_it_goes_by_the_process() {
        // What can't be opened, for another reason than that it is not there.
        let nowhere = Path::new("/dev/null/0.lock");
        assert!(Life::of(nowhere, process::id()).is_some());
        assert!(Life::of(nowhere, i32::MAX as u32).is_none());
        assert!(Life::of(nowhere, 0).is_none() && Life::of(nowhere, u32::MAX).is_none(), "not our own group, not all");
        assert!(Life::of(Path::new("/nowhere/0.lock"), process::id()).is_none(), "whoever follows took it away");
    }
}

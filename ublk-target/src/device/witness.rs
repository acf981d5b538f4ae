//! Whether the kernel has let go of a file that was closed.

use nix::fcntl::{FcntlArg, fcntl};
use std::{
    fs::File,
    os::fd::AsRawFd,
    thread,
    time::{Duration, Instant},
};

/// How long a closed file is waited for: only operations that have ended may hold it.
const PATIENCE: Duration = Duration::from_secs(5);
/// What comes after the locks when a file goes: the claim on a block device, the hold on a mounted
/// file system.
const LAST_STEPS: Duration = Duration::from_millis(5);

/// Another opening of a file, and a byte that only the first has locked. The kernel takes such
/// locks away with the last hold on what was opened, whoever has it (F_OFD_SETLK,
/// fcntl_locking(2)).
pub(super) struct Witness {
    other: File,
    byte: i64,
}

impl Witness {
    /// For `file`, which is about to be closed. `None` where there are no such locks.
    pub(super) fn of(file: &File) -> Option<Self> {
        let other = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
        let mut random = [0; 8];
        getrandom::fill(&mut random).ok()?;
        // Beyond all content, and beyond what anybody else locks.
        let byte = i64::MAX / 2 + i64::from_ne_bytes(random).rem_euclid(i64::MAX / 4);
        let lock = one_byte(byte, libc::F_RDLCK);
        fcntl(file, FcntlArg::F_OFD_SETLK(&lock)).ok()?;
        Some(Self { other, byte })
    }

    /// Waits until the file has gone.
    pub(super) fn wait(self) {
        let deadline = Instant::now() + PATIENCE;
        let mut waited = false;
        while self.is_held() && Instant::now() < deadline {
            waited = true;
            thread::sleep(Duration::from_millis(1));
        }
        if waited {
            thread::sleep(LAST_STEPS);
        }
    }

    fn is_held(&self) -> bool {
        let mut lock = one_byte(self.byte, libc::F_WRLCK);
        let asked = fcntl(&self.other, FcntlArg::F_OFD_GETLK(&mut lock));
        asked.is_ok() && i32::from(lock.l_type) != libc::F_UNLCK
    }
}

fn one_byte(at: i64, kind: libc::c_int) -> libc::flock {
    libc::flock { l_type: kind as _, l_whence: libc::SEEK_SET as _, l_start: at, l_len: 1, l_pid: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_held_until_its_last_descriptor_is_closed() {
        let file = tempfile::tempfile().unwrap();
        let copy = file.try_clone().unwrap();
        let (witness, of_another) = (Witness::of(&file).unwrap(), Witness::of(&tempfile::tempfile().unwrap()).unwrap());
        assert!(witness.is_held() && !of_another.is_held());
        drop(file);
        assert!(witness.is_held());
        let closing = thread::spawn(move || {
            thread::sleep(Duration::from_millis(50));
            drop(copy);
        });
        witness.wait();
        assert!(closing.is_finished() || closing.join().is_ok());
    }
}

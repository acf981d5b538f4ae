//! Keeping the programs of this one apart that open a device, and out of udev's way.
//!
//! A regular file is locked with flock(2). On a block device that lock has a meaning already: udev
//! takes a shared one before it looks into a disk, and puts off what it has to do with the disk as long as somebody has it
//! alone (systemd's "Locking Block Device Access"). A daemon that held it so would have each event of
//! its disk retried for minutes. So one byte beyond all content is locked there instead
//! (F_OFD_SETLK), which udev does not look at. The flock is shared, as udev's is: that of an older
//! program is still seen, and such a program still does not get it alone.
//!
//! Both belong to what was opened, and so last until its last descriptor is closed, whoever has that.

use crate::{
    os,
    wait::{Wait, locked_within},
};
use nix::{
    fcntl::{FcntlArg, FlockArg, fcntl},
    sys::statfs::{self, FsType},
};
use std::fs::File;

/// "ublk-int", read as a number: nobody else locks it, nor does a witness.
const BYTE: i64 = 0x7562_6c6b_2d69_6e74;
/// The next one.
const KEY_AREA_BYTE: i64 = BYTE + 1;

/// `linux/magic.h`.
const CIFS: FsType = FsType(0xff53_4d42);
const SMB2: FsType = FsType(0xfe53_4d42);

/// Who else of ours may have a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Share {
    /// Others that read.
    Readers,
    /// Nobody.
    Nobody,
    /// Nobody, and udev is not to look: what it would find is half made.
    NotEvenUdev,
}

/// Locks a regular file, or waits for that as long as `wait` allows.
pub(super) fn file(file: &File, share: Share, wait: &mut Wait) -> nix::Result<()> {
    let how = match share {
        Share::Readers => FlockArg::LockSharedNonblock,
        Share::Nobody | Share::NotEvenUdev => FlockArg::LockExclusiveNonblock,
    };
    locked_within(|| os::flock(file, how), wait)
}

/// The same of a block device.
pub(super) fn device(file: &File, share: Share, wait: &mut Wait) -> nix::Result<()> {
    locked_within(|| lock_byte(file, share), wait)?;
    locked_within(
        || {
            // Alone at first: an older program that reads has it shared, and so has udev for a moment.
            if share != Share::Readers {
                os::flock(file, FlockArg::LockExclusiveNonblock)?;
            }
            match share {
                Share::NotEvenUdev => Ok(()),
                // An older program may come between the two: then both are to be had anew.
                Share::Readers | Share::Nobody => os::flock(file, FlockArg::LockSharedNonblock),
            }
        },
        wait,
    )
}

/// Whether a file lies where flock(2) locks all bytes for fcntl(2), too: NFS and SMB.
pub(super) fn is_of_network(file: &File) -> bool {
    let kind = statfs::fstatfs(file).map(|of| of.filesystem_type());
    kind.is_ok_and(|kind| [statfs::NFS_SUPER_MAGIC, statfs::SMB_SUPER_MAGIC, CIFS, SMB2].contains(&kind))
}

/// That to write key areas, which is nobody's who serves the volume: of a device or a file.
pub(super) fn key_area(file: &File, wait: &mut Wait) -> nix::Result<()> {
    locked_within(|| lock_at(file, KEY_AREA_BYTE, libc::F_WRLCK), wait)
}

fn lock_byte(file: &File, share: Share) -> nix::Result<()> {
    lock_at(file, BYTE, if share == Share::Readers { libc::F_RDLCK } else { libc::F_WRLCK })
}

fn lock_at(file: &File, byte: i64, kind: i32) -> nix::Result<()> {
    let lock = libc::flock { l_type: kind as _, l_whence: libc::SEEK_SET as _, l_start: byte, l_len: 1, l_pid: 0 };
    fcntl(file, FcntlArg::F_OFD_SETLK(&lock)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::errno::Errno;
    use std::{fs::OpenOptions, path::Path, time::Duration};

    const SHARED: FlockArg = FlockArg::LockSharedNonblock;
    const ALONE: FlockArg = FlockArg::LockExclusiveNonblock;

    /// The kernel locks a file and the node of a block device in the same way.
    fn opened(path: &Path) -> File {
        OpenOptions::new().read(true).write(true).open(path).unwrap()
    }

    fn now(path: &Path, share: Share) -> nix::Result<File> {
        let file = opened(path);
        device(&file, share, &mut Wait::up_to(Duration::ZERO, "nothing")).map(|()| file)
    }

    fn flock(path: &Path, how: FlockArg) -> nix::Result<File> {
        let file = opened(path);
        os::flock(&file, how).map(|()| file)
    }

    fn is_locked<T>(result: nix::Result<T>) -> bool {
        result.err() == Some(Errno::EWOULDBLOCK)
    }

    #[test]
    fn who_writes_a_device_is_alone_among_us_and_udev_looks_all_the_same() {
        let named = tempfile::NamedTempFile::new().unwrap();
        let path = named.path();
        let daemon = now(path, Share::Nobody).unwrap();
        for share in [Share::Readers, Share::Nobody, Share::NotEvenUdev] {
            assert!(is_locked(now(path, share)), "{share:?}");
        }
        assert!(flock(path, SHARED).is_ok(), "udev would put off what it has to do");
        assert!(is_locked(flock(path, ALONE)), "an older program could have it");
        // What the kernel does for it yet has descriptors, too.
        let in_flight = daemon.try_clone().unwrap();
        drop(daemon);
        assert!(is_locked(now(path, Share::Readers)));
        drop(in_flight);
        let reader = now(path, Share::Readers).unwrap();
        assert!(now(path, Share::Readers).is_ok() && flock(path, SHARED).is_ok());
        assert!(is_locked(now(path, Share::Nobody)) && is_locked(flock(path, ALONE)));
        drop(reader);
        let format = now(path, Share::NotEvenUdev).unwrap();
        assert!(is_locked(flock(path, SHARED)), "udev would look at what is half made");
        drop(format);
        assert!(now(path, Share::Nobody).is_ok());
    }

    #[test]
    fn a_program_that_knows_the_flock_alone_is_seen() {
        let named = tempfile::NamedTempFile::new().unwrap();
        let path = named.path();
        let daemon = flock(path, ALONE).unwrap();
        for share in [Share::Readers, Share::Nobody, Share::NotEvenUdev] {
            assert!(is_locked(now(path, share)), "{share:?}");
        }
        drop(daemon);
        let reader = flock(path, SHARED).unwrap();
        assert!(is_locked(now(path, Share::Nobody)) && now(path, Share::Readers).is_ok());
        // As udev has it: for a moment.
        let moment = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            drop(reader);
        });
        device(&opened(path), Share::Nobody, &mut Wait::up_to(Duration::from_secs(60), "udev")).unwrap();
        moment.join().unwrap();
    }

    #[test]
    fn a_regular_file_has_the_flock_as_ever() {
        let named = tempfile::NamedTempFile::new().unwrap();
        let path = named.path();
        let none = || Wait::up_to(Duration::ZERO, "nothing");
        let daemon = opened(path);
        file(&daemon, Share::Nobody, &mut none()).unwrap();
        assert!(is_locked(flock(path, SHARED)) && is_locked(file(&opened(path), Share::Readers, &mut none())));
    }
}

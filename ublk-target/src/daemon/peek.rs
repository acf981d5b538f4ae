//! A look at the volume that is to be served, before anything is decided or locked: how much memory
//! it takes hangs on its sizes.
//!
//! A disk may never answer, and who reads from it then can't be ended: so another process does, and
//! is left behind.

use super::launch::null_stdio;
use crate::{
    failure::{Context, Exit, Failure, Outcome},
    os,
    wait::{LONGEST, Wait},
};
use nix::{
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::wait::waitpid,
    unistd::{ForkResult, pipe2},
};
use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::{fd::AsFd, unix::fs::OpenOptionsExt},
    path::Path,
    process,
};
use ublk_integrity::create::VolumeInfo;

/// Bytes that say what a volume is.
const SUPERBLOCK: usize = 512;

/// The sizes of the volume that the device with its metadata seems to hold; what is no volume is
/// refused later. By a process that has one thread. Fails where the device does not answer.
pub fn peek(meta: &Path) -> Outcome<Option<VolumeInfo>> {
    let what = format!("can't look at {}", meta.display());
    let (read, write) = pipe2(OFlag::O_CLOEXEC).doing(&what)?;
    match os::fork_single_threaded().doing(&what)? {
        ForkResult::Child => {
            // It may outlive us: whoever reads what we print must not wait for it.
            let _ = null_stdio();
            let _ = superblock(meta).and_then(|bytes| File::from(write).write_all(&bytes));
            process::exit(0)
        }
        ForkResult::Parent { child } => {
            drop(write);
            let shown = meta.display();
            let mut wait = Wait::up_to(LONGEST, format_args!("{shown} to answer a read"));
            let bytes = answer(File::from(read), &mut wait).doing(&what)?.ok_or_else(|| {
                let seconds = LONGEST.as_secs();
                let message = format!(
                    "{shown} has not answered a read within {seconds} s, the device seems to be away: nothing was done, try again when it is back"
                );
                Failure::new(Exit::Device, message)
            })?;
            let _ = waitpid(child, None);
            Ok(bytes.try_into().ok().and_then(|bytes: [u8; SUPERBLOCK]| VolumeInfo::peek(&bytes)))
        }
    }
}

/// The same of a device that answers, by a process with any threads; nothing where it can't be read.
pub fn look(meta: &Path) -> Option<VolumeInfo> {
    VolumeInfo::peek(&superblock(meta).ok()?)
}

/// All that comes through the pipe; `None` where its other end is still open when the wait is over.
fn answer(mut pipe: File, wait: &mut Wait) -> io::Result<Option<Vec<u8>>> {
    while poll(&mut [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO)? == 0 {
        if !wait.pause() {
            return Ok(None);
        }
    }
    let mut bytes = Vec::new();
    pipe.read_to_end(&mut bytes)?;
    Ok(Some(bytes))
}

fn superblock(meta: &Path) -> io::Result<[u8; SUPERBLOCK]> {
    let mut bytes = [0; SUPERBLOCK];
    // Whatever the path leads to.
    OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(meta)?.read_exact(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn who_does_not_answer_is_not_waited_for_without_end() {
        let (read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let mut wait = Wait::up_to(Duration::from_millis(60), "it");
        assert!(answer(File::from(read), &mut wait).unwrap().is_none());
        drop(write);
        let (read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
        File::from(write).write_all(b"abc").unwrap();
        assert_eq!(answer(File::from(read), &mut wait).unwrap().as_deref(), Some(b"abc".as_slice()));
    }
}

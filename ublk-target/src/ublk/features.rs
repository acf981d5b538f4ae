//! What the kernel's driver can do.

use super::command::{self, CONTROL};
use crate::os;
use libublk::sys;
use nix::{
    sys::wait::{WaitStatus, waitpid},
    unistd::{AccessFlags, ForkResult, access},
};
use std::{path::Path, process};

/// Whether who asks here is told: where the driver's file can't be opened, it seems to have no feature at all.
pub fn may_be_asked() -> bool {
    access(CONTROL, AccessFlags::R_OK | AccessFlags::W_OK).is_ok()
}

/// Whether several threads can share a queue's requests (UBLK_F_PER_IO_DAEMON, Linux 6.16).
pub fn shares_queues() -> bool {
    has_feature(sys::UBLK_F_PER_IO_DAEMON.into())
}

/// Whether a device in use can get another size (UBLK_F_UPDATE_SIZE, Linux 6.16).
pub fn resizes_in_use() -> bool {
    has_feature(sys::UBLK_F_UPDATE_SIZE.into())
}

fn has_feature(feature: u64) -> bool {
    if !Path::new(CONTROL).exists() {
        return false;
    }
    // Asked by another process: the kernel may have a thread at work for a ring of ours even when
    // that is gone, and with it nobody forks. (Nor will a thread do: it may still be there a little
    // after it was joined.)
    match os::fork_single_threaded() {
        Ok(ForkResult::Child) => {
            let has = command::features() & feature != 0;
            process::exit(i32::from(!has))
        }
        Ok(ForkResult::Parent { child }) => matches!(waitpid(child, None), Ok(WaitStatus::Exited(_, 0))),
        Err(_) => false,
    }
}

//! Who uses a block device: mounts and other exclusive holders, and plain open descriptors.

use std::{
    fs::{self, OpenOptions},
    io,
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    path::Path,
    process,
};

/// Whether somebody has the block device at `path` mounted or open.
///
/// Descriptors in processes that we may not look into stay unseen; root sees all.
pub fn has_users(path: &Path) -> bool {
    held_exclusively(path) || path.metadata().is_ok_and(|device| open_somewhere(device.rdev()))
}

/// Mounted, swapped on, or under device-mapper, a loop device or md: they all claim a device for themselves.
fn held_exclusively(path: &Path) -> bool {
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(path);
    opened.is_err_and(|e| e.raw_os_error() == Some(libc::EBUSY))
}

/// A plain open does not stand in the way of an exclusive one: look through all processes' descriptors.
fn open_somewhere(device: u64) -> bool {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| *pid != process::id()).any(|pid| process_has_open(pid, device).unwrap_or(false))
}

fn process_has_open(pid: u32, device: u64) -> io::Result<bool> {
    for descriptor in fs::read_dir(format!("/proc/{pid}/fd"))? {
        // Follows the link to what is open, whatever its name and namespace.
        if let Ok(meta) = fs::metadata(descriptor?.path()) {
            if meta.file_type().is_block_device() && meta.rdev() == device {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

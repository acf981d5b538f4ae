//! Making the process one that its own device can rely on. Each step that fails is told with its
//! consequence; none stops the daemon, for a device without it still beats no device.

use crate::os;
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use std::{fmt::Display, fs, path::Path};

/// Before anything is waited for: the key is in memory, and what was locked before we were forked
/// off is not ours.
pub fn lock_memory(mut warn: impl FnMut(String)) {
    check(
        &mut warn,
        "mlockall",
        "parts of this daemon may be swapped out, keys among them, and with swap on its own device never come back",
        os::lock_memory(true),
    );
}

fn check<E: Display>(warn: &mut impl FnMut(String), what: &str, consequence: &str, result: Result<(), E>) {
    if let Err(e) = result {
        warn(format!("{what} failed ({e}): {consequence}"));
    }
}

/// Before any thread is started, for threads inherit it.
pub fn before_threads(mut warn: impl FnMut(String)) {
    check(
        &mut warn,
        "PR_SET_IO_FLUSHER",
        "when memory is short, this daemon may wait for writes to its own device, for ever",
        os::set_io_flusher(),
    );
    check(
        &mut warn,
        "setting oom_score_adj",
        "when memory runs out, the kernel may choose to kill this daemon",
        fs::write("/proc/self/oom_score_adj", "-1000"),
    );
    check(
        &mut warn,
        "leaving the mount namespace",
        "a file system on the device can't be unmounted for good while this daemon lives",
        leave_mounts(),
    );
}

/// A mount namespace of our own that holds no block device but the root's: what is mounted on our
/// device would otherwise be held by our own namespace, and flushed to us when we exit. Later
/// mounts come in, and go, by propagation.
///
/// After the devices and the key have been opened: their paths may lead through mounts that vanish
/// here.
fn leave_mounts() -> Result<(), String> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(|e| e.to_string())?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none).map_err(|e| e.to_string())?;
    let mounts = fs::read_to_string("/proc/self/mounts").map_err(|e| e.to_string())?;
    let mapped = fs::read_to_string("/proc/self/maps").map_err(|e| e.to_string())?;
    let mut points: Vec<String> = mounts.lines().filter_map(block_mount_point).collect();
    // What this program was loaded from stays in reach: a stop runs it once more.
    points.retain(|point| !holds_a_mapped_file(point, &mapped));
    // The innermost first.
    points.reverse();
    for point in points {
        // Gone already, with one that it lay on.
        let _ = umount2(point.as_str(), MntFlags::MNT_DETACH);
    }
    Ok(())
}

/// The mount point in a line of /proc/self/mounts, if a block device other than the root's is
/// mounted there.
fn block_mount_point(line: &str) -> Option<String> {
    let mut fields = line.split(' ');
    let (source, point) = (fields.next()?, fields.next()?);
    (source.starts_with("/dev/") && point != "/").then(|| unescape(point))
}

/// Whether a file that is mapped into this process (lines of /proc/self/maps) lies
/// below a mount point.
fn holds_a_mapped_file(point: &str, maps: &str) -> bool {
    let files = maps.lines().filter_map(|line| line.find('/').map(|at| &line[at..]));
    files.into_iter().any(|file| Path::new(file).starts_with(point))
}

/// Undoes the octal escapes of blanks, tabs, newlines and backslashes.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_mounts_of_block_devices_go() {
        assert_eq!(block_mount_point("/dev/sda1 /mnt/a\\040b ext4 rw 0 0"), Some("/mnt/a b".into()));
        assert_eq!(block_mount_point("/dev/sda1 / ext4 rw 0 0"), None);
        assert_eq!(block_mount_point("proc /proc proc rw 0 0"), None);
    }

    #[test]
    fn the_mount_that_the_program_was_loaded_from_stays() {
        let maps = "55d0-55d1 r-xp 00002000 fe:00 1234    /usr/bin/ublk-integrity\n7f00-7f01 rw-p 00000000 00:00 0\n";
        assert!(holds_a_mapped_file("/usr", maps));
        assert!(!holds_a_mapped_file("/us", maps) && !holds_a_mapped_file("/mnt", maps));
    }
}

//! Who uses a block device: mounts and other exclusive holders, and plain open descriptors.

use std::{
    fs::{self, Metadata, OpenOptions},
    io,
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    path::Path,
    process, thread,
    time::{Duration, Instant},
};

/// How long a user may be a passing one: udev and others look into devices for moments.
const PASSING: Duration = Duration::from_secs(1);

/// Whether somebody has the block device at `path` mounted or open.
///
/// Descriptors in processes that we may not look into stay unseen; root sees all.
pub fn has_users(path: &Path) -> bool {
    stays(PASSING, || held_exclusively(path) || path.metadata().is_ok_and(|device| open_somewhere(device.rdev())))
}

/// Whether it is so for as long as `time`.
fn stays(time: Duration, mut is_so: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + time;
    while is_so() {
        if Instant::now() >= deadline {
            return true;
        }
        thread::sleep(Duration::from_millis(50));
    }
    false
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
    let is_it = |open: &Metadata| open.file_type().is_block_device() && open.rdev() == device;
    pids.filter(|pid| *pid != process::id()).any(|pid| process_has_open(pid, is_it).unwrap_or(false))
}

fn process_has_open(pid: u32, is_it: impl Fn(&Metadata) -> bool) -> io::Result<bool> {
    for descriptor in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let link = descriptor?.path();
        // The name first: to look at a file behind a dead network would hang. Other namespaces have their devices in /dev too.
        let may_be = fs::read_link(&link).is_ok_and(|name| name.starts_with("/dev"));
        // Follows the link to what is open, whatever lies under that name here.
        if may_be && fs::metadata(link).is_ok_and(|open| is_it(&open)) {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_devices_are_found_and_files_not_looked_at() {
        let null = fs::metadata("/dev/null").unwrap().rdev();
        let ours = |is_it: &dyn Fn(&Metadata) -> bool| process_has_open(process::id(), is_it).unwrap();
        let device = fs::File::open("/dev/null").unwrap();
        let file = tempfile::tempfile_in(std::env::temp_dir()).unwrap();
        assert!(ours(&|open| open.file_type().is_char_device() && open.rdev() == null));
        let ino = file.metadata().unwrap().ino();
        assert!(!ours(&|open| open.is_file() && open.ino() == ino));
        drop((device, file));
    }

    #[test]
    fn a_passing_user_is_none() {
        let mut looks = 0;
        let passing = stays(Duration::from_secs(60), || {
            looks += 1;
            looks < 4
        });
        assert!(!passing && looks == 4);
        assert!(stays(Duration::from_millis(1), || true));
    }
}

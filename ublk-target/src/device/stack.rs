//! What lies under a path: a device must not lie on itself, not even by way of others, for its
//! requests would wait for themselves.

use nix::{
    errno::Errno,
    unistd::{AccessFlags, access},
};
use std::{
    collections::HashSet,
    ffi::OsString,
    fs::{self, OpenOptions},
    os::{
        fd::AsRawFd,
        unix::{
            ffi::OsStringExt,
            fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
        },
    },
    path::{Path, PathBuf},
};

/// Whether `path` leads to the ublk device `number` in the end: as a file on a file system on it,
/// through loop devices, partitions and device-mapper, or through other ublk devices, of which
/// `below_ublk` names what they lie on.
pub fn lies_on_ublk(path: &Path, number: u32, below_ublk: impl Fn(u32) -> Vec<PathBuf>) -> bool {
    all_below(path, below_ublk).iter().any(|device| ublk_number(device) == Some(number))
}

/// Whether both lie on one disk in the end, or on one file system of which nobody knows the disk.
pub fn share_a_disk(one: &Path, other: &Path, below_ublk: impl Fn(u32) -> Vec<PathBuf>) -> bool {
    let (ours, theirs) = (all_below(one, &below_ublk), all_below(other, &below_ublk));
    if !ours.is_empty() || !theirs.is_empty() {
        return !ours.is_disjoint(&theirs);
    }
    let number = |path: &Path| path.metadata().ok().map(|meta| meta.dev());
    number(one).is_some_and(|number_of_one| number(other) == Some(number_of_one))
}

/// The sysfs folders of all that a path lies on.
fn all_below(path: &Path, below_ublk: impl Fn(u32) -> Vec<PathBuf>) -> HashSet<PathBuf> {
    let mut seen = HashSet::new();
    let mut below = vec![path.to_owned()];
    while let Some(path) = below.pop() {
        for device in devices_of(&path) {
            if seen.insert(device.clone()) {
                below.extend(ublk_number(&device).into_iter().flat_map(&below_ublk));
                below.extend(directly_below(&device));
            }
        }
    }
    seen
}

/// The sysfs folders of the block devices that `path` is or lies on: of Btrfs several, and of a union those of what is
/// written to.
fn devices_of(path: &Path) -> Vec<PathBuf> {
    if leads_to_server(path) {
        return Vec::new();
    }
    let Some(device) = device_of(path) else {
        let upper = mount_of(path).and_then(|mount| mount.option("upperdir"));
        // One that lies in itself is nothing that can be mounted.
        return upper.iter().flat_map(|upper| devices_of(upper)).collect();
    };
    let members = btrfs_members(&device);
    if members.is_empty() { vec![device] } else { members }
}

/// All devices of the Btrfs file system that this one is of.
fn btrfs_members(device: &Path) -> Vec<PathBuf> {
    let Some(name) = device.file_name() else { return Vec::new() };
    let systems = fs::read_dir("/sys/fs/btrfs").into_iter().flatten().flatten();
    let ours = systems.map(|entry| entry.path().join("devices")).find(|devices| devices.join(name).exists());
    let members = ours.into_iter().flat_map(fs::read_dir).flatten().flatten();
    members.filter_map(|member| fs::canonicalize(member.path()).ok()).collect()
}

/// The sysfs folder of the block device that `path` is or lies on.
fn device_of(path: &Path) -> Option<PathBuf> {
    let meta = path.metadata().ok()?;
    let id = if meta.file_type().is_block_device() { meta.rdev() } else { meta.dev() };
    // Btrfs and others number their file systems apart from their devices; the mount
    // table knows the device.
    sysfs_folder(id).or_else(|| sysfs_folder(mount_of(path)?.source.metadata().ok()?.rdev()))
}

/// The sysfs folder of the block device of this number, if there is one.
pub fn sysfs_folder(number: u64) -> Option<PathBuf> {
    fs::canonicalize(format!("/sys/dev/block/{}:{}", libc::major(number), libc::minor(number))).ok()
}

/// The sysfs folder of the disk that this one's device is a partition of, if it is one.
pub(super) fn disk_of_partition(folder: &Path) -> Option<&Path> {
    folder.parent().filter(|_| folder.join("partition").exists())
}

/// Whether the kernel refuses writes to this file or block device, whoever asks: a disk made
/// read-only (`blockdev --setro`), a file system mounted so.
pub fn is_read_only(path: &Path) -> bool {
    let Ok(metadata) = path.metadata() else { return false };
    if metadata.file_type().is_block_device() {
        let flag = sysfs_folder(metadata.rdev()).map(|folder| fs::read_to_string(folder.join("ro")));
        return flag.is_some_and(|flag| flag.is_ok_and(|ro| ro.trim() == "1"));
    }
    access(path, AccessFlags::W_OK) == Err(Errno::EROFS)
}

/// A line of the mount table.
#[derive(PartialEq, Eq, Debug)]
struct Mount {
    source: PathBuf,
    options: String,
}

impl Mount {
    /// The path that an option names. Where it has a comma or blank in it the table writes that otherwise, and nothing is found.
    fn option(&self, name: &str) -> Option<PathBuf> {
        self.options.split(',').find_map(|option| Some(option.strip_prefix(name)?.strip_prefix('=')?.into()))
    }
}

/// What is mounted where this file lies. By the mount's own id: a file of Btrfs has the device number of its subvolume, which no
/// mount has.
fn mount_of(path: &Path) -> Option<Mount> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path).ok()?;
    let about = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).ok()?;
    let id = about.lines().find_map(|line| line.strip_prefix("mnt_id:"))?.trim();
    let table = fs::read_to_string("/proc/self/mountinfo").ok()?;
    mount_in(&table, id)
}

/// In a mountinfo table: the first field is the id; after the lone "-" come the type, the source, and the options of the file
/// system.
fn mount_in(table: &str, id: &str) -> Option<Mount> {
    let line = table.lines().find(|line| line.split(' ').next() == Some(id))?;
    let (_, after) = line.split_once(" - ")?;
    let mut words = after.split(' ').skip(1);
    Some(Mount { source: words.next()?.into(), options: words.next().unwrap_or_default().into() })
}

/// File systems that somebody else serves: what lies there lies on no device of this machine, and where that one is gone a look at it
/// may last for ever.
const OF_SERVERS: [&str; 14] = [
    "9p", "afs", "autofs", "beegfs", "ceph", "cifs", "coda", "fuse", "lustre", "nfs", "nfs4", "orangefs", "smb3",
    "virtiofs",
];

/// Links that are followed, as the kernel does.
const LINKS: usize = 40;

/// Whether the way to `path` leads into such a file system, or there is no knowing. The mount table says so: nothing there is asked.
pub fn leads_to_server(path: &Path) -> bool {
    // A name that is not UTF-8 spoils its own line alone.
    let table = fs::read("/proc/self/mountinfo").unwrap_or_default();
    let whole = std::path::absolute(path);
    leads_to_server_in(&String::from_utf8_lossy(&table), whole.as_deref().unwrap_or(path))
}

fn leads_to_server_in(table: &str, path: &Path) -> bool {
    let mounts: Vec<(PathBuf, bool)> = table.lines().filter_map(mount_point).collect();
    // Of those that are mounted over each other the last counts.
    let deepest = |at: &Path| {
        let over = mounts.iter().filter(|(point, _)| at.starts_with(point));
        over.max_by_key(|(point, _)| point.components().count())
    };
    let is_served = |at: &Path| deepest(at).is_some_and(|(_, is_served)| *is_served);
    let steps = |path: &Path| path.iter().rev().map(ToOwned::to_owned).collect::<Vec<_>>();
    let (mut at, mut left, mut links) = (PathBuf::from("/"), steps(path), 0);
    while let Some(step) = left.pop() {
        if step == ".." {
            at.pop();
            continue;
        }
        let there = at.join(step);
        if there == Path::new("/") {
            at = there;
            continue;
        }
        if is_served(&there) {
            // What is mounted further down the way need not be the server's, and nobody in between is asked.
            let whole = left.iter().rev().fold(there.clone(), |way, step| way.join(step));
            match deepest(&whole) {
                Some((point, false)) if point.starts_with(&there) => {
                    left.truncate(left.len() - (point.components().count() - there.components().count()));
                    at.clone_from(point);
                    continue;
                }
                _ => return true,
            }
        }
        let target = fs::read_link(&there);
        match target {
            Ok(_) if links == LINKS => return false,
            Ok(target) => {
                links += 1;
                left.extend(steps(&target));
            }
            Err(_) => at = there,
        }
    }
    is_served(&at)
}

/// Where a line of a mountinfo table says that something is mounted, and whether a server has it.
fn mount_point(line: &str) -> Option<(PathBuf, bool)> {
    let (before, after) = line.split_once(" - ")?;
    let (mut kind, source) = after.split_once(' ')?;
    kind = kind.split('.').next()?;
    let is_served = OF_SERVERS.contains(&kind) && !source.starts_with("/dev/");
    Some((unescaped(before.split(' ').nth(4)?), is_served))
}

/// Blanks and others are written as a backslash and three octal digits.
fn unescaped(text: &str) -> PathBuf {
    let mut parts = text.split('\\');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let code = part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.extend(code);
        bytes.extend_from_slice(part.get(3..).unwrap_or_default().as_bytes());
    }
    OsString::from_vec(bytes).into()
}

/// The sector size of the disk that `path` is, lies on, or is a partition of, in bytes.
pub fn sector_below(path: &Path) -> Option<u32> {
    let device = device_of(path)?;
    let disk = disk_of_partition(&device).unwrap_or(&device);
    fs::read_to_string(disk.join("queue/logical_block_size")).ok()?.trim().parse().ok()
}

fn ublk_number(device: &Path) -> Option<u32> {
    let name = |folder: &Path| folder.file_name()?.to_str()?.strip_prefix("ublkb")?.parse().ok();
    // A partition's folder lies in its disk's.
    name(device).or_else(|| name(device.parent()?))
}

/// Members of device-mapper and md devices, a partition's disk, a loop device's file.
fn directly_below(device: &Path) -> Vec<PathBuf> {
    let node = |name: std::ffi::OsString| Path::new("/dev").join(name);
    let slaves = fs::read_dir(device.join("slaves")).into_iter().flatten().flatten();
    let mut below: Vec<PathBuf> = slaves.map(|entry| node(entry.file_name())).collect();
    below.extend(disk_of_partition(device).and_then(Path::file_name).map(|name| node(name.to_owned())));
    let file = fs::read_to_string(device.join("loop/backing_file"));
    below.extend(file.ok().map(|path| PathBuf::from(path.trim_end())));
    below
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_one_folder_share_a_disk() {
        let folder = tempfile::tempdir().unwrap();
        let [one, other] = ["one", "other"].map(|name| folder.path().join(name));
        std::fs::write(&one, "").unwrap();
        std::fs::write(&other, "").unwrap();
        let shares = |other: &Path| share_a_disk(&one, other, |_| Vec::new());
        assert!(shares(&other) && !shares(Path::new("/proc/version")));
    }

    #[test]
    fn the_mount_table_names_source_and_options() {
        let table = "25 1 0:22 / / rw shared:1 - overlay o rw,lowerdir=/a:/b,upperdir=/disk/up,workdir=/w\n30 25 0:31 /sub /mnt rw shared:2 master:1 - btrfs /dev/sdb rw\n";
        assert_eq!(mount_in(table, "30").unwrap().source, Path::new("/dev/sdb"));
        let union = mount_in(table, "25").unwrap();
        assert_eq!(union.option("upperdir"), Some("/disk/up".into()));
        assert_eq!((union.option("upper"), union.option("index")), (None, None));
        assert_eq!(mount_in(table, "3"), None);
        assert!(mount_of(Path::new("/proc/version")).is_some_and(|mount| mount.source.as_os_str() == "proc"));
    }

    /// A server that is gone holds whoever asks it, so who asks only where a path leads must not.
    #[test]
    fn the_mount_table_says_what_a_server_has() {
        let folder = tempfile::tempdir().unwrap();
        let (root, link) =
            (folder.path(), |name: &str, to: &str| std::os::unix::fs::symlink(to, folder.path().join(name)));
        let mounts = |kind: &str, source: &str| {
            format!(
                "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n2 1 0:9 / {}/a\\040b rw shared:7 - {kind} {source} rw\n",
                root.display()
            )
        };
        std::fs::create_dir(root.join("here")).unwrap();
        link("straight", root.join("a b/x").to_str().unwrap()).unwrap();
        link("around", "here/../a b").unwrap();
        link("itself", "itself").unwrap();
        let served = |kind: &str, path: &str| leads_to_server_in(&mounts(kind, "host:/export"), &root.join(path));
        for path in ["a b", "a b/c/d", "straight", "around/anchor", "here/../a b/c", "a b/../here"] {
            assert!(served("nfs4", path) && served("fuse.sshfs", path) && !served("xfs", path), "{path}");
        }
        for path in ["a", "a bc", "here", "here/none/at/all", "itself"] {
            assert!(!served("nfs4", path), "{path}");
        }
        assert!(!leads_to_server_in(&mounts("fuse", "/dev/sdb1"), &root.join("a b/c")), "it has a device");
        // What is mounted over it counts.
        let over = mounts("nfs", "host:/") + &mounts("ext4", "/dev/sdc");
        assert!(!leads_to_server_in(&over, &root.join("a b/c")));
        assert!(!leads_to_server(Path::new("/proc/version")));
    }

    #[test]
    fn what_is_mounted_below_a_server_is_not_the_servers() {
        let table = "1 0 0:9 / / rw - nfs4 host:/ rw\n2 1 0:5 / /dev rw - devtmpfs dev rw\n3 1 8:1 / /none/disk rw - ext4 /dev/sda1 rw\n\
            4 1 0:7 / /none/net rw - autofs auto rw\n5 4 8:2 / /none/net/local/a rw - xfs /dev/sda2 rw\n6 3 0:9 / /none/disk/far rw - nfs host:/ rw\n";
        for path in ["/dev/none", "/none/disk/a", "/none/net/local/a/b"] {
            assert!(!leads_to_server_in(table, Path::new(path)), "{path}");
        }
        for path in ["/", "/none", "/none/net/other", "/none/net/local/ab", "/none/disk/far/away"] {
            assert!(leads_to_server_in(table, Path::new(path)), "{path}");
        }
    }

    #[test]
    fn partitions_belong_to_their_disk() {
        assert_eq!(ublk_number(Path::new("/sys/devices/virtual/block/ublkb3")), Some(3));
        assert_eq!(ublk_number(Path::new("/sys/devices/virtual/block/ublkb3/ublkb3p1")), Some(3));
        assert_eq!(ublk_number(Path::new("/sys/devices/pci0/block/sda/sda1")), None);
    }
}

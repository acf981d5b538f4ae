//! Who uses a block device: what the kernel has put on it, and processes that have it open.

use super::{
    claim::{Claim, claim_here},
    stack::sysfs_folder,
};
use std::{
    collections::HashSet,
    fmt,
    fs::{self, Metadata},
    io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
    process,
};

/// Users that a line names.
const NAMED: usize = 4;

/// One who uses a device, or a partition of it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum User {
    /// A file system, here.
    Mount(String),
    /// It is swapped to.
    Swap,
    /// A block device that lies on it: of device-mapper, md, bcache, or a loop device.
    Device(String),
    /// A target of the kernel's (nvmet, LIO) serves it.
    Target(String),
    /// A process has it open.
    Process(u32, String),
    /// Somebody has claimed it whom we can't see: mounted in another mount namespace, for one.
    Claim,
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mount(point) => write!(f, "mounted on {point}"),
            Self::Swap => f.write_str("used as swap"),
            Self::Device(name) => write!(f, "below {name}"),
            Self::Target(folder) => write!(f, "served by {folder}"),
            Self::Process(pid, name) => write!(f, "open in process {pid} ({name})"),
            Self::Claim => f.write_str("mounted or claimed out of our sight"),
        }
    }
}

/// Users in words, for a line.
pub fn in_words(users: &[User]) -> String {
    let named: Vec<_> = users.iter().take(NAMED).map(User::to_string).collect();
    match users.len().saturating_sub(NAMED) {
        0 => named.join(", "),
        more => format!("{} and {more} more", named.join(", ")),
    }
}

/// Who uses the block device at `path`, at this moment. Opens it, which waits for its daemon: that
/// must be alive.
///
/// Descriptors in processes that we may not look into stay unseen; root sees all.
pub fn now(path: &Path) -> Vec<User> {
    let users = seen(path);
    let claim = if are_processes(&users) { claim_here(path) } else { Claim::Free };
    with_claim(users, claim)
}

/// Who uses a device that is known to be claimed.
pub fn of_claimed(path: &Path) -> Vec<User> {
    with_claim(seen(path), Claim::Taken)
}

/// Whoever else is seen there has the claim.
fn with_claim(mut users: Vec<User>, claim: Claim) -> Vec<User> {
    if claim == Claim::Taken && are_processes(&users) {
        users.insert(0, User::Claim);
    }
    users
}

fn are_processes(users: &[User]) -> bool {
    users.iter().all(|user| matches!(user, User::Process(..)))
}

/// The same, as far as it can be seen without opening the device.
pub fn seen(path: &Path) -> Vec<User> {
    let Ok(device) = path.metadata() else { return Vec::new() };
    let Some(disk) = Disk::of(device.rdev(), path) else { return Vec::new() };
    [
        mounts(&disk),
        swaps(&disk),
        disk.holders(),
        loops(&disk, Path::new("/sys/block")),
        exports(&disk, Path::new("/sys/kernel/config")),
        openers(&disk),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// A disk and its partitions, by their names and numbers.
struct Disk {
    folder: PathBuf,
    numbers: HashSet<u64>,
    nodes: HashSet<PathBuf>,
}

impl Disk {
    fn of(number: u64, path: &Path) -> Option<Self> {
        let folder = sysfs_folder(number)?;
        let mut disk = Self { folder, numbers: HashSet::from([number]), nodes: HashSet::from([path.to_owned()]) };
        for folder in disk.parts() {
            disk.nodes.extend(folder.file_name().map(|name| Path::new("/dev").join(name)));
            disk.numbers.extend(fs::read_to_string(folder.join("dev")).ok().and_then(|text| parse_number(&text)));
        }
        Some(disk)
    }

    /// The sysfs folders of the disk and of its partitions.
    fn parts(&self) -> Vec<PathBuf> {
        let inner = fs::read_dir(&self.folder).into_iter().flatten().flatten().map(|entry| entry.path());
        std::iter::once(self.folder.clone()).chain(inner.filter(|folder| folder.join("partition").exists())).collect()
    }

    fn holders(&self) -> Vec<User> {
        let holders =
            self.parts().into_iter().flat_map(|part| fs::read_dir(part.join("holders")).into_iter().flatten());
        holders.flatten().map(|holder| User::Device(holder.file_name().to_string_lossy().into())).collect()
    }

    /// Whether this name leads to it.
    fn is_at(&self, path: &Path) -> bool {
        self.nodes.contains(path) || path.metadata().is_ok_and(|found| self.is(&found))
    }

    fn is(&self, found: &Metadata) -> bool {
        found.file_type().is_block_device() && self.numbers.contains(&found.rdev())
    }
}

fn parse_number(text: &str) -> Option<u64> {
    let (major, minor) = text.trim().split_once(':')?;
    Some(libc::makedev(major.parse().ok()?, minor.parse().ok()?))
}

fn mounts(disk: &Disk) -> Vec<User> {
    let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let points = table.lines().filter_map(|line| {
        let mut fields = line.split(' ');
        let source = fields.next().filter(|source| source.starts_with("/dev/"))?;
        disk.is_at(Path::new(source)).then(|| User::Mount(fields.next().unwrap_or_default().into()))
    });
    points.collect()
}

fn swaps(disk: &Disk) -> Vec<User> {
    let table = fs::read_to_string("/proc/swaps").unwrap_or_default();
    let names = table.lines().skip(1).filter_map(|line| line.split(' ').next());
    names.filter(|name| disk.is_at(Path::new(name))).map(|_| User::Swap).collect()
}

/// A loop device has its disk open, and neither claims it nor is named among its holders.
fn loops(disk: &Disk, all: &Path) -> Vec<User> {
    let devices = fs::read_dir(all).into_iter().flatten().flatten();
    let on_it = devices.filter(|device| {
        let file = fs::read_to_string(device.path().join("loop/backing_file"));
        file.is_ok_and(|file| disk.is_at(Path::new(file.trim_end_matches('\n').trim_end_matches(" (deleted)"))))
    });
    on_it.map(|device| User::Device(device.file_name().to_string_lossy().into())).collect()
}

/// Targets of the kernel's that serve it to other machines: they have it open, and claim nothing.
/// One of NVMe that is switched off has let go of it; one of SCSI holds it as long as it is there.
fn exports(disk: &Disk, config: &Path) -> Vec<User> {
    let is_at = |file: &Path| fs::read_to_string(file).is_ok_and(|path| disk.is_at(Path::new(path.trim_end())));
    let is_on = |file: &Path| fs::read_to_string(file).is_ok_and(|on| on.trim() == "1");
    let nvme = below(&config.join("nvmet/subsystems")).flat_map(|subsystem| below(&subsystem.join("namespaces")));
    let nvme = nvme.filter(|namespace| is_on(&namespace.join("enable")) && is_at(&namespace.join("device_path")));
    let scsi = below(&config.join("target/core")).flat_map(|backend| below(&backend));
    let scsi = scsi.filter(|store| is_at(&store.join("udev_path")));
    nvme.chain(scsi).map(|target| User::Target(target.display().to_string())).collect()
}

fn below(folder: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path())
}

/// A plain open does not stand in the way of an exclusive one: look through all processes'
/// descriptors.
fn openers(disk: &Disk) -> Vec<User> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let open =
        pids.filter(|pid| *pid != process::id() && process_has_open(*pid, |open| disk.is(open)).unwrap_or(false));
    let name = |pid| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim_end().to_owned();
    open.map(|pid| User::Process(pid, name(pid))).collect()
}

fn process_has_open(pid: u32, is_it: impl Fn(&Metadata) -> bool) -> io::Result<bool> {
    for descriptor in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let link = descriptor?.path();
        // The name first: to look at a file behind a dead network would hang. Other namespaces have
        // their devices in /dev too.
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

    /// A disk as sysfs shows it, with a partition.
    fn disk(sys: &Path) -> Disk {
        let folder = sys.join("ublkb0");
        for (part, holders) in [("", "dm-3"), ("ublkb0p1", "md7")] {
            fs::create_dir_all(folder.join(part).join("holders").join(holders)).unwrap();
        }
        fs::write(folder.join("ublkb0p1/partition"), "1\n").unwrap();
        Disk { folder, numbers: HashSet::new(), nodes: ["/dev/ublkb0", "/dev/ublkb0p1"].map(PathBuf::from).into() }
    }

    #[test]
    fn what_lies_on_a_disk_or_a_partition_of_it_is_found_in_sysfs() {
        let sys = tempfile::tempdir().unwrap();
        let disk = disk(sys.path());
        let mut holders = disk.holders();
        holders.sort_by_key(User::to_string);
        assert_eq!(holders, [User::Device("dm-3".into()), User::Device("md7".into())]);
        for (name, file) in
            [("loop0", "/dev/ublkb0\n"), ("loop1", "/dev/ublkb10\n"), ("loop2", "/dev/ublkb0p1\n"), ("sda", "")]
        {
            let folder = sys.path().join(name);
            fs::create_dir(&folder).unwrap();
            if !file.is_empty() {
                fs::create_dir(folder.join("loop")).unwrap();
                fs::write(folder.join("loop/backing_file"), file).unwrap();
            }
        }
        let mut loops = loops(&disk, sys.path());
        loops.sort_by_key(User::to_string);
        assert_eq!(loops, [User::Device("loop0".into()), User::Device("loop2".into())]);
    }

    #[test]
    fn targets_that_serve_it_are_found_in_configfs() {
        let sys = tempfile::tempdir().unwrap();
        let disk = disk(sys.path());
        let config = sys.path().join("config");
        for (space, path, on) in
            [("1", "/dev/ublkb0\n", "1\n"), ("2", "/dev/ublkb10\n", "1\n"), ("3", "/dev/ublkb0p1\n", "0\n")]
        {
            let folder = config.join("nvmet/subsystems/nqn.x/namespaces").join(space);
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("device_path"), path).unwrap();
            fs::write(folder.join("enable"), on).unwrap();
        }
        let store = config.join("target/core/iblock_0/disk");
        fs::create_dir_all(&store).unwrap();
        fs::write(store.join("udev_path"), "/dev/ublkb0p1\n").unwrap();
        let found: Vec<_> = exports(&disk, &config).iter().map(User::to_string).collect();
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].ends_with("nqn.x/namespaces/1") && found[1].ends_with("iblock_0/disk"), "{found:?}");
        assert_eq!(exports(&disk, Path::new("/nowhere")), []);
    }

    #[test]
    fn numbers_are_read_as_sysfs_writes_them() {
        assert_eq!(parse_number("259:3\n"), Some(libc::makedev(259, 3)));
        assert_eq!(parse_number("259"), None);
    }

    #[test]
    fn a_line_names_a_few() {
        let users: Vec<_> = (0..7).map(|i| User::Device(format!("loop{i}"))).collect();
        assert_eq!(in_words(&users[..2]), "below loop0, below loop1");
        assert!(in_words(&users).ends_with("below loop3 and 3 more"));
    }
}

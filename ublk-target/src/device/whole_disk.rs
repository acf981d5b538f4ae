//! The disk that a partition is of: udev locks that before it looks into the partition (systemd's "Locking Block Device
//! Access"), so whoever is to be alone with the partition must lock it, too.

use super::stack::{disk_of_partition, sysfs_folder};
use crate::{
    os,
    wait::{Wait, locked_within},
};
use nix::fcntl::FlockArg;
use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// A whole disk, held.
pub(super) struct WholeDisk {
    number: u64,
    _file: File,
}

impl WholeDisk {
    /// That of a partition, locked alone, if it is one and `held` has not its disk already. Where the disk has no node there is
    /// no udev.
    pub(super) fn hold(partition: &File, held: &[Self], wait: &mut Wait) -> Result<Option<Self>, (PathBuf, io::Error)> {
        let folder = partition.metadata().ok().and_then(|of| sysfs_folder(of.rdev()));
        let Some((number, node)) = folder.and_then(|folder| disk_of(&folder)) else { return Ok(None) };
        if held.iter().any(|disk| disk.number == number) {
            return Ok(None);
        }
        let file = match File::open(&node) {
            // Nor does who may have the partition alone keep udev out.
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) => return Ok(None),
            opened => opened.and_then(|file| Ok((file.metadata()?.rdev() == number).then_some(file))),
        };
        let locked = file.and_then(|file| {
            let Some(file) = file else { return Ok(None) };
            locked_within(|| os::flock(&file, FlockArg::LockExclusiveNonblock), wait)?;
            Ok(Some(Self { number, _file: file }))
        });
        locked.map_err(|e| (node, e))
    }
}

/// The number and the node of the disk that the block device with this sysfs folder is a partition of.
fn disk_of(folder: &Path) -> Option<(u64, PathBuf)> {
    let about = fs::read_to_string(disk_of_partition(folder)?.join("uevent")).ok()?;
    let said = |name: &str| about.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    let number = libc::makedev(said("MAJOR")?.parse().ok()?, said("MINOR")?.parse().ok()?);
    Some((number, Path::new("/dev").join(said("DEVNAME")?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_leads_to_its_disk_and_a_disk_to_none() {
        let sys = tempfile::tempdir().unwrap();
        let disk = sys.path().join("devices/pci/block/vda");
        fs::create_dir_all(disk.join("vda1")).unwrap();
        fs::write(disk.join("uevent"), "MAJOR=254\nMINOR=16\nDEVNAME=vda\nDEVTYPE=disk\n").unwrap();
        fs::write(disk.join("vda1/partition"), "1\n").unwrap();
        assert_eq!(disk_of(&disk.join("vda1")), Some((libc::makedev(254, 16), "/dev/vda".into())));
        assert_eq!(disk_of(&disk), None);
        assert_eq!(disk_of(&disk.join("vda2")), None, "nobody knows it");
    }
}

//! Opening the data and metadata device for good: the very descriptions that are opened and locked
//! here do all the I/O.

use super::{
    lock::{self, Share},
    stack,
    whole_disk::WholeDisk,
    witness::Witness,
};
use crate::{
    event_loop::ring::DeviceFiles,
    failure::{Context, Exit, Failure, Outcome},
    os,
    wait::{LONGEST, Wait},
};
use std::{
    fs::{File, Metadata, OpenOptions},
    io::{self, Seek, SeekFrom},
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use ublk_integrity::{Device, Geometry};

/// What a regular file's physical block counts as: file systems write whole pages.
const FILE_PHYSICAL_BLOCK: u32 = 4096;
/// The smallest sector of any device in Linux; what passes through the page cache has none.
const LEAST_SECTOR: u32 = 512;
/// How long the I/O of a killed daemon, still in flight, may hold a device.
pub const DYING: Duration = LONGEST;

/// How long another command may take to change key slots.
const CHANGED: Duration = LONGEST;
/// How long a lock is waited for at least: udev looks into a device under a lock of its own
/// whenever somebody who could write to it has closed it, `format` for one. While we hold ours it
/// looks beside us.
const PROBED: Duration = Duration::from_secs(3);

/// What a device is opened for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Use {
    /// Alone, to write.
    Exclusive,
    /// Alone, to make a volume there: until that is done udev is not to look.
    Anew,
    /// The same, alone among ourselves: even over what is mounted.
    Forced,
    /// To read, beside other readers.
    Shared,
    /// To see whether it is free.
    Probe,
    /// To look, even while it is in use.
    Unlocked,
    /// To write beside a daemon of ours what that does not touch.
    Beside,
}

impl Use {
    fn writes(self) -> bool {
        matches!(self, Self::Exclusive | Self::Anew | Self::Forced | Self::Beside)
    }

    /// O_EXCL without O_CREAT: a block device that is mounted, or used by device-mapper
    /// or swap, is refused.
    fn claims(self) -> bool {
        matches!(self, Self::Exclusive | Self::Anew | Self::Probe)
    }

    /// Who else of ours may have it meanwhile; `None` where that is not asked.
    fn share(self) -> Option<Share> {
        match self {
            Self::Exclusive => Some(Share::Nobody),
            Self::Anew | Self::Forced => Some(Share::NotEvenUdev),
            Self::Shared | Self::Probe => Some(Share::Readers),
            Self::Unlocked | Self::Beside => None,
        }
    }
}

/// One open, locked device.
pub struct Backing {
    path: PathBuf,
    /// Locked but for [`Use::Unlocked`], until the last descriptor of it is closed: a
    /// ring may have others.
    file: File,
    geometry: Geometry,
    direct: bool,
}

/// Both devices.
pub struct Backings {
    /// Holds the blocks.
    pub data: Backing,
    /// Holds the metadata where that is elsewhere.
    pub meta: Option<Backing>,
    /// The disks that they are partitions of, where udev is not to look.
    _disks: Vec<WholeDisk>,
}

impl Backings {
    /// Keeps others from writing the key area, whoever serves the volume, for as long as this is open. A command that is at it is
    /// waited for. Not on a network file system, which makes a lock of all bytes of the daemon's flock: there that is all there is.
    pub fn lock_key_area(&self) -> Outcome {
        let meta = self.get(Device::Meta);
        let path = meta.path.display();
        if lock::is_of_network(&meta.file) {
            return Ok(());
        }
        let mut wait = Wait::up_to(CHANGED, format_args!("another `key` command on {path}"));
        match lock::key_area(&meta.file, &mut wait) {
            Err(nix::Error::EWOULDBLOCK) => {
                let message =
                    format_args!("another `key` command changes the slots of {path}: try again when it has ended");
                Err(Failure::new(Exit::Busy, message))
            }
            locked => locked.doing(format_args!("can't lock {path}")),
        }
    }

    /// Opens and locks. `patience`: how long to wait for a holder that may be dying. `meta` must be
    /// another device.
    pub fn open(data: &Path, meta: Option<&Path>, purpose: Use, patience: Duration) -> Outcome<Self> {
        let data_file = Backing::open(data, purpose, patience)?;
        let mut opened = Self { data: data_file, meta: None, _disks: Vec::new() };
        if let Some(path) = meta {
            if is_same_device(data, path)? {
                return Err(Failure::new(Exit::Arguments, "--data and --meta are one device: leave --meta out"));
            }
            opened.meta = Some(Backing::open(path, purpose, patience)?);
        }
        if purpose.share() == Some(Share::NotEvenUdev) {
            opened._disks = opened.hold_disks(patience)?;
        }
        Ok(opened)
    }

    /// Both may be partitions of one disk.
    fn hold_disks(&self, patience: Duration) -> Outcome<Vec<WholeDisk>> {
        let mut held = Vec::new();
        for backing in self.both() {
            let what = format!("the lock on the disk of {}", backing.path.display());
            let mut wait = Wait::up_to(PROBED.max(patience), &what);
            let disk = WholeDisk::hold(&backing.file, &held, &mut wait).map_err(|(disk, e)| match e.kind() {
                io::ErrorKind::WouldBlock => in_use(&disk),
                _ => Failure::io(format_args!("can't take {what}, {}", disk.display()), &e),
            })?;
            held.extend(disk);
        }
        Ok(held)
    }

    /// Waits until nobody holds the devices. One that has vanished is free.
    pub fn wait_until_free(data: &Path, meta: Option<&Path>) -> Outcome {
        match Self::open(data, meta, Use::Probe, DYING) {
            Err(failure) if failure.exit == Exit::Busy => Err(failure),
            _ => Ok(()),
        }
    }

    /// The device, or both.
    pub fn both(&self) -> impl Iterator<Item = &Backing> {
        std::iter::once(&self.data).chain(&self.meta)
    }

    /// The descriptors to register with a ring, in the order that [`files`](Self::files) counts on.
    pub fn fds(&self) -> Vec<RawFd> {
        self.both().map(|b| b.file.as_raw_fd()).collect()
    }

    /// Others for a ring to keep, in the same order.
    pub fn descriptors(&self) -> io::Result<Vec<OwnedFd>> {
        self.both().map(|b| b.file.try_clone().map(OwnedFd::from)).collect()
    }

    /// Closes the devices, and returns when the kernel has let go of them.
    ///
    /// An operation that io_uring has told of may hold its file for a moment more, if it was done
    /// by a thread of the kernel's. Whoever waits for us to end would find the device in use.
    pub fn close(self) {
        let witnesses: Vec<Witness> = self.both().filter_map(|b| Witness::of(&b.file)).collect();
        drop(self);
        witnesses.into_iter().for_each(Witness::wait);
    }

    /// The devices for a ring where the first of [`fds`](Self::fds) is number `first`.
    pub fn files(&self, first: u32) -> DeviceFiles {
        let meta = self.meta.as_ref();
        DeviceFiles {
            data: first,
            meta: if meta.is_some() { first + 1 } else { first },
            data_geometry: self.data.geometry,
            meta_geometry: meta.map_or(self.data.geometry, |m| m.geometry),
        }
    }

    /// The one that the library names so.
    pub fn get(&self, device: Device) -> &Backing {
        match (device, &self.meta) {
            (Device::Meta, Some(meta)) => meta,
            _ => &self.data,
        }
    }

    /// The paths that they were opened by.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.both().map(|b| b.path.as_path())
    }

    /// The devices that can't do O_DIRECT, for a warning.
    pub fn buffered(&self) -> impl Iterator<Item = &Path> {
        self.both().filter(|b| !b.direct).map(|b| b.path.as_path())
    }
}

impl Backing {
    /// The path that it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.geometry.size
    }

    /// Opens it once more, to read or write bytes at any place. It is the very device that is held,
    /// whatever its path leads to by now.
    pub fn reopened(&self, writes: bool) -> std::io::Result<File> {
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        OpenOptions::new().read(true).write(writes).open(path)
    }

    /// What the kernel knows it by.
    pub fn number(&self) -> io::Result<(Option<u64>, u64)> {
        self.file.metadata().map(|metadata| number(&metadata))
    }

    fn open(path: &Path, purpose: Use, patience: Duration) -> Outcome<Self> {
        let deadline = Instant::now() + patience;
        let mut wait = Wait::up_to(patience, format_args!("{}, which somebody has in use", path.display()));
        loop {
            match Self::try_open(path, purpose, deadline) {
                Err(failure) if failure.exit == Exit::Busy && wait.pause() => {}
                done => return done,
            }
        }
    }

    fn try_open(path: &Path, purpose: Use, deadline: Instant) -> Outcome<Self> {
        let (mut file, direct, is_block) = open_file(path, purpose)?;
        let (physical_block, logical_block) = if is_block {
            let physical = os::physical_block_size(&file);
            let logical = os::logical_block_size(&file);
            let what = format!("block sizes of {}", path.display());
            (physical.doing(&what)?, logical.doing(&what)?)
        } else {
            (FILE_PHYSICAL_BLOCK, if direct { file_sector(&file, path) } else { LEAST_SECTOR })
        };
        let patience = PROBED.max(deadline.saturating_duration_since(Instant::now()));
        if let Some(share) = purpose.share() {
            lock_opened(&file, path, (share, is_block), patience)?;
        }
        // Not before: whoever held it may have had the device grow.
        let size = file.seek(SeekFrom::End(0)).doing(format_args!("size of {}", path.display()))?;
        let geometry = Geometry { size, physical_block, logical_block };
        Ok(Self { path: path.to_owned(), file, geometry, direct })
    }
}

/// What direct I/O to a regular file is made of. A kernel that does not say (before 6.1, or for
/// this file system) asks in most of them for the sectors of the disk below; where there is no such
/// disk, no device's sectors are smaller than 512 bytes, and more is refused by the device itself.
fn file_sector(file: &File, path: &Path) -> u32 {
    os::direct_io_alignment(file).or_else(|| stack::sector_below(path)).unwrap_or(LEAST_SECTOR).max(LEAST_SECTOR)
}

/// Opens without lock: the file, whether it takes O_DIRECT, whether it is a block device.
fn open_file(path: &Path, purpose: Use) -> Outcome<(File, bool, bool)> {
    let shown = path.display();
    let kind = path.metadata().doing(format_args!("can't use {shown}"))?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(Failure::new(Exit::Device, format_args!("{shown} is neither a block device nor a regular file")));
    }
    // Some kernels open such a device to write, and only then refuse.
    if purpose.writes() && stack::is_read_only(path) {
        return Err(Failure::new(Exit::Device, format_args!("{shown} is read-only: nothing can be written to it")));
    }
    let exclusive = if kind.is_block_device() && purpose.claims() { libc::O_EXCL } else { 0 };
    let open =
        |direct: i32| OpenOptions::new().read(true).write(purpose.writes()).custom_flags(exclusive | direct).open(path);
    let (file, direct) = match open(libc::O_DIRECT) {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => (open(0), false),
        other => (other, true),
    };
    let file = file.map_err(|e| match e.raw_os_error() {
        Some(libc::EBUSY) => in_use(path),
        _ => Failure::io(format_args!("can't open {shown}"), &e),
    })?;
    Ok((file, direct, kind.is_block_device()))
}

/// Waits with the file open: to close it, and open it once more, would have udev look again.
fn lock_opened(file: &File, path: &Path, (share, is_block): (Share, bool), patience: Duration) -> Outcome {
    let mut wait = Wait::up_to(patience, format_args!("the lock on {}", path.display()));
    let locked = if is_block { lock::device(file, share, &mut wait) } else { lock::file(file, share, &mut wait) };
    match locked {
        Err(nix::Error::EWOULDBLOCK) => Err(in_use(path)),
        locked => locked.doing(format_args!("can't lock {}", path.display())),
    }
}

fn in_use(path: &Path) -> Failure {
    let path = path.display();
    Failure::new(
        Exit::Busy,
        format_args!("{path} is in use: mounted, or held by another program (`ublk-integrity list` shows ours)"),
    )
}

/// Whether two paths lead to one file or one block device.
pub fn is_same_device(a: &Path, b: &Path) -> Outcome<bool> {
    let look = |p: &Path| p.metadata().doing(format_args!("can't use {}", p.display()));
    Ok(is_same(&look(a)?, &look(b)?))
}

/// The same of what has been looked up already.
pub fn is_same(a: &Metadata, b: &Metadata) -> bool {
    number(a) == number(b)
}

/// What the kernel knows a block device by, or a file.
pub fn number(m: &Metadata) -> (Option<u64>, u64) {
    match m.file_type().is_block_device() {
        true => (None, m.rdev()),
        false => (Some(m.dev()), m.ino()),
    }
}

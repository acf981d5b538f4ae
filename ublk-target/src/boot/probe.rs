//! What a disk is to those who look at all disks: udev, lsblk, installers. Needs no key and no
//! io_uring, and takes two or three reads.

use futures_util::FutureExt;
use std::{
    fs::{File, OpenOptions},
    future::{Ready, ready},
    io::{self, Seek, SeekFrom},
    ops::Range,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    time::Duration,
};
use ublk_integrity::{
    Buf, ByteOffset, Device, Durability, Errno, Geometry, Storage,
    open::{self, Dump, OpenError},
};

/// What a disk holds of a volume. Nothing of it is authenticated.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Found {
    /// Which part.
    pub role: Role,
    /// The volume's UUID, where it can be read.
    pub uuid: Option<String>,
    /// The format's version, where it can be read.
    pub version: Option<u32>,
}

/// A part of a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// All of it.
    Volume,
    /// The data; the metadata is elsewhere.
    Data,
    /// The metadata; the data is elsewhere.
    Meta,
}

/// What is on the device or in the file; `None` where that is no volume of ours.
pub fn probe(path: &Path) -> io::Result<Option<Found>> {
    // Who waits for a disk to be put in waits here for nothing.
    let mut file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let size = file.seek(SeekFrom::End(0))?;
    let disk = Disk { file, size };
    let done = open::dump(&disk).now_or_never().expect("nothing waits in it");
    match done {
        Ok(dump) => Ok(Some(Found::of(&dump))),
        Err(OpenError::Device(e)) => Err(io::Error::from_raw_os_error(e.errno.0)),
        Err(_) => Ok(None),
    }
}

impl Found {
    fn of(dump: &Dump) -> Self {
        let version = dump.copies.iter().find_map(|copy| copy.version);
        let (role, uuid) = match (&dump.volume, &dump.identity) {
            (Some(volume), _) => (if volume.separate_meta { Role::Meta } else { Role::Volume }, Some(&volume.uuid)),
            (None, Some(uuid)) => (Role::Data, Some(uuid)),
            (None, None) => (Role::Volume, None),
        };
        Self { role, uuid: uuid.cloned(), version }
    }

    /// As udev's properties, named as libblkid names its own. The metadata alone has the UUID as a
    /// part's: what leads to a volume by its UUID leads to where the data is.
    pub fn properties(&self) -> Vec<(&'static str, String)> {
        let (kind, uuid) = match self.role {
            Role::Volume => ("ublk_integrity", ["ID_FS_UUID", "ID_FS_UUID_ENC"]),
            Role::Data => ("ublk_integrity_data", ["ID_FS_UUID", "ID_FS_UUID_ENC"]),
            Role::Meta => ("ublk_integrity_meta", ["ID_FS_UUID_SUB", "ID_FS_UUID_SUB_ENC"]),
        };
        let mut all = vec![("ID_FS_TYPE", kind.to_owned()), ("ID_FS_USAGE", "crypto".to_owned())];
        all.extend(self.uuid.iter().flat_map(|text| uuid.map(|name| (name, text.clone()))));
        all.extend(self.version.map(|version| ("ID_FS_VERSION", version.to_string())));
        all
    }
}

/// One disk, read as any program reads a file.
struct Disk {
    file: File,
    size: u64,
}

impl Storage for Disk {
    type Transfer = Ready<(Result<(), Errno>, Buf)>;
    type Command = Ready<Result<(), Errno>>;

    fn geometry(&self, _: Device) -> Geometry {
        Geometry { size: self.size, physical_block: 512, logical_block: 512 }
    }

    fn read(&self, _: Device, offset: ByteOffset, mut buf: Buf, part: Range<usize>) -> Self::Transfer {
        let read = self.file.read_exact_at(&mut buf[part], offset.0);
        let done = match read {
            // What is not there holds no superblock.
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(()),
            read => read.map_err(|e| e.raw_os_error().map_or(Errno::EIO, Errno)),
        };
        ready((done, buf))
    }

    fn write(&self, _: Device, _: ByteOffset, buf: Buf, _: Range<usize>, _: Durability) -> Self::Transfer {
        ready((Err(Errno::EROFS), buf))
    }

    fn sync(&self, _: Device) -> Self::Command {
        ready(Err(Errno::EROFS))
    }

    fn discard(&self, _: Device, _: ByteOffset, _: u64) -> Self::Command {
        ready(Err(Errno::EROFS))
    }

    fn sleep(&self, _: Duration) -> Self::Command {
        ready(Ok(()))
    }
}

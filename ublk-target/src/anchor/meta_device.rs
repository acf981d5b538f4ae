//! The metadata device, for the bodies of an anchor that is a counter. Each call waits for the device.

use crate::device::Backings;
use std::{
    fs::File,
    future::{Ready, ready},
    io,
    ops::Range,
    os::unix::fs::FileExt,
    time::Duration,
};
use ublk_integrity::{Buf, ByteOffset, Device, Durability, Errno, Geometry, Storage};

/// The metadata device of an open volume. A [`BodyRoom`](ublk_integrity::anchor::BodyRoom) is made of it, which uses 8 KiB of
/// it.
pub struct MetaDevice {
    file: File,
    geometry: Geometry,
}

impl MetaDevice {
    /// That of these devices. It stays open as long as this lives.
    pub fn of(backings: &Backings) -> io::Result<Self> {
        let files = backings.files(0);
        let file = backings.descriptors()?.swap_remove(files.meta as usize).into();
        Ok(Self { file, geometry: files.meta_geometry })
    }
}

fn errno(done: io::Result<()>) -> Result<(), Errno> {
    done.map_err(|e| e.raw_os_error().map_or(Errno::EIO, Errno))
}

/// It is always that device, whichever is named.
impl Storage for MetaDevice {
    type Transfer = Ready<(Result<(), Errno>, Buf)>;
    type Command = Ready<Result<(), Errno>>;

    fn geometry(&self, _: Device) -> Geometry {
        self.geometry
    }

    fn read(&self, _: Device, at: ByteOffset, mut buf: Buf, part: Range<usize>) -> Self::Transfer {
        let read = self.file.read_exact_at(&mut buf[part], at.0);
        ready((errno(read), buf))
    }

    fn write(&self, _: Device, at: ByteOffset, buf: Buf, part: Range<usize>, durability: Durability) -> Self::Transfer {
        let written = self.file.write_all_at(&buf[part], at.0);
        let synced = match durability {
            Durability::Durable => written.and_then(|()| self.file.sync_data()),
            Durability::MayBeLost => written,
        };
        ready((errno(synced), buf))
    }

    fn sync(&self, _: Device) -> Self::Command {
        ready(errno(self.file.sync_data()))
    }

    fn discard(&self, _: Device, _: ByteOffset, _: u64) -> Self::Command {
        ready(Err(Errno::EOPNOTSUPP))
    }

    fn sleep(&self, time: Duration) -> Self::Command {
        std::thread::sleep(time);
        ready(Ok(()))
    }
}

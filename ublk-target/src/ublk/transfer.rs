//! How the bytes of a tag's requests come to us and go back: copied once, by the driver.

use crate::os;
use libublk::{
    BufDesc,
    io::{UblkIOCtx, UblkQueue},
    sys,
};
use std::os::fd::RawFd;
use ublk_integrity::{Buf, Errno};

/// One of the two ways that the driver has.
#[derive(Clone, Copy)]
pub(super) enum Transfer {
    /// It copies between a request and the buffer that we have named with the command that fetched
    /// it, whatever it is.
    Named,
    /// It copies when we ask for it, between any memory and its character device at this offset
    /// (`UBLK_F_USER_COPY`, Linux 6.5): a system call more, but the bytes can be fetched to any
    /// memory, not only where the next request is fetched to.
    Asked { device: RawFd, at: u64 },
}

impl Transfer {
    /// The way for a request tag.
    pub(super) fn of(queue: &UblkQueue<'_>, tag: u16) -> Self {
        match is_asked(queue.dev.dev_info.flags) {
            true => {
                Self::Asked { device: queue.dev.tgt.fds[0], at: UblkIOCtx::ublk_user_copy_pos(queue.get_qid(), tag, 0) }
            }
            false => Self::Named,
        }
    }

    /// What to name with a command. The address is the same as long as the buffer lives: it moves
    /// into operations and back, its memory does not.
    pub(super) fn named(self, buf: &Buf) -> BufDesc<'static> {
        match self {
            Self::Named => BufDesc::RawAddress(buf.as_ptr()),
            Self::Asked { .. } => BufDesc::Slice(&[]),
        }
    }

    /// Puts the bytes of a write at the front of a buffer, where they are not there already.
    pub(super) fn fetch(self, buf: &mut Buf, len: usize) -> Result<(), Errno> {
        let Self::Asked { device, at } = self else { return Ok(()) };
        let bytes = buf.get_mut(..len).ok_or(Errno::EINVAL)?;
        os::read_at(device, bytes, at).map_err(|e| Errno(e as i32))
    }

    /// Gives a read its bytes from the front of a buffer, where the driver does not
    /// take them by itself.
    pub(super) fn give(self, buf: &Buf, len: usize) -> Result<(), Errno> {
        let Self::Asked { device, at } = self else { return Ok(()) };
        let bytes = buf.get(..len).ok_or(Errno::EINVAL)?;
        os::write_at(device, bytes, at).map_err(|e| Errno(e as i32))
    }
}

/// Whether a device with these flags copies when it is asked.
pub(super) fn is_asked(flags: u64) -> bool {
    flags & u64::from(sys::UBLK_F_USER_COPY) != 0
}

//! Buffers that the kernel knows beforehand: their pages are looked up and pinned once, not at
//! every request (`io_uring_register_buffers(3)`).

use super::Ops;
use std::io;
use ublk_integrity::{Buf, BufMark};

/// Registers buffers with a ring, once in its life. They are marked, and their operations on
/// this ring then name them by number. Where the kernel refuses (a limit on locked memory)
/// all goes on as without.
pub fn register<'a>(ops: &Ops, bufs: impl IntoIterator<Item = &'a mut Buf>) -> io::Result<()> {
    let mut bufs: Vec<&mut Buf> = bufs.into_iter().collect();
    let memory: Vec<_> =
        bufs.iter_mut().map(|buf| libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() }).collect();
    // SAFETY: the memory is alive now, and the kernel holds its pages from here on, so it is never
    // the kernel that touches freed memory. Nor is it ours that it would touch for another's: an
    // entry names a registered buffer only because of the mark, and the mark goes with the memory.
    ops.port().with(|ring| unsafe { ring.submitter().register_buffers(&memory) })?;
    for (index, buf) in (0..).zip(&mut bufs) {
        buf.set_mark(BufMark { ring: ops.number(), index });
    }
    Ok(())
}

//! Where submissions go: the one place that hands memory to the kernel's I/O.

use io_uring::{IoUring, squeue};
use std::{cell::RefCell, io};

/// One thread's submission and completion queues.
pub enum Port {
    /// A ring of our own (boxed: it is far larger than the other variant).
    Own(Box<RefCell<IoUring>>),
    /// The ring that libublk keeps for this thread's ublk queue.
    UblkQueue,
}

/// A ring that only its thread submits to, and whose completions are made ready in batches when that thread asks. That
/// there are some to ask for can be seen in its memory.
pub fn build(entries: u32, completions: u32) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.setup_cqsize(completions).setup_taskrun_flag();
    match builder.clone().setup_single_issuer().setup_defer_taskrun().build(entries) {
        // Linux 6.0 and earlier.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => builder.setup_coop_taskrun().build(entries),
        other => other,
    }
}

impl Port {
    /// A ring of our own with `entries` submission entries.
    pub fn own(entries: u32) -> io::Result<Self> {
        Ok(Self::Own(Box::new(RefCell::new(build(entries, entries * 4)?))))
    }

    /// Runs `f` on the ring.
    pub fn with<R>(&self, f: impl FnOnce(&mut IoUring) -> R) -> R {
        match self {
            Self::Own(ring) => f(&mut ring.borrow_mut()),
            Self::UblkQueue => crate::ublk::with_queue_ring(f),
        }
    }

    /// Whether completions can be had without waiting; a look at memory.
    pub fn has_completions(&self) -> bool {
        self.with(|ring| ring.submission().taskrun() || !ring.completion().is_empty())
    }

    /// Puts entries into the submission queue; makes room by submitting what is there.
    pub(super) fn push(&self, entries: impl Iterator<Item = squeue::Entry>) {
        self.with(|ring| {
            for entry in entries {
                // SAFETY: the entry's buffer and timespec live in a slot of `Ops`, on the heap, and leave it only after
                // this entry's completion; `Ops` leaks its table rather than free it before. The doorbell's poll has no memory.
                while unsafe { ring.submission().push(&entry) }.is_err() {
                    // Full. EBUSY (completion queue full too) passes as the kernel makes room; nothing else can be
                    // wrong with a ring that was set up.
                    let _ = ring.submit();
                }
            }
        });
    }
}

//! Where submissions go: the one place that hands memory to the kernel's I/O.

use crate::rings::{self, RingLife};
use io_uring::{
    IoUring, squeue,
    types::{SubmitArgs, Timespec},
};
use std::{cell::RefCell, io, time::Duration};

/// Calls what it is given, once, with a ring that somebody else keeps for this thread.
pub type WithRing = fn(&mut dyn FnMut(&mut IoUring));

/// One thread's submission and completion queues.
pub enum Port {
    /// A ring of our own (boxed: it is far larger than the other variant).
    Own(Box<RefCell<IoUring>>),
    /// A ring that somebody else keeps for this thread.
    Kept(WithRing),
}

/// What to wait for in the kernel.
#[derive(Clone, Copy)]
pub enum EnterWait {
    No,
    One,
    /// So many completions, but only so long.
    Many {
        completions: usize,
        at_most: Duration,
    },
}

/// A ring that only its thread submits to, and whose completions are made ready in batches when
/// that thread asks. That there are some to ask for can be read from its memory.
pub fn build(entries: u32, completions: u32, life: RingLife) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.setup_cqsize(completions).setup_taskrun_flag();
    match rings::build(builder.clone().setup_single_issuer().setup_defer_taskrun(), entries, life) {
        // Linux 6.0 and earlier.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => rings::build(builder.setup_coop_taskrun(), entries, life),
        other => other,
    }
}

impl Port {
    /// A ring of our own with `entries` submission entries.
    pub fn own(entries: u32) -> io::Result<Self> {
        Ok(Self::Own(Box::new(RefCell::new(build(entries, entries * 4, RingLife::Shorter)?))))
    }

    /// Runs `f` on the ring.
    pub fn with<R>(&self, f: impl FnOnce(&mut IoUring) -> R) -> R {
        match self {
            Self::Own(ring) => f(&mut ring.borrow_mut()),
            Self::Kept(with) => {
                let (mut f, mut result) = (Some(f), None);
                with(&mut |ring| result = f.take().map(|f| f(ring)));
                result.expect("the ring is there")
            }
        }
    }

    /// Whether completions can be had without waiting: reads memory only.
    pub fn has_completions(&self) -> bool {
        self.with(|ring| ring.submission().taskrun() || !ring.completion().is_empty())
    }

    /// Puts entries into the submission queue; makes room by submitting what is there.
    pub(super) fn push(&self, entries: impl Iterator<Item = squeue::Entry>) {
        self.with(|ring| {
            for entry in entries {
                // SAFETY: the entry's buffer and timespec live in the table of `Ops`, on the heap,
                // and leave it only after this entry's completion; `Ops` leaks its table rather
                // than free it before. The doorbell's poll has no memory.
                while unsafe { ring.submission().push(&entry) }.is_err() {
                    // Full. EBUSY (completion queue full too) passes as the kernel makes room;
                    // nothing else can be wrong with a ring that was set up.
                    let _ = ring.submit();
                }
            }
        });
    }

    /// Submits what is in the queue, waits, and has completions made ready.
    pub(super) fn enter(&self, wait: EnterWait) -> io::Result<()> {
        let entered = self.with(|ring| match wait {
            // Has completions made ready, too, where the ring's memory shows that there are some.
            EnterWait::No => ring.submit(),
            EnterWait::One => ring.submit_and_wait(1),
            EnterWait::Many { completions, at_most } => {
                let time = Timespec::from(at_most);
                ring.submitter().submit_with_args(completions, &SubmitArgs::new().timespec(&time))
            }
        });
        match entered {
            // EBUSY: completions must be taken first, which is what follows. ETIME: there are none
            // yet.
            Err(e) if !matches!(e.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN | libc::ETIME)) => {
                Err(e)
            }
            _ => Ok(()),
        }
    }
}

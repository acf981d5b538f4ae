//! Where io_uring rings are made.
//!
//! From Linux 7.0 on, and from 6.18.11 of the stable ones, a thread's io-wq workers end when it has
//! closed its last ring ("io_uring: allow io-wq workers to exit when unused"). Work that goes to one that is just ending
//! is lost: the kernel takes the worker for a free one, and the worker looks at the queue no more.
//! Who opens another ring right after the last one is gone then waits for ever for what needs a
//! worker: a sync, any command to the ublk driver. So a thread that has had a ring is never without
//! one.

use io_uring::{Builder, IoUring, cqueue, squeue};
use std::{cell::RefCell, io, process};

thread_local! {
    /// A ring that nothing is submitted to, and the process that has made it: in one that was
    /// forked the kernel knows of no ring.
    static KEPT: RefCell<Option<(u32, IoUring)>> = const { RefCell::new(None) };
}

/// How long a ring is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RingLife {
    /// Until its thread ends, as libublk's are, which it makes itself.
    Thread,
    /// Its thread may have others later.
    Shorter,
}

/// Sees to it that this thread, of this process, has a ring until it ends.
fn keep_one(process: u32) {
    KEPT.with_borrow_mut(|kept| {
        if kept.as_ref().is_none_or(|(by, _)| *by != process) {
            // Where the kernel refuses, it refuses the ring that is wanted, too, and that is told.
            *kept = make(&IoUring::builder(), 1).ok().map(|ring| (process, ring));
        }
    });
}

/// Whether this thread keeps one.
pub fn keeps_one() -> bool {
    KEPT.with_borrow(Option::is_some)
}

/// A ring with `entries` submission entries, set up as `builder` says.
pub fn build<S: squeue::EntryMarker, C: cqueue::EntryMarker>(
    builder: &Builder<S, C>,
    entries: u32,
    life: RingLife,
) -> io::Result<IoUring<S, C>> {
    if life == RingLife::Shorter {
        keep_one(process::id());
    }
    make(builder, entries)
}

#[expect(clippy::disallowed_methods, reason = "the one place that may")]
fn make<S: squeue::EntryMarker, C: cqueue::EntryMarker>(
    builder: &Builder<S, C>,
    entries: u32,
) -> io::Result<IoUring<S, C>> {
    builder.build(entries)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event_loop::OwnRing;
    use std::{fs, os::fd::AsRawFd, thread};

    /// The descriptor of the ring that this thread keeps, where that is a ring.
    fn kept() -> Option<i32> {
        let number = KEPT.with_borrow(|kept| kept.as_ref().map(|(_, ring)| ring.as_raw_fd()))?;
        let what = fs::read_link(format!("/proc/self/fd/{number}")).unwrap();
        what.to_str().unwrap().contains("io_uring").then_some(number)
    }

    /// On a thread that has had none.
    fn on_a_new_thread(test: impl FnOnce() + Send + 'static) {
        thread::spawn(test).join().unwrap();
    }

    #[test]
    fn a_thread_never_closes_its_last_ring() {
        on_a_new_thread(|| {
            assert_eq!(kept(), None);
            drop(OwnRing::new(Vec::new()).unwrap());
            let first = kept().expect("one is left");
            drop(OwnRing::new(Vec::new()).unwrap());
            assert_eq!(kept(), Some(first), "and it is the same for ever");
        });
    }

    #[test]
    fn a_forked_process_keeps_one_of_its_own() {
        on_a_new_thread(|| {
            keep_one(1);
            let parents = kept().unwrap();
            keep_one(2);
            assert_ne!(kept().unwrap(), parents);
        });
    }
}

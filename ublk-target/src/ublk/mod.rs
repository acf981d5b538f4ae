//! The kernel's ublk driver, through libublk. Nothing outside this folder names that crate.

mod control;
mod early;
mod queue;
mod request;
mod transfer;

pub use control::{
    Device, Shape, block_path, daemon_of, delete, exists, need_driver, secure_run_folder, shares_queues, stop,
};
pub use queue::Shared;
pub use request::{BlockShift, Request, Unknown};

use io_uring::IoUring;

/// Runs `f` on the ring that libublk keeps for this thread's queue.
pub fn with_queue_ring<R>(f: impl FnOnce(&mut IoUring) -> R) -> R {
    libublk::with_task_io_ring_mut(f)
}

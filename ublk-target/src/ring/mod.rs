//! Device I/O over io_uring.
//!
//! ```text
//!  library ── Storage ──> storage.rs ──> ops.rs ──────> port.rs ──> kernel
//!                                        │ owns the      │ a ring of our own, or
//!             future <── waker ──────────┘ memory until  │ the ring of a ublk queue
//!                                          the completion└──> completions back to ops.rs
//! ```
//!
//! An operation has a slot in a preallocated table for as long as the kernel may touch its memory;
//! the future only names the slot. Dropping the future leaves the operation running and its buffer
//! in the slot.

mod op;
mod ops;
mod own;
mod port;
mod registered;
mod storage;
#[cfg(test)]
mod tests;

pub use ops::Ops;
pub use own::{OwnRing, drive};
pub use port::{Port, build};
pub use registered::register;
pub use storage::{DeviceFiles, RingStorage};

/// Set in the user data of every entry that is ours; ublk's own commands leave it clear.
pub const TARGET_BIT: u64 = 1 << 63;

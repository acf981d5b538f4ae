//! Device I/O over io_uring.
//!
//! ```text
//!  library ── Storage ──> storage.rs ──> ops.rs ──────> port.rs ──> kernel
//!                                        │ owns the      │ a ring of our own, or
//!             future <── waker ──────────┘ memory until  │ one that libublk keeps
//!                                          the completion└──> completions back to ops.rs
//! ```
//!
//! An operation has an entry in a preallocated table for as long as the kernel may touch its memory;
//! the future only names it. Dropping the future leaves the operation running and its buffer
//! in the table.

mod op;
mod ops;
mod port;
mod registered;
mod storage;

pub use ops::Ops;
pub use port::{EnterWait, Port, build};
pub use registered::register;
pub use storage::{DeviceFiles, RingStorage};

/// Set in the user data of every entry that is ours; ublk's own commands leave it clear.
pub const TARGET_BIT: u64 = 1 << 63;

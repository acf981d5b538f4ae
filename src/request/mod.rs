//! One request: its memory, the range that it holds, and what a read and a write do.

pub(crate) mod context;
pub(crate) mod fix;
pub(crate) mod hash_batch;
pub(crate) mod lock_queue;
pub(crate) mod range_lock;
pub(crate) mod range_watch;
pub(crate) mod read;
pub(crate) mod write;

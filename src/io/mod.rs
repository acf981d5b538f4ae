//! What the engine runs on: devices, owned buffers, and the thread's scheduler.

pub(crate) mod buffer;
pub(crate) mod memory_storage;
pub(crate) mod retry;
pub(crate) mod scheduler;
pub(crate) mod sectors;
pub(crate) mod storage;

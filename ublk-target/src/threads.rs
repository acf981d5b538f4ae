//! How the program makes threads.

use std::thread;

/// A thread of the daemon. Its stack is locked in memory, so it is no larger than it must be.
pub fn named(name: &str) -> thread::Builder {
    thread::Builder::new().name(name.into()).stack_size(512 << 10)
}

//! Threads of the program.

use std::thread;

/// A thread with this name. Its stack is locked in memory, so it is no larger than it must be.
pub fn named(name: &str) -> thread::Builder {
    thread::Builder::new().name(name.into()).stack_size(512 << 10)
}

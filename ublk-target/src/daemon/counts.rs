//! How many of what a device has.

use super::workers::PREFETCH_LANES;

/// How many of what a device has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Counts {
    /// Queues.
    pub queues: u16,
    /// Threads of each queue.
    pub threads: u16,
    /// Threads that hash for those.
    pub hash_threads: u16,
    /// Requests of each queue.
    pub depth: u16,
    /// Small writes of each thread that may be answered before they are in place.
    pub write_back: u16,
}

impl Counts {
    /// Threads that serve requests.
    pub fn io_threads(self) -> u64 {
        u64::from(self.queues) * u64::from(self.threads)
    }
    /// Requests in flight at most.
    pub fn requests(self) -> u64 {
        u64::from(self.queues) * u64::from(self.depth)
    }
    /// Slots of the write-back file: writes at most that are answered and not in place.
    pub fn write_back_slots(self) -> u64 {
        self.io_threads() * u64::from(self.write_back)
    }
    /// Request contexts of a volume: one more to replay what the daemon before has left, one to heal, and one for the anchor.
    pub fn contexts(self) -> usize {
        (self.requests() + self.write_back_slots()) as usize + PREFETCH_LANES + 3
    }
}

//! Counters: one set for each I/O thread, so that no two threads share a cache line.

use crate::sync::{AtomicU64, Ordering};
use serde::Serialize;

macro_rules! counters {
    ($(#[doc = $doc:literal] $name:ident),* $(,)?) => {
        /// Values of the counters at one moment, since the volume was opened.
        #[derive(Clone, Copy, Debug, Default, Serialize, PartialEq, Eq)]
        pub struct CounterValues {
            $(#[doc = $doc] pub $name: u64,)*
        }

        impl CounterValues {
            /// All of them: the name of the field, and in words what it counts.
            pub const ALL: &'static [(&'static str, &'static str)] = &[$((stringify!($name), $doc)),*];
        }

        /// One I/O thread's counters.
        #[derive(Default)]
        #[repr(align(128))]
        pub(crate) struct ThreadCounters {
            $(pub(crate) $name: Counter,)*
        }

        impl ThreadCounters {
            pub(crate) fn add_to(&self, sum: &mut CounterValues) {
                $(sum.$name += self.$name.0.load(Ordering::Relaxed);)*
            }
        }
    };
}

counters! {
    /// Read requests.
    reads,
    /// Write requests.
    writes,
    /// Writes answered before they were in place.
    write_back_writes,
    /// Writes that a record of the log has carried with their data.
    carried_writes,
    /// Writes that were written again before they were in place, and never were.
    superseded_writes,
    /// Writes that were written again before anything was logged of them, and never were.
    inherited_writes,
    /// Discard and write-zeroes requests.
    zeroes,
    /// Flush requests.
    flushes,
    /// Bytes asked for by reads.
    read_bytes,
    /// Bytes sent by writes.
    written_bytes,
    /// Blocks whose tags were compared.
    blocks_verified,
    /// Blocks that did not match their tags.
    mismatches,
    /// Times that a damaged metadata page was met.
    bad_pages,
    /// Blocks accepted and signed anew by `--on-mismatch fix`.
    fixed_blocks,
    /// Bad blocks put back in place from a replica.
    healed_blocks,
    /// Tag pages found in the cache.
    cache_hits,
    /// Walks that met a page that was not in the cache.
    cache_misses,
    /// Prefetch hints handed to the worker.
    hints_sent,
    /// Prefetch hints dropped: the channel was full or the worker gone.
    hints_dropped,
    /// Tag pages brought by a hint and then used.
    hints_used,
    /// Checkpoints completed.
    checkpoints,
    /// Tag and tree pages written by checkpoints.
    pages_written,
    /// Pages that did not verify when a checkpoint had to change them: their blocks are lost.
    pages_lost,
    /// Records written to the tag log.
    log_records,
    /// Bytes written to the tag log.
    log_bytes,
    /// Data writes that the device failed.
    failed_writes,
    /// Discards that the device refused; the blocks read as zeros all the same.
    failed_discards,
}

impl ThreadCounters {
    /// A write request of so many bytes.
    pub(crate) fn count_write(&self, bytes: usize) {
        self.writes.add(1);
        self.written_bytes.add(bytes as u64);
    }
}

/// A counter that one thread writes and others read.
#[derive(Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }
}

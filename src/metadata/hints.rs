//! Prefetch hints. Any of them may be dropped, and nobody can wait for one: offering it returns
//! nothing, and only a counter tells of a drop.

use crate::{
    BlockRange,
    counters::ThreadCounters,
    format::{Layout, tag_pages},
    sync::{AtomicU64, AtomicUsize, Ordering},
};
use std::ops::Range;

/// "These blocks were asked for just now."
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hint(pub BlockRange);

/// The sending end of the bounded hint channel.
pub type HintSender = crossbeam_channel::Sender<Hint>;
/// The worker's end.
pub type HintReceiver = crossbeam_channel::Receiver<Hint>;

/// A channel that holds `capacity` hints.
pub fn channel(capacity: usize) -> (HintSender, HintReceiver) {
    crossbeam_channel::bounded(capacity)
}

/// A volume's channel to its prefetch worker.
pub(crate) struct Hints {
    sender: HintSender,
    recent: Recent,
    /// All pages fit into the cache: each that a hint brings will be used, however reads jump about.
    eager: bool,
}

impl Hints {
    /// `cached_pages`: how many the cache holds.
    pub(crate) fn new(sender: HintSender, layout: &Layout, cached_pages: usize) -> Self {
        let pages: u64 = (0..layout.levels() as u8).map(|level| layout.pages_in(level)).sum();
        Self { sender, recent: Recent::default(), eager: pages <= cached_pages as u64 }
    }

    /// Hands a hint to the worker, if it is worth one and that costs nothing.
    pub(crate) fn offer(&self, range: BlockRange, counters: &ThreadCounters) {
        if !self.eager && !self.recent.runs_on(tag_pages(range)) {
            return;
        }
        match self.sender.try_send(Hint(range)) {
            Ok(()) => counters.hints_sent.add(1),
            Err(_) => counters.hints_dropped.add(1),
        }
    }
}

/// Streams of sequential reads that are told apart.
const STREAMS: usize = 8;
const NONE: u64 = u64::MAX;

/// Where reads ended lately. Reads that jump about a volume much larger than the cache would use
/// one page in sixteen of what a hint brings.
struct Recent {
    last_pages: [AtomicU64; STREAMS],
    next: AtomicUsize,
}

impl Default for Recent {
    fn default() -> Self {
        Self { last_pages: [const { AtomicU64::new(NONE) }; STREAMS], next: AtomicUsize::new(0) }
    }
}

impl Recent {
    /// Notes a read of these tag pages; whether it goes on where an earlier one ended. Threads that
    /// race here only misjudge a hint.
    fn runs_on(&self, pages: Range<u64>) -> bool {
        let last = pages.end - 1;
        for place in &self.last_pages {
            let before = place.load(Ordering::Relaxed);
            if before == pages.start || before.checked_add(1) == Some(pages.start) {
                place.store(last, Ordering::Relaxed);
                return true;
            }
        }
        let place = self.next.fetch_add(1, Ordering::Relaxed) % STREAMS;
        self.last_pages[place].store(last, Ordering::Relaxed);
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_side_by_side_run_on_and_jumps_do_not() {
        let recent = Recent::default();
        let streams = [0u64, 1000, 2000, 3000];
        assert!(streams.iter().all(|s| !recent.runs_on(*s..s + 1)), "nothing is known of a first read");
        for page in 1..20 {
            assert!(streams.iter().all(|s| recent.runs_on(s + page..s + page + 1)), "page {page}");
        }
        let jumps = (0..1000u64).filter(|i| recent.runs_on(i * 7919 % 100_003 + 5000..i * 7919 % 100_003 + 5001));
        assert!(jumps.count() < 10);
        assert!(!recent.runs_on(500..503) && recent.runs_on(502..505) && recent.runs_on(505..506), "several pages");
    }
}

//! The cache of verified pages: set-associative, lock-free, of fixed size.
//!
//! A page is found by its name *and* the epoch of the entry that names it, so a stale page can
//! never answer. Hits take no lock and write nothing but a "used" mark that is set once, and again after the hand
//! has passed: two threads that hit the same page do not disturb each other. A thread that loses a race for a frame
//! does not cache its page. Only pages that have verified are put in.
//!
//! Two kinds of page share a set, and neither takes a frame of the other: *upper* pages, which are
//! those of level 2 and above, and the pages below them. A page of level 2 is on the way to 2 GiB of
//! 4 KiB blocks, and there are 64 times as many of each level as of the one above it. So upper pages
//! are few, all reads need some, and reads that jump about a large volume bring a page of either
//! lower level each, which would push them out. Upper pages have at most three quarters of a set.
//!
//! The hand of a set goes round, and takes a chance from each page that it passes; one that has none leaves (the
//! generalized clock, Smith 1978). A page above the tag pages gets more of them by a use: it is on the way to 64 of the
//! level below. With one chance for all, thirty-two reads at a time would push out what the next need: so many pages
//! come before anything is used again.

use crate::{
    Epoch,
    format::{PAGE_BYTES, PageId},
    sync::{AtomicU8, AtomicU64, Ordering, fence},
};

const WORDS: usize = PAGE_BYTES / 8;
const WAYS: usize = 8;

/// One frame's state; its page lies in `PageCache::words`.
struct Frame {
    /// Page name + 1; 0 for an empty frame.
    name: AtomicU64,
    epoch: AtomicU64,
    /// Sequence lock: odd while the frame is being written.
    version: AtomicU64,
    /// How many [chances](Chances) are left, and [`HINTED`]: brought by a hint, not used yet.
    marks: AtomicU8,
}

/// Pages of this level and above are upper ones.
const UPPER: u8 = 2;

const HINTED: u8 = 1 << 7;

/// How often the hand passes a page before it leaves.
struct Chances {
    new: u8,
    /// As many again with each use.
    used: u8,
}

impl Chances {
    const MOST: u8 = 7;

    fn of(page: PageId) -> Self {
        match page.level {
            0 => Self { new: 0, used: 1 },
            _ => Self { new: 1, used: Self::MOST },
        }
    }
}

/// What a lookup found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Lookup {
    Miss,
    Hit,
    /// The first use of a page that a hint brought in.
    HintedHit,
}

pub(crate) struct PageCache {
    frames: Vec<Frame>,
    words: Vec<AtomicU64>,
    hands: Vec<AtomicU8>,
    ways: usize,
}

fn name(page: PageId) -> u64 {
    (u64::from(page.level) << 56 | page.index) + 1
}

/// Whether a frame of this name holds an upper page.
fn is_upper(name: u64) -> bool {
    name > u64::from(UPPER) << 56
}

impl PageCache {
    /// A cache of at most `bytes` bytes of pages; may be 0.
    pub(crate) fn new(bytes: u64) -> Self {
        let frames = bytes as usize / PAGE_BYTES;
        let ways = frames.clamp(1, WAYS);
        let sets = frames / ways;
        let frame = || Frame {
            name: AtomicU64::new(0),
            epoch: AtomicU64::new(0),
            version: AtomicU64::new(0),
            marks: AtomicU8::new(0),
        };
        Self {
            frames: (0..sets * ways).map(|_| frame()).collect(),
            words: (0..sets * ways * WORDS).map(|_| AtomicU64::new(0)).collect(),
            hands: (0..sets).map(|_| AtomicU8::new(0)).collect(),
            ways,
        }
    }

    /// The most memory that a cache of `bytes` bytes of pages takes.
    pub(crate) fn most_memory_bytes(bytes: u64) -> u64 {
        bytes.saturating_add(bytes / PAGE_BYTES as u64 * (size_of::<Frame>() as u64 + 1))
    }

    /// How many pages it holds.
    pub(crate) fn pages(&self) -> usize {
        self.frames.len()
    }

    /// Bytes of memory taken.
    pub(crate) fn memory_bytes(&self) -> u64 {
        (self.words.len() * 8 + self.frames.len() * size_of::<Frame>() + self.hands.len()) as u64
    }

    /// The set of a page: the high half of a 128-bit product spreads names over any number of sets.
    fn set(&self, name: u64) -> Option<usize> {
        let hash = name.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let set = (u128::from(hash) * self.hands.len() as u128) >> 64;
        (!self.hands.is_empty()).then_some(set as usize)
    }

    /// Copies `out.len()` bytes at `at` of the page, both multiples of 8, if this
    /// version of it is here.
    pub(crate) fn get(&self, page: PageId, epoch: Epoch, at: usize, out: &mut [u8]) -> Lookup {
        let name = name(page);
        let Some(set) = self.set(name) else { return Lookup::Miss };
        for i in set * self.ways..(set + 1) * self.ways {
            let f = &self.frames[i];
            let version = f.version.load(Ordering::Acquire);
            let here = f.name.load(Ordering::Relaxed) == name && f.epoch.load(Ordering::Relaxed) == epoch.0;
            if !here || version & 1 == 1 {
                continue;
            }
            let words = &self.words[i * WORDS + at / 8..];
            for (bytes, word) in out.chunks_exact_mut(8).zip(words) {
                bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
            }
            // The loads above must not sink below the second look at the version.
            fence(Ordering::Acquire);
            if f.version.load(Ordering::Relaxed) != version {
                return Lookup::Miss;
            }
            let (marks, used) = (f.marks.load(Ordering::Relaxed), Chances::of(page).used);
            if marks != used {
                f.marks.store(used, Ordering::Relaxed);
            }
            return if marks & HINTED != 0 { Lookup::HintedHit } else { Lookup::Hit };
        }
        Lookup::Miss
    }

    /// Whether this version of the page is here; does not change the marks.
    pub(crate) fn holds(&self, page: PageId, epoch: Epoch) -> bool {
        let name = name(page);
        self.set(name).is_some_and(|set| {
            self.frames[set * self.ways..(set + 1) * self.ways]
                .iter()
                .any(|f| f.name.load(Ordering::Relaxed) == name && f.epoch.load(Ordering::Relaxed) == epoch.0)
        })
    }

    /// Keeps a verified page. `hinted`: a prefetch hint brought it.
    pub(crate) fn put(&self, page: PageId, epoch: Epoch, bytes: &[u8], hinted: bool) {
        if self.holds(page, epoch) {
            return;
        }
        let name = name(page);
        let Some(set) = self.set(name) else { return };
        let Some(i) = self.victim(set, name) else { return };
        let f = &self.frames[i];
        let version = f.version.load(Ordering::Relaxed);
        let taken = version & 1 == 0
            && f.version.compare_exchange(version, version + 1, Ordering::Acquire, Ordering::Relaxed).is_ok();
        if !taken {
            return;
        }
        fence(Ordering::Release);
        f.name.store(name, Ordering::Relaxed);
        f.epoch.store(epoch.0, Ordering::Relaxed);
        for (word, bytes) in self.words[i * WORDS..].iter().zip(bytes.chunks_exact(8)) {
            word.store(u64::from_le_bytes(bytes.try_into().expect("8 bytes")), Ordering::Relaxed);
        }
        f.marks.store(Chances::of(page).new | if hinted { HINTED } else { 0 }, Ordering::Relaxed);
        f.version.store(version + 2, Ordering::Release);
    }

    /// An older version of the same page, else an empty frame, else the first of its kind that has no
    /// chance left. None, where races have left the other kind all frames.
    fn victim(&self, set: usize, name: u64) -> Option<usize> {
        let first = set * self.ways;
        let frames = &self.frames[first..first + self.ways];
        let names = || frames.iter().map(|f| f.name.load(Ordering::Relaxed));
        if let Some(way) = names().position(|here| here == name) {
            return Some(first + way);
        }
        let uppers = names().filter(|here| is_upper(*here)).count();
        let full = uppers >= self.most_upper();
        let may_take = |here: u64| match is_upper(name) {
            _ if self.ways == 1 => true,
            true => is_upper(here) == full,
            false => !is_upper(here),
        };
        if let Some(way) = names().position(|here| here == 0 && may_take(here)) {
            return Some(first + way);
        }
        let mut way = usize::from(self.hands[set].load(Ordering::Relaxed)) % self.ways;
        let mut found = None;
        // Each time around takes a chance from all, so that in the end there is one without.
        for _ in 0..(usize::from(Chances::MOST) + 1) * self.ways {
            let f = &frames[way];
            if may_take(f.name.load(Ordering::Relaxed)) {
                found = Some(first + way);
                let marks = f.marks.load(Ordering::Relaxed);
                if marks & !HINTED == 0 {
                    break;
                }
                f.marks.store(marks - 1, Ordering::Relaxed);
            }
            way = (way + 1) % self.ways;
        }
        self.hands[set].store(((way + 1) % self.ways) as u8, Ordering::Relaxed);
        found
    }

    /// Frames of a set that upper pages may have.
    fn most_upper(&self) -> usize {
        self.ways - (self.ways / 4).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(index: u64) -> PageId {
        PageId { level: 0, index }
    }

    #[test]
    fn finds_only_the_version_asked_for() {
        let c = PageCache::new(4 * 4096);
        let bytes: Vec<u8> = (0..4096).map(|i| i as u8).collect();
        c.put(page(3), Epoch(7), &bytes, true);
        let mut out = [0; 32];
        assert_eq!(c.get(page(3), Epoch(8), 64, &mut out), Lookup::Miss);
        assert_eq!(c.get(PageId { level: 1, index: 3 }, Epoch(7), 64, &mut out), Lookup::Miss);
        assert_eq!(c.get(page(3), Epoch(7), 64, &mut out), Lookup::HintedHit);
        assert_eq!(out[..], bytes[64..96]);
        assert_eq!(c.get(page(3), Epoch(7), 64, &mut out), Lookup::Hit);
    }

    #[test]
    fn a_new_version_takes_the_old_ones_place_and_used_pages_stay() {
        let c = PageCache::new(8 * 4096);
        let bytes = [1; 4096];
        let mut out = [0; 8];
        for i in 0..8 {
            c.put(page(i), Epoch(1), &bytes, false);
        }
        assert_eq!(c.get(page(5), Epoch(1), 0, &mut out), Lookup::Hit);
        c.put(page(2), Epoch(2), &bytes, false);
        assert!(c.holds(page(2), Epoch(2)) && !c.holds(page(2), Epoch(1)));
        for i in 8..15 {
            c.put(page(i), Epoch(1), &bytes, false);
        }
        assert!(c.holds(page(5), Epoch(1)), "a used page gets a second chance");
    }

    #[test]
    fn tag_pages_never_push_out_upper_pages_nor_those_the_last_tag_pages() {
        for frames in [2, 3, 8, 64] {
            let c = PageCache::new(frames * 4096);
            let page = |level, index| PageId { level, index };
            let held = |level: u8, count| (0..count).filter(|i| c.holds(page(level, *i), Epoch(1))).count();
            let put = |level, index| c.put(page(level, index), Epoch(1), &[level; 4096], false);
            // Used ones, so that second chances do not decide.
            let lower = |from: u64| {
                for i in from..from + 1000 {
                    put((i % 2) as u8, i);
                    c.get(page((i % 2) as u8, i), Epoch(1), 0, &mut [0; 8]);
                }
            };
            lower(0);
            (0..frames / 8 + 1).for_each(|i| put(2 + (i % 3) as u8, i));
            let before: Vec<_> = (2..5).map(|level| held(level, frames)).collect();
            assert!(before[0] > 0, "they take the place of lower ones");
            lower(1000);
            assert_eq!((2..5).map(|level| held(level, frames)).collect::<Vec<_>>(), before);
            (0..1000).for_each(|i| put(2, i));
            let (uppers, sets) = (held(2, 1000) + held(3, 1000) + held(4, 1000), c.hands.len());
            assert_eq!(uppers, sets * c.most_upper());
            let lowers = held(0, 2000) + held(1, 2000);
            assert_eq!(lowers, sets * (c.ways - c.most_upper()), "tag pages have the rest");
        }
    }

    /// Thirty-two reads at a time look for what they need, all miss their tag page, and all put one in: so many come between
    /// two uses of their parent.
    #[test]
    fn a_used_parent_outlasts_many_tag_pages_and_one_that_nobody_uses_leaves() {
        let c = PageCache::new(8 * 4096);
        let parent = PageId { level: 1, index: 0 };
        c.put(parent, Epoch(1), &[1; 4096], true);
        assert_eq!(c.get(parent, Epoch(1), 0, &mut [0; 8]), Lookup::HintedHit);
        let tag_pages =
            |from: u64, count: u64| (from..from + count).for_each(|i| c.put(page(i), Epoch(1), &[0; 4096], false));
        for round in 0..10 {
            tag_pages(round * 40, 40);
            assert_eq!(c.get(parent, Epoch(1), 0, &mut [0; 8]), Lookup::Hit);
        }
        tag_pages(1000, 100);
        assert!(!c.holds(parent, Epoch(1)));
        c.put(parent, Epoch(1), &[1; 4096], false);
        tag_pages(2000, 20);
        assert!(!c.holds(parent, Epoch(1)), "one that was never used leaves soon");
    }

    #[test]
    fn a_single_frame_is_for_all() {
        let c = PageCache::new(4096);
        for level in [0, 3, 0] {
            c.put(PageId { level, index: 1 }, Epoch(1), &[0; 4096], false);
            assert!(c.holds(PageId { level, index: 1 }, Epoch(1)));
        }
    }

    #[test]
    fn no_memory_is_no_failure() {
        let c = PageCache::new(0);
        c.put(page(1), Epoch(1), &[0; 4096], false);
        assert_eq!(c.get(page(1), Epoch(1), 0, &mut [0; 8]), Lookup::Miss);
    }

    #[test]
    fn readers_never_see_half_a_page() {
        let c = PageCache::new(4096);
        std::thread::scope(|s| {
            s.spawn(|| {
                for i in 0..20_000u64 {
                    c.put(page(i % 3), Epoch(1), &[(i % 3) as u8; 4096], false);
                }
            });
            for _ in 0..2 {
                s.spawn(|| {
                    let mut out = [0; 4096];
                    for i in 0..20_000u64 {
                        if c.get(page(i % 3), Epoch(1), 0, &mut out) != Lookup::Miss {
                            assert!(out.iter().all(|&b| u64::from(b) == i % 3));
                        }
                    }
                });
            }
        });
    }
}

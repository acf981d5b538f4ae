//! Pending tags: what was logged in one epoch and is not yet in a tag page.
//!
//! There are two sets, chosen by the parity of the epoch. A set is a hash table of fixed size that
//! is read without a lock. Who writes a block's entry holds a range guard on the block; who reads it
//! need not, so an entry says by its number whether it is being written. The checkpoint may be
//! emptying a set meanwhile; for that the generation is looked at before and after.

use crate::{
    BlockIndex, BlockRange, Seq,
    format::{LOST_TAG, TAG_BYTES, Tag, ZERO_TAG},
    sync::{AtomicU64, AtomicUsize, Mutex, Ordering, fence},
};

/// In the place of a number: the entry is free, or its tag is being written.
const BEING_WRITTEN: u64 = u64::MAX;

struct Entry {
    /// Block + 1; 0 where free.
    key: AtomicU64,
    /// The number of its change, or [`BEING_WRITTEN`].
    seq: AtomicU64,
    tag: [AtomicU64; TAG_BYTES / 8],
}

/// A run that reads as zeros.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct ZeroRun {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) seq: Seq,
}

/// A pending tag, as the checkpoint reads it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct PendingTag {
    pub(crate) block: BlockIndex,
    place: u32,
}

pub(crate) struct PendingSet {
    table: Vec<Entry>,
    /// Indices in `table`, in order of insertion.
    used: Vec<AtomicU64>,
    count: AtomicUsize,
    runs: Mutex<Vec<ZeroRun>>,
    run_count: AtomicUsize,
    /// Odd while the set is being emptied.
    generation: AtomicU64,
}

impl PendingSet {
    /// A set for `tags` blocks and `runs` runs (as split by overlaps).
    pub(crate) fn new(tags: usize, runs: usize) -> Self {
        // Half full at most: short probes.
        let size = (tags * 2).next_power_of_two();
        let entry = || Entry {
            key: AtomicU64::new(0),
            seq: AtomicU64::new(BEING_WRITTEN),
            tag: std::array::from_fn(|_| AtomicU64::new(0)),
        };
        Self {
            table: (0..size).map(|_| entry()).collect(),
            used: (0..tags).map(|_| AtomicU64::new(0)).collect(),
            count: AtomicUsize::new(0),
            runs: Mutex::new(Vec::with_capacity(runs)),
            run_count: AtomicUsize::new(0),
            generation: AtomicU64::new(0),
        }
    }

    /// The memory of a set for so many tags and runs.
    pub(crate) fn memory_bytes_for(tags: usize, runs: usize) -> u64 {
        ((tags * 2).next_power_of_two() * size_of::<Entry>() + tags * 8 + runs * size_of::<ZeroRun>()) as u64
    }

    pub(crate) fn memory_bytes(&self) -> u64 {
        (self.table.len() * size_of::<Entry>()
            + self.used.len() * 8
            + self.runs.lock().capacity() * size_of::<ZeroRun>()) as u64
    }

    /// Blocks with a tag here.
    pub(crate) fn len(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// Runs of zeros here.
    pub(crate) fn runs(&self) -> usize {
        self.run_count.load(Ordering::Acquire)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0 && self.runs() == 0
    }

    fn probe(&self, block: BlockIndex) -> impl Iterator<Item = usize> {
        // Neighbours lie side by side: a large request touches few cache lines, in order.
        const NEIGHBOURS: u64 = 16;
        let mask = self.table.len() - 1;
        let run = ((block.0 / NEIGHBOURS).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) * NEIGHBOURS;
        let start = (run + block.0 % NEIGHBOURS) as usize;
        (0..self.table.len()).map(move |i| (start + i) & mask)
    }

    /// Puts a tag in; the caller holds the block's range exclusively. Returns whether
    /// the block is new here.
    ///
    /// # Panics
    /// When more than the reserved number of blocks are put in: space is reserved
    /// before anything is logged.
    pub(crate) fn insert(&self, block: BlockIndex, seq: Seq, tag: &Tag) -> bool {
        let key = block.0 + 1;
        let (place, new) = self
            .probe(block)
            .find_map(|i| match self.table[i].key.compare_exchange(0, key, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => Some((i, true)),
                Err(there) if there == key => Some((i, false)),
                Err(_) => None,
            })
            .expect("pending space was reserved");
        let e = &self.table[place];
        e.seq.store(BEING_WRITTEN, Ordering::Relaxed);
        fence(Ordering::Release);
        for (word, bytes) in e.tag.iter().zip(tag.chunks_exact(8)) {
            word.store(u64::from_le_bytes(bytes.try_into().expect("8 bytes")), Ordering::Relaxed);
        }
        e.seq.store(seq.0, Ordering::Release);
        if new {
            let n = self.count.fetch_add(1, Ordering::AcqRel);
            self.used[n].store(place as u64, Ordering::Release);
        }
        new
    }

    /// Puts a run in over what it covers; returns by how many the number of runs grew (at most 2).
    pub(crate) fn insert_run(&self, range: BlockRange, seq: Seq) -> isize {
        // A run of nothing would cut the one that it lies in into two.
        if range.count == 0 {
            return 0;
        }
        let mut runs = self.runs.lock();
        let before = runs.len() as isize;
        let (start, end) = (range.first.0, range.end());
        let first = runs.partition_point(|r| r.end <= start);
        let last = runs.partition_point(|r| r.start < end);
        // Runs first..last overlap the new one; what sticks out on either side stays.
        let left = runs[first..last].first().filter(|r| r.start < start).map(|r| ZeroRun { end: start, ..*r });
        let right = runs[first..last].last().filter(|r| r.end > end).map(|r| ZeroRun { start: end, ..*r });
        let mut new = [ZeroRun { start, end, seq }; 3];
        let mut n = 0;
        for run in [left, Some(new[0]), right].into_iter().flatten() {
            new[n] = run;
            n += 1;
        }
        // An iterator of known length: `splice` then allocates nothing.
        runs.splice(first..last, new[..n].iter().copied());
        self.run_count.store(runs.len(), Ordering::Release);
        runs.len() as isize - before
    }

    fn tag_at(&self, place: usize) -> Tag {
        let mut tag = ZERO_TAG;
        for (bytes, word) in tag.chunks_exact_mut(8).zip(&self.table[place].tag) {
            bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
        }
        tag
    }

    /// The number and the tag of an entry; one that nothing matches while it is being written.
    fn entry_at(&self, place: usize) -> (Seq, Tag) {
        let seq = &self.table[place].seq;
        let before = seq.load(Ordering::Acquire);
        let tag = self.tag_at(place);
        fence(Ordering::Acquire);
        let whole = before != BEING_WRITTEN && seq.load(Ordering::Relaxed) == before;
        if whole { (Seq(before), tag) } else { (Seq(BEING_WRITTEN), LOST_TAG) }
    }

    fn lookup_tag(&self, block: BlockIndex) -> Option<(Seq, Tag)> {
        if self.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        for i in self.probe(block) {
            match self.table[i].key.load(Ordering::Acquire) {
                0 => return None,
                key if key == block.0 + 1 => {
                    return Some(self.entry_at(i));
                }
                _ => {}
            }
        }
        None
    }

    /// The run of zeros over a block, if any.
    pub(crate) fn zeros_at(&self, block: BlockIndex) -> Option<Seq> {
        if self.run_count.load(Ordering::Acquire) == 0 {
            return None;
        }
        run_over(&self.runs.lock(), block)
    }

    /// How often the set has been emptied, twice; odd while it is being emptied.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// The newest thing this set knows of a block. Without a range guard on the block that may be
    /// [`LOST_TAG`], where it is just being changed.
    ///
    /// While the set is emptied its content is in the tree already, so "nothing here" is right then.
    pub(crate) fn lookup(&self, block: BlockIndex) -> Option<(Seq, Tag)> {
        let generation = self.generation.load(Ordering::Acquire);
        if generation & 1 == 1 {
            return None;
        }
        let tag = self.lookup_tag(block);
        let zeros = self.zeros_at(block).map(|seq| (seq, ZERO_TAG));
        let newest = tag.into_iter().chain(zeros).max_by_key(|(seq, _)| *seq);
        fence(Ordering::Acquire);
        // Acquire, too: a reader that discards what it has found must see the root
        // that was stored before.
        newest.filter(|_| self.generation.load(Ordering::Acquire) == generation)
    }

    /// For the checkpoint, when nothing of the set's epoch is in flight any more: the tags that are
    /// not overlaid by a later run of zeros, by block, and the runs.
    pub(crate) fn sorted(&self, tags: &mut Vec<PendingTag>, runs: &mut Vec<ZeroRun>) {
        runs.clear();
        runs.extend_from_slice(&self.runs.lock());
        tags.clear();
        for used in &self.used[..self.len()] {
            let place = used.load(Ordering::Acquire) as usize;
            let e = &self.table[place];
            let block = BlockIndex(e.key.load(Ordering::Acquire) - 1);
            let overlaid = run_over(runs, block).is_some_and(|seq| seq.0 > e.seq.load(Ordering::Relaxed));
            if !overlaid {
                tags.push(PendingTag { block, place: place as u32 });
            }
        }
        tags.sort_unstable();
    }

    /// The first block at or after `from` with a tag here. Looks at all of them: for
    /// tools, not for requests.
    pub(crate) fn next(&self, from: BlockIndex) -> Option<BlockIndex> {
        self.blocks().filter(|block| *block >= from).min()
    }

    /// All blocks with a tag here, in any order.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = BlockIndex> {
        let blocks = self.used[..self.len()].iter().map(|place| {
            let place = place.load(Ordering::Acquire) as usize;
            self.table[place].key.load(Ordering::Acquire).wrapping_sub(1)
        });
        blocks.filter(|block| *block != u64::MAX).map(BlockIndex)
    }

    /// The tag itself.
    pub(crate) fn tag(&self, t: PendingTag) -> Tag {
        self.tag_at(t.place as usize)
    }

    /// Empties the set. Its content has been published by
    /// [`Root::store`](crate::metadata::root::Root::store) *before*: that store's fence is what
    /// makes a reader that sees the set half empty see the new root too.
    pub(crate) fn clear(&self) {
        let generation = self.generation.load(Ordering::Relaxed);
        self.generation.store(generation + 1, Ordering::Relaxed);
        fence(Ordering::Release);
        for used in &self.used[..self.len()] {
            let entry = &self.table[used.load(Ordering::Relaxed) as usize];
            entry.seq.store(BEING_WRITTEN, Ordering::Relaxed);
            entry.key.store(0, Ordering::Relaxed);
        }
        self.count.store(0, Ordering::Release);
        self.runs.lock().clear();
        self.run_count.store(0, Ordering::Release);
        self.generation.store(generation + 2, Ordering::Release);
    }
}

fn run_over(runs: &[ZeroRun], block: BlockIndex) -> Option<Seq> {
    let i = runs.partition_point(|r| r.end <= block.0);
    runs.get(i).filter(|r| r.start <= block.0).map(|r| r.seq)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[test]
    fn blocks_that_want_the_same_place_each_find_one() {
        let set = PendingSet::new(64, 1);
        let (block, tag) = (|n: u64| BlockIndex(n * 16), |n: u64| [n as u8 + 1; TAG_BYTES]);
        for new in [true, false] {
            (0..64).for_each(|n| assert_eq!(set.insert(block(n), Seq(n), &tag(n)), new));
            (0..64).for_each(|n| assert_eq!(set.lookup(block(n)), Some((Seq(n), tag(n)))));
        }
    }

    proptest! {
        #[test]
        fn behaves_like_a_map(ops in prop::collection::vec((0u64..64, 1u64..20, any::<bool>()), 1..200)) {
            let set = PendingSet::new(64, 512);
            let mut model = BTreeMap::new();
            let mut runs = 0;
            for (i, (first, count, zero)) in ops.into_iter().enumerate() {
                let seq = Seq(i as u64 + 1);
                if zero {
                    runs += set.insert_run(BlockRange::new(BlockIndex(first), count), seq);
                    for b in first..first + count { model.insert(b, (seq, ZERO_TAG)); }
                } else {
                    set.insert(BlockIndex(first), seq, &[i as u8 + 1; 32]);
                    model.insert(first, (seq, [i as u8 + 1; 32]));
                }
                for b in 0..90 { prop_assert_eq!(set.lookup(BlockIndex(b)), model.get(&b).copied()); }
            }
            let (mut tags, mut list) = (Vec::new(), Vec::new());
            set.sorted(&mut tags, &mut list);
            prop_assert_eq!(list.len() as isize, runs);
            let tagged: Vec<_> = tags.iter().map(|&t| (t.block.0, set.tag(t))).collect();
            let want: Vec<_> = model.iter().filter(|(_, (_, t))| *t != ZERO_TAG).map(|(&b, &(_, t))| (b, t)).collect();
            prop_assert_eq!(tagged, want);
            set.clear();
            prop_assert!(set.is_empty());
            for b in 0..90 { prop_assert_eq!(set.lookup(BlockIndex(b)), None); }
        }
    }
}

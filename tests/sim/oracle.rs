//! What each block may rightly read as.

use super::{image::TAGS_PER_PAGE, rot::tag_pages};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Range,
};
use ublk_integrity::{BlockIndex, BlockRange, ReadError};

/// The content of one write to one block: 0 stands for zeros.
pub type VersionId = u64;

/// Fills one block with a version's content.
pub fn fill(block: BlockIndex, version: VersionId, out: &mut [u8]) {
    for (i, word) in out.chunks_exact_mut(8).enumerate() {
        let value = if version == 0 { 0 } else { version ^ (block.0 << 32) ^ ((i as u64) << 56) };
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// The same for each block of a range, from the front of `out`.
pub fn fill_all(range: BlockRange, version: VersionId, block_size: usize, out: &mut [u8]) {
    range.blocks().zip(out.chunks_exact_mut(block_size)).for_each(|(block, bytes)| fill(block, version, bytes));
}

#[derive(Clone, Default, Debug)]
struct History {
    /// In the order in which the range was taken.
    issued: Vec<VersionId>,
    /// When each was.
    times: Vec<u64>,
    /// The newest that completed.
    acked: usize,
    /// When that was issued.
    fresh: u64,
    /// Nothing older may be read after a crash.
    floor: usize,
    /// Nor anything older than what a heal has put in place. The log knows nothing of it.
    healed: usize,
    /// What the log was told of when the last crash came.
    recorded: usize,
    /// A write failed and may have left anything, or the block has rotted: EILSEQ is right until the next write.
    broken: bool,
    /// How often that was said.
    breaks: u64,
    /// Versions before this one may have been in place when the block rotted; 0: it has not.
    rotten: usize,
    /// Nothing has made it good since then, and it is bad for sure.
    bad_since: Option<u64>,
    /// It is not known which version the tag is of.
    unsure: bool,
    /// Requests under way that change it, and those who try to heal it.
    open: u32,
    heals: u32,
    /// How often it has rotted, was healed, or a request came to change it.
    changes: u64,
}

impl History {
    fn of(version: VersionId) -> Self {
        Self { issued: vec![version], times: vec![0], ..Self::default() }
    }
    fn set_broken(&mut self) {
        self.broken = true;
        self.breaks += 1;
    }
    fn change(&mut self) {
        self.changes += 1;
        self.bad_since = None;
    }
    /// Nothing older may be read after a crash that leaves whole blocks.
    fn oldest(&self) -> usize {
        self.floor.max(self.healed)
    }
}

#[derive(Clone, Default)]
pub struct Oracle {
    blocks: HashMap<u64, History>,
    /// Counts what happens.
    now: u64,
    /// Tag pages that have rotted, or a page above them, and when they did last.
    rotted: BTreeMap<u64, u64>,
    /// Those of them that may be bad yet, and blocks of the others whose tags are gone.
    lost: BTreeSet<u64>,
    gone: BTreeSet<u64>,
}

/// A block when a read of it began.
#[derive(Default, Debug)]
pub struct Before {
    at: u64,
    acked: usize,
    broken: bool,
    breaks: u64,
}

impl Before {
    pub fn is_broken(&self) -> bool {
        self.broken
    }
}

/// A block when somebody begins to heal it.
#[derive(Debug)]
pub struct BeforeHeal {
    pub before: Before,
    /// What its tag is of, where that is known.
    pub version: Option<VersionId>,
    /// It is bad for sure.
    pub is_bad: bool,
    changes: u64,
}

/// What was acknowledged at some moment.
pub struct Snapshot(HashMap<u64, usize>);

impl Oracle {
    fn of(&mut self, block: BlockIndex) -> &mut History {
        self.blocks.entry(block.0).or_insert_with(|| History::of(0))
    }
    /// A moment to ask about later.
    pub fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }
    /// A request takes its range; returns its place in each block's history.
    pub fn issue(&mut self, range: BlockRange, version: VersionId) -> Vec<usize> {
        let now = self.tick();
        range
            .blocks()
            .map(|b| {
                let h = self.of(b);
                h.issued.push(version);
                h.times.push(now);
                h.change();
                h.open += 1;
                h.issued.len() - 1
            })
            .collect()
    }
    /// A request that changes its range has ended, in whichever way.
    pub fn ended(&mut self, range: BlockRange) {
        range.blocks().for_each(|b| self.of(b).open -= 1);
    }
    pub fn ack(&mut self, range: BlockRange, places: &[usize], durable: bool) {
        for (b, place) in range.blocks().zip(places) {
            let h = self.of(b);
            h.acked = h.acked.max(*place);
            h.fresh = h.times[h.acked];
            h.unsure = false;
            // One that had come before it rotted may have been in place by then.
            h.broken &= *place < h.rotten;
            if durable {
                h.floor = h.floor.max(*place);
            }
        }
    }
    pub fn fail(&mut self, range: BlockRange) {
        range.blocks().for_each(|b| self.of(b).set_broken());
    }
    pub fn snapshot(&self) -> Snapshot {
        Snapshot(self.blocks.iter().map(|(b, h)| (*b, h.acked)).collect())
    }
    pub fn flushed(&mut self, snapshot: Snapshot) {
        for (b, acked) in snapshot.0 {
            let h = self.of(BlockIndex(b));
            h.floor = h.floor.max(acked);
        }
    }
    /// What a power cut must not take back, by block: places in the histories.
    pub fn promised(&self) -> BTreeMap<u64, usize> {
        self.blocks.iter().filter(|(_, h)| h.floor > 0).map(|(b, h)| (*b, h.floor)).collect()
    }
    /// What was acknowledged last, by block: places in the histories.
    pub fn acknowledged(&self) -> BTreeMap<u64, usize> {
        self.blocks.iter().map(|(b, h)| (*b, h.acked)).collect()
    }
    /// What is read of a block that somebody has exchanged while the power was off.
    pub fn check_exchanged(&self, block: BlockIndex, recorded: usize, data: &[u8]) {
        self.check(block, recorded, &self.blocks[&block.0], data, "exchanged");
    }
    /// The daemon died and the machine did not: all that was acknowledged is there.
    pub fn killed(&mut self) {
        self.blocks.values_mut().for_each(|h| h.floor = h.floor.max(h.acked));
    }
    /// Blocks that have a version which a power cut must not take back.
    pub fn flushed_blocks(&self) -> u64 {
        self.blocks.values().filter(|h| h.floor > 0).count() as u64
    }
    /// What is read while the volume runs: nothing older than what was acknowledged
    /// when the read began. `on_medium`: that is where it was read.
    pub fn check_running(&mut self, block: BlockIndex, before: &Before, data: &[u8], on_medium: bool) {
        let h = self.of(block).clone();
        self.check(block, before.acked, &h, data, "running");
        // Whatever a failed write left there has been settled: from now on an error is a false alarm.
        self.of(block).broken &= !on_medium || h.breaks > before.breaks;
    }
    /// Whether the page that has its tag may be bad, or was and took the tag along, and no newer tag has come.
    fn is_lost(&self, block: u64, fresh: u64) -> bool {
        let page = block / TAGS_PER_PAGE;
        (self.lost.contains(&page) || self.gone.contains(&block)) && fresh < self.rotted[&page]
    }
    fn before_of(&self, block: u64, h: &History) -> Before {
        let broken = h.broken || self.is_lost(block, h.fresh);
        Before { at: self.now, acked: h.acked.max(h.healed), broken, breaks: h.breaks }
    }
    /// What a read of this block may rely on, at its start.
    pub fn before(&mut self, block: BlockIndex) -> Before {
        let h = self.of(block).clone();
        self.before_of(block.0, &h)
    }
    pub fn broken(&self, block: BlockIndex) -> bool {
        let h = self.blocks.get(&block.0);
        h.is_some_and(|h| h.broken) || self.is_lost(block.0, h.map_or(0, |h| h.fresh))
    }
    /// What a look at all blocks may rely on, at its start, by block.
    pub fn before_all(&self) -> HashMap<u64, Before> {
        self.blocks.iter().map(|(b, h)| (*b, self.before_of(*b, h))).collect()
    }
    /// Whether it has been broken at any moment since: a read may be answered late.
    pub fn broken_since(&self, block: BlockIndex, before: &Before) -> bool {
        let page_has = self.rotted.get(&(block.0 / TAGS_PER_PAGE)).is_some_and(|at| *at > before.at);
        before.broken || page_has || self.blocks.get(&block.0).is_some_and(|h| h.breaks > before.breaks)
    }
    fn check(&self, block: BlockIndex, floor: usize, h: &History, data: &[u8], when: &str) -> VersionId {
        let mut want = vec![0; data.len()];
        for version in h.issued[floor..].iter().rev() {
            fill(block, *version, &mut want);
            if want == data {
                return *version;
            }
        }
        let older = h.issued[..floor].iter().any(|v| {
            fill(block, *v, &mut want);
            want == data
        });
        panic!(
            "{when}: block {block} reads as {}: {:02x?}, floor {floor} of {:?}",
            if older { "an older version" } else { "nothing that was ever written" },
            &data[..16],
            h.issued
        );
    }
    /// What is read after a crash becomes the only version.
    pub fn settle(&mut self, block: BlockIndex, data: Option<&[u8]>, torn: bool) {
        let h = self.of(block).clone();
        let is_lost = self.is_lost(block.0, h.fresh);
        let Some(data) = data else {
            assert!(h.broken || torn || is_lost, "false alarm: block {block} does not verify: {h:?}");
            let now = self.tick();
            let h = self.of(block);
            h.unsure = true;
            h.acked = h.oldest();
            if !is_lost {
                h.set_broken();
                h.bad_since = Some(now);
            }
            return;
        };
        // Torn below the unit of atomicity: that its newest version was flushed can't be known
        // then, if the flush entry was not durable yet.
        let floor = if torn { h.recorded } else { h.oldest() };
        let version = self.check(block, floor, &h, data, "after a crash");
        // By now its tag is in the page, or that is bad.
        let fresh = if self.lost.contains(&(block.0 / TAGS_PER_PAGE)) { 0 } else { self.tick() };
        *self.of(block) = History { times: vec![fresh], fresh, ..History::of(version) };
    }
    /// The daemon or the machine has gone down, and of these versions the log had been told. What had rotted, and
    /// nothing made good for good, may be bad again, or read as what it held before if the log can't know better.
    pub fn crashed(&mut self, recorded: &BTreeMap<u64, usize>) {
        let mut blocks = std::mem::take(&mut self.blocks);
        for (block, h) in &mut blocks {
            (h.open, h.heals, h.bad_since) = (0, 0, None);
            h.recorded = recorded.get(block).copied().unwrap_or(0);
            h.fresh = h.times[h.floor];
            // What may not have arrived leaves nothing that can be proven where the older tag is lost; or where the block
            // had rotted, though what is newer than that lies in the log.
            let may_be_bad = h.rotten > 0 || self.is_lost(*block, 0);
            if may_be_bad && h.oldest() + 1 < h.issued.len() {
                h.set_broken();
            }
            if h.rotten > h.oldest() {
                h.set_broken();
                (h.floor, h.healed) = (h.floor.min(h.recorded), 0);
            }
        }
        self.blocks = blocks;
    }

    /// From now on the medium holds something else there: `is` says whether that is what a version holds.
    pub fn rot(&mut self, block: BlockIndex, mut is: impl FnMut(VersionId) -> bool) {
        let (now, version) = (self.tick(), self.tag_of(block));
        let h = self.of(block);
        h.change();
        h.rotten = h.issued.len();
        h.set_broken();
        h.bad_since = version.filter(|version| *version != 0 && !is(*version)).map(|_| now);
    }
    /// These tag pages have rotted, or a page above them.
    pub fn page_rots(&mut self, pages: Range<u64>) {
        let now = self.tick();
        self.rotted.extend(pages.clone().map(|page| (page, now)));
        self.lost.extend(pages);
    }
    /// That a page is damaged is right only of one that has rotted at some time.
    pub fn explains(&self, error: &ReadError) -> bool {
        let ReadError::BadPage { page, .. } = error else { return true };
        self.page_broken_since(tag_pages(page.level, page.index), 0)
    }
    /// When one did last.
    pub fn last_page_rot(&self) -> u64 {
        self.rotted.values().copied().max().unwrap_or(0)
    }
    /// Whether one of these tag pages has rotted since then.
    pub fn page_rots_since(&self, mut pages: Range<u64>, moment: u64) -> bool {
        pages.any(|page| self.rotted.get(&page).is_some_and(|at| *at > moment))
    }
    /// Whether one of them has been bad at any moment since then.
    pub fn page_broken_since(&self, pages: Range<u64>, moment: u64) -> bool {
        self.lost.range(pages.clone()).next().is_some() || self.page_rots_since(pages, moment)
    }
    pub fn lost_pages(&self) -> Vec<u64> {
        self.lost.iter().copied().collect()
    }
    /// A tag page is whole again; of these of its blocks the tags are gone.
    pub fn page_is_whole(&mut self, page: u64, gone: impl Iterator<Item = u64>) {
        self.gone.retain(|block| block / TAGS_PER_PAGE != page);
        self.gone.extend(gone);
        self.lost.remove(&page);
    }
    /// Which version the tag of a block is of, if nobody is changing it.
    pub fn tag_of(&mut self, block: BlockIndex) -> Option<VersionId> {
        let h = self.of(block).clone();
        let known = h.open == 0 && !h.unsure && h.acked + 1 == h.issued.len();
        (known && !self.is_lost(block.0, h.fresh)).then(|| h.issued[h.acked])
    }
    /// The same after a crash, for one that is bad: somebody has looked.
    pub fn set_tag(&mut self, block: BlockIndex, version: VersionId) {
        let now = self.tick();
        let h = self.of(block);
        *h = History { bad_since: h.bad_since.map(|_| now), rotten: 1, ..History::of(version) };
        h.set_broken();
    }
    /// Blocks that are bad, and it is not known what their tags are of.
    pub fn unsure(&self) -> Vec<BlockIndex> {
        let unsure = self.blocks.iter().filter(|(_, h)| h.unsure && h.broken);
        unsure.map(|(block, _)| BlockIndex(*block)).collect()
    }
    /// Blocks that may be bad.
    pub fn bad(&self) -> Vec<BlockIndex> {
        self.touched().into_iter().filter(|block| self.broken(*block)).collect()
    }
    /// Somebody begins to heal a block.
    pub fn heal_begins(&mut self, block: BlockIndex) -> BeforeHeal {
        let (before, version) = (self.before(block), self.tag_of(block));
        let h = self.of(block);
        h.heals += 1;
        BeforeHeal { before, version, is_bad: h.bad_since.is_some(), changes: h.changes }
    }
    /// Whether anything has happened to a block but that somebody has tried to heal it.
    pub fn has_changed(&mut self, block: BlockIndex, since: &BeforeHeal) -> bool {
        self.of(block).changes != since.changes
    }
    /// That has come to an end. A pass that has been under way beside it need not find the block.
    /// `is_known`: what it has done.
    pub fn heal_ended(&mut self, block: BlockIndex, is_known: bool) {
        let now = self.tick();
        let h = self.of(block);
        h.heals -= 1;
        h.bad_since = h.bad_since.filter(|_| is_known).map(|_| now);
    }
    /// A block has been healed with this.
    pub fn healed(&mut self, block: BlockIndex, since: &BeforeHeal, data: &[u8]) {
        let h = self.of(block).clone();
        let version = self.check(block, since.before.acked, &h, data, "healed");
        let h = self.of(block);
        let place = h.issued.iter().rposition(|issued| *issued == version).expect("just found");
        h.healed = h.healed.max(place);
        h.change();
        if h.breaks == since.before.breaks {
            (h.broken, h.rotten) = (false, 0);
        }
    }
    /// Blocks that have been bad since before that moment, whatever anybody did.
    pub fn bad_since(&self, moment: u64) -> Vec<BlockIndex> {
        let is_bad = |h: &History| h.heals == 0 && h.bad_since.is_some_and(|at| at < moment);
        self.blocks.iter().filter(|(_, h)| is_bad(h)).map(|(b, _)| BlockIndex(*b)).collect()
    }
    /// All versions of a block, in order.
    pub fn issued(&self, block: BlockIndex) -> &[VersionId] {
        self.blocks.get(&block.0).map_or(&[0], |h| &h.issued)
    }
    pub fn touched(&self) -> Vec<BlockIndex> {
        let mut blocks: Vec<_> = self.blocks.keys().copied().map(BlockIndex).collect();
        blocks.sort_unstable();
        blocks
    }
}

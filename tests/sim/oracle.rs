//! What each block may rightly read as.

use std::collections::{BTreeMap, HashMap};
use ublk_integrity::{BlockIndex, BlockRange};

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

#[derive(Clone, Debug)]
struct History {
    /// In the order in which the range was taken.
    issued: Vec<VersionId>,
    /// The newest that completed.
    acked: usize,
    /// Nothing older may be read after a crash.
    floor: usize,
    /// A write failed and may have left anything: EILSEQ is right until the next write.
    broken: bool,
    /// How often that was said.
    breaks: u64,
}

impl History {
    fn set_broken(&mut self) {
        self.broken = true;
        self.breaks += 1;
    }
}

impl Default for History {
    fn default() -> Self {
        Self { issued: vec![0], acked: 0, floor: 0, broken: false, breaks: 0 }
    }
}

#[derive(Clone, Default)]
pub struct Oracle {
    blocks: HashMap<u64, History>,
}

/// A block when a read of it began.
#[derive(Default)]
pub struct Before {
    acked: usize,
    broken: bool,
    breaks: u64,
}

impl Before {
    pub fn is_broken(&self) -> bool {
        self.broken
    }
}

/// What was acknowledged at some moment.
pub struct Snapshot(HashMap<u64, usize>);

impl Oracle {
    fn of(&mut self, block: BlockIndex) -> &mut History {
        self.blocks.entry(block.0).or_default()
    }
    /// A request takes its range; returns its place in each block's history.
    pub fn issue(&mut self, range: BlockRange, version: VersionId) -> Vec<usize> {
        range
            .blocks()
            .map(|b| {
                let h = self.of(b);
                h.issued.push(version);
                h.issued.len() - 1
            })
            .collect()
    }
    pub fn ack(&mut self, range: BlockRange, places: &[usize], durable: bool) {
        for (b, place) in range.blocks().zip(places) {
            let h = self.of(b);
            h.acked = h.acked.max(*place);
            h.broken = false;
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
    /// when the read began.
    pub fn check_running(&mut self, block: BlockIndex, before: &Before, data: &[u8]) {
        let h = self.of(block).clone();
        self.check(block, before.acked, &h, data, "running");
        // Whatever a failed write left there has been settled: from now on an error is a false alarm.
        self.of(block).broken &= h.breaks > before.breaks;
    }
    /// What a read of this block may rely on, at its start.
    pub fn before(&mut self, block: BlockIndex) -> Before {
        let h = self.of(block);
        Before { acked: h.acked, broken: h.broken, breaks: h.breaks }
    }
    pub fn broken(&mut self, block: BlockIndex) -> bool {
        self.of(block).broken
    }
    /// What a look at all blocks may rely on, at its start, by block.
    pub fn before_all(&self) -> HashMap<u64, Before> {
        let before = |h: &History| Before { acked: h.acked, broken: h.broken, breaks: h.breaks };
        self.blocks.iter().map(|(b, h)| (*b, before(h))).collect()
    }
    /// Whether it has been broken at any moment since: a read may be answered late.
    pub fn broken_since(&mut self, block: BlockIndex, before: &Before) -> bool {
        before.broken || self.of(block).breaks > before.breaks
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
        let Some(data) = data else {
            assert!(
                h.broken || torn,
                "false alarm: block {block} does not verify; issued {:?}, floor {}",
                h.issued,
                h.floor
            );
            self.of(block).set_broken();
            return;
        };
        // Torn below the unit of atomicity: that its newest version was flushed can't be known
        // then, if the flush entry was not durable yet.
        let floor = if torn { 0 } else { h.floor };
        let version = self.check(block, floor, &h, data, "after a crash");
        *self.of(block) = History { issued: vec![version], acked: 0, floor: 0, broken: false, breaks: 0 };
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

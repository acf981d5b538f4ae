//! Verifying every block: returns a report, prints nothing.

use crate::{
    BadReason, BlockIndex, BlockRange, Buf, Io, ReadError, Slot, Volume,
    format::TAGS_PER_PAGE,
    metadata::tree::{CacheUse, Found, LoadError, Missing, Walk},
};
use serde::Serialize;
use std::ops::ControlFlow;

/// What [`check`] found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct CheckReport {
    /// Blocks of the volume.
    pub blocks: u64,
    /// Blocks looked at, from the first on: all of them, unless it was ended before.
    pub checked_blocks: u64,
    /// Of these, blocks that hold data (the rest reads as zeros).
    pub data_blocks: u64,
    /// Blocks that do not match their tags or can't be verified.
    pub bad_blocks: u64,
    /// Blocks that the device could not read.
    pub unreadable_blocks: u64,
    /// Runs of such blocks with the reason, in order; at most [`MAX_REPORTED_RUNS`].
    pub bad_runs: Vec<BadRun>,
    /// More runs were found than are listed.
    pub truncated: bool,
}

/// How many runs a report lists.
pub const MAX_REPORTED_RUNS: usize = 10_000;

/// A run of bad blocks.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct BadRun {
    /// The blocks.
    pub range: BlockRange,
    /// What is wrong with them.
    #[serde(flatten)]
    pub reason: BadReason,
}

impl CheckReport {
    fn add(&mut self, range: BlockRange, error: &ReadError) {
        let unreadable = matches!(error, ReadError::Device(_));
        *(if unreadable { &mut self.unreadable_blocks } else { &mut self.bad_blocks }) += range.count;
        let reason = error.reason();
        let full = self.bad_runs.len() == MAX_REPORTED_RUNS;
        match self.bad_runs.last_mut() {
            Some(last) if last.range.end() == range.first.0 && last.reason == reason => last.range.count += range.count,
            _ if full => self.truncated = true,
            _ => self.bad_runs.push(BadRun { range, reason }),
        }
    }
    /// Whether every block that was looked at verified.
    pub fn is_clean(&self) -> bool {
        self.bad_blocks + self.unreadable_blocks == 0
    }
    /// Whether all blocks were looked at.
    pub fn is_whole(&self) -> bool {
        self.checked_blocks == self.blocks
    }
}

/// Verifies all blocks of the volume; `progress` is called with the number of blocks done, and may end it there.
/// Subtrees that read as zeros are passed over whole.
pub async fn check<S: Io>(
    volume: &Volume,
    io: &S,
    slot: &mut Slot,
    mut progress: impl FnMut(u64) -> ControlFlow<()>,
) -> CheckReport {
    let mut report = CheckReport { blocks: volume.blocks(), ..Default::default() };
    let mut buf = Buf::new(volume.max_request_bytes);
    let mut from = BlockIndex(0);
    while let Some(run) = volume.next_data(io, slot, from).await {
        let most = (volume.max_request_bytes / volume.block_size()) as u64;
        for first in (run.first.0..run.end()).step_by(most as usize) {
            let part = BlockRange::new(BlockIndex(first), most.min(run.end() - first));
            buf = check_part(volume, io, slot, part, buf, &mut report).await;
            report.checked_blocks = part.end();
            if progress(part.end()).is_break() {
                return report;
            }
        }
        from = BlockIndex(run.end());
    }
    report.checked_blocks = volume.blocks();
    let _ = progress(volume.blocks());
    report
}

/// Whether any block holds data, or can't be verified: where it is not so, all of the volume reads as zeros.
pub async fn holds_data<S: Io>(volume: &Volume, io: &S, slot: &mut Slot) -> bool {
    let mut buf = Buf::new(volume.max_request_bytes);
    let mut report = CheckReport::default();
    let most = (volume.max_request_bytes / volume.block_size()) as u64;
    let mut from = BlockIndex(0);
    while let Some(run) = volume.next_data(io, slot, from).await {
        let part = BlockRange::new(run.first, run.count.min(most));
        buf = check_part(volume, io, slot, part, buf, &mut report).await;
        if report.data_blocks > 0 {
            return true;
        }
        from = BlockIndex(part.end());
    }
    false
}

async fn check_part<S: Io>(
    volume: &Volume,
    io: &S,
    slot: &mut Slot,
    part: BlockRange,
    buf: Buf,
    report: &mut CheckReport,
) -> Buf {
    let (result, mut buf) = volume.read(io, slot, part, buf).await;
    let zero = crate::format::ZERO_TAG;
    if result.is_ok() {
        report.data_blocks += slot.tags.tags(part.count).iter().filter(|t| **t != zero).count() as u64;
        return buf;
    }
    for block in part.blocks() {
        let one = BlockRange::new(block, 1);
        let result;
        (result, buf) = volume.read(io, slot, one, buf).await;
        match result {
            Ok(()) => report.data_blocks += u64::from(slot.tags.tags(1)[0] != zero),
            Err(e) => {
                report.data_blocks += 1;
                report.add(one, &e);
            }
        }
    }
    buf
}

impl Volume {
    /// The next run of blocks at or after `from` that may hold data; everything between reads as zeros.
    /// A run under damaged metadata counts as data: reading it tells what is wrong.
    pub async fn next_data<S: Io>(&self, io: &S, slot: &mut Slot, from: BlockIndex) -> Option<BlockRange> {
        let mut at = from;
        if self.newer_from.is_some() && from.0 < self.blocks() {
            // What the tree says of a subtree may be older, too.
            return Some(BlockRange::new(from, self.blocks() - from.0));
        }
        while at.0 < self.blocks() {
            let page_end = (at.0 / TAGS_PER_PAGE + 1) * TAGS_PER_PAGE;
            let absent_to = match self.find_page(io, slot, at).await {
                Ok(Found::Absent(page)) => self.tree.layout.blocks_under(page).end(),
                _ => at.0,
            };
            if absent_to == at.0 {
                return Some(BlockRange::new(at, page_end.min(self.blocks()) - at.0));
            }
            if let Some(pending) = self.next_pending(at).filter(|b| b.0 < absent_to) {
                let end = (pending.0 / TAGS_PER_PAGE + 1) * TAGS_PER_PAGE;
                return Some(BlockRange::new(pending, end.min(self.blocks()) - pending.0));
            }
            at = BlockIndex(absent_to);
        }
        None
    }

    /// The first block at or after `from` with a tag that is not in the tree yet.
    fn next_pending(&self, from: BlockIndex) -> Option<BlockIndex> {
        let kept = self.overlay.get(self.overlay.partition_point(|b| *b < from)).copied();
        // A volume that takes writes has no overlay; its pending sets are searched.
        let live = self.pending.iter().filter(|_| self.overlay.is_empty()).filter_map(|set| set.next(from)).min();
        kept.into_iter().chain(live).min()
    }

    async fn find_page<S: Io>(&self, io: &S, slot: &mut Slot, block: BlockIndex) -> Result<Found, LoadError> {
        let (leaf, _) = self.tree.layout.tag_page_of(block);
        let root = self.tree.root.load();
        match self.tree.walk(root, leaf.index, 0, &mut [], &mut CacheUse::default()) {
            Walk::Found(found) => Ok(found),
            Walk::Missing(page, entry) => {
                let (mut missing, mut result) = (Missing::new(leaf.index), Found::Page);
                missing.add(leaf.index, page, entry);
                self.tree.load(io, &mut slot.pages, &missing, false, |_, found, _| result = found).await?;
                Ok(result)
            }
        }
    }
}

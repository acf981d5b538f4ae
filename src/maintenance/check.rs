//! Verifying every block: returns a report, prints nothing.

use crate::{BadReason, BlockIndex, BlockRange, Buf, Io, ReadError, Volume, request::context::RequestContext};
use serde::{Deserialize, Serialize};
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
    /// Of these, blocks that lie in the log and are good there: the next open for writing puts them in
    /// place.
    pub in_log: u64,
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
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BadRun {
    /// The blocks.
    pub range: BlockRange,
    /// What is wrong with them.
    #[serde(flatten)]
    pub reason: BadReason,
}

/// Takes blocks out of the runs that they are in, each once and in the order of the runs; `taken` hears what
/// was wrong with each.
pub(super) fn take_out(runs: &mut Vec<BadRun>, blocks: &[BlockIndex], mut taken: impl FnMut(BadReason)) {
    let mut blocks = blocks.iter().peekable();
    for BadRun { mut range, reason } in std::mem::take(runs) {
        while let Some(block) = blocks.next_if(|block| range.overlaps(BlockRange::new(**block, 1))) {
            let before = BlockRange::new(range.first, block.0 - range.first.0);
            runs.extend((before.count > 0).then_some(BadRun { range: before, reason }));
            range = BlockRange::new(BlockIndex(block.0 + 1), range.end() - block.0 - 1);
            taken(reason);
        }
        runs.extend((range.count > 0).then_some(BadRun { range, reason }));
    }
}

impl CheckReport {
    /// Blocks that were found bad are good now: in order, each once.
    pub fn are_good(&mut self, blocks: &[BlockIndex]) {
        let mut runs = std::mem::take(&mut self.bad_runs);
        take_out(&mut runs, blocks, |reason| *self.count_of(matches!(reason, BadReason::Unreadable { .. })) -= 1);
        self.truncated |= runs.len() > MAX_REPORTED_RUNS;
        runs.truncate(MAX_REPORTED_RUNS);
        self.bad_runs = runs;
    }

    fn count_of(&mut self, unreadable: bool) -> &mut u64 {
        if unreadable { &mut self.unreadable_blocks } else { &mut self.bad_blocks }
    }

    fn add(&mut self, range: BlockRange, error: &ReadError) {
        *self.count_of(matches!(error, ReadError::Device(_))) += range.count;
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

/// Verifies all blocks of the volume; `progress` is called with the number of blocks done, and may
/// end it there. Subtrees that read as zeros are passed over whole.
pub async fn check<S: Io>(
    volume: &Volume,
    io: &S,
    context: &mut RequestContext,
    mut progress: impl FnMut(u64) -> ControlFlow<()>,
) -> CheckReport {
    let mut report = CheckReport { blocks: volume.blocks(), ..Default::default() };
    let mut buf = Buf::new(volume.max_request_bytes());
    let mut from = BlockIndex(0);
    while let Some(run) = volume.next_data(io, context, from).await {
        let most = (volume.max_request_bytes() / volume.block_size()) as u64;
        for first in (run.first.0..run.end()).step_by(most as usize) {
            let part = BlockRange::new(BlockIndex(first), most.min(run.end() - first));
            buf = check_part(volume, io, context, part, buf, &mut report).await;
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

/// Whether any block holds data, or can't be verified: where it is not so, all of the
/// volume reads as zeros.
pub async fn holds_data<S: Io>(volume: &Volume, io: &S, context: &mut RequestContext) -> bool {
    let mut buf = Buf::new(volume.max_request_bytes());
    let mut report = CheckReport::default();
    let most = (volume.max_request_bytes() / volume.block_size()) as u64;
    let mut from = BlockIndex(0);
    while let Some(run) = volume.next_data(io, context, from).await {
        let part = BlockRange::new(run.first, run.count.min(most));
        buf = check_part(volume, io, context, part, buf, &mut report).await;
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
    context: &mut RequestContext,
    part: BlockRange,
    buf: Buf,
    report: &mut CheckReport,
) -> Buf {
    let (result, mut buf) = volume.read(io, context, part, buf).await;
    let zero = crate::format::ZERO_TAG;
    if result.is_ok() {
        report.in_log += volume.blocks_in_log(part);
        report.data_blocks += context.tags.tags(part.count).iter().filter(|t| **t != zero).count() as u64;
        return buf;
    }
    for block in part.blocks() {
        let one = BlockRange::new(block, 1);
        let result;
        (result, buf) = volume.read(io, context, one, buf).await;
        match result {
            Ok(()) => {
                report.in_log += volume.blocks_in_log(one);
                report.data_blocks += u64::from(context.tags.tags(1)[0] != zero);
            }
            Err(e) => {
                report.data_blocks += 1;
                report.add(one, &e);
            }
        }
    }
    buf
}

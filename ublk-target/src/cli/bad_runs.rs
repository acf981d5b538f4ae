//! Bad blocks as they are met, told as runs.

use crate::{
    failure::{Exit, Failure, Outcome},
    output,
};
use ublk_integrity::{BadReason, BlockIndex, BlockRange, ReadError};

/// Runs that are told one by one.
const LISTED: u64 = 100;

/// What has been met so far, in order of place.
#[derive(Default)]
pub struct BadRuns {
    blocks: u64,
    runs: u64,
    /// The last, which may go on.
    last: Option<(BlockRange, BadReason)>,
}

impl BadRuns {
    /// One more block. Returns the run before it, if that has ended.
    pub fn add(&mut self, block: BlockIndex, error: &ReadError) -> Option<(BlockRange, BadReason)> {
        self.blocks += 1;
        let reason = error.reason();
        match &mut self.last {
            Some((run, why)) if run.end() == block.0 && *why == reason => {
                run.count += 1;
                None
            }
            last => last.replace((BlockRange::new(block, 1), reason)),
        }
    }

    /// Tells of a run that has ended, up to a limit; `named` puts paths into the words.
    pub fn tell(&mut self, ended: Option<(BlockRange, BadReason)>, block_size: usize, named: impl Fn(&str) -> String) {
        let Some((run, reason)) = ended else { return };
        self.runs += 1;
        if self.runs <= LISTED {
            let (first, end) = (run.first.0 * block_size as u64, run.end() * block_size as u64);
            let line = format!("bad: blocks {run} (bytes {first}..{end}), exported as zeros: {reason}");
            output::tell(named(&line));
        }
    }

    /// Tells of the last run, and of all together.
    pub fn finish(mut self, block_size: usize, named: impl Fn(&str) -> String) -> Outcome {
        let last = self.last.take();
        self.tell(last, block_size, named);
        let more = match self.runs.saturating_sub(LISTED) {
            0 => String::new(),
            more => format!(" ({more} runs are not listed: `check` has them)"),
        };
        match self.blocks {
            0 => Ok(()),
            n => {
                Err(Failure::new(Exit::Integrity, format_args!("{n} blocks are bad and were exported as zeros{more}")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_with_one_reason_are_a_run() {
        let mut bad = BadRuns::default();
        let mismatch = |block| ReadError::Mismatch { block: BlockIndex(block) };
        let met: Vec<_> = [3, 4, 5, 9].into_iter().filter_map(|b| bad.add(BlockIndex(b), &mismatch(b))).collect();
        assert_eq!(met, [(BlockRange::new(BlockIndex(3), 3), BadReason::Mismatch)]);
        let outside = ReadError::BadRange(BlockRange::new(BlockIndex(10), 1));
        assert!(bad.add(BlockIndex(10), &outside).is_some_and(|(run, _)| run.first.0 == 9));
        assert_eq!(bad.finish(4096, str::to_owned).unwrap_err().exit, Exit::Integrity);
    }
}

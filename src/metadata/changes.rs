//! What an epoch changes, asked by ranges of blocks.

use crate::{
    BlockRange,
    metadata::pending::{PendingTag, ZeroRun},
};

/// What the pending changes do to a page's blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Effect {
    None,
    /// All become zeros and nothing else: the entry becomes absent.
    Vanish,
    Change,
}

/// All pending changes of an epoch, sorted.
pub(crate) struct Changes<'a> {
    tags: &'a [PendingTag],
    runs: &'a [ZeroRun],
}

impl<'a> Changes<'a> {
    /// Of sorted tags and runs; runs that touch each other become one: what they say of a page is
    /// then said by one of them.
    pub(crate) fn new(tags: &'a [PendingTag], runs: &'a mut Vec<ZeroRun>) -> Self {
        runs.dedup_by(|next, run| {
            let touch = run.end == next.start;
            if touch {
                run.end = next.end;
            }
            touch
        });
        Self { tags, runs }
    }
    pub(crate) fn tags_in(&self, range: BlockRange) -> &'a [PendingTag] {
        let from = self.tags.partition_point(|t| t.block < range.first);
        let len = self.tags[from..].partition_point(|t| t.block.0 < range.end());
        &self.tags[from..from + len]
    }
    pub(crate) fn runs_in(&self, range: BlockRange) -> &'a [ZeroRun] {
        let from = self.runs.partition_point(|r| r.end <= range.first.0);
        let len = self.runs[from..].partition_point(|r| r.start < range.end());
        &self.runs[from..from + len]
    }
    /// Whether the runs leave no block of the range out.
    fn zeroes_all(&self, range: BlockRange) -> bool {
        matches!(self.runs_in(range), [run, ..] if run.start <= range.first.0 && run.end >= range.end())
    }
    pub(crate) fn effect(&self, range: BlockRange) -> Effect {
        match (self.tags_in(range).is_empty(), self.runs_in(range)) {
            (true, []) => Effect::None,
            (true, _) if self.zeroes_all(range) => Effect::Vanish,
            _ => Effect::Change,
        }
    }
}

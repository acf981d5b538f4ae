//! What is found is noted for those who look, and told: runs of blocks as such.

use super::{
    control::ScrubControl,
    report::{BadMetadata, MetadataPart, ScrubFinding},
};
use crate::{BadReason, BlockIndex, BlockRange, maintenance::check::BadRun};

/// Where findings go.
pub(super) struct Findings<'p, T> {
    control: &'p ScrubControl,
    tell: T,
    /// A run that may go on.
    last: Option<BadRun>,
}

impl<'p, T: FnMut(ScrubFinding)> Findings<'p, T> {
    pub(super) fn new(control: &'p ScrubControl, tell: T) -> Self {
        Self { control, tell, last: None }
    }

    pub(super) fn block(&mut self, block: BlockIndex, reason: BadReason) {
        self.control.note(|report| report.count(reason));
        match &mut self.last {
            Some(run) if run.range.end() == block.0 && run.reason == reason => run.range.count += 1,
            _ => {
                self.end_run();
                self.last = Some(BadRun { range: BlockRange::new(block, 1), reason });
            }
        }
    }

    pub(super) fn end_run(&mut self) {
        if let Some(run) = self.last.take() {
            self.control.note(|report| report.add_run(run));
            (self.tell)(ScrubFinding::Blocks(run));
        }
    }

    /// A piece of metadata, if it is not known yet.
    pub(super) fn metadata(&mut self, part: MetadataPart, reason: BadReason, mended: bool) {
        let bad = BadMetadata { part, reason, mended };
        let mut known = false;
        self.control.note(|report| {
            known = report.bad_metadata.iter().any(|known| known.part == part);
            if !known {
                report.add_metadata(bad);
            }
        });
        if !known {
            (self.tell)(ScrubFinding::Metadata(bad));
        }
    }
}

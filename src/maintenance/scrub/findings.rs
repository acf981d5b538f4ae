//! What is found is noted for those who look, and told: runs of blocks as such, metadata when it is found and when
//! it is known what has become of it.

use super::{
    control::ScrubControl,
    report::{BadMetadata, MetadataPart, Remedy, ScrubFinding},
};
use crate::{
    BadReason, BlockIndex, BlockRange, Epoch, PageName, crypto::keys::Digest, format::PageId,
    maintenance::check::BadRun, metadata::rescued::RescueState,
};
use std::collections::HashSet;

/// Most tree pages that are known not to be told twice. Where so many are damaged nobody counts them.
const MOST_KNOWN: usize = 1 << 14;

/// What a piece of metadata waits for.
#[derive(Clone, Copy)]
pub(super) enum WaitsFor {
    /// That a checkpoint has written the page.
    Page(PageId, Digest),
    /// That both superblock copies are newer.
    NewerThan(Epoch),
    /// That nothing before this position of the log is needed.
    LogFree(u64),
}

/// Where findings go.
pub(super) struct Findings<'p, T> {
    control: &'p ScrubControl,
    tell: T,
    /// A run that may go on.
    last: Option<BadRun>,
    /// Tree pages that have been told: they are met again and again.
    known: HashSet<PageName>,
    /// What is mended once a checkpoint has done it.
    waiting: Vec<(MetadataPart, BadReason, WaitsFor)>,
}

impl<'p, T: FnMut(ScrubFinding)> Findings<'p, T> {
    pub(super) fn new(control: &'p ScrubControl, tell: T) -> Self {
        Self { control, tell, last: None, known: HashSet::new(), waiting: Vec::new() }
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

    /// A piece of metadata of which nothing more will become, if it is not known yet.
    pub(super) fn metadata(&mut self, part: MetadataPart, reason: BadReason, remedy: Remedy) {
        self.add(BadMetadata { part, reason, remedy });
    }

    /// One that the next checkpoint mends.
    pub(super) fn mended_later(&mut self, part: MetadataPart, reason: BadReason, waits: WaitsFor) {
        if self.add(BadMetadata { part, reason, remedy: Remedy::Waits }) {
            self.waiting.push((part, reason, waits));
        }
    }

    fn add(&mut self, bad: BadMetadata) -> bool {
        let is_new = !self.note_known(bad.part);
        if is_new {
            self.control.note(|report| report.add_metadata(bad));
            (self.tell)(ScrubFinding::Metadata(bad));
        }
        is_new
    }

    /// Whether it was told already. From now on it was.
    fn note_known(&mut self, part: MetadataPart) -> bool {
        let MetadataPart::TreePage { name } = part else { return false };
        // A tag page is met once on the way through.
        if name.level == 0 {
            return false;
        }
        if self.known.len() < MOST_KNOWN { !self.known.insert(name) } else { self.known.contains(&name) }
    }

    /// Whether something waits.
    pub(super) fn are_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// The pages that wait.
    pub(super) fn waiting_pages(&self) -> impl Iterator<Item = PageId> {
        self.waiting.iter().filter_map(|(.., waits)| match waits {
            WaitsFor::Page(id, _) => Some(*id),
            _ => None,
        })
    }

    /// What has become of that which waited, as `state` says.
    pub(super) fn settle(&mut self, state: impl Fn(WaitsFor) -> RescueState) {
        let Self { waiting, control, tell, .. } = self;
        waiting.retain(|(part, reason, waits)| {
            let remedy = match state(*waits) {
                RescueState::Waits => return true,
                RescueState::Written => Remedy::Mended,
                RescueState::Failed => Remedy::None,
            };
            let bad = BadMetadata { part: *part, reason: *reason, remedy };
            control.note(|report| report.settle_metadata(bad));
            tell(ScrubFinding::Metadata(bad));
            false
        });
    }
}

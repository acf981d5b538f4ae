//! One block, looked at alone, until it can be said for sure what it is.

use super::{
    BETWEEN_LOOKS,
    blocks::Pass,
    metered::Metered,
    report::ScrubFinding,
    way::{End, Judged, Moved, prove, read_page},
};
use crate::{
    BadReason, BlockIndex, BlockRange, Buf, Device, Io,
    format::{PageId, Tag, ZERO_TAG},
    metadata::lookup::leaf_tag,
};
use std::mem;

/// How often a block is looked at that is not at rest, when it is met and at the end of the pass.
const LOOKS: u32 = 3;
const LAST_LOOKS: u32 = 16;
/// Most blocks that are kept for the end of the pass.
const MOST_DEFERRED: usize = 1024;

/// What is found of one block.
enum Verdict {
    /// It reads as zeros.
    Zeros,
    Verified,
    Bad(BadReason),
    /// It is never at rest.
    Unsettled,
}

impl<T: FnMut(ScrubFinding)> Pass<'_, T> {
    /// Looks at some blocks of a range. `false`: the pass is to end before it has come through.
    pub(super) async fn judge_each<S: Io>(&mut self, io: &Metered<'_, S>, range: BlockRange, which: u128) -> bool {
        for (_, block) in range.blocks().enumerate().filter(|(i, _)| which >> i & 1 != 0) {
            match self.judge(io, block, LOOKS).await {
                None => return false,
                Some(Verdict::Unsettled) if self.deferred.len() < MOST_DEFERRED => self.deferred.push_back(block),
                Some(verdict) => self.settle(block, &verdict),
            }
        }
        true
    }

    /// Looks once more at blocks that were never at rest.
    pub(super) async fn deferred<S: Io>(&mut self, io: &Metered<'_, S>) {
        self.way.forget_unreadable();
        self.lanes.iter_mut().for_each(|lane| lane.bad = None);
        while let Some(block) = self.deferred.front().copied() {
            let Some(verdict) = self.judge(io, block, LAST_LOOKS).await else { return };
            self.settle(block, &verdict);
            self.deferred.pop_front();
        }
    }

    fn settle(&mut self, block: BlockIndex, verdict: &Verdict) {
        match verdict {
            Verdict::Zeros => {}
            Verdict::Verified => self.control.note(|report| report.verified_blocks += 1),
            Verdict::Bad(reason) => self.findings.block(block, *reason),
            Verdict::Unsettled => self.control.note(|report| report.unsettled_blocks += 1),
        }
    }

    /// What one block is, in a quiet window if there is one. `None`: the pass is to end before that is known.
    async fn judge<S: Io>(&mut self, io: &Metered<'_, S>, block: BlockIndex, looks: u32) -> Option<Verdict> {
        let one = BlockRange::new(block, 1);
        if self.of.is_elsewhere(one) {
            return Some(Verdict::Unsettled);
        }
        for look in 0..looks {
            if look > 0 {
                self.control.sleep(io, BETWEEN_LOOKS).await;
            }
            self.control.pace(io).await;
            if !self.may_go_on().await {
                return None;
            }
            // Before the tag is looked up: a write that ends between the two would change both.
            let watch = self.of.ranges.watch(one);
            if !watch.is_quiet() {
                continue;
            }
            let verdict = self.verdict(io, block).await;
            match verdict {
                Ok(verdict) if watch.is_quiet() => return Some(verdict),
                _ => {}
            }
        }
        Some(Verdict::Unsettled)
    }

    async fn verdict<S: Io>(&mut self, io: &S, block: BlockIndex) -> Result<Verdict, Moved> {
        if self.of.admitted.has_failed(BlockRange::new(block, 1)) {
            return Ok(Verdict::Bad(BadReason::NotInPlace));
        }
        let tag = match self.of.metadata.pending_tag(block) {
            Some(tag) => tag,
            None => match self.tag_in_tree(io, block).await? {
                Ok(tag) => tag,
                Err(page) => return Ok(Verdict::Bad(BadReason::BadPage { page: page.name() })),
            },
        };
        if tag == ZERO_TAG {
            return Ok(Verdict::Zeros);
        }
        let (at, all) = (self.of.metadata.layout().block_offset(block), 0..self.block.len());
        let read;
        (read, self.block) = io.read(Device::Data, at, mem::replace(&mut self.block, Buf::none()), all).await;
        io.charge();
        Ok(match read {
            Err(errno) => Verdict::Bad(BadReason::Unreadable { device: Device::Data, errno }),
            Ok(()) if self.of.tagger.proves(&tag, block, &self.block) => Verdict::Verified,
            Ok(()) => Verdict::Bad(BadReason::Mismatch),
        })
    }

    /// The tag that the tree has for a block, or the page for which it can't be known.
    async fn tag_in_tree<S: Io>(&mut self, io: &S, block: BlockIndex) -> Result<Result<Tag, PageId>, Moved> {
        let tree = &self.of.metadata.tree;
        let (page, i) = tree.layout.tag_page_of(block);
        let root = tree.root.load();
        let entry = match self.find(io, root, page.index).await? {
            End::TagPage(entry) => entry,
            End::Absent(_) => return Ok(Ok(ZERO_TAG)),
            End::Bad(page) => return Ok(Err(page)),
        };
        if self.lanes.iter().any(|lane| lane.bad == Some((page, entry))) {
            return Ok(Err(page));
        }
        let started = read_page(io, tree, page, entry, mem::replace(&mut self.page, Buf::none()));
        let judged;
        (judged, self.page) = prove(io, tree, root, (page, entry), started).await;
        match judged? {
            Judged::Bad(_) => Ok(Err(page)),
            Judged::Good | Judged::InMemory(_) => Ok(Ok(leaf_tag(&self.page, i))),
        }
    }
}

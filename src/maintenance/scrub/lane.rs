//! A tag page and its blocks, on their way from the devices.

use crate::{
    BlockIndex, BlockRange, Buf,
    format::{LOST_TAG, PAGE_BYTES, PageId, TAGS_PER_PAGE, Tag, TreeEntry, ZERO_TAG},
    metadata::lookup::leaf_tag,
};
use std::{mem, ops::Range};

/// Memory for a tag page and its blocks.
pub(super) struct Lane {
    pub(super) range: BlockRange,
    pub(super) page: Buf,
    pub(super) data: Buf,
    /// [`LOST_TAG`] where it is not known.
    pub(super) tags: [Tag; TAGS_PER_PAGE as usize],
    /// Which of them are pending, and not of the page.
    pub(super) pending: u128,
    /// The page, if it can't be had: it is not asked for again for each of its blocks.
    pub(super) bad: Option<(PageId, TreeEntry)>,
}

impl Lane {
    pub(super) fn new(block_size: usize) -> Self {
        Self {
            range: BlockRange::new(BlockIndex(0), 0),
            page: Buf::new(PAGE_BYTES),
            data: Buf::new(TAGS_PER_PAGE as usize * block_size),
            tags: [LOST_TAG; TAGS_PER_PAGE as usize],
            pending: 0,
            bad: None,
        }
    }

    pub(super) fn is_pending(&self, i: usize) -> bool {
        self.pending >> i & 1 != 0
    }

    /// The tags that are not pending.
    pub(super) fn fill(&mut self, tag: impl Fn(usize) -> Tag) {
        for i in 0..self.range.count as usize {
            if !self.is_pending(i) {
                self.tags[i] = tag(i);
            }
        }
    }

    pub(super) fn fill_from_page(&mut self) {
        let page = mem::replace(&mut self.page, Buf::none());
        self.fill(|i| leaf_tag(&page, i));
        self.page = page;
    }

    pub(super) fn tags(&self) -> &[Tag] {
        &self.tags[..self.range.count as usize]
    }

    /// From the first block with something to prove to the last.
    pub(super) fn extent(&self) -> Range<usize> {
        let is_known = |tag: &Tag| ![ZERO_TAG, LOST_TAG].contains(tag);
        let first = self.tags().iter().position(is_known).unwrap_or(0);
        let end = self.tags().iter().rposition(is_known).map_or(first, |last| last + 1);
        first..end
    }
}

//! Memory for applying pending tags to the tree, taken once: which pages are touched, and some to work on.

use crate::{
    Buf,
    format::{Layout, PAGE_BYTES, TreeEntry},
    metadata::{
        pending::{PendingTag, ZeroRun},
        rescued::{MOST_RESCUED, Rescue},
    },
};

/// Pages that are read, changed and written together.
pub(super) const BATCH: usize = 32;

/// A page that must be changed.
#[derive(Clone, Copy)]
pub(super) struct Touched {
    pub(super) index: u64,
    /// As read while descending; replaced by the new one once the page is rewritten.
    pub(super) entry: TreeEntry,
    /// Whether something pending changes it: else it is here only for what has rotted.
    pub(super) changes: bool,
    /// The way up keeps to the verdict of the way down.
    pub(super) verdict: Verdict,
}

/// What was found of a touched page.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing that speaks against it.
    Usable,
    /// It did not verify.
    Lost,
    /// It is left as it is, and so is all below it. Nothing pending changes it, so that it can't be had, or
    /// written, is nothing to fail for: it may be well tomorrow.
    Left,
}

/// Memory for [`apply`](super::tree_update::apply).
pub(crate) struct Scratch {
    pub(super) tags: Vec<PendingTag>,
    pub(super) runs: Vec<ZeroRun>,
    /// Those that have rotted.
    pub(super) rescued: Vec<Rescue>,
    /// By level.
    pub(super) touched: Vec<Vec<Touched>>,
    pub(super) bufs: Vec<Option<Buf>>,
}

impl Scratch {
    /// For at most so many pending tags and runs.
    pub(crate) fn new(layout: &Layout, max_tags: usize, max_runs: usize) -> Self {
        let at_level = |l: usize| Vec::with_capacity(Self::most_at(layout, l, max_tags, max_runs));
        Self {
            tags: Vec::with_capacity(max_tags),
            runs: Vec::with_capacity(max_runs),
            rescued: Vec::with_capacity(MOST_RESCUED),
            touched: (0..layout.levels()).map(at_level).collect(),
            bufs: (0..BATCH).map(|_| Some(Buf::new(PAGE_BYTES))).collect(),
        }
    }
    /// A page of memory, to be given back.
    pub(crate) fn lend_page(&mut self) -> Buf {
        self.bufs[0].take().expect("no batch is in flight")
    }
    pub(crate) fn give_back(&mut self, page: Buf) {
        self.bufs[0] = Some(page);
    }
    /// The pages that the last update was to write because they had rotted.
    pub(crate) fn rescued(&self) -> &[Rescue] {
        &self.rescued
    }
    /// Each tag touches a page at most, each run the two at its ends, each that has rotted one.
    fn most_at(layout: &Layout, level: usize, max_tags: usize, max_runs: usize) -> usize {
        layout.pages_in(level as u8).min((max_tags + 2 * max_runs + MOST_RESCUED) as u64) as usize
    }
    pub(crate) fn memory_bytes(layout: &Layout, max_tags: usize, max_runs: usize) -> u64 {
        let touched: usize = (0..layout.levels()).map(|l| Self::most_at(layout, l, max_tags, max_runs)).sum();
        let lists = max_tags * size_of::<PendingTag>() + max_runs * size_of::<ZeroRun>();
        (touched * size_of::<Touched>() + lists + BATCH * 2 * PAGE_BYTES) as u64
    }
}

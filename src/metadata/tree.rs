//! Finding a tag page: down from the root, through the cache. What is missing there [`load`] reads.
//!
//! Each page is believed only because its parent's entry names its digest, and the root because the
//! superblock's MAC holds.
//!
//! [`load`]: crate::metadata::load

use crate::{
    DeviceError,
    format::{EntryState, Layout, PageId, TREE_FANOUT, TreeEntry},
    metadata::{
        page_cache::{Lookup, PageCache},
        rescued::Rescued,
        root::Root,
    },
};
use zerocopy::FromBytes;

/// The hash tree of an open volume.
pub(crate) struct Tree {
    pub(crate) layout: Layout,
    pub(crate) root: Root,
    pub(crate) cache: PageCache,
    pub(crate) rescued: Rescued,
}

/// What a tree entry leads to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Found {
    /// The bytes asked for have been copied.
    Page,
    /// The whole subtree under this page reads as zeros.
    Absent(PageId),
    /// The page, or one above it, was lost: nothing under it verifies.
    Lost(PageId),
}

/// Where a walk through the cache ended.
pub(crate) enum CacheWalk {
    Found(Found),
    /// This page is not cached; its entry is known.
    Missing(PageId, TreeEntry),
}

/// Why a page can't be had.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum LoadError {
    /// It does not verify under the entry.
    Bad(PageId),
    Device(DeviceError),
}

/// Counts of one walk or load.
#[derive(Clone, Copy, Default)]
pub(crate) struct CacheUse {
    pub(crate) hits: u64,
    pub(crate) misses: u64,
    pub(crate) hints_used: u64,
}

impl Tree {
    /// Walks from `root` to a tag page through the cache, and copies `out.len()` bytes at `at` of
    /// it. Asked for none, it only looks whether the page is there, which is no use of it.
    pub(crate) fn walk_cached(
        &self,
        root: TreeEntry,
        tag_page: u64,
        at: usize,
        out: &mut [u8],
        uses: &mut CacheUse,
    ) -> CacheWalk {
        let mut entry = root;
        for level in (0..self.layout.levels() as u8).rev() {
            let page = self.layout.ancestor(tag_page, level);
            match entry.state() {
                EntryState::Absent => return CacheWalk::Found(Found::Absent(page)),
                EntryState::Lost => return CacheWalk::Found(Found::Lost(page)),
                EntryState::Slot(_) => {}
            }
            let mut child = [0; size_of::<TreeEntry>()];
            let (at, bytes) = match level {
                0 => (at, &mut *out),
                _ => (self.entry_at(tag_page, level), &mut child[..]),
            };
            let lookup = match bytes.is_empty() {
                true if self.cache.holds(page, entry.epoch()) => Lookup::Hit,
                true => Lookup::Miss,
                false => self.cache.get(page, entry.epoch(), at, bytes),
            };
            match lookup {
                Lookup::Miss => {
                    uses.misses += 1;
                    return CacheWalk::Missing(page, entry);
                }
                hit => {
                    uses.hits += u64::from(level == 0);
                    uses.hints_used += u64::from(hit == Lookup::HintedHit);
                }
            }
            entry = TreeEntry::read_from_bytes(&child).expect("same size");
        }
        CacheWalk::Found(Found::Page)
    }

    /// Index, within a tree page, of the entry on the way to a tag page.
    pub(crate) fn entry_at(&self, tag_page: u64, level: u8) -> usize {
        let child = self.layout.ancestor(tag_page, level - 1);
        (child.index % TREE_FANOUT) as usize * size_of::<TreeEntry>()
    }
}

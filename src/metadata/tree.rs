//! Finding a tag page: down from the root, out of the cache or from the device.
//!
//! Each page is believed only because its parent's entry names its digest, and the root because the
//! superblock's MAC holds. On a miss all that is missing is read at once, every level and all tag
//! pages of the request: the page whose entry is known from its slot, those below from both slots,
//! since the parent that knows is being read, too. Tag pages side by side are one read.

use crate::{
    Buf, Device, DeviceError, Errno, Storage,
    crypto::keys::equal,
    format::{EntryState, Layout, MAX_LEVELS, PAGE_BYTES, PageId, TAGS_PER_PAGE, TREE_FANOUT, TreeEntry, digest},
    metadata::{
        page_cache::{Lookup, PageCache},
        root::Root,
    },
};
use std::ops::Range;
use zerocopy::FromBytes;

/// Bytes of a buffer that takes both slots of a page.
pub(crate) const PAIR_BYTES: usize = 2 * PAGE_BYTES;

/// The hash tree of an open volume.
pub(crate) struct Tree {
    pub(crate) layout: Layout,
    pub(crate) root: Root,
    pub(crate) cache: PageCache,
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

/// Most tag pages that are read at once: what a request of 512 KiB touches at 512-byte blocks.
const MAX_TOGETHER: usize = 9;

/// Page buffers of one request or worker: one pair of slots for each level, and of tag pages as
/// many as are read at once. `None` while in flight.
pub(crate) struct PageBufs {
    levels: [Option<Buf>; MAX_LEVELS],
    together: usize,
}

impl PageBufs {
    /// For requests of up to `max_blocks` blocks.
    pub(crate) fn new(levels: usize, max_blocks: usize) -> Self {
        let together = Self::together_for(max_blocks);
        let pairs = |level| if level == 0 { together } else { 1 };
        let levels = std::array::from_fn(|i| (i < levels).then(|| Buf::new(pairs(i) * PAIR_BYTES)));
        Self { levels, together }
    }
    pub(crate) fn memory_bytes(levels: usize, max_blocks: usize) -> u64 {
        let pairs = levels - 1 + Self::together_for(max_blocks);
        (levels * crate::BUF_ALIGN + pairs * PAIR_BYTES) as u64
    }
    /// Tag pages that so many blocks lie on at most.
    fn together_for(max_blocks: usize) -> usize {
        (max_blocks.saturating_sub(1).div_ceil(TAGS_PER_PAGE as usize) + 1).min(MAX_TOGETHER)
    }
    /// A buffer for one block, between two loads.
    pub(crate) fn lend(&mut self) -> Buf {
        self.levels[0].take().expect("no load is in flight")
    }
    pub(crate) fn give_back(&mut self, buf: Buf) {
        self.levels[0] = Some(buf);
    }
    /// Splits tag pages into runs that one [`Tree::load`] can bring: under one parent, and no more
    /// than there is memory for.
    pub(crate) fn runs(&self, pages: Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
        let (mut start, most) = (pages.start, self.together as u64);
        std::iter::from_fn(move || {
            let end = pages.end.min(start + most).min((start / TREE_FANOUT + 1) * TREE_FANOUT);
            let run = std::mem::replace(&mut start, end)..end;
            (!run.is_empty()).then_some(run)
        })
    }
}

/// What is missing of the way to a run of tag pages.
pub(crate) struct Missing {
    /// The first tag page of the run.
    first: u64,
    leaves: [Leaf; MAX_TOGETHER],
    /// The highest page that is missing above them, and its entry.
    above: Option<(PageId, TreeEntry)>,
}

#[derive(Clone, Copy)]
enum Leaf {
    NotMissing,
    Entry(TreeEntry),
    /// The entry is in the parent, which is missing too.
    InParent,
}

impl Missing {
    /// Nothing, of the run that begins at `first`.
    pub(crate) fn new(first: u64) -> Self {
        Self { first, leaves: [Leaf::NotMissing; MAX_TOGETHER], above: None }
    }
    /// Where the walk to this tag page ended. All walks begin at one root.
    pub(crate) fn add(&mut self, tag_page: u64, page: PageId, entry: TreeEntry) {
        self.leaves[(tag_page - self.first) as usize] = match page.level {
            0 => Leaf::Entry(entry),
            _ => {
                self.above.get_or_insert((page, entry));
                Leaf::InParent
            }
        };
    }
    fn is_missing(&self, i: usize) -> bool {
        !matches!(self.leaves[i], Leaf::NotMissing)
    }
    /// The indices in the run from the first that is missing to the last.
    fn extent(&self) -> Option<Range<usize>> {
        let mut places = (0..MAX_TOGETHER).filter(|i| self.is_missing(*i));
        let first = places.next()?;
        Some(first..places.next_back().unwrap_or(first) + 1)
    }
}

/// How the way down to the parent of a run of tag pages ended.
struct Way<'a> {
    missing: &'a Missing,
    end: Result<Found, LoadError>,
    /// Names the parent.
    entry: TreeEntry,
    /// Both slots of the parent, where it was missing.
    parent: Option<&'a [u8]>,
}

impl Way<'_> {
    fn leaf(&self, i: usize) -> PageId {
        PageId { level: 0, index: self.missing.first + i as u64 }
    }
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
    fn entry_at(&self, tag_page: u64, level: u8) -> usize {
        let child = self.layout.ancestor(tag_page, level - 1);
        (child.index % TREE_FANOUT) as usize * size_of::<TreeEntry>()
    }

    /// Reads all that is missing at once, verifies from the top, and caches. `found` hears of each
    /// tag page that could be had. Of several failures it returns a device error, if there is one.
    pub(crate) async fn load_missing<S: Storage>(
        &self,
        io: &S,
        bufs: &mut PageBufs,
        missing: &Missing,
        hinted: bool,
        found: impl FnMut(u64, Found, &[u8]),
    ) -> Result<(), LoadError> {
        let Some(extent) = missing.extent() else { return Ok(()) };
        let mut reads = [const { None }; MAX_LEVELS];
        let levels = missing.above.map_or(0, |(top, _)| top.level);
        for level in (1..=levels).rev() {
            let page = self.layout.ancestor(missing.first, level);
            let part = match missing.above {
                Some((top, entry)) if top == page => known_part(entry),
                _ => 0..PAIR_BYTES,
            };
            reads[usize::from(level)] = Some(self.start(io, bufs, page, 0, part));
        }
        let page = PageId { level: 0, index: missing.first + extent.start as u64 };
        let part = match missing.leaves[extent.start] {
            Leaf::Entry(entry) if extent.len() == 1 => known_part(entry),
            _ => 0..extent.len() * PAIR_BYTES,
        };
        let leaves = self.start(io, bufs, page, extent.start * PAIR_BYTES, part);

        // All reads are awaited, also below a failure: the buffers must come back.
        let mut parent = (Ok(Found::Page), missing.above.map_or(TreeEntry::ABSENT, |(_, entry)| entry));
        for level in (1..=levels).rev() {
            let Some(read) = reads[usize::from(level)].take() else { continue };
            let (mut read, mut buf) = read.await;
            if let (Ok(Found::Page), entry) = parent {
                let page = self.layout.ancestor(missing.first, level);
                (read, buf) = self.once_more(io, read, page, entry, (0, buf)).await;
                parent.0 = self.accept(page, entry, read, &buf, hinted);
                if parent.0 == Ok(Found::Page) && level > 1 {
                    parent.1 = self.child(&buf, entry, missing.first, level);
                }
            }
            bufs.levels[usize::from(level)] = Some(buf);
        }
        let (read, mut buf) = leaves.await;
        let mut reads = [read; MAX_TOGETHER];
        let way = Way { missing, end: parent.0, entry: parent.1, parent: bufs.levels[1].as_deref() };
        for i in extent.filter(|i| read.is_err() && way.missing.is_missing(*i)) {
            if let Ok(Ok(entry)) = self.leaf_entry(&way, i) {
                (reads[i], buf) = self.once_more(io, read, way.leaf(i), entry, (i * PAIR_BYTES, buf)).await;
            }
        }
        let result = self.accept_leaves(&way, &reads, &buf, hinted, found);
        bufs.levels[0] = Some(buf);
        result
    }

    /// A read that failed is done again for the slot alone that holds the page: the other slot, or
    /// a neighbour, may be what can't be read, and nobody needs it. `at`: where the page's pair
    /// lies in the buffer.
    async fn once_more<S: Storage>(
        &self,
        io: &S,
        read: Result<(), Errno>,
        page: PageId,
        entry: TreeEntry,
        (at, buf): (usize, Buf),
    ) -> (Result<(), Errno>, Buf) {
        match (read, entry.state()) {
            (Err(_), EntryState::Slot(slot)) => {
                let part = slot_part(slot);
                io.read(Device::Meta, self.layout.slot_offset(page, slot), buf, at + part.start..at + part.end).await
            }
            _ => (read, buf),
        }
    }

    /// Starts to read bytes of a page's pair of slots, or of several pairs side by side, into its
    /// level's buffer from `at` on.
    fn start<S: Storage>(
        &self,
        io: &S,
        bufs: &mut PageBufs,
        page: PageId,
        at: usize,
        part: Range<usize>,
    ) -> S::Transfer {
        let buf = bufs.levels[usize::from(page.level)].take().expect("one load at a time");
        let slot = u8::from(part.start != 0);
        let offset = self.layout.slot_offset(page, slot);
        io.read(Device::Meta, offset, buf, at + part.start..at + part.end)
    }

    /// What names a tag page, or where the way to it ended.
    fn leaf_entry(&self, way: &Way<'_>, i: usize) -> Result<Result<TreeEntry, Found>, LoadError> {
        match (way.missing.leaves[i], way.end, way.parent) {
            (Leaf::Entry(entry), ..) => Ok(Ok(entry)),
            (_, Ok(Found::Page), Some(parent)) => Ok(Ok(self.child(parent, way.entry, way.leaf(i).index, 1))),
            (_, Ok(end), _) => Ok(Err(end)),
            (_, Err(e), _) => Err(e),
        }
    }

    /// Judges the tag pages that were read, once it is known how the way to their parent ended.
    fn accept_leaves(
        &self,
        way: &Way<'_>,
        reads: &[Result<(), Errno>; MAX_TOGETHER],
        buf: &[u8],
        hinted: bool,
        mut found: impl FnMut(u64, Found, &[u8]),
    ) -> Result<(), LoadError> {
        let mut result = Ok(());
        for ((i, pair), read) in buf.chunks_exact(PAIR_BYTES).enumerate().zip(reads) {
            if !way.missing.is_missing(i) {
                continue;
            }
            let page = way.leaf(i);
            let accepted = self.leaf_entry(way, i).and_then(|entry| match entry {
                Ok(entry) => Ok((self.accept(page, entry, *read, pair, hinted)?, &pair[known_part(entry)])),
                Err(end) => Ok((end, &[][..])),
            });
            match (accepted, result) {
                (Ok((Found::Page, bytes)), _) => found(page.index, Found::Page, bytes),
                (Ok((end, _)), _) => found(page.index, end, &[]),
                (Err(_), Err(LoadError::Device(_))) => {}
                (Err(e), _) => result = Err(e),
            }
        }
        result
    }

    /// The entry on the way to a tag page, in a verified page that lies in the slot
    /// which `entry` names.
    fn child(&self, pair: &[u8], entry: TreeEntry, tag_page: u64, level: u8) -> TreeEntry {
        let at = known_part(entry).start + self.entry_at(tag_page, level);
        TreeEntry::read_from_prefix(&pair[at..]).expect("inside the page").0
    }

    /// Judges one page that was read; a good one goes to the cache.
    fn accept(
        &self,
        page: PageId,
        entry: TreeEntry,
        read: Result<(), Errno>,
        pair: &[u8],
        hinted: bool,
    ) -> Result<Found, LoadError> {
        let slot = match entry.state() {
            EntryState::Absent => return Ok(Found::Absent(page)),
            EntryState::Lost => return Ok(Found::Lost(page)),
            EntryState::Slot(slot) => slot,
        };
        read.map_err(|errno| LoadError::Device(self.read_error(page, errno)))?;
        let bytes = &pair[slot_part(slot)];
        if !equal(&digest(page, bytes), &entry.digest) {
            return Err(LoadError::Bad(page));
        }
        self.cache.put(page, entry.epoch(), bytes, hinted);
        Ok(Found::Page)
    }

    pub(crate) fn read_error(&self, page: PageId, errno: Errno) -> DeviceError {
        let offset = self.layout.slot_offset(page, 0);
        DeviceError::new("read", Device::Meta, offset, PAIR_BYTES, errno)
    }
}

/// The byte range, within the 8 KiB of both slots of a page, of the slot that the entry names; all
/// of it where it names none.
fn known_part(entry: TreeEntry) -> Range<usize> {
    match entry.state() {
        EntryState::Slot(slot) => slot_part(slot),
        _ => 0..PAIR_BYTES,
    }
}

/// The byte range of a slot, within the 8 KiB of both slots of a page.
pub(crate) fn slot_part(slot: u8) -> Range<usize> {
    let start = usize::from(slot) * PAGE_BYTES;
    start..start + PAGE_BYTES
}

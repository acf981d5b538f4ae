//! Reading what the cache has not: tag pages and the tree pages above them.
//!
//! All that is missing is read at once, every level and all tag pages of the request: the page whose
//! entry is known from its slot, those below from both slots, since the parent that knows is being
//! read, too. Tag pages side by side are one read. Then they are proven from the top, by digests
//! that have been made side by side.

use crate::{
    Buf, Device, DeviceError, Errno, Storage,
    crypto::keys::{Digest, equal},
    format::{EntryState, MAX_LEVELS, PAGE_BYTES, PageId, TAGS_PER_PAGE, TREE_FANOUT, TreeEntry, digest, digest_each},
    metadata::tree::{Found, LoadError, Tree},
};
use arrayvec::ArrayVec;
use std::ops::Range;
use zerocopy::FromBytes;

/// Bytes of a buffer that takes both slots of a page.
const PAIR_BYTES: usize = 2 * PAGE_BYTES;

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
    fn take(&mut self, level: u8) -> Buf {
        self.levels[usize::from(level)].take().expect("one load at a time")
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

/// Most pages that one load brings.
const MOST_DIGESTS: usize = MAX_LEVELS + MAX_TOGETHER;

/// Digests of pages, each of one slot.
type Digests = ArrayVec<(PageId, u8, Digest), MOST_DIGESTS>;

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
    /// Reads all that is missing at once, verifies from the top, and caches. `found` hears of each
    /// tag page that could be had, `failed` of a read that failed, before anything is read again.
    /// Of several failures it returns a device error, if there is one.
    pub(crate) async fn load_missing<S: Storage>(
        &self,
        io: &S,
        bufs: &mut PageBufs,
        missing: &Missing,
        hinted: bool,
        failed: impl FnOnce(),
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
        reads[0] = Some(leaves);
        let mut results = [Ok(()); MAX_LEVELS];
        for level in 0..=usize::from(levels) {
            if let Some(read) = reads[level].take() {
                let came = read.await;
                (results[level], bufs.levels[level]) = (came.0, Some(came.1));
            }
        }
        if results.iter().any(Result::is_err) {
            failed();
        }
        let mut made = Digests::new();
        if levels > 0 || extent.len() > 1 {
            self.digest_together(missing, &extent, &results, bufs, &mut made);
        }
        let mut parent = (Ok(Found::Page), missing.above.map_or(TreeEntry::ABSENT, |(_, entry)| entry));
        for level in (1..=levels).rev() {
            let (Ok(Found::Page), entry) = parent else { break };
            let page = self.layout.ancestor(missing.first, level);
            let buf = bufs.take(level);
            let (read, buf) = self.once_more(io, results[usize::from(level)], page, entry, (0, buf)).await;
            parent.0 = self.accept(page, entry, read, &buf, &made, hinted);
            if parent.0 == Ok(Found::Page) && level > 1 {
                parent.1 = self.child(&buf, entry, missing.first, level);
            }
            bufs.levels[usize::from(level)] = Some(buf);
        }
        let (read, mut buf) = (results[0], bufs.take(0));
        let mut reads = [read; MAX_TOGETHER];
        let way = Way { missing, end: parent.0, entry: parent.1, parent: bufs.levels[1].as_deref() };
        for i in extent.filter(|i| read.is_err() && way.missing.is_missing(*i)) {
            if let Ok(Ok(entry)) = self.leaf_entry(&way, i) {
                (reads[i], buf) = self.once_more(io, read, way.leaf(i), entry, (i * PAIR_BYTES, buf)).await;
            }
        }
        let result = self.accept_leaves(&way, &reads, &buf, &made, hinted, found);
        bufs.levels[0] = Some(buf);
        result
    }

    /// The digests of what has been read, side by side: two take hardly longer than one. Which slot of a page counts is its parent's word, which nobody has
    /// proved yet. So these digests prove nothing: [`accept`](Self::accept) takes that of the slot
    /// that a proven parent names, and makes it where it is not here.
    fn digest_together(
        &self,
        missing: &Missing,
        extent: &Range<usize>,
        results: &[Result<(), Errno>; MAX_LEVELS],
        bufs: &PageBufs,
        made: &mut Digests,
    ) {
        let mut pages = ArrayVec::<(PageId, u8, &[u8]), MOST_DIGESTS>::new();
        let mut add = |page: PageId, entry: TreeEntry, pair| match entry.state() {
            EntryState::Slot(slot) => pages.push((page, slot, pair)),
            EntryState::Absent | EntryState::Lost => {}
        };
        let pair_of =
            |level: u8| bufs.levels[usize::from(level)].as_deref().filter(|_| results[usize::from(level)].is_ok());
        let mut above = missing.above.map(|(top, entry)| (top.level, entry));
        // The parent of the tag pages, and what names it.
        let mut parent = None;
        while let Some((level, entry)) = above {
            above = None;
            if let Some(pair) = pair_of(level) {
                add(self.layout.ancestor(missing.first, level), entry, pair);
                match level {
                    1 => parent = Some((pair, entry)),
                    _ => above = Some((level - 1, self.child(pair, entry, missing.first, level))),
                }
            }
        }
        for i in extent.clone() {
            let page = PageId { level: 0, index: missing.first + i as u64 };
            let entry = match (missing.leaves[i], parent) {
                (Leaf::Entry(entry), _) => entry,
                (Leaf::InParent, Some((pair, entry))) => self.child(pair, entry, page.index, 1),
                _ => continue,
            };
            pair_of(0).into_iter().for_each(|pairs| add(page, entry, &pairs[i * PAIR_BYTES..][..PAIR_BYTES]));
        }
        let of_slots = pages.iter().map(|(page, slot, pair)| ((*page, *slot), *page, &pair[slot_part(*slot)]));
        digest_each(of_slots, |(page, slot), digest| made.push((page, slot, digest)));
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
        let buf = bufs.take(page.level);
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
        made: &Digests,
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
                Ok(entry) => Ok((self.accept(page, entry, *read, pair, made, hinted)?, &pair[known_part(entry)])),
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

    /// Judges one page that was read; a good one goes to the cache. `made`: digests of what lies in
    /// the buffers.
    fn accept(
        &self,
        page: PageId,
        entry: TreeEntry,
        read: Result<(), Errno>,
        pair: &[u8],
        made: &Digests,
        hinted: bool,
    ) -> Result<Found, LoadError> {
        let slot = match entry.state() {
            EntryState::Absent => return Ok(Found::Absent(page)),
            EntryState::Lost => return Ok(Found::Lost(page)),
            EntryState::Slot(slot) => slot,
        };
        read.map_err(|errno| LoadError::Device(self.read_error(page, errno)))?;
        let bytes = &pair[slot_part(slot)];
        let of_this = made.iter().find(|(made, of, _)| (*made, *of) == (page, slot));
        let digest = of_this.map_or_else(|| digest(page, bytes), |(.., digest)| *digest);
        if !equal(&digest, &entry.digest) {
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

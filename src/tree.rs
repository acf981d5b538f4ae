//! Finding a tag page: down from the root, out of the cache or from the device.
//!
//! Each page is believed only because its parent's entry names its digest, and the root because the
//! superblock's MAC holds. On a miss every level that is missing is read at once: the page whose
//! entry is known from its slot, those below from both slots, since the parent that knows is on its way too.

use crate::{
    Buf, Device, DeviceError, Errno, Storage,
    cache::{Cache, Lookup},
    format::{EntryState, Layout, MAX_LEVELS, PAGE_BYTES, PageId, TREE_FANOUT, TreeEntry, digest},
    keys::equal,
    root::Root,
};
use zerocopy::FromBytes;

/// Bytes of a buffer that takes both slots of a page.
pub(crate) const PAIR_BYTES: usize = 2 * PAGE_BYTES;

/// The hash tree of an open volume.
pub(crate) struct Tree {
    pub(crate) layout: Layout,
    pub(crate) root: Root,
    pub(crate) cache: Cache,
}

/// What hangs on a tree entry.
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
pub(crate) enum Walk {
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

/// Page buffers of one request or worker: one pair of slots for each level. `None` while in flight.
pub(crate) struct PageBufs([Option<Buf>; MAX_LEVELS]);

impl PageBufs {
    pub(crate) fn new(levels: usize) -> Self {
        Self(std::array::from_fn(|i| (i < levels).then(|| Buf::new(PAIR_BYTES))))
    }
    pub(crate) fn memory_bytes(levels: usize) -> u64 {
        (levels * (PAIR_BYTES + crate::BUF_ALIGN)) as u64
    }
}

impl Tree {
    /// Walks from `root` to a tag page through the cache, and copies `out.len()` bytes at `at` of it.
    pub(crate) fn walk(&self, root: TreeEntry, tag_page: u64, at: usize, out: &mut [u8], uses: &mut CacheUse) -> Walk {
        let mut entry = root;
        for level in (0..self.layout.levels() as u8).rev() {
            let page = self.layout.ancestor(tag_page, level);
            match entry.state() {
                EntryState::Absent => return Walk::Found(Found::Absent(page)),
                EntryState::Lost => return Walk::Found(Found::Lost(page)),
                EntryState::Slot(_) => {}
            }
            let mut child = [0; size_of::<TreeEntry>()];
            let (at, bytes) = match level {
                0 => (at, &mut *out),
                _ => (self.entry_at(tag_page, level), &mut child[..]),
            };
            match self.cache.get(page, entry.epoch(), at, bytes) {
                Lookup::Miss => {
                    uses.misses += 1;
                    return Walk::Missing(page, entry);
                }
                hit => {
                    uses.hits += u64::from(level == 0);
                    uses.hints_used += u64::from(hit == Lookup::HintedHit);
                }
            }
            entry = TreeEntry::read_from_bytes(&child).expect("same size");
        }
        Walk::Found(Found::Page)
    }

    /// Place, within a tree page, of the entry on the way to a tag page.
    fn entry_at(&self, tag_page: u64, level: u8) -> usize {
        let child = self.layout.ancestor(tag_page, level - 1);
        (child.index % TREE_FANOUT) as usize * size_of::<TreeEntry>()
    }

    /// Reads what [`Walk::Missing`] named and every level below it, verifies from the top, caches, and copies.
    pub(crate) async fn load<S: Storage>(
        &self,
        io: &S,
        bufs: &mut PageBufs,
        (top, top_entry): (PageId, TreeEntry),
        tag_page: u64,
        (at, out, hinted): (usize, &mut [u8], bool),
    ) -> Result<Found, LoadError> {
        let mut reads = [const { None }; MAX_LEVELS];
        for level in (0..=top.level).rev() {
            let page = self.layout.ancestor(tag_page, level);
            let part = match top_entry.state() {
                EntryState::Slot(slot) if level == top.level => slot_part(slot),
                _ => 0..PAIR_BYTES,
            };
            let slot = u8::from(part.start != 0);
            let buf = bufs.0[usize::from(level)].take().expect("one load at a time");
            reads[usize::from(level)] = Some(io.read(Device::Meta, self.layout.slot_offset(page, slot), buf, part));
        }
        let mut result = Ok(Found::Page);
        let mut entry = top_entry;
        // All reads are awaited, also below a failure: the buffers must come back.
        for level in (0..=top.level).rev() {
            let Some(read) = reads[usize::from(level)].take() else { continue };
            let (read, buf) = read.await;
            if result == Ok(Found::Page) {
                let page = self.layout.ancestor(tag_page, level);
                let place = if level == 0 { at } else { self.entry_at(tag_page, level) };
                result = self.accept(page, entry, read, &buf, hinted);
                if let (Ok(Found::Page), EntryState::Slot(slot)) = (result, entry.state()) {
                    let bytes = &buf[slot_part(slot)][place..];
                    match level {
                        0 => out.copy_from_slice(&bytes[..out.len()]),
                        _ => entry = TreeEntry::read_from_prefix(bytes).expect("inside the page").0,
                    }
                }
            }
            bufs.0[usize::from(level)] = Some(buf);
        }
        result
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
        DeviceError { op: "read", device: Device::Meta, offset, len: PAIR_BYTES as u64, errno }
    }
}

/// The bytes of a slot within a pair.
pub(crate) fn slot_part(slot: u8) -> std::ops::Range<usize> {
    let start = usize::from(slot) * PAGE_BYTES;
    start..start + PAGE_BYTES
}

//! The way from the root to a tag page, read from the medium: a page in the cache would hide that it has
//! rotted below.
//!
//! A page is proven by the digest in its parent, which is proven before. So each tree page is read once for
//! all pages below it, unless a checkpoint has written it anew meanwhile.

use crate::{
    BadReason, Buf, Device, Storage,
    crypto::keys::equal,
    format::{EntryState, PAGE_BYTES, PageId, TreeEntry, digest},
    io::retry::READ,
    metadata::{page_cache::Lookup, tree::Tree},
};
use zerocopy::FromBytes;

/// Where the way to a tag page ends.
#[derive(Clone, Copy)]
pub(super) enum End {
    /// There is a tag page, in the slot that this entry names.
    TagPage(TreeEntry),
    /// All that hangs on this page reads as zeros.
    Absent(PageId),
    /// It can't be known what hangs on this page.
    Bad(PageId),
}

/// The tree has moved on since the root was loaded: what was read may have been written over. Begin anew,
/// with the pending tags.
pub(super) struct Moved;

/// What was found of a page.
pub(super) enum Judged {
    /// It is what its entry says.
    Good,
    /// Not on the medium, but in memory: the bytes are here now.
    InMemory(BadReason),
    Bad(BadReason),
}

/// A page that is damaged on the medium.
pub(super) struct RottenPage<'a> {
    pub(super) page: PageId,
    pub(super) entry: TreeEntry,
    pub(super) reason: BadReason,
    /// What it should be, where that is known.
    pub(super) bytes: Option<&'a [u8]>,
}

/// A tree page as it was found last.
struct Step {
    of: Option<(PageId, TreeEntry)>,
    /// Why nothing verified, where that is so.
    bad: Option<BadReason>,
    bytes: Box<[u8; PAGE_BYTES]>,
}

/// The tree pages above the last tag page.
pub(super) struct Way {
    /// From level 1 on.
    steps: Vec<Step>,
    buf: Buf,
}

impl Way {
    pub(super) fn new(levels: usize) -> Self {
        let step = |_| Step { of: None, bad: None, bytes: Box::new([0; PAGE_BYTES]) };
        Self { steps: (1..levels).map(step).collect(), buf: Buf::new(PAGE_BYTES) }
    }

    /// What it still knows of the pages above a page: these are to be written with it, and may have rotted by then.
    pub(super) fn above(&self, page: PageId) -> impl Iterator<Item = (PageId, TreeEntry, &[u8])> {
        let of_page = move |id: PageId| id.level > page.level && page.hangs_on(id);
        let good = self.steps.iter().filter(|step| step.bad.is_none());
        good.filter_map(move |step| {
            step.of.filter(|(id, _)| of_page(*id)).map(|(id, entry)| (id, entry, &step.bytes[..]))
        })
    }

    /// What could not be read may be there again: it is known of no page for longer than a moment.
    pub(super) fn forget_unreadable(&mut self) {
        let is_unreadable = |step: &&mut Step| matches!(step.bad, Some(BadReason::Unreadable { .. }));
        self.steps.iter_mut().filter(is_unreadable).for_each(|step| step.of = None);
    }

    /// Goes down from `root` to a tag page. `rotten` hears of each page that is damaged on the medium, once.
    pub(super) async fn find<S: Storage>(
        &mut self,
        io: &S,
        tree: &Tree,
        root: TreeEntry,
        tag_page: u64,
        mut rotten: impl FnMut(RottenPage<'_>),
    ) -> Result<End, Moved> {
        let mut entry = root;
        for level in (1..tree.layout.levels() as u8).rev() {
            let page = tree.layout.ancestor(tag_page, level);
            match entry.state() {
                EntryState::Absent => return Ok(End::Absent(page)),
                EntryState::Lost => return Ok(End::Bad(page)),
                EntryState::Slot(_) => {}
            }
            let step = &mut self.steps[usize::from(level) - 1];
            if step.of != Some((page, entry)) {
                step.of = None;
                let started = read_page(io, tree, page, entry, std::mem::replace(&mut self.buf, Buf::none()));
                let judged;
                (judged, self.buf) = prove(io, tree, root, (page, entry), started).await;
                let judged = judged?;
                step.bad = if let Judged::Bad(reason) = judged { Some(reason) } else { None };
                step.bytes.copy_from_slice(&self.buf);
                step.of = Some((page, entry));
                if let Judged::InMemory(reason) | Judged::Bad(reason) = judged {
                    rotten(RottenPage { page, entry, reason, bytes: step.bad.is_none().then_some(&step.bytes[..]) });
                }
            }
            if step.bad.is_some() {
                return Ok(End::Bad(page));
            }
            let at = tree.entry_at(tag_page, level);
            entry = TreeEntry::read_from_prefix(&step.bytes[at..]).expect("inside the page").0;
        }
        let page = PageId { level: 0, index: tag_page };
        Ok(match entry.state() {
            EntryState::Absent => End::Absent(page),
            EntryState::Lost => End::Bad(page),
            EntryState::Slot(_) => End::TagPage(entry),
        })
    }
}

/// Starts to read a page, which its entry says is in a slot.
pub(super) fn read_page<S: Storage>(io: &S, tree: &Tree, page: PageId, entry: TreeEntry, buf: Buf) -> S::Transfer {
    let EntryState::Slot(slot) = entry.state() else { unreachable!("asked of a page that is there") };
    io.read(Device::Meta, tree.layout.slot_offset(page, slot), buf, 0..PAGE_BYTES)
}

/// Compares a page that is being read with the entry of its proven parent, under `root`. Before anything is said
/// of one that fails it is read once more, or a few times if it can't be read, and looked for in memory. That has
/// been there for long, so it is proven, too.
pub(super) async fn prove<S: Storage>(
    io: &S,
    tree: &Tree,
    root: TreeEntry,
    (page, entry): (PageId, TreeEntry),
    started: S::Transfer,
) -> (Result<Judged, Moved>, Buf) {
    let (mut read, mut buf) = started.await;
    for left in (0..READ.most).rev() {
        if read.is_ok() && equal(&digest(page, &buf), &entry.digest) {
            return (Ok(Judged::Good), buf);
        }
        // Nothing that is current is written over.
        if tree.root.load() != root {
            return (Err(Moved), buf);
        }
        if left == 0 || read.is_ok() && left < READ.most - 1 {
            break;
        }
        if read.is_err() {
            let _ = io.sleep(READ.pause).await;
        }
        (read, buf) = read_page(io, tree, page, entry, buf).await;
    }
    let reason = match read {
        Ok(()) => BadReason::Mismatch,
        Err(errno) => BadReason::Unreadable { device: Device::Meta, errno },
    };
    (Ok(if from_memory(tree, (page, entry), &mut buf) { Judged::InMemory(reason) } else { Judged::Bad(reason) }), buf)
}

/// Copies what an entry says a page is, if it is in memory. Else the buffer is left alone.
fn from_memory(tree: &Tree, (page, entry): (PageId, TreeEntry), into: &mut Buf) -> bool {
    // A look into the cache that fails may have copied some bytes.
    let mut bytes = Box::new([0; PAGE_BYTES]);
    let found = tree.rescued.get(page, &entry.digest, &mut bytes[..])
        || tree.cache.get(page, entry.epoch(), 0, &mut bytes[..]) != Lookup::Miss;
    let is_it = found && equal(&digest(page, &bytes[..]), &entry.digest);
    if is_it {
        into[..PAGE_BYTES].copy_from_slice(&bytes[..]);
    }
    is_it
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Epoch,
        format::Layout,
        metadata::{page_cache::PageCache, rescued::Rescued, root::Root},
    };

    #[test]
    fn what_has_rotted_in_memory_proves_nothing() {
        let layout = Layout::new(4096, 64 << 20, 1 << 20, false).unwrap();
        let (root, cache) = (Root::new(TreeEntry::ABSENT), PageCache::new(8 * PAGE_BYTES as u64));
        let tree = Tree { layout, root, cache, rescued: Rescued::new() };
        let page = PageId { level: 0, index: 3 };
        let (good, bad) = ([5; PAGE_BYTES], [6; PAGE_BYTES]);
        let entry = TreeEntry::new(digest(page, &good), Epoch(7), 0);
        let mut found = Buf::new(PAGE_BYTES);
        tree.cache.put(page, Epoch(7), &bad, false);
        assert!(!from_memory(&tree, (page, entry), &mut found));
        assert!(found.iter().all(|byte| *byte == 0), "what was read is still needed");
        assert!(tree.rescued.add(page, entry.digest, &good));
        assert!(from_memory(&tree, (page, entry), &mut found) && found[..] == good);
        tree.cache.put(page, Epoch(8), &good, false);
        let moved = TreeEntry::new(entry.digest, Epoch(8), 1);
        assert!(from_memory(&tree, (page, moved), &mut found));
    }
}

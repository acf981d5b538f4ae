//! Applying pending tags to tag pages and tree: level by level, never over anything current.
//!
//! Down: which pages are touched, and what their current entries are. Up: each touched page is
//! loaded, verified, changed, and written to the slot that is *not* current; its parent's entry then
//! names the new slot. Until a superblock names the new root, everything the old root names is
//! untouched. A page that has rotted is written anew, as it is, with those above it
//! ([`Rescued`](super::rescued::Rescued)); where that fails it is left. Work goes in batches, so that the device
//! always has several requests.

use crate::{
    Buf, Device, DeviceError, Durability, Epoch, Errno, Latched, Storage,
    crypto::keys::equal,
    format::{EntryState, PAGE_BYTES, PageId, TAG_BYTES, TREE_FANOUT, Tag, TreeEntry, ZERO_TAG, digest, digest_each},
    io::retry::{READ, retry},
    metadata::{
        changes::{Changes, Effect},
        page_cache::Lookup,
        pending::PendingSet,
        rescued::Rescue,
        tree::Tree,
        update_scratch::{BATCH, Scratch, Touched, Verdict},
    },
};
use zerocopy::{FromBytes, IntoBytes};

/// What a run of [`apply`] did.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Applied {
    pub(crate) pages_written: u64,
    /// Pages that did not verify and were rewritten as lost.
    pub(crate) pages_lost: u64,
}

/// A page as the base of its new version.
enum Base {
    /// Verified bytes are in the buffer.
    Page,
    /// Nothing there: all zeros.
    Zeros,
    /// Nothing that verifies: all ones.
    Lost,
    /// See [`Verdict::Left`].
    Left,
}

/// Applies `set` to the tree under `old_root`, for a superblock of epoch `epoch`; returns the new
/// root. Nothing is synced.
pub(crate) async fn apply<S: Storage>(
    io: &S,
    tree: &Tree,
    scratch: &mut Scratch,
    set: &PendingSet,
    old_root: TreeEntry,
    epoch: Epoch,
) -> Result<(TreeEntry, Applied), Latched> {
    let Scratch { tags, runs, rescued, touched, bufs } = scratch;
    set.sorted(tags, runs);
    tree.rescued.list(rescued);
    let changes = Changes::new(tags, runs);
    let mut job = Job { io, tree, set, changes, rescued, epoch, bufs, applied: Applied::default() };
    let top = tree.layout.root_page();
    touched.iter_mut().for_each(Vec::clear);
    if job.changes.effect(tree.layout.blocks_under(top)) == Effect::Vanish {
        return Ok((TreeEntry::ABSENT, job.applied));
    }
    match job.touch(top, old_root) {
        None => return Ok((old_root, job.applied)),
        Some(root) => touched[usize::from(top.level)].push(root),
    }
    for level in (1..=top.level).rev() {
        let (below, here) = touched.split_at_mut(level.into());
        job.descend(level, &mut here[0], &mut below[usize::from(level) - 1]).await?;
    }
    for level in 0..=top.level {
        let (below, here) = touched.split_at_mut(level.into());
        job.rewrite(level, &mut here[0], below.last().map_or(&[], Vec::as_slice)).await?;
    }
    Ok((touched[usize::from(top.level)][0].entry, job.applied))
}

struct Job<'a, S> {
    io: &'a S,
    tree: &'a Tree,
    set: &'a PendingSet,
    changes: Changes<'a>,
    rescued: &'a mut [Rescue],
    epoch: Epoch,
    bufs: &'a mut [Option<Buf>],
    applied: Applied,
}

impl<S: Storage> Job<'_, S> {
    /// A page that is to be written: something pending changes it, or it has rotted, or one below it.
    /// What has rotted counts where the tree still has something: below what is absent nothing is current any more,
    /// and what is below a lost page is lost with it.
    fn touch(&mut self, page: PageId, entry: TreeEntry) -> Option<Touched> {
        let effect = self.changes.effect(self.tree.layout.blocks_under(page));
        let is_rescued =
            |rescue: &Rescue| rescue.hangs_on(page) && (rescue.id != page || rescue.is(page, &entry.digest));
        let changes = effect == Effect::Change;
        let is_there = match entry.state() {
            EntryState::Slot(_) => true,
            EntryState::Absent => false,
            EntryState::Lost => {
                if effect != Effect::Vanish {
                    self.fail(page);
                }
                false
            }
        };
        let touched = changes || effect == Effect::None && is_there && self.rescued.iter().any(is_rescued);
        touched.then_some(Touched { index: page.index, entry, changes, verdict: Verdict::Usable })
    }

    /// A page that nothing pending changes stays as it is, and nothing below it is rescued.
    fn leave(&mut self, level: u8, page: &mut Touched) {
        page.verdict = Verdict::Left;
        self.fail(PageId { level, index: page.index });
    }

    /// Neither a page nor one below it is rescued.
    fn fail(&mut self, page: PageId) {
        self.rescued.iter_mut().filter(|rescue| rescue.hangs_on(page)).for_each(|rescue| rescue.failed = true);
    }

    /// Finds the touched children of the touched pages of one level.
    async fn descend(&mut self, level: u8, here: &mut [Touched], below: &mut Vec<Touched>) -> Result<(), Latched> {
        for batch in here.chunks_mut(BATCH) {
            let bases = self.load(level, batch).await?;
            for (i, page) in batch.iter_mut().enumerate() {
                match bases[i] {
                    Some(Base::Left) => {
                        self.leave(level, page);
                        continue;
                    }
                    Some(Base::Lost) => page.verdict = Verdict::Lost,
                    _ => {}
                }
                let buf = self.bufs[i].take().expect("loads have ended");
                let old = |place: usize| match bases[i] {
                    Some(Base::Page) => entry_in(&buf, place),
                    Some(Base::Lost) => TreeEntry::LOST,
                    _ => TreeEntry::ABSENT,
                };
                let children = self.tree.layout.pages_in(level - 1);
                let first = page.index * TREE_FANOUT;
                for index in first..children.min(first + TREE_FANOUT) {
                    let entry = old((index - first) as usize);
                    below.extend(self.touch(PageId { level: level - 1, index }, entry));
                }
                self.bufs[i] = Some(buf);
            }
        }
        Ok(())
    }

    /// Writes the new versions of one level's touched pages; their entries become the new ones.
    async fn rewrite(&mut self, level: u8, here: &mut [Touched], below: &[Touched]) -> Result<(), Latched> {
        for batch in here.chunks_mut(BATCH) {
            let bases = self.load(level, batch).await?;
            for (i, (page, base)) in batch.iter_mut().zip(bases).enumerate() {
                match base {
                    Some(Base::Left) => self.leave(level, page),
                    base => self.change(PageId { level, index: page.index }, i, page.entry, base, below),
                }
            }
            let before = std::array::from_fn::<_, BATCH, _>(|i| batch.get(i).map(|page| page.entry));
            let mut writes = self.write_new(level, batch);
            let mut failed = None;
            for (i, page) in batch.iter_mut().enumerate() {
                let Some(write) = writes[i].take() else { continue };
                let (result, buf) = write.await;
                self.bufs[i] = Some(buf);
                match (result, before[i]) {
                    (Err(_), Some(entry)) if !page.changes => {
                        page.entry = entry;
                        self.leave(level, page);
                    }
                    (result, _) => failed = failed.or(result.err()),
                }
            }
            if let Some(errno) = failed {
                let first = PageId { level, index: batch[0].index };
                return Err(self.error("write", first, errno));
            }
        }
        Ok(())
    }

    /// Makes the new version of a page in the `i`-th buffer.
    fn change(&mut self, id: PageId, i: usize, current: TreeEntry, base: Option<Base>, below: &[Touched]) {
        let mut buf = self.bufs[i].take().expect("loads have ended");
        match base {
            Some(Base::Page) => {}
            Some(Base::Lost) => {
                buf.fill(0xff);
                self.applied.pages_lost += u64::from(current.state() != EntryState::Lost);
            }
            _ => buf.fill(0),
        }
        match id.level {
            0 => self.change_tags(id, &mut buf),
            _ => self.change_entries(id, &mut buf, below),
        }
        self.bufs[i] = Some(buf);
    }

    /// Gives the new versions of a batch of pages their entries, and starts their writes. Those of
    /// zeros alone need none.
    fn write_new(&mut self, level: u8, batch: &mut [Touched]) -> [Option<S::Transfer>; BATCH] {
        let mut digests = [None; BATCH];
        let id = |page: &Touched| PageId { level, index: page.index };
        let bufs = self.bufs.iter().map(|buf| buf.as_deref().expect("loads have ended"));
        let is_written = |page: &Touched| page.verdict != Verdict::Left;
        let pages = batch.iter().zip(bufs).enumerate().filter(|(_, (page, _))| is_written(page));
        let pages = pages.map(|(i, (page, buf))| (i, id(page), buf));
        digest_each(pages.filter(|(.., buf)| buf.iter().any(|b| *b != 0)), |i, digest| digests[i] = Some(digest));
        let mut writes = [const { None }; BATCH];
        for (i, page) in batch.iter_mut().enumerate().filter(|(_, page)| is_written(page)) {
            let Some(digest) = digests[i] else {
                page.entry = TreeEntry::ABSENT;
                continue;
            };
            let slot = page.entry.other_slot();
            page.entry = TreeEntry::new(digest, self.epoch, slot);
            let buf = self.bufs[i].take().expect("just hashed");
            self.tree.cache.put(id(page), self.epoch, &buf, false);
            let offset = self.tree.layout.slot_offset(id(page), slot);
            self.applied.pages_written += 1;
            writes[i] = Some(self.io.write(Device::Meta, offset, buf, 0..PAGE_BYTES, Durability::MayBeLost));
        }
        writes
    }

    fn change_tags(&self, id: PageId, page: &mut [u8]) {
        let range = self.tree.layout.blocks_under(id);
        for run in self.changes.runs_in(range) {
            let from = (run.start.max(range.first.0) - range.first.0) as usize;
            let to = (run.end.min(range.end()) - range.first.0) as usize;
            page[from * TAG_BYTES..to * TAG_BYTES].fill(0);
        }
        for t in self.changes.tags_in(range) {
            let tag: Tag = self.set.tag(*t);
            let at = (t.block.0 - range.first.0) as usize * TAG_BYTES;
            page[at..at + TAG_BYTES].copy_from_slice(&tag);
        }
        // Beyond the volume's end there is nothing: a lost page says so there too.
        page[range.count as usize * TAG_BYTES..].fill(ZERO_TAG[0]);
    }

    fn change_entries(&self, id: PageId, page: &mut [u8], below: &[Touched]) {
        let first = id.index * TREE_FANOUT;
        let end = self.tree.layout.pages_in(id.level - 1).min(first + TREE_FANOUT);
        for index in first..end {
            let child = PageId { level: id.level - 1, index };
            if self.changes.effect(self.tree.layout.blocks_under(child)) == Effect::Vanish {
                put_entry(page, (index - first) as usize, &TreeEntry::ABSENT);
            }
        }
        let from = below.partition_point(|t| t.index < first);
        for t in below[from..].iter().take_while(|t| t.index < end) {
            put_entry(page, (t.index - first) as usize, &t.entry);
        }
        page[(end - first) as usize * size_of::<TreeEntry>()..].fill(0);
    }

    /// Loads a batch of pages into the buffers, from the cache or all at once from the device.
    async fn load(&mut self, level: u8, batch: &[Touched]) -> Result<[Option<Base>; BATCH], Latched> {
        let mut bases = [const { None }; BATCH];
        let mut reads = [const { None }; BATCH];
        for (i, page) in batch.iter().enumerate() {
            let id = PageId { level, index: page.index };
            let slot = match (page.entry.state(), page.verdict) {
                (EntryState::Slot(slot), Verdict::Usable) => slot,
                (EntryState::Absent, Verdict::Usable) if page.changes => {
                    bases[i] = Some(Base::Zeros);
                    continue;
                }
                _ => {
                    bases[i] = Some(if page.changes { Base::Lost } else { Base::Left });
                    continue;
                }
            };
            let mut buf = self.bufs[i].take().expect("one batch at a time");
            // Rescued pages have been proven once more.
            let known = self.tree.rescued.get(id, &page.entry.digest, &mut buf);
            if known || self.tree.cache.get(id, page.entry.epoch(), 0, &mut buf) != Lookup::Miss {
                bases[i] = Some(Base::Page);
                self.bufs[i] = Some(buf);
                continue;
            }
            let offset = self.tree.layout.slot_offset(id, slot);
            reads[i] = Some(self.io.read(Device::Meta, offset, buf, 0..PAGE_BYTES));
        }
        let mut results = [None; BATCH];
        for (i, read) in reads.iter_mut().enumerate() {
            let Some(read) = read.take() else { continue };
            let (result, buf) = read.await;
            (results[i], self.bufs[i]) = (Some(result), Some(buf));
        }
        let id = |page: &Touched| PageId { level, index: page.index };
        let pages = batch.iter().zip(self.bufs.iter()).enumerate().filter(|(i, _)| results[*i] == Some(Ok(())));
        let pages = pages.map(|(i, (page, buf))| (i, id(page), buf.as_deref().expect("just read")));
        digest_each(pages, |i, digest| {
            if equal(&digest, &batch[i].entry.digest) {
                bases[i] = Some(Base::Page);
            }
        });
        let mut failed = None;
        for (i, page) in batch.iter().enumerate() {
            let Some(result) = results[i].filter(|_| bases[i].is_none()) else { continue };
            let buf = self.bufs[i].take().expect("just read");
            let (judged, buf) = self.judge(id(page), page.entry, result, buf).await;
            self.bufs[i] = Some(buf);
            match judged {
                Ok(Base::Lost) | Err(_) if !page.changes => bases[i] = Some(Base::Left),
                Ok(base) => bases[i] = Some(base),
                Err(why) => failed = failed.or(Some(why)),
            }
        }
        match failed {
            Some(why) => Err(why),
            None => Ok(bases),
        }
    }

    /// A page that does not verify is read once more; one that can't be read, a few times.
    async fn judge(
        &self,
        id: PageId,
        entry: TreeEntry,
        result: Result<(), Errno>,
        mut buf: Buf,
    ) -> (Result<Base, Latched>, Buf) {
        let offset = self.tree.layout.slot_offset(id, entry.other_slot() ^ 1);
        let mut first = Some(result);
        for _ in 0..2 {
            let read = async || {
                if let Some(result) = first.take() {
                    return result;
                }
                let result;
                (result, buf) =
                    self.io.read(Device::Meta, offset, std::mem::replace(&mut buf, Buf::none()), 0..PAGE_BYTES).await;
                result
            };
            match retry(self.io, READ, read).await {
                Err(errno) => return (Err(self.error("read", id, errno)), buf),
                Ok(()) if equal(&digest(id, &buf), &entry.digest) => return (Ok(Base::Page), buf),
                Ok(()) => {}
            }
        }
        (Ok(Base::Lost), buf)
    }

    fn error(&self, op: &'static str, id: PageId, errno: Errno) -> Latched {
        let offset = self.tree.layout.slot_offset(id, 0);
        Latched::Device(DeviceError::new(op, Device::Meta, offset, PAGE_BYTES, errno))
    }
}

fn entry_in(page: &[u8], place: usize) -> TreeEntry {
    TreeEntry::read_from_prefix(&page[place * size_of::<TreeEntry>()..]).expect("inside the page").0
}

fn put_entry(page: &mut [u8], place: usize, entry: &TreeEntry) {
    let at = place * size_of::<TreeEntry>();
    page[at..at + size_of::<TreeEntry>()].copy_from_slice(entry.as_bytes());
}

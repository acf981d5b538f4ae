//! From blocks to tags: pending first, then the tree.
//!
//! The order matters: a checkpoint publishes the new root *before* it empties the pending set, so
//! a lookup that reads the pending tags first and loads the root afterwards misses nothing. A range
//! guard keeps the blocks' own tags still meanwhile. Without one each tag that is found was the
//! current one at some moment of the lookup, or is [`LOST_TAG`] where it was just being changed.

use super::Metadata;
use crate::{
    BlockIndex, BlockRange, DeviceError, PageName, RequestContext, Storage,
    format::{LOST_TAG, PageId, TAG_BYTES, TAGS_PER_PAGE, Tag, TreeEntry, ZERO_TAG, tag_pages},
    io::retry::{READ, retry},
    metadata::pending::PendingSet,
    metadata::{
        load::Missing,
        loads::{Load, LoadsHandle},
        tree::{CacheUse, CacheWalk, Found, LoadError},
    },
    request::context::{TagBuf, TagSide},
    sync::{Ordering, fence},
};
use std::{ops::Range, time::Duration};

/// How often a lookup begins anew because the tree moved under it, before it asks the next
/// checkpoint to wait.
const STALE_RETRIES: u32 = 3;

/// The tags of one tag page that a request needs: their indices in its [`TagBuf`] and in the page.
struct Part {
    tag_page: u64,
    /// Indices in the request.
    places: Range<usize>,
    /// Byte offset in the page of the first.
    at: usize,
}

fn part(range: BlockRange, tag_page: u64) -> Part {
    let first = range.first.0;
    let from = first.max(tag_page * TAGS_PER_PAGE);
    let to = range.end().min((tag_page + 1) * TAGS_PER_PAGE);
    Part {
        tag_page,
        places: (from - first) as usize..(to - first) as usize,
        at: (from % TAGS_PER_PAGE) as usize * TAG_BYTES,
    }
}

/// The indices in the request of all tags on a run of its tag pages.
fn places(range: BlockRange, run: &Range<u64>) -> Range<usize> {
    part(range, run.start).places.start..part(range, run.end - 1).places.end
}

/// A tag of a tag page.
pub(crate) fn leaf_tag(leaf: &[u8], i: usize) -> Tag {
    leaf[i * TAG_BYTES..][..TAG_BYTES].try_into().expect("a tag's length")
}

/// Keeps the next checkpoint from writing pages, for a bounded time.
struct Hold<'a>(&'a Metadata);

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        self.0.holds.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Metadata {
    /// The newest pending tag of a block; [`LOST_TAG`] where it is just being changed.
    pub(crate) fn pending_tag(&self, block: BlockIndex) -> Option<Tag> {
        let generations = || self.pending.each_ref().map(PendingSet::generation);
        loop {
            let before = generations();
            // The newer entry, whichever set it is in: both share one run of sequence numbers.
            let [a, b] = self.pending.each_ref().map(|set| set.lookup(block));
            fence(Ordering::Acquire);
            // One that was emptied in between may have had the newer: then the tree has it, and the
            // other may have an older one, from before it was emptied itself.
            if generations() == before {
                return a.into_iter().chain(b).max_by_key(|(seq, _)| *seq).map(|(_, tag)| tag);
            }
        }
    }

    fn lookup_pending(&self, range: BlockRange, into: &mut TagBuf, places: Range<usize>) {
        if self.pending.iter().all(|set| set.is_empty()) {
            return;
        }
        for i in places {
            if let Some(tag) = self.pending_tag(BlockIndex(range.first.0 + i as u64)) {
                into.set(i, tag);
            }
        }
    }

    /// Fills in what can be known without I/O; returns whether that is all.
    pub(crate) fn lookup_cached(&self, context: &mut RequestContext, range: BlockRange, uses: &mut CacheUse) -> bool {
        let all = 0..range.count as usize;
        context.tags.begin(range);
        self.lookup_pending(range, &mut context.tags, all.clone());
        let root = self.tree.root.load();
        for part in tag_pages(range).map(|page| part(range, page)) {
            if context.tags.all_known(part.places.clone()) {
                continue;
            }
            let bytes = part.places.len() * TAG_BYTES;
            let walk = self.tree.walk_cached(root, part.tag_page, part.at, &mut context.leaf[..bytes], uses);
            if let CacheWalk::Found(found) = walk {
                take(found, &part, &context.leaf[..], &mut context.tags);
            }
        }
        context.tags.all_known(all)
    }

    /// Fills in the rest from the device, for a read: what another one of the thread brings is not read
    /// twice. Blocks whose metadata is damaged get [`LOST_TAG`]; the first such page is returned.
    pub(crate) async fn lookup_missing<S: Storage>(
        &self,
        io: &S,
        context: &mut RequestContext,
        range: BlockRange,
    ) -> Result<Option<PageName>, DeviceError> {
        let mut bad = None;
        for run in context.pages.runs(tag_pages(range)) {
            let load = self.begin_load(context, range, &run).await;
            let resolved = self.resolve(io, context, range, run, TagSide::New).await;
            // Who waits for these pages need not wait for those of the next run.
            drop(load);
            bad = bad.or(resolved?);
        }
        Ok(bad.map(PageId::name))
    }

    /// Begins to load what is missing of a run, if anything is: after another request of the thread, where
    /// that brings all of it. Without a cache that would help nobody.
    async fn begin_load(&self, context: &RequestContext, range: BlockRange, run: &Range<u64>) -> Option<Load> {
        let loads = context.loads.as_ref().filter(|_| self.tree.cache.pages() > 0)?;
        let unknown = context.tags.unknown(places(range, run))?;
        let tag_page = |i: usize| (range.first.0 + i as u64) / TAGS_PER_PAGE;
        Some(loads.begin(tag_page(*unknown.start())..tag_page(*unknown.end()) + 1).await)
    }

    /// All tags of a range, from memory or from the device. It waits for nobody: it may have logged.
    /// What is returned is as above.
    pub(crate) async fn lookup<S: Storage>(
        &self,
        io: &S,
        context: &mut RequestContext,
        range: BlockRange,
        side: TagSide,
    ) -> Result<Option<PageName>, DeviceError> {
        let buf = context.side(side);
        buf.begin(range);
        self.lookup_pending(range, buf, 0..range.count as usize);
        let mut bad = None;
        for run in context.pages.runs(tag_pages(range)) {
            bad = bad.or(self.resolve(io, context, range, run, side).await?);
        }
        Ok(bad.map(PageId::name))
    }

    /// The same, patiently: a device that fails is asked a few times, damaged metadata is read once
    /// more. For lookups whose answer decides what is kept.
    pub(crate) async fn lookup_patiently<S: Storage>(
        &self,
        io: &S,
        context: &mut RequestContext,
        range: BlockRange,
        side: TagSide,
    ) -> Result<Option<PageName>, DeviceError> {
        match retry(io, READ, async || self.lookup(io, context, range, side).await).await? {
            None => Ok(None),
            Some(_) => self.lookup(io, context, range, side).await,
        }
    }

    /// A run of tag pages. Where one fails to verify and the root has moved meanwhile, its
    /// slot may have been written again: begin anew, pending tags included. Under an
    /// unmoved root it is damaged.
    async fn resolve<S: Storage>(
        &self,
        io: &S,
        context: &mut RequestContext,
        range: BlockRange,
        run: Range<u64>,
        side: TagSide,
    ) -> Result<Option<PageId>, DeviceError> {
        let places = places(range, &run);
        let mut hold = None;
        for attempt in 0.. {
            let root = self.tree.root.load();
            match self.resolve_from(io, root, context, range, run.clone(), side).await {
                Ok(lost) => return Ok(lost),
                Err(LoadError::Device(e)) => return Err(e),
                Err(LoadError::Bad(page)) if self.tree.root.load() == root => {
                    context.counters.bad_pages.add(1);
                    context.side(side).fill(places, |_| LOST_TAG);
                    return Ok(Some(page));
                }
                Err(LoadError::Bad(_)) => {}
            }
            self.lookup_pending(range, context.side(side), places.clone());
            if attempt >= STALE_RETRIES && hold.is_none() {
                self.holds.fetch_add(1, Ordering::AcqRel);
                hold = Some(Hold(self));
            }
        }
        unreachable!("the loop ends by returning")
    }

    /// The same under one root. All tags that can be had are filled in, also where others fail.
    /// Returns the first lost page.
    async fn resolve_from<S: Storage>(
        &self,
        io: &S,
        root: TreeEntry,
        context: &mut RequestContext,
        range: BlockRange,
        run: Range<u64>,
        side: TagSide,
    ) -> Result<Option<PageId>, LoadError> {
        let RequestContext { tags, old, pages, leaf, loads, .. } = context;
        let into = if side == TagSide::New { tags } else { old };
        let mut missing = Missing::new(run.start);
        let mut lost = None;
        let mut found = |part: &Part, found: Found, bytes: &[u8], into: &mut TagBuf| {
            if let Found::Lost(page) = found {
                lost.get_or_insert(page);
            }
            take(found, part, bytes, into);
        };
        for part in run.map(|page| part(range, page)) {
            if into.all_known(part.places.clone()) {
                continue;
            }
            let bytes = part.places.len() * TAG_BYTES;
            match self.tree.walk_cached(root, part.tag_page, part.at, &mut leaf[..bytes], &mut CacheUse::default()) {
                CacheWalk::Found(end) => found(&part, end, &leaf[..], into),
                CacheWalk::Missing(page, entry) => missing.add(part.tag_page, page, entry),
            }
        }
        let on_page = |tag_page: u64, end: Found, page: &[u8]| {
            let part = part(range, tag_page);
            found(&part, end, page.get(part.at..).unwrap_or_default(), into);
        };
        // Who waits for these pages may need none of those that are read again.
        let failed = || loads.iter().for_each(LoadsHandle::end);
        self.tree.load_missing(io, pages, &missing, false, failed, on_page).await?;
        Ok(lost)
    }

    /// Waits, for a bounded time, for lookups that had to begin anew because of the last checkpoints.
    pub(crate) async fn wait_for_holds<S: Storage>(&self, io: &S) {
        for _ in 0..100 {
            if self.holds.load(Ordering::Acquire) == 0 {
                return;
            }
            let _ = io.sleep(Duration::from_millis(10)).await;
        }
    }
}

fn take(found: Found, part: &Part, leaf: &[u8], into: &mut TagBuf) {
    let start = part.places.start;
    into.fill(part.places.clone(), |i| match found {
        Found::Page => leaf_tag(leaf, i - start),
        Found::Absent(_) => ZERO_TAG,
        Found::Lost(_) => LOST_TAG,
    });
}

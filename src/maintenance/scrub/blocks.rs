//! Tag pages and the blocks that they vouch for, in order of place.

use super::{
    Scrubber,
    control::ScrubControl,
    findings::Findings,
    lane::Lane,
    metered::Metered,
    report::ScrubFinding,
    way::{End, Judged, Moved, RottenPage, Way, prove, read_page},
};
use crate::{
    BlockIndex, Buf, Device, Io, Scheduler, Storage,
    crypto::tagger::MAX_VERIFIED,
    format::{LOST_TAG, MAX_LEVELS, PAGE_BYTES, PageId, TAGS_PER_PAGE, TreeEntry, ZERO_TAG},
    io::retry::READ,
    request::range_watch::RangeWatch,
};
use arrayvec::ArrayVec;
use std::{collections::VecDeque, mem, ops::Range};

/// Most bytes of blocks that are read at a time, and most tag pages.
const MOST_BYTES: usize = 2 << 20;
const MOST_LANES: usize = 16;
/// How often a tag page is looked at where checkpoints move the tree on meanwhile. What has rotted there is found by
/// nobody else.
const LOOKS: u32 = 8;

/// One pass on its way, and its memory.
pub(super) struct Pass<'p, T> {
    pub(super) of: &'p Scrubber<'p>,
    pub(super) control: &'p ScrubControl,
    pub(super) findings: Findings<'p, T>,
    pub(super) way: Way,
    pub(super) lanes: Vec<Lane>,
    /// Of one page, and of one block.
    pub(super) page: Buf,
    pub(super) block: Buf,
    /// The tag page that it goes on with.
    next: u64,
    /// Blocks with tags that were pending at the start, sorted: their tag pages may be still to come.
    pending: Vec<BlockIndex>,
    /// Blocks that are kept for the end of the pass, in order.
    pub(super) deferred: VecDeque<BlockIndex>,
}

/// What is known of a lane's tag page.
struct Looked<'p, S: Io> {
    lane: usize,
    /// Since before the tags were looked up.
    watch: RangeWatch<'p>,
    root: TreeEntry,
    page: Option<(PageId, TreeEntry, S::Transfer)>,
}

impl<'p, T: FnMut(ScrubFinding)> Pass<'p, T> {
    pub(super) fn new(of: &'p Scrubber<'p>, control: &'p ScrubControl, tell: T) -> Self {
        let layout = of.metadata.layout();
        let block_size = layout.block_size as usize;
        let lanes = (MOST_BYTES / (TAGS_PER_PAGE as usize * block_size)).min(MOST_LANES);
        let mut pending: Vec<_> = of.metadata.pending.iter().flat_map(|set| set.blocks()).collect();
        pending.sort_unstable();
        of.metadata.tree.rescued.forget_failed();
        Self {
            of,
            control,
            findings: Findings::new(control, tell),
            way: Way::new(layout.levels()),
            lanes: (0..lanes).map(|_| Lane::new(block_size)).collect(),
            page: Buf::new(PAGE_BYTES),
            block: Buf::new(block_size),
            next: control.in_superblock().cursor / TAGS_PER_PAGE,
            pending,
            deferred: VecDeque::new(),
        }
    }

    /// Waits while it is paused. `false`: it is to end. Whatever reads asks this first, so that it does not go on
    /// for long on a disk that is slow to fail.
    pub(super) async fn may_go_on(&mut self) -> bool {
        self.see_what_is_mended();
        self.note_held();
        self.control.may_go_on(|scrub| self.of.checkpoints.note_scrub(scrub)).await
    }

    /// Says to which block it has to come back.
    pub(super) fn note_held(&self) {
        let layout = self.of.metadata.layout();
        let pages = self.findings.waiting_pages().map(|page| layout.blocks_under(page).first.0);
        let held_at = self.deferred.front().map(|block| block.0).into_iter().chain(pages).min();
        self.control.note(|report| report.held_at = held_at);
    }

    /// Whether there are tag pages left.
    pub(super) fn is_left(&self) -> bool {
        self.next < self.of.metadata.layout().pages_in(0)
    }

    /// A buffer that is used between two looks at pages and blocks.
    pub(super) fn buf(&mut self) -> &mut Buf {
        &mut self.lanes[0].data
    }

    /// Goes on by some tag pages and their blocks: one beside requests, else several.
    pub(super) async fn some<S: Io>(&mut self, io: &Metered<'_, S>, busy: bool) {
        self.way.forget_unreadable();
        let lanes = if busy { 1 } else { self.lanes.len().min(self.room()).max(1) };
        let mut looked = Vec::with_capacity(lanes);
        while looked.len() < lanes && self.is_left() {
            let lane = looked.len();
            looked.extend(self.look(io, lane).await);
        }
        let mut reads = Vec::with_capacity(looked.len());
        for looked in looked {
            let Some((lane, watch)) = self.take(io, looked).await else { continue };
            let its = &mut self.lanes[lane];
            let extent = its.extent();
            let started = (!extent.is_empty()).then(|| {
                let at = self.of.metadata.layout().block_offset(BlockIndex(its.range.first.0 + extent.start as u64));
                let bytes = 0..extent.len() * self.block.len();
                io.read(Device::Data, at, mem::replace(&mut its.data, Buf::none()), bytes)
            });
            reads.push((lane, watch, extent, started));
        }
        let (mut doubtful, mut is_unreadable) = (ArrayVec::<_, MOST_LANES>::new(), false);
        for (lane, watch, extent, started) in reads {
            let mut read = Ok(());
            if let Some(started) = started {
                (read, self.lanes[lane].data) = started.await;
                io.charge();
                is_unreadable |= read.is_err();
            }
            doubtful.push((self.lanes[lane].range, self.compare(&self.lanes[lane], extent, read.is_ok(), &watch)));
        }
        if is_unreadable {
            // A path that fails over within a moment is not noticed.
            self.control.sleep(io, READ.pause).await;
        }
        // By now nothing is watched, however long this takes.
        for (range, which) in doubtful {
            if !self.judge_each(io, range, which).await {
                return;
            }
        }
        let cursor = (self.next * TAGS_PER_PAGE).min(self.of.metadata.layout().blocks);
        self.control.note(|report| report.cursor = cursor);
    }

    /// Looks for the next tag page and begins to read it. `None`: nothing hangs on it, or on some after it.
    async fn look<S: Io>(&mut self, io: &S, lane: usize) -> Option<Looked<'p, S>> {
        let index = self.next;
        self.next += 1;
        self.look_at(io, lane, index).await
    }

    /// Begins to read a tag page.
    async fn look_at<S: Io>(&mut self, io: &S, lane: usize, index: u64) -> Option<Looked<'p, S>> {
        let (tree, page) = (&self.of.metadata.tree, PageId { level: 0, index });
        let mut looks = 1..LOOKS;
        let (watch, root, end) = loop {
            let (watch, root) = self.take_pending(lane, page);
            match self.find(io, root, index).await {
                Err(Moved) if looks.next().is_some() => {}
                end => break (watch, root, end),
            }
        };
        let its = &mut self.lanes[lane];
        let mut looked = Looked { lane, watch, root, page: None };
        match end {
            Ok(End::TagPage(entry)) => {
                its.fill(|_| LOST_TAG);
                let buf = mem::replace(&mut its.page, Buf::none());
                looked.page = Some((page, entry, read_page(io, tree, page, entry, buf)));
            }
            Ok(End::Absent(top)) if its.pending == 0 => {
                self.skip(top);
                return None;
            }
            Ok(End::Absent(_)) => its.fill(|_| ZERO_TAG),
            Ok(End::Bad(_)) | Err(Moved) => its.fill(|_| LOST_TAG),
        }
        Some(looked)
    }

    /// Takes the tags that are pending, and the root that was current after that.
    fn take_pending(&mut self, lane: usize, page: PageId) -> (RangeWatch<'p>, TreeEntry) {
        let metadata = self.of.metadata;
        let range = metadata.layout().blocks_under(page);
        // In this order: a tag that is looked up before may be another's by then.
        let watch = self.of.ranges.watch(range);
        let its = &mut self.lanes[lane];
        (its.range, its.pending, its.bad) = (range, 0, None);
        for (i, block) in range.blocks().enumerate() {
            if let Some(tag) = metadata.pending_tag(block) {
                its.tags[i] = tag;
                its.pending |= 1 << i;
            }
        }
        (watch, metadata.tree.root.load())
    }

    /// Takes the tags out of the tag page that a look has begun to read. `None`: nothing hangs on it any more.
    async fn take<S: Io>(&mut self, io: &S, mut looked: Looked<'p, S>) -> Option<(usize, RangeWatch<'p>)> {
        let mut looks = 1..LOOKS;
        while let Some((page, entry, started)) = looked.page.take() {
            match self.take_page(io, looked.lane, looked.root, (page, entry), started).await {
                Err(Moved) if looks.next().is_some() => looked = self.look_at(io, looked.lane, page.index).await?,
                _ => break,
            }
        }
        Some((looked.lane, looked.watch))
    }

    /// The same once, as the tree was when it was looked at.
    async fn take_page<S: Io>(
        &mut self,
        io: &S,
        lane: usize,
        root: TreeEntry,
        (page, entry): (PageId, TreeEntry),
        started: S::Transfer,
    ) -> Result<(), Moved> {
        let judged;
        (judged, self.lanes[lane].page) = prove(io, &self.of.metadata.tree, root, (page, entry), started).await;
        let (reason, is_known) = match judged? {
            Judged::Good => {
                self.lanes[lane].fill_from_page();
                return Ok(());
            }
            Judged::InMemory(reason) => (reason, true),
            Judged::Bad(reason) => (reason, self.rebuild(io, lane, (page, entry)).await),
        };
        let bytes = mem::replace(&mut self.lanes[lane].page, Buf::none());
        self.page_has_rotted(page, entry, reason, is_known.then_some(&bytes[..]));
        self.lanes[lane].page = bytes;
        match is_known {
            true => self.lanes[lane].fill_from_page(),
            false => self.lanes[lane].bad = Some((page, entry)),
        }
        Ok(())
    }

    /// Goes down to a tag page, and mends what has rotted on the way.
    pub(super) async fn find<S: Io>(&mut self, io: &S, root: TreeEntry, tag_page: u64) -> Result<End, Moved> {
        let mut rotten = ArrayVec::<_, MAX_LEVELS>::new();
        let note = |RottenPage { page, entry, reason, bytes }: RottenPage<'_>| {
            rotten.push((page, entry, reason, bytes.map(<[u8]>::to_vec)));
        };
        let end = self.way.find(io, &self.of.metadata.tree, root, tag_page, note).await;
        for (page, entry, reason, bytes) in rotten {
            self.page_has_rotted(page, entry, reason, bytes.as_deref());
        }
        end
    }

    /// Nothing hangs on a page but what is pending.
    fn skip(&mut self, top: PageId) {
        let layout = self.of.metadata.layout();
        let end = (layout.blocks_under(top).end()).div_ceil(TAGS_PER_PAGE);
        let at = self.pending.partition_point(|block| block.0 < self.next * TAGS_PER_PAGE);
        let pending = self.pending.get(at).map_or(u64::MAX, |block| block.0 / TAGS_PER_PAGE);
        self.next = end.min(pending).max(self.next);
    }

    /// Compares a lane's blocks with their tags. Returns those of which that proves nothing.
    fn compare(&self, lane: &Lane, extent: Range<usize>, read: bool, watch: &RangeWatch<'_>) -> u128 {
        // Data and tags are there: what comes from now on changes neither.
        let (bs, quiet) = (self.block.len(), watch.is_quiet());
        let mut doubtful = 0;
        for i in (0..lane.tags().len()).filter(|i| lane.tags[*i] == LOST_TAG) {
            doubtful |= 1 << i;
        }
        let is_odd = self.of.is_elsewhere(lane.range) || self.of.admitted.has_failed(lane.range);
        let mut verified = 0;
        for from in extent.clone().step_by(MAX_VERIFIED) {
            let part = from..extent.end.min(from + MAX_VERIFIED);
            let at = (from - extent.start) * bs;
            let data = &lane.data[at..at + part.len() * bs];
            let first = BlockIndex(lane.range.first.0 + from as u64);
            let bad = match read && !is_odd {
                true => self.of.tagger.mismatches(first, data, &lane.tags[part.clone()]),
                false => u64::MAX,
            };
            for i in part.filter(|i| lane.tags[*i] != ZERO_TAG) {
                match bad >> (i - from) & 1 {
                    0 if !lane.is_pending(i) || quiet => verified += 1,
                    _ => doubtful |= 1 << i,
                }
            }
        }
        // One that is just being written may have looked like zeros.
        if !quiet {
            doubtful |= lane.pending;
        }
        self.control.note(|report| report.verified_blocks += verified);
        doubtful
    }
}

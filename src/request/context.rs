//! The memory of one request, taken before the first request comes.

use crate::{
    BlockRange, CounterValues,
    counters::ThreadCounters,
    format::{PAGE_BYTES, Tag, ZERO_TAG},
    log::Requester,
    metadata::{load::PageBufs, loads::LoadsHandle},
    request::hash_batch::BatchHandle,
    sync::{AtomicUsize, Ordering},
};
use std::{
    ops::{Range, RangeInclusive},
    sync::Arc,
};

/// The preallocated memory of one request: tags, page buffers, its index.
pub struct RequestContext {
    /// Its index among the contexts of the volume; the checkpoint's is 0. Lists, locks and the log
    /// know a request by it alone, as `request: usize`: a context has one request at a time.
    pub(crate) id: usize,
    /// The I/O thread that uses it, and its counters.
    pub(crate) thread: usize,
    pub(crate) counters: Arc<ThreadCounters>,
    /// Whether the look of its read at the cache is counted: it may look twice.
    pub(crate) is_counted: bool,
    /// Tags to compare with, or to write.
    pub(crate) tags: TagBuf,
    /// Tags before a write that failed; of a read, those computed from the data.
    pub(crate) old: TagBuf,
    pub(crate) pages: PageBufs,
    /// A tag page's worth of tags, copied from the tree.
    pub(crate) leaf: Box<[u8; PAGE_BYTES]>,
    /// The hash batch of its thread, where that has several requests.
    pub(crate) batch: Option<BatchHandle>,
    /// The loads of tag pages of its thread, where that has several requests.
    pub(crate) loads: Option<LoadsHandle>,
}

/// Which of a request's two tag buffers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum TagSide {
    New,
    Old,
}

impl RequestContext {
    pub(crate) fn memory_bytes(max_blocks: usize, levels: usize) -> u64 {
        PageBufs::memory_bytes(levels, max_blocks)
            + (2 * max_blocks * (size_of::<Tag>() + 1)
                + PAGE_BYTES
                + BatchHandle::MEMORY_BYTES
                + LoadsHandle::MEMORY_BYTES) as u64
    }

    /// Gives the contexts of one volume that one thread uses a common hash batch: it hashes for
    /// several requests at once, and may have it done by other threads. And it loads a tag page once
    /// for all of them: a request may wait for another one's read, so all are to be polled.
    pub fn work_together<'a>(contexts: impl IntoIterator<Item = &'a mut RequestContext>) {
        let contexts: Vec<_> = contexts.into_iter().collect();
        let handles = BatchHandle::several(contexts.len()).zip(LoadsHandle::several(contexts.len()));
        for (context, (batch, loads)) in contexts.into_iter().zip(handles) {
            (context.batch, context.loads) = (Some(batch), Some(loads));
        }
    }

    pub(crate) fn side(&mut self, side: TagSide) -> &mut TagBuf {
        if side == TagSide::New { &mut self.tags } else { &mut self.old }
    }

    pub(crate) fn requester(&self) -> Requester {
        Requester { id: self.id, thread: self.thread }
    }
}

/// Hands out the memory of requests, as much as was announced, and the counters of each thread.
pub(crate) struct RequestContexts {
    counters: Vec<Arc<ThreadCounters>>,
    taken: AtomicUsize,
    max: usize,
    max_blocks: usize,
    levels: usize,
}

impl RequestContexts {
    /// For `max` requests of up to `max_blocks` blocks beside the first, which is the checkpoint's.
    pub(crate) fn new(max: usize, threads: usize, max_blocks: usize, levels: usize) -> Self {
        let counters = (0..threads.max(1)).map(|_| Arc::default()).collect();
        Self { counters, taken: AtomicUsize::new(1), max: max + 1, max_blocks, levels }
    }

    pub(crate) fn max(&self) -> usize {
        self.max
    }

    pub(crate) fn memory_bytes(&self) -> u64 {
        self.max as u64 * RequestContext::memory_bytes(self.max_blocks, self.levels)
    }

    /// # Panics
    /// When more than `max` are taken, or the thread does not exist.
    pub(crate) fn take(&self, thread: usize) -> RequestContext {
        let id = self.taken.fetch_add(1, Ordering::AcqRel);
        assert!(id < self.max, "more contexts than the volume was opened for");
        assert!(thread < self.counters.len(), "no such thread");
        RequestContext {
            id,
            thread,
            counters: Arc::clone(&self.counters[thread]),
            is_counted: false,
            tags: TagBuf::new(self.max_blocks),
            old: TagBuf::new(self.max_blocks),
            pages: PageBufs::new(self.levels, self.max_blocks),
            leaf: Box::new([0; PAGE_BYTES]),
            batch: None,
            loads: None,
        }
    }

    /// The counters of the first thread, which the checkpoint uses, too.
    pub(crate) fn first_counters(&self) -> &ThreadCounters {
        &self.counters[0]
    }

    pub(crate) fn sum(&self) -> CounterValues {
        let mut sum = CounterValues::default();
        self.counters.iter().for_each(|thread| thread.add_to(&mut sum));
        sum
    }
}

/// The tags of a range, as far as they are known.
pub(crate) struct TagBuf {
    tags: Vec<Tag>,
    known: Vec<bool>,
}

impl TagBuf {
    fn new(max: usize) -> Self {
        Self { tags: vec![ZERO_TAG; max], known: vec![false; max] }
    }
    /// The first `count` tags.
    pub(crate) fn tags(&self, count: u64) -> &[Tag] {
        &self.tags[..count as usize]
    }
    /// Room for all tags, which the buffer is without until it is given back.
    pub(crate) fn lend(&mut self) -> Vec<Tag> {
        self.restore();
        std::mem::take(&mut self.tags)
    }
    pub(crate) fn give_back(&mut self, tags: Vec<Tag>) {
        self.tags = tags;
    }
    /// Allocates them anew where a request that was dropped has not given them back.
    fn restore(&mut self) {
        if self.tags.is_empty() {
            self.tags.resize(self.known.len(), ZERO_TAG);
        }
    }
    /// Makes all tags of the range unknown.
    pub(crate) fn begin(&mut self, range: BlockRange) {
        self.restore();
        self.known[..range.count as usize].fill(false);
    }
    pub(crate) fn set(&mut self, i: usize, tag: Tag) {
        self.tags[i] = tag;
        self.known[i] = true;
    }
    /// Sets what is not known yet in `range`.
    pub(crate) fn fill(&mut self, range: Range<usize>, tag: impl Fn(usize) -> Tag) {
        for i in range {
            if !self.known[i] {
                self.set(i, tag(i));
            }
        }
    }
    /// From the first tag in `range` that is not known to the last.
    pub(crate) fn unknown(&self, range: Range<usize>) -> Option<RangeInclusive<usize>> {
        let mut unknown = range.filter(|i| !self.known[*i]);
        let first = unknown.next()?;
        Some(first..=unknown.next_back().unwrap_or(first))
    }
    pub(crate) fn all_known(&self, range: Range<usize>) -> bool {
        self.known[range].iter().all(|k| *k)
    }
}

//! The memory of one request, taken before the first request comes.

use crate::{
    BlockRange,
    format::{PAGE_BYTES, Tag, ZERO_TAG},
    metadata::tree::PageBufs,
    request::hash_batch::Member,
};

/// The preallocated memory of one request: tags, page buffers, its place in the waiting lists.
pub struct Slot {
    /// Place in the waiting lists.
    pub(crate) id: usize,
    /// Whose counters it counts on.
    pub(crate) queue: usize,
    /// Tags to compare with, or to write.
    pub(crate) tags: TagBuf,
    /// Tags before a write that failed.
    pub(crate) old: TagBuf,
    pub(crate) pages: PageBufs,
    /// A tag page's worth of tags on their way from the tree.
    pub(crate) leaf: Box<[u8; PAGE_BYTES]>,
    /// Its place among the requests of its thread, where it has company.
    pub(crate) member: Option<Member>,
}

impl Slot {
    pub(crate) fn new(id: usize, queue: usize, max_blocks: usize, levels: usize) -> Self {
        Self {
            id,
            queue,
            tags: TagBuf::new(max_blocks),
            old: TagBuf::new(max_blocks),
            pages: PageBufs::new(levels, max_blocks),
            leaf: Box::new([0; PAGE_BYTES]),
            member: None,
        }
    }
    pub(crate) fn memory_bytes(max_blocks: usize, levels: usize) -> u64 {
        PageBufs::memory_bytes(levels, max_blocks)
            + (2 * max_blocks * (size_of::<Tag>() + 1) + PAGE_BYTES + Member::MEMORY_BYTES) as u64
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
        self.mend();
        std::mem::take(&mut self.tags)
    }
    pub(crate) fn give_back(&mut self, tags: Vec<Tag>) {
        self.tags = tags;
    }
    /// A request that was dropped has not given them back.
    fn mend(&mut self) {
        if self.tags.is_empty() {
            self.tags.resize(self.known.len(), ZERO_TAG);
        }
    }
    /// Forgets all.
    pub(crate) fn begin(&mut self, range: BlockRange) {
        self.mend();
        self.known[..range.count as usize].fill(false);
    }
    pub(crate) fn set(&mut self, i: usize, tag: Tag) {
        self.tags[i] = tag;
        self.known[i] = true;
    }
    /// Sets what is not known yet in `range`.
    pub(crate) fn fill(&mut self, range: std::ops::Range<usize>, tag: impl Fn(usize) -> Tag) {
        for i in range {
            if !self.known[i] {
                self.set(i, tag(i));
            }
        }
    }
    pub(crate) fn all_known(&self, range: std::ops::Range<usize>) -> bool {
        self.known[range].iter().all(|k| *k)
    }
}

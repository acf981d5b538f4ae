//! The tags of all blocks: those of the last epochs in memory, the others in a hash tree that is
//! read through a cache.

pub(crate) mod changes;
pub mod hints;
pub(crate) mod load;
pub(crate) mod loads;
pub(crate) mod lookup;
mod next_data;
pub(crate) mod page_cache;
pub(crate) mod pending;
mod prefetch;
pub(crate) mod rescued;
pub(crate) mod root;
pub(crate) mod tree;
pub(crate) mod tree_update;
pub(crate) mod update_scratch;

use crate::{
    BlockIndex, BlockRange, Epoch, Seq,
    counters::ThreadCounters,
    format::{Layout, Tag},
    sync::{AtomicU64, AtomicUsize},
};
use hints::Hints;
use pending::PendingSet;
use tree::Tree;

/// The tags of a volume: the pending ones, the tree, and the channel to the prefetch worker.
pub(crate) struct Metadata {
    pub(crate) tree: Tree,
    /// By parity of the epoch.
    pub(crate) pending: [PendingSet; 2],
    /// Lookups that ask the next checkpoint to wait.
    holds: AtomicUsize,
    hints: Option<Hints>,
    /// The cluster of the last hint: used by the prefetch worker alone.
    last_cluster: AtomicU64,
}

impl Metadata {
    pub(crate) fn new(tree: Tree, pending: [PendingSet; 2], hints: Option<Hints>) -> Self {
        Self { tree, pending, holds: AtomicUsize::new(0), hints, last_cluster: AtomicU64::new(u64::MAX) }
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.tree.layout
    }

    /// Bytes of the cache and of pending tags.
    pub(crate) fn memory_bytes(&self) -> u64 {
        self.tree.cache.memory_bytes() + self.pending.iter().map(PendingSet::memory_bytes).sum::<u64>()
    }

    /// Bytes of a block.
    pub(crate) fn block_size(&self) -> usize {
        self.tree.layout.block_size as usize
    }

    /// The tags of a change of this epoch and number, for lookups from now on. Returns how many
    /// blocks had none pending.
    pub(crate) fn publish(&self, epoch: Epoch, seq: Seq, first: BlockIndex, tags: &[Tag]) -> usize {
        let set = &self.pending[epoch.parity()];
        let blocks = BlockRange::new(first, tags.len() as u64).blocks();
        blocks.zip(tags).filter(|(block, tag)| set.insert(*block, seq, tag)).count()
    }

    /// Tells the prefetch worker of a read, if that costs nothing.
    pub(crate) fn hint(&self, range: BlockRange, counters: &ThreadCounters) {
        self.hints.iter().for_each(|hints| hints.offer(range, counters));
    }
}

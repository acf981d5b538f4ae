//! The prefetch worker's part: a cluster of tag pages for each hint, and the next one where reads run on.
//!
//! Nobody waits for any of this: what it brings in time is in the cache, what it does not bring is
//! read by whoever needs it.

use crate::{BlockIndex, BlockRange, Hint, Slot, Storage, Volume, format::TAGS_PER_PAGE, lookup::Into, sync::Ordering};

/// Tag pages that are brought together: at 4096-byte blocks, 8 MiB of data.
const CLUSTER: u64 = 16;

impl Volume {
    /// Loads the tag pages around a hint into the cache, and runs ahead of sequential reads.
    pub async fn prefetch<S: Storage>(&self, io: &S, slot: &mut Slot, hint: Hint) {
        let range = hint.0;
        if range.count == 0 || !self.tree.layout.contains(range) {
            return;
        }
        let cluster = range.first.0 / TAGS_PER_PAGE / CLUSTER;
        let last = self.last_cluster.swap(cluster, Ordering::Relaxed);
        self.prefetch_cluster(io, slot, cluster).await;
        // The same cluster again, or the one after the last: reads are running on.
        if last == cluster || last.wrapping_add(1) == cluster {
            self.prefetch_cluster(io, slot, cluster + 1).await;
        }
    }

    async fn prefetch_cluster<S: Storage>(&self, io: &S, slot: &mut Slot, cluster: u64) {
        for tag_page in cluster * CLUSTER..(cluster + 1) * CLUSTER {
            let first = BlockIndex(tag_page * TAGS_PER_PAGE);
            if first.0 >= self.blocks() {
                return;
            }
            // One tag is enough to bring its page. Pending tags are of no interest here, and no range
            // guard is held: what is found is not used, only kept in the cache as verified.
            let one = BlockRange::new(first, 1);
            slot.tags.begin(one);
            if self.lookup_missing(io, slot, one, (Into::Tags, true)).await.is_err() {
                return;
            }
        }
    }
}

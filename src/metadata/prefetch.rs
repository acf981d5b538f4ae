//! The prefetch worker's part: a cluster of tag pages for each hint, and the next one where reads
//! run on.
//!
//! Nobody waits for any of this: what it brings in time is in the cache, what it does not bring is
//! read by the request that needs it.

use super::Metadata;
use crate::{
    Hint, RequestContext, Storage,
    format::TAGS_PER_PAGE,
    metadata::{
        load::Missing,
        tree::{CacheUse, CacheWalk},
    },
    sync::Ordering,
};

/// Tag pages that are brought together: at 4096-byte blocks, 8 MiB of data.
const CLUSTER: u64 = 16;

impl Metadata {
    /// Loads the tag pages around a hint into the cache, and runs ahead of sequential reads.
    pub(crate) async fn prefetch<S: Storage>(&self, io: &S, context: &mut RequestContext, hint: Hint) {
        let range = hint.0;
        if range.count == 0 || !self.tree.layout.contains(range) {
            return;
        }
        let cluster = range.first.0 / TAGS_PER_PAGE / CLUSTER;
        let last = self.last_cluster.swap(cluster, Ordering::Relaxed);
        self.prefetch_cluster(io, context, cluster).await;
        // The same cluster again, or the one after the last: reads are running on.
        if last == cluster || last.checked_add(1) == Some(cluster) {
            self.prefetch_cluster(io, context, cluster + 1).await;
        }
    }

    async fn prefetch_cluster<S: Storage>(&self, io: &S, context: &mut RequestContext, cluster: u64) {
        let end = self.tree.layout.pages_in(0).min((cluster + 1) * CLUSTER);
        for run in context.pages.runs(cluster * CLUSTER..end) {
            // Pending tags are of no interest here, and no range guard is held: what is found is
            // not used, only kept in the cache as verified.
            let root = self.tree.root.load();
            let mut missing = Missing::new(run.start);
            for tag_page in run {
                let walk = self.tree.walk_cached(root, tag_page, 0, &mut [], &mut CacheUse::default());
                if let CacheWalk::Missing(page, entry) = walk {
                    missing.add(tag_page, page, entry);
                }
            }
            if self.tree.load_missing(io, &mut context.pages, &missing, true, || {}, |_, _, _| {}).await.is_err() {
                return;
            }
        }
    }
}

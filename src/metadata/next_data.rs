//! Where data is: runs of blocks that may hold some, subtrees that read as zeros passed over whole.

use super::{
    Metadata,
    load::Missing,
    tree::{CacheUse, CacheWalk, Found, LoadError},
};
use crate::{BlockIndex, BlockRange, Storage, format::TAGS_PER_PAGE, request::context::RequestContext};

impl Metadata {
    /// The next run of blocks at or after `from` that may hold data; everything between reads as
    /// zeros. A run under damaged metadata counts as data: reading it tells what is wrong.
    /// `overlay`: blocks that recovery has found tags of and not written down, sorted; a volume
    /// that takes writes has none.
    pub(crate) async fn next_data<S: Storage>(
        &self,
        io: &S,
        context: &mut RequestContext,
        from: BlockIndex,
        overlay: &[BlockIndex],
    ) -> Option<BlockRange> {
        let mut at = from;
        while at.0 < self.layout().blocks {
            let page_end = (at.0 / TAGS_PER_PAGE + 1) * TAGS_PER_PAGE;
            let absent_to = match self.find_page(io, context, at).await {
                Ok(Found::Absent(page)) => self.layout().blocks_under(page).end(),
                _ => at.0,
            };
            if absent_to == at.0 {
                return Some(BlockRange::new(at, page_end.min(self.layout().blocks) - at.0));
            }
            if let Some(pending) = self.next_pending(at, overlay).filter(|b| b.0 < absent_to) {
                let end = (pending.0 / TAGS_PER_PAGE + 1) * TAGS_PER_PAGE;
                return Some(BlockRange::new(pending, end.min(self.layout().blocks) - pending.0));
            }
            at = BlockIndex(absent_to);
        }
        None
    }

    /// The first block at or after `from` with a tag that is not in the tree yet.
    fn next_pending(&self, from: BlockIndex, overlay: &[BlockIndex]) -> Option<BlockIndex> {
        let kept = overlay.get(overlay.partition_point(|b| *b < from)).copied();
        // Without an overlay the pending sets are searched.
        let live = self.pending.iter().filter(|_| overlay.is_empty()).filter_map(|set| set.next(from)).min();
        kept.into_iter().chain(live).min()
    }

    async fn find_page<S: Storage>(
        &self,
        io: &S,
        context: &mut RequestContext,
        block: BlockIndex,
    ) -> Result<Found, LoadError> {
        let (leaf, _) = self.layout().tag_page_of(block);
        let root = self.tree.root.load();
        match self.tree.walk_cached(root, leaf.index, 0, &mut [], &mut CacheUse::default()) {
            CacheWalk::Found(found) => Ok(found),
            CacheWalk::Missing(page, entry) => {
                let (mut missing, mut result) = (Missing::new(leaf.index), Found::Page);
                missing.add(leaf.index, page, entry);
                self.tree
                    .load_missing(io, &mut context.pages, &missing, false, || {}, |_, found, _| result = found)
                    .await?;
                Ok(result)
            }
        }
    }
}

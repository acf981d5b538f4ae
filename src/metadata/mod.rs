//! The tags of all blocks: those of the last epochs in memory, the others in a hash tree that is read through a cache.

pub(crate) mod changes;
pub mod hints;
pub(crate) mod lookup;
pub(crate) mod page_cache;
pub(crate) mod pending;
mod prefetch;
pub(crate) mod root;
pub(crate) mod tree;
pub(crate) mod tree_update;

//! Keys, and the tags of blocks: made for writes, checked for reads.

pub(crate) mod keys;
pub(crate) mod lanes;
pub(crate) mod sha256;
pub(crate) mod tagger;

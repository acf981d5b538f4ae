//! Keys, and the tags of blocks: made for writes, checked for reads.

pub(crate) mod aegis;
pub(crate) mod keys;
pub(crate) mod lanes;
pub(crate) mod sha256;
pub(crate) mod tagger;
pub(crate) mod wrapping;

/// A SHA-256 digest.
pub(crate) type Digest = [u8; 32];
/// An HMAC-SHA256.
pub(crate) type Mac = [u8; 32];

//! `--tag`.

use ublk_integrity::TagAlgorithm;

#[derive(Clone, Copy, clap::ValueEnum)]
pub enum TagName {
    /// HMAC-SHA-256: fast on CPUs with SHA instructions
    HmacSha256,
    /// Keyed BLAKE3: fast on any CPU with wide vectors
    Blake3,
    /// AEGIS-128X2, a MAC at the price of a checksum, with AES instructions; a 128-bit key, which
    /// must stay unknown
    #[value(name = "aegis-128x2")]
    Aegis128X2,
}

impl From<TagName> for TagAlgorithm {
    fn from(tag: TagName) -> Self {
        match tag {
            TagName::HmacSha256 => Self::HmacSha256,
            TagName::Blake3 => Self::Blake3,
            TagName::Aegis128X2 => Self::Aegis128X2,
        }
    }
}

//! Tags by AEGISMAC-128X2 (RFC 10032, section 8.3): 256 bits, under a key of 128 bits, at the price
//! of a checksum.
//!
//! It is the one function of AEGIS that may use a nonce again for other data, and rewritten blocks
//! do. The nonce is the block's byte offset: blocks don't share a state then, and all that is kept
//! is the key, which is zeroized. A state kept to be cloned for each block would do what the key
//! does, and the crate does not zeroize it.
//!
//! A known key makes collisions easy, where it does not with HMAC-SHA256: see `docs/guarantees.md`.

use crate::format::Tag;
use aegis::aegis128x2::Aegis128X2Mac;
use zeroize::{Zeroize, ZeroizeOnDrop};

const KEY_BYTES: usize = 16;

/// The key of AEGIS tags.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub(crate) struct AegisKey([u8; KEY_BYTES]);

impl AegisKey {
    /// Of a derived key, the bytes that come first.
    pub(crate) fn new(derived: &[u8; 32]) -> Self {
        let mut key = Self([0; KEY_BYTES]);
        key.0.copy_from_slice(&derived[..KEY_BYTES]);
        key
    }

    /// The tag of the block at this byte of the volume.
    pub(crate) fn tag(&self, offset: [u8; 8], data: &[u8]) -> Tag {
        let mut nonce = [0; 16];
        nonce[..8].copy_from_slice(&offset);
        let mut mac = Aegis128X2Mac::<32>::new_with_nonce(&self.0, &nonce);
        mac.update(data);
        mac.finalize()
    }
}

/// Which of its ways the crate's C library takes here. It asks the processor when it is first used;
/// the order is its own.
pub(crate) fn implementation() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("vaes") && is_x86_feature_detected!("avx2") {
            return "libaegis, vaes";
        }
        if is_x86_feature_detected!("aes") && is_x86_feature_detected!("avx") {
            return "libaegis, aes-ni";
        }
    }
    #[cfg(target_arch = "aarch64")]
    if std::arch::is_aarch64_feature_detected!("aes") {
        return "libaegis, armv8";
    }
    PORTABLE
}

const PORTABLE: &str = "libaegis, portable";

/// Whether this processor has the instructions that make it fast.
pub(crate) fn has_instructions() -> bool {
    implementation() != PORTABLE
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::hex;

    /// RFC 10032, A.8.2; its nonce is no offset.
    #[test]
    fn vector_of_the_rfc() {
        let (mut key, mut nonce) = ([0; 16], [0; 16]);
        (key[0], key[1], nonce[0], nonce[2]) = (0x10, 0x01, 0x10, 0x02);
        let mut mac = Aegis128X2Mac::<32>::new_with_nonce(&key, &nonce);
        mac.update(&std::array::from_fn::<u8, 35, _>(|i| i as u8));
        assert_eq!(hex(&mac.finalize()), "afcba3fc2d63c8d6c7f2d63f3ec8fbbbaf022e15ac120e78ffa7755abccd959c");
    }

    /// The same nonce in the terms of the device: an offset of 0x020010 bytes.
    #[test]
    fn the_offset_is_the_nonce() {
        let mut derived = [0xee; 32];
        derived[..16].fill(0);
        (derived[0], derived[1]) = (0x10, 0x01);
        let data: [u8; 35] = std::array::from_fn(|i| i as u8);
        let tag = AegisKey::new(&derived).tag(0x02_00_10u64.to_le_bytes(), &data);
        assert_eq!(hex(&tag), "afcba3fc2d63c8d6c7f2d63f3ec8fbbbaf022e15ac120e78ffa7755abccd959c");
    }
}

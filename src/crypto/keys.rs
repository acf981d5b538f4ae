//! The master key and what is derived from it.

pub(crate) use super::{Digest, Mac};
use super::{
    aegis::{self, AegisKey},
    sha256::HmacKey,
};
use hkdf::Hkdf;
use hmac::{Hmac, KeyInit, Mac as _};
use serde::Serialize;
use sha2::Sha256;
use std::{fmt, str::FromStr};
use subtle::ConstantTimeEq;
use zeroize::{Zeroize, Zeroizing};

/// How the tag of a block is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Default)]
pub enum TagAlgorithm {
    /// HMAC-SHA256(K, SHA256(block) ‖ le64(byte offset)).
    #[default]
    #[serde(rename = "hmac-sha256")]
    HmacSha256,
    /// Keyed BLAKE3(K, block ‖ le64(byte offset)), 32 bytes of it. For processors without SHA
    /// instructions.
    #[serde(rename = "blake3")]
    Blake3,
    /// AEGISMAC-128X2 (RFC 10032) with the byte offset as nonce, 32 bytes. For processors with AES
    /// instructions.
    #[serde(rename = "aegis-128x2")]
    Aegis128X2,
}

impl TagAlgorithm {
    /// All there are.
    pub const ALL: [Self; 3] = [Self::HmacSha256, Self::Blake3, Self::Aegis128X2];

    /// Its number in the superblock.
    pub(crate) fn code(self) -> u16 {
        match self {
            Self::HmacSha256 => 1,
            Self::Blake3 => 2,
            Self::Aegis128X2 => 3,
        }
    }
    pub(crate) fn from_code(code: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|a| a.code() == code)
    }
    fn name(self) -> &'static str {
        match self {
            Self::HmacSha256 => "hmac-sha256",
            Self::Blake3 => "blake3",
            Self::Aegis128X2 => "aegis-128x2",
        }
    }
    /// Whether this processor lacks the instructions without which the algorithm is
    /// slower than any other.
    pub fn lacks_instructions(self) -> bool {
        self == Self::Aegis128X2 && !aegis::has_instructions()
    }
}

impl fmt::Display for TagAlgorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// There is no tag algorithm of this name.
#[derive(Debug, thiserror::Error)]
#[error("the tag algorithm {0:?} is none of {all}", all = TagAlgorithm::ALL.map(TagAlgorithm::name).join(", "))]
pub struct UnknownTagAlgorithm(String);

impl FromStr for TagAlgorithm {
    type Err = UnknownTagAlgorithm;

    fn from_str(name: &str) -> Result<Self, UnknownTagAlgorithm> {
        Self::ALL.into_iter().find(|a| a.name() == name).ok_or_else(|| UnknownTagAlgorithm(name.into()))
    }
}

/// Fewest bytes of a master key.
pub const MIN_KEY_BYTES: usize = 32;
/// Most bytes of a master key.
pub const MAX_KEY_BYTES: usize = 4096;

/// The volume's secret, zeroized when dropped and never printed.
#[derive(zeroize::Zeroize, zeroize::ZeroizeOnDrop)]
pub struct MasterKey(Vec<u8>);

/// The key has the wrong length.
#[derive(Debug, thiserror::Error)]
#[error("the key has {0} bytes; must be from {MIN_KEY_BYTES} to {MAX_KEY_BYTES}")]
pub struct KeyLength(pub usize);

impl MasterKey {
    /// Takes the secret; the caller zeroizes its own copies.
    pub fn new(bytes: &[u8]) -> Result<Self, KeyLength> {
        if !(MIN_KEY_BYTES..=MAX_KEY_BYTES).contains(&bytes.len()) {
            return Err(KeyLength(bytes.len()));
        }
        Ok(Self(bytes.to_vec()))
    }
    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MasterKey(secret)")
    }
}

/// HMAC-SHA256 under one derived key; the key's two blocks are hashed once, here.
#[derive(Clone)]
pub(crate) struct MacKey(Hmac<Sha256>);

impl MacKey {
    fn new(key: &[u8; 32]) -> Self {
        Self(Hmac::new_from_slice(key).expect("HMAC takes a key of any length"))
    }
    pub(crate) fn sign(&self, message: &[u8]) -> Mac {
        self.0.clone().chain_update(message).finalize().into_bytes().into()
    }
    pub(crate) fn verify(&self, message: &[u8], mac: &Mac) -> bool {
        equal(&self.sign(message), mac)
    }
}

/// Comparison whose time does not depend on the bytes. `subtle` takes byte after byte of arrays,
/// and each has to go through memory: a tenth of what an AEGIS tag costs. So the differences are
/// put together first, in words.
pub(crate) fn equal(a: &[u8; 32], b: &[u8; 32]) -> bool {
    let words = |bytes: &[u8; 32]| -> [u64; 4] { zerocopy::transmute!(*bytes) };
    let (a, b) = (words(a), words(b));
    let difference = (a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]);
    difference.ct_eq(&0).into()
}

/// The key of keyed BLAKE3.
pub(crate) type Blake3Key = Zeroizing<[u8; 32]>;

/// What an anchor's body is signed with: it outlives the opening that derived the other keys.
#[derive(Clone)]
pub(crate) struct AnchorKey {
    pub(crate) mac: MacKey,
    /// The id of the volume's key.
    pub(crate) id: [u8; 16],
    /// What a counter knows us by, and we it.
    pub(crate) secret: Zeroizing<[u8; 32]>,
}

/// Everything derived from the master key for one volume: HKDF-SHA256 (RFC 5869), the volume's
/// UUID as salt, one label for each use.
pub(crate) struct Keys {
    hmac_tags: HmacKey,
    blake3_tags: Blake3Key,
    aegis_tags: AegisKey,
    log: MacKey,
    superblock: MacKey,
    identity: MacKey,
    key_area: MacKey,
    anchor: AnchorKey,
    id: [u8; 16],
}

impl Keys {
    pub(crate) fn derive(master: &MasterKey, uuid: &[u8; 16]) -> Self {
        let hkdf = Hkdf::<Sha256>::new(Some(uuid), &master.0);
        let expand = |label: &str| {
            let mut key = Zeroizing::new([0; 32]);
            hkdf.expand(label.as_bytes(), &mut *key).expect("32 bytes are a valid HKDF-SHA256 output");
            key
        };
        let mut id_bytes = expand("ublk-integrity v1 key id");
        let id = id_bytes[..16].try_into().expect("16 of 32 bytes");
        id_bytes.zeroize();
        Self {
            hmac_tags: HmacKey::new(&expand("ublk-integrity v1 block tags")),
            blake3_tags: expand("ublk-integrity v1 block tags, blake3"),
            aegis_tags: AegisKey::new(&expand("ublk-integrity v1 block tags, aegis-128x2")),
            log: MacKey::new(&expand("ublk-integrity v1 tag log")),
            superblock: MacKey::new(&expand("ublk-integrity v1 superblock")),
            identity: MacKey::new(&expand("ublk-integrity v1 identity")),
            key_area: MacKey::new(&expand("ublk-integrity v1 key area")),
            anchor: AnchorKey {
                mac: MacKey::new(&expand("ublk-integrity v1 anchor")),
                id,
                secret: expand("ublk-integrity v1 anchor counter"),
            },
            id,
        }
    }
    /// Tells one key from another without telling anything else about it.
    pub(crate) fn id(&self) -> [u8; 16] {
        self.id
    }
    pub(crate) fn hmac_tags(&self) -> &HmacKey {
        &self.hmac_tags
    }
    pub(crate) fn blake3_tags(&self) -> &Blake3Key {
        &self.blake3_tags
    }
    pub(crate) fn aegis_tags(&self) -> &AegisKey {
        &self.aegis_tags
    }
    pub(crate) fn log(&self) -> &MacKey {
        &self.log
    }
    pub(crate) fn superblock(&self) -> &MacKey {
        &self.superblock
    }
    pub(crate) fn identity(&self) -> &MacKey {
        &self.identity
    }
    pub(crate) fn key_area(&self) -> &MacKey {
        &self.key_area
    }
    pub(crate) fn anchor(&self) -> &AnchorKey {
        &self.anchor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_anywhere_makes_a_difference() {
        let a: [u8; 32] = std::array::from_fn(|i| i as u8 ^ 0x5a);
        assert!(equal(&a, &a));
        for bit in 0..256 {
            let mut b = a;
            b[bit / 8] ^= 1 << (bit % 8);
            assert!(!equal(&a, &b) && !equal(&b, &a), "bit {bit}");
        }
    }

    #[test]
    fn tag_algorithms_have_one_name_and_one_number() {
        let all = [
            (TagAlgorithm::HmacSha256, "hmac-sha256", 1),
            (TagAlgorithm::Blake3, "blake3", 2),
            (TagAlgorithm::Aegis128X2, "aegis-128x2", 3),
        ];
        assert_eq!(all.map(|(algorithm, ..)| algorithm), TagAlgorithm::ALL);
        for (algorithm, name, code) in all {
            assert_eq!(algorithm.to_string(), name);
            assert_eq!(name.parse::<TagAlgorithm>().unwrap(), algorithm);
            assert_eq!((algorithm.code(), TagAlgorithm::from_code(code)), (code, Some(algorithm)));
        }
        assert_eq!((TagAlgorithm::from_code(0), TagAlgorithm::from_code(4)), (None, None));
        let unknown = "sha1".parse::<TagAlgorithm>().unwrap_err();
        assert_eq!(unknown.to_string(), "the tag algorithm \"sha1\" is none of hmac-sha256, blake3, aegis-128x2");
    }
}

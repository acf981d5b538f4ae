//! A volume's key, wrapped: encrypted and authenticated by what somebody has or knows.

use super::keys::MasterKey;
use argon2::{Algorithm, Argon2, Block, Params, Version};
use chacha20poly1305::{AeadInOut, KeyInit, XChaCha20Poly1305};
use hkdf::Hkdf;
use serde::Serialize;
use sha2::Sha256;
use std::fmt;
use zeroize::Zeroizing;

/// Bytes of the key that lies wrapped.
pub(crate) const VOLUME_KEY_BYTES: usize = 32;
/// The same, and the 16 bytes by which a wrong key is told.
pub(crate) const WRAPPED_BYTES: usize = VOLUME_KEY_BYTES + 16;
/// Most bytes of a passphrase.
pub const MAX_PASSPHRASE_BYTES: usize = 512;

/// What opens a volume: its key or, where that lies wrapped in [key slots](crate::key_slots), what
/// opens one of them.
#[derive(Debug)]
pub enum Credential {
    /// The bytes of a key file, or of a key from a keyring.
    Key(MasterKey),
    /// What somebody knows.
    Passphrase(Passphrase),
}

/// A passphrase, zeroized when dropped and never printed.
pub struct Passphrase(Zeroizing<Vec<u8>>);

/// The passphrase has the wrong length.
#[derive(Debug, thiserror::Error)]
#[error("the passphrase has {0} bytes; must be from 1 to {MAX_PASSPHRASE_BYTES}")]
pub struct PassphraseLength(pub usize);

impl Passphrase {
    /// Takes the secret; the caller zeroizes its own copies.
    pub fn new(bytes: &[u8]) -> Result<Self, PassphraseLength> {
        match bytes.len() {
            1..=MAX_PASSPHRASE_BYTES => Ok(Self(Zeroizing::new(bytes.to_vec()))),
            len => Err(PassphraseLength(len)),
        }
    }
}

impl fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Passphrase(secret)")
    }
}

/// What one guess of a passphrase costs (argon2id, RFC 9106).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct GuessCost {
    /// Memory in KiB.
    pub memory_kib: u32,
    /// Passes over it.
    pub passes: u32,
    /// Lanes, which could be computed side by side.
    pub lanes: u32,
}

impl GuessCost {
    /// Most of each that is taken from a disk: whoever writes there must not have us take all
    /// memory, or all day.
    pub(crate) const MOST: Self = Self { memory_kib: 1 << 20, passes: 16, lanes: 16 };

    /// Whether a slot may ask for it.
    pub(crate) fn is_bounded(&self) -> bool {
        let Self { memory_kib, passes, lanes } = *self;
        let most = Self::MOST;
        (1..=most.passes).contains(&passes)
            && (1..=most.lanes).contains(&lanes)
            && (8 * lanes..=most.memory_kib).contains(&memory_kib)
    }

    /// Bytes of memory that a guess takes.
    pub(crate) fn memory_bytes(&self) -> u64 {
        u64::from(self.memory_kib) << 10
    }
}

impl Default for GuessCost {
    /// Four times the memory of RFC 9106's second choice: some 0.3 s of a processor of today.
    fn default() -> Self {
        Self { memory_kib: 256 << 10, passes: 3, lanes: 4 }
    }
}

/// There is not the memory for a passphrase.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct NoMemory;

/// The key that wraps, made of a credential and a salt.
pub(crate) struct WrappingKey(Zeroizing<[u8; 32]>);

impl WrappingKey {
    /// Of a key file: HKDF-SHA256 (RFC 5869). It has all the entropy there is, so a guess may be
    /// cheap.
    pub(crate) fn of_key(key: &MasterKey, salt: &[u8; 32]) -> Self {
        let mut bytes = Zeroizing::new([0; 32]);
        let hkdf = Hkdf::<Sha256>::new(Some(salt), key.bytes());
        hkdf.expand(b"ublk-integrity v1 key slot", &mut *bytes).expect("32 bytes are a valid HKDF-SHA256 output");
        Self(bytes)
    }

    /// Of a passphrase: argon2id (RFC 9106), at a bounded cost.
    pub(crate) fn of_passphrase(passphrase: &Passphrase, salt: &[u8; 32], cost: GuessCost) -> Result<Self, NoMemory> {
        let GuessCost { memory_kib, passes, lanes } = cost;
        let mut bytes = Zeroizing::new([0; 32]);
        let params = Params::new(memory_kib, passes, lanes, Some(bytes.len())).expect("the cost is bounded");
        // The passphrase can be told from what this memory holds afterwards.
        let mut memory = Zeroizing::new(Vec::new());
        memory.try_reserve_exact(params.block_count()).map_err(|_| NoMemory)?;
        memory.resize(params.block_count(), Block::default());
        let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
        let hashed = argon2.hash_password_into_with_memory(&passphrase.0, salt, &mut *bytes, &mut memory[..]);
        hashed.expect("lengths and memory are right");
        Ok(Self(bytes))
    }

    /// Encrypts a volume's key (XChaCha20-Poly1305); what it is bound to is authenticated with it.
    pub(crate) fn wrap(&self, key: &[u8; VOLUME_KEY_BYTES], nonce: &[u8; 24], bound_to: &[u8]) -> [u8; WRAPPED_BYTES] {
        let mut wrapped = [0; WRAPPED_BYTES];
        let (encrypted, tag) = wrapped.split_at_mut(VOLUME_KEY_BYTES);
        encrypted.copy_from_slice(key);
        let made = self.cipher().encrypt_inout_detached(&(*nonce).into(), bound_to, encrypted.into());
        tag.copy_from_slice(&made.expect("a few bytes are not too many"));
        wrapped
    }

    /// The volume's key; `None` where this key has not wrapped it, or not there.
    pub(crate) fn unwrap(&self, wrapped: &[u8; WRAPPED_BYTES], nonce: &[u8; 24], bound_to: &[u8]) -> Option<VolumeKey> {
        let mut key = Zeroizing::new([0; VOLUME_KEY_BYTES]);
        let (encrypted, tag) = wrapped.split_at(VOLUME_KEY_BYTES);
        key.copy_from_slice(encrypted);
        let tag = tag.try_into().expect("16 bytes are left");
        let verified = self.cipher().decrypt_inout_detached(&(*nonce).into(), bound_to, (&mut key[..]).into(), tag);
        verified.ok().map(|()| key)
    }

    fn cipher(&self) -> XChaCha20Poly1305 {
        XChaCha20Poly1305::new((&*self.0).into())
    }
}

/// A volume's key that lies wrapped.
pub(crate) type VolumeKey = Zeroizing<[u8; VOLUME_KEY_BYTES]>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_key_salt_nonce_and_place_give_the_volume_key_back() {
        let key = |byte| MasterKey::new(&[byte; 40]).unwrap();
        let wrapping = WrappingKey::of_key(&key(1), &[2; 32]);
        let wrapped = wrapping.wrap(&[3; 32], &[4; 24], b"slot 0");
        let unwrap = |wrapping: &WrappingKey, nonce, place: &[u8]| wrapping.unwrap(&wrapped, &[nonce; 24], place);
        assert_eq!(*unwrap(&wrapping, 4, b"slot 0").unwrap(), [3; 32]);
        assert!(unwrap(&wrapping, 5, b"slot 0").is_none());
        assert!(unwrap(&wrapping, 4, b"slot 1").is_none());
        assert!(unwrap(&WrappingKey::of_key(&key(2), &[2; 32]), 4, b"slot 0").is_none());
        assert!(unwrap(&WrappingKey::of_key(&key(1), &[1; 32]), 4, b"slot 0").is_none());
        for byte in 0..WRAPPED_BYTES {
            let mut other = wrapped;
            other[byte] ^= 1;
            assert!(wrapping.unwrap(&other, &[4; 24], b"slot 0").is_none(), "byte {byte}");
        }
    }

    #[test]
    fn a_passphrase_is_stretched_by_argon2id() {
        let cost = GuessCost { memory_kib: 64, passes: 2, lanes: 2 };
        let stretched = |text: &[u8], salt| {
            WrappingKey::of_passphrase(&Passphrase::new(text).unwrap(), &[salt; 32], cost).unwrap().0
        };
        assert_ne!(stretched(b"a", 1), stretched(b"b", 1));
        assert_ne!(stretched(b"a", 1), stretched(b"a", 2));
        assert_eq!(stretched(b"a", 1), stretched(b"a", 1));
        assert!(Passphrase::new(b"").is_err() && Passphrase::new(&[1; 513]).is_err());
        assert_eq!(format!("{:?}", Passphrase::new(b"secret word").unwrap()), "Passphrase(secret)");
    }

    #[test]
    fn what_a_disk_may_ask_for_is_bounded() {
        let most = GuessCost::MOST;
        assert!(most.is_bounded() && GuessCost::default().is_bounded());
        assert!(!GuessCost { memory_kib: most.memory_kib + 1, ..most }.is_bounded());
        assert!(!GuessCost { passes: 17, ..most }.is_bounded() && !GuessCost { passes: 0, ..most }.is_bounded());
        assert!(!GuessCost { lanes: 17, ..most }.is_bounded() && !GuessCost { lanes: 0, ..most }.is_bounded());
        assert!(!GuessCost { memory_kib: 127, ..most }.is_bounded(), "8 KiB a lane");
    }
}

//! HMAC-SHA256 (RFC 2104) of short messages of one length, side by side.

use super::{BLOCK_BYTES, Engine, INITIAL, State, last_block, to_bytes};
use crate::crypto::Mac;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// A key as HMAC uses it: where the inner and the outer hash are after the key's own block.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub(crate) struct HmacKey {
    inner: State,
    outer: State,
}

impl HmacKey {
    pub(crate) fn new(key: &[u8; 32]) -> Self {
        let begin = |pad: u8| {
            let mut block = Zeroizing::new([[pad; BLOCK_BYTES]]);
            block[0].iter_mut().zip(key).for_each(|(b, k)| *b ^= k);
            let mut state = [INITIAL];
            Engine::Portable.compress(&mut state, [&[]], &block);
            state[0]
        };
        Self { inner: begin(0x36), outer: begin(0x5c) }
    }

    /// The MACs of messages that fit into one block: two compressions, whatever the number of lanes.
    pub(crate) fn sign<const N: usize, const BYTES: usize>(
        &self,
        engine: Engine,
        messages: [[u8; BYTES]; N],
    ) -> [Mac; N] {
        // Either hash has the key's block before what it hashes here.
        let blocks = messages.map(|m| last_block(&m, (BLOCK_BYTES + BYTES) as u64));
        let mut inner = [self.inner; N];
        engine.compress(&mut inner, [&[]; N], &blocks);
        let blocks = inner.map(|state| last_block(&to_bytes(state), (BLOCK_BYTES + size_of::<Mac>()) as u64));
        let mut outer = [self.outer; N];
        engine.compress(&mut outer, [&[]; N], &blocks);
        outer.map(to_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hmac::{Hmac, KeyInit, Mac as _};
    use proptest::prelude::*;
    use sha2::Sha256;

    fn reference(key: &[u8], message: &[u8]) -> Mac {
        Hmac::<Sha256>::new_from_slice(key).unwrap().chain_update(message).finalize().into_bytes().into()
    }

    proptest! {
        #[test]
        fn same_macs_as_the_hmac_crate(
            key in any::<[u8; 32]>(),
            long in any::<[[u8; 40]; 2]>(),
            longest in any::<[[u8; 55]; 2]>(),
        ) {
            let mine = HmacKey::new(&key);
            for engine in Engine::all() {
                prop_assert_eq!(mine.sign(engine, long), long.map(|m| reference(&key, &m)));
                prop_assert_eq!(mine.sign(engine, longest), longest.map(|m| reference(&key, &m)));
                prop_assert_eq!(mine.sign(engine, [long[0]]), [reference(&key, &long[0])]);
                prop_assert_eq!(mine.sign(engine, [[]]), [reference(&key, &[])]);
            }
        }
    }
}

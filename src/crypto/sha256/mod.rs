//! SHA-256 of several messages of one length, side by side.
//!
//! A digest is one long chain: each round needs the one before, and a core with SHA instructions
//! spends most of its time waiting for them. A second, independent message fills exactly that time,
//! so that two digests take no longer than one. A third has no registers left to live in.

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)] // As below.
mod avx2;
#[cfg(all(target_arch = "x86_64", avx512))]
#[allow(unsafe_code)] // As below.
mod avx512;
mod hmac;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)] // The one place: an instruction that not every processor has is unsafe to use.
mod sha_ni;
#[cfg(target_arch = "x86_64")]
mod vector;
mod ways;

pub(crate) use hmac::HmacKey;
pub(crate) use ways::Ways;
pub use ways::{Timing, Way, choose};

use crate::crypto::Digest;
use arrayvec::ArrayVec;
use sha2::block_api::compress256;
use std::slice::from_ref;
use zerocopy::FromBytes;

/// The chaining value: what the message so far has been compressed to.
type State = [u32; 8];
/// What a message is cut into.
type Block = [u8; BLOCK_BYTES];
const BLOCK_BYTES: usize = 64;

/// The chaining value that every digest begins with (FIPS 180-4, 5.3.3).
const INITIAL: State = [0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19];

/// The round constants (FIPS 180-4, 4.2.2), four to a row as the rounds are done.
#[rustfmt::skip]
const K: [[u32; 4]; 16] = [
    [0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5], [0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5],
    [0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3], [0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174],
    [0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc], [0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da],
    [0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7], [0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967],
    [0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13], [0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85],
    [0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3], [0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070],
    [0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5], [0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3],
    [0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208], [0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2],
];

/// What compresses.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Engine {
    /// The SHA instructions of x86, all messages interleaved; two are worth it.
    #[cfg(target_arch = "x86_64")]
    ShaNi(sha_ni::ShaNi),
    /// Eight messages in the lanes of AVX2's registers; a single one as in `Portable`.
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
    /// Sixteen messages in the lanes of AVX-512's registers; a single one as in `Portable`.
    #[cfg(all(target_arch = "x86_64", avx512))]
    Avx512(avx512::Avx512),
    /// The `sha2` crate, one message after the other.
    Portable,
}

impl Engine {
    /// All that this machine can run.
    pub(crate) fn all() -> ArrayVec<Self, 4> {
        let mut engines = ArrayVec::new();
        engines.push(Self::Portable);
        #[cfg(target_arch = "x86_64")]
        {
            engines.extend(sha_ni::ShaNi::detect().map(Self::ShaNi));
            engines.extend(avx2::Avx2::detect().map(Self::Avx2));
        }
        #[cfg(all(target_arch = "x86_64", avx512))]
        engines.extend(avx512::Avx512::detect().map(Self::Avx512));
        engines
    }

    /// Its name for `benchmark`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::ShaNi(_) => "sha-ni x2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => "avx2 x8",
            #[cfg(all(target_arch = "x86_64", avx512))]
            Self::Avx512(_) => "avx-512 x16",
            Self::Portable => "portable",
        }
    }

    /// Moves each state on by the blocks of its message, then by the message's last block; all
    /// messages, at most as many as it has lanes where those are more than two, have the same
    /// length. The last ones come in the same call because a second one would first have to wait
    /// for the end of the chain.
    fn compress<const N: usize>(self, states: &mut [State; N], messages: [&[Block]; N], last: &[Block; N]) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::ShaNi(token) => token.compress(states, messages, last),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(token) if N > 1 => token.compress(states, &messages, last),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => one_by_one(states, &messages, last),
            #[cfg(all(target_arch = "x86_64", avx512))]
            Self::Avx512(token) if N > 1 => token.compress(states, &messages, last),
            #[cfg(all(target_arch = "x86_64", avx512))]
            Self::Avx512(_) => one_by_one(states, &messages, last),
            Self::Portable => one_by_one(states, &messages, last),
        }
    }

    /// How many messages at a time make full use of it.
    pub(crate) fn lanes(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::ShaNi(_) => 2,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => avx2::LANES,
            #[cfg(all(target_arch = "x86_64", avx512))]
            Self::Avx512(_) => avx512::LANES,
            Self::Portable => 1,
        }
    }

    /// The digests of messages of one length, a multiple of [`BLOCK_BYTES`].
    pub(crate) fn digests<const N: usize>(self, messages: [&[u8]; N]) -> [Digest; N] {
        let bytes = messages[0].len() as u64;
        let mut states = [INITIAL; N];
        self.compress(&mut states, messages.map(whole_blocks), &[last_block(&[], bytes); N]);
        states.map(to_bytes)
    }

    /// The digests of messages of one length, at least a block, each after a prefix of less than
    /// one. What of them does not fill a block must leave room in it for the padding, 9 bytes.
    pub(crate) fn prefixed_digests<const P: usize, const N: usize>(
        self,
        messages: [(&[u8; P], &[u8]); N],
    ) -> [Digest; N] {
        let bytes = P + messages[0].1.len();
        let mut states = [INITIAL; N];
        let parts = messages.map(|(prefix, message)| {
            let (begin, rest) = message.split_at(BLOCK_BYTES - P);
            let mut first = [0; BLOCK_BYTES];
            first[..P].copy_from_slice(prefix);
            first[P..].copy_from_slice(begin);
            (first, rest.split_at(rest.len() / BLOCK_BYTES * BLOCK_BYTES))
        });
        self.compress(&mut states, [&[]; N], &parts.map(|(first, _)| first));
        let last = parts.map(|(_, (_, tail))| last_block(tail, bytes as u64));
        self.compress(&mut states, parts.map(|(_, (blocks, _))| whole_blocks(blocks)), &last);
        states.map(to_bytes)
    }
}

fn one_by_one(states: &mut [State], messages: &[&[Block]], last: &[Block]) {
    for ((state, message), last) in states.iter_mut().zip(messages).zip(last) {
        compress256(state, message);
        compress256(state, from_ref(last));
    }
}

/// The message as blocks.
fn whole_blocks(message: &[u8]) -> &[Block] {
    FromBytes::ref_from_bytes(message).expect("a message of whole blocks")
}

/// Most bytes that fit into a last block: 64 − 8 of length − 1 that ends the message.
const MAX_TAIL: usize = BLOCK_BYTES - 9;

/// The last block of a message of `bytes` bytes, of which `tail` come after its whole blocks.
fn last_block(tail: &[u8], bytes: u64) -> Block {
    assert!(tail.len() <= MAX_TAIL, "the length fits into the same block");
    let mut block = [0; BLOCK_BYTES];
    block[..tail.len()].copy_from_slice(tail);
    block[tail.len()] = 0x80;
    block[BLOCK_BYTES - 8..].copy_from_slice(&(8 * bytes).to_be_bytes());
    block
}

/// The digest that a final state stands for.
fn to_bytes(state: State) -> Digest {
    let mut digest = [0; 32];
    for (bytes, word) in digest.chunks_exact_mut(4).zip(state) {
        bytes.copy_from_slice(&word.to_be_bytes());
    }
    digest
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use sha2::{Digest as _, Sha256};

    /// Padding as in FIPS 180-4, 5.1.1, for any length: the raw compression takes what it gets.
    fn padded(message: &[u8]) -> (Vec<Block>, Block) {
        let mut bytes = message.to_vec();
        bytes.push(0x80);
        bytes.resize((message.len() + 9).next_multiple_of(BLOCK_BYTES) - 8, 0);
        bytes.extend((8 * message.len() as u64).to_be_bytes());
        let (last, blocks) = whole_blocks(&bytes).split_last().unwrap();
        (blocks.to_vec(), *last)
    }

    fn compressed<const N: usize>(engine: Engine, messages: [&[u8]; N]) -> [Digest; N] {
        let padded = messages.map(padded);
        let mut states = [INITIAL; N];
        engine.compress(&mut states, padded.each_ref().map(|p| &p.0[..]), &padded.each_ref().map(|p| p.1));
        states.map(to_bytes)
    }

    fn sha2(message: &[u8]) -> Digest {
        Sha256::digest(message).into()
    }

    /// The examples that NIST publishes with FIPS 180-4, and the empty message of its test suite.
    #[test]
    fn nist_vectors() {
        let million = vec![b'a'; 1_000_000];
        let vectors: [(&[u8], &str); 5] = [
            (b"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
            (b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
            (
                b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
                "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
            ),
            (
                b"abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmnoijklmnopjklmnopqklmnopqrlmnopqrsmnopqrstnopqrstu",
                "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1",
            ),
            (&million, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"),
        ];
        if Engine::all().len() < 4 {
            eprintln!("skipped: of SHA-NI, AVX2 and AVX-512, what is not here; tested: {:?}", Engine::all());
        }
        for engine in Engine::all() {
            for (message, digest) in vectors {
                for d in compressed(engine, [message]).into_iter().chain(compressed(engine, [message, message])) {
                    assert_eq!(crate::format::hex(&d), digest, "{engine:?}");
                }
            }
        }
    }

    #[test]
    fn every_length_around_the_padding() {
        let bytes: Vec<u8> = (0..300).map(|i| (i * 7) as u8).collect();
        for engine in Engine::all() {
            for len in 0..=200 {
                let (a, b) = (&bytes[..len], &bytes[100..100 + len]);
                assert_eq!(compressed(engine, [a, b]), [sha2(a), sha2(b)], "{engine:?}, {len} bytes");
                assert_eq!(compressed(engine, [a]), [sha2(a)], "{engine:?}, {len} bytes");
            }
        }
    }

    proptest! {
        #[test]
        fn a_prefix_comes_before_the_message(
            prefix in any::<[u8; 40]>(),
            len in prop::sample::select(&[64usize, 79, 512, 4096][..]),
            bytes in prop::collection::vec(any::<u8>(), 2 * 4096),
        ) {
            let (a, b) = (&bytes[..len], &bytes[4096..4096 + len]);
            let reference = |message: &[u8]| sha2(&[&prefix, message].concat());
            for engine in Engine::all() {
                prop_assert_eq!(engine.prefixed_digests([(&prefix, a)]), [reference(a)]);
                prop_assert_eq!(engine.prefixed_digests([(&prefix, a), (&prefix, b)]), [reference(a), reference(b)]);
                let eight: [&[u8]; 8] = std::array::from_fn(|i| &bytes[i * 500..i * 500 + len]);
                prop_assert_eq!(engine.prefixed_digests(eight.map(|m| (&prefix, m))), eight.map(reference));
            }
        }

        #[test]
        fn same_digests_as_sha2(
            block in prop::sample::select(&[512usize, 1024, 2048, 4096][..]),
            bytes in prop::collection::vec(any::<u8>(), 3 * 4096),
        ) {
            let (a, b, c) = (&bytes[..block], &bytes[block..2 * block], &bytes[2 * block..3 * block]);
            for engine in Engine::all() {
                prop_assert_eq!(engine.digests([a]), [sha2(a)]);
                prop_assert_eq!(engine.digests([a, b]), [sha2(a), sha2(b)]);
                prop_assert_eq!(engine.digests([c, b, a]), [sha2(c), sha2(b), sha2(a)]);
            }
        }
    }
}

//! Tags of blocks: made for writes, checked for reads.

use crate::{
    BlockIndex, MasterKey,
    crypto::{
        aegis::{self, AegisKey},
        keys::{Blake3Key, Keys, TagAlgorithm, equal},
        lanes::{self, Groups, Lanes},
        sha256::{Engine, HmacKey, Way, Ways},
    },
    format::{LOST_TAG, Layout, Tag, ZERO_TAG},
};

/// Most blocks that are verified in one call: one bit each.
pub(crate) const MAX_VERIFIED: usize = 64;

/// Makes and checks tags.
pub(crate) struct Tagger {
    method: Method,
    layout: Layout,
}

/// A [`TagAlgorithm`] with its key.
enum Method {
    /// The original target's construction with a hash inside the HMAC, so that the long part, hashing
    /// the block, needs no key and several blocks can run side by side.
    HmacSha256 { key: HmacKey, ways: Ways },
    /// The crate fills its own lanes with the 1024-byte chunks of one block.
    Blake3 { key: Blake3Key },
    /// The library keeps the processor's AES unit busy with one block.
    Aegis128X2 { key: AegisKey },
}

impl Method {
    /// How many blocks to hash side by side.
    fn groups(&self) -> Groups {
        match self {
            Self::HmacSha256 { ways, .. } => ways.groups(),
            Self::Blake3 { .. } | Self::Aegis128X2 { .. } => Groups::SINGLE,
        }
    }
}

impl Tagger {
    pub(crate) fn new(keys: &Keys, algorithm: TagAlgorithm, layout: &Layout) -> Self {
        let method = match algorithm {
            TagAlgorithm::HmacSha256 => Method::HmacSha256 { key: keys.hmac_tags().clone(), ways: Ways::here() },
            TagAlgorithm::Blake3 => Method::Blake3 { key: keys.blake3_tags().clone() },
            TagAlgorithm::Aegis128X2 => Method::Aegis128X2 { key: keys.aegis_tags().clone() },
        };
        Self { method, layout: *layout }
    }

    /// SHA-256 by this way alone.
    pub(crate) fn take(&mut self, way: Way) {
        if let Method::HmacSha256 { ways, .. } = &mut self.method {
            *ways = way.alone();
        }
    }

    /// Bytes of a block.
    pub(crate) fn block_size(&self) -> usize {
        self.layout.block_size as usize
    }

    /// What hashes so many blocks at once.
    pub(crate) fn implementation(&self, blocks: usize) -> &'static str {
        match &self.method {
            Method::HmacSha256 { ways, .. } => ways.name(blocks),
            Method::Blake3 { .. } => "blake3 crate",
            Method::Aegis128X2 { .. } => aegis::implementation(),
        }
    }

    /// The tags of consecutive blocks.
    pub(crate) fn tags(&self, first: BlockIndex, data: &[u8], out: &mut [Tag]) {
        self.each(0..out.len(), self.consecutive(first, data), |i, tag| out[i] = tag);
    }

    /// Whether so many blocks take less time with others than alone.
    pub(crate) fn benefits_from_batching(&self, blocks: usize) -> bool {
        blocks < self.method.groups().many
    }

    /// Whether so many blocks of several requests gain by more of them: what fills no lane is at
    /// most half of the work then.
    pub(crate) fn is_short_batch(&self, blocks: usize) -> bool {
        blocks < 2 * self.method.groups().many
    }

    /// Whether the block is what the tag says; for [`ZERO_TAG`] there is nothing to prove.
    pub(crate) fn proves(&self, tag: &Tag, block: BlockIndex, data: &[u8]) -> bool {
        *tag != LOST_TAG && equal(tag, &self.tags_of([(block, data)])[0])
    }

    /// Whether each of these consecutive blocks is what its tag says; one that says something else
    /// than a block's content is proved by none.
    pub(crate) fn proves_all(&self, tags: &[Tag], first: BlockIndex, data: &[u8]) -> bool {
        let firsts = (first.0..).step_by(MAX_VERIFIED).map(BlockIndex);
        let parts = tags.chunks(MAX_VERIFIED).zip(data.chunks(MAX_VERIFIED * self.block_size()));
        !tags.contains(&ZERO_TAG)
            && firsts.zip(parts).all(|(first, (tags, data))| self.mismatches(first, data, tags) == 0)
    }

    /// Which of at most [`MAX_VERIFIED`] consecutive blocks do not match their tags: bit i for the
    /// i-th. Blocks that read as zeros have nothing to match; lost ones never match.
    pub(crate) fn mismatches(&self, first: BlockIndex, data: &[u8], tags: &[Tag]) -> u64 {
        assert!(tags.len() <= MAX_VERIFIED, "one bit a block");
        let mut bad = tags.iter().rev().fold(0, |bad, tag| bad << 1 | u64::from(*tag == LOST_TAG));
        let to_prove = (0..tags.len()).filter(|i| ![ZERO_TAG, LOST_TAG].contains(&tags[*i]));
        let block = self.consecutive(first, data);
        self.each(to_prove, block, |i, made| bad |= u64::from(!equal(&tags[i], &made)) << i);
        bad
    }

    /// The blocks of `data`, which begins with block `first`.
    pub(crate) fn consecutive<'d>(
        &self,
        first: BlockIndex,
        data: &'d [u8],
    ) -> impl Fn(usize) -> (BlockIndex, &'d [u8]) + use<'d> {
        let bs = self.block_size();
        move |i| (BlockIndex(first.0 + i as u64), &data[i * bs..(i + 1) * bs])
    }

    /// Makes the tags of some blocks, whichever they are: `which` are the numbers that `block`
    /// knows them by.
    pub(crate) fn each<'d, W: Copy>(
        &self,
        which: impl Iterator<Item = W>,
        block: impl Fn(W) -> (BlockIndex, &'d [u8]),
        mut with: impl FnMut(W, Tag),
    ) {
        lanes::each(self, which.map(|w| (w, block(w))), |(w, _), tag| with(w, tag));
    }

    /// The tags of any blocks.
    fn tags_of<const N: usize>(&self, blocks: [(BlockIndex, &[u8]); N]) -> [Tag; N] {
        let blocks = blocks.map(|(block, data)| (self.layout.volume_offset(block).0.to_le_bytes(), data));
        let tags = match &self.method {
            Method::HmacSha256 { key, ways } => hmac_sha256(key, ways.of(N), blocks),
            Method::Blake3 { key } => blocks.map(|block| keyed_blake3(key, block)),
            Method::Aegis128X2 { key } => blocks.map(|(offset, data)| key.tag(offset, data)),
        };
        // 2^-255: but a tag that means something else must not be one that can occur.
        debug_assert!(tags.iter().all(|tag| *tag != ZERO_TAG && *tag != LOST_TAG));
        tags
    }
}

impl<'d, W: Copy> Lanes<(W, (BlockIndex, &'d [u8]))> for Tagger {
    type Output = Tag;

    fn groups(&self) -> Groups {
        self.method.groups()
    }

    fn side_by_side<const N: usize>(&self, blocks: [(W, (BlockIndex, &'d [u8])); N]) -> [Tag; N] {
        self.tags_of(blocks.map(|(_, block)| block))
    }
}

fn hmac_sha256<const N: usize>(key: &HmacKey, engine: Engine, blocks: [([u8; 8], &[u8]); N]) -> [Tag; N] {
    let digests = engine.digests(blocks.map(|(_, data)| data));
    let mut messages = [[0; 40]; N];
    for ((message, digest), (offset, _)) in messages.iter_mut().zip(digests).zip(blocks) {
        message[..32].copy_from_slice(&digest);
        message[32..].copy_from_slice(&offset);
    }
    key.sign(engine, messages)
}

fn keyed_blake3(key: &Blake3Key, (offset, data): ([u8; 8], &[u8])) -> Tag {
    *blake3::Hasher::new_keyed(key).update(data).update(&offset).finalize().as_bytes()
}

/// Makes the tags of blocks without a volume, as fast as a volume makes them: to measure that.
pub struct TagMaker {
    tagger: Tagger,
    tags: Vec<Tag>,
}

impl TagMaker {
    /// For blocks of `block_size` bytes, at most `most` at a time. `None` where a volume can't have
    /// this block size.
    pub fn new(key: &MasterKey, algorithm: TagAlgorithm, block_size: u32, most: usize) -> Option<Self> {
        let layout = Layout::new(block_size, 1 << 30, 1 << 20, false).ok()?;
        let tagger = Tagger::new(&Keys::derive(key, &[0; 16]), algorithm, &layout);
        Some(Self { tagger, tags: vec![ZERO_TAG; most] })
    }

    /// The tags of consecutive blocks, of which `first` is the first.
    ///
    /// # Panics
    /// When there are more than were announced.
    pub fn tags(&mut self, first: BlockIndex, data: &[u8]) -> &[[u8; 32]] {
        let tags = &mut self.tags[..data.len() / self.tagger.block_size()];
        self.tagger.tags(first, data, tags);
        tags
    }

    /// What hashes: "sha-ni x2" (two blocks side by side), "portable", or "blake3
    /// crate", for instance.
    pub fn implementation(&self) -> &'static str {
        self.tagger.implementation(self.tags.len())
    }

    /// SHA-256 by this way alone.
    pub fn take(&mut self, way: Way) {
        self.tagger.take(way);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use hmac::{Hmac, KeyInit, Mac as _};
    use proptest::prelude::*;
    use sha2::{Digest as _, Sha256};

    const UUID: [u8; 16] = [7; 16];

    pub(crate) fn tagger(algorithm: TagAlgorithm, block_size: u32) -> Tagger {
        let keys = Keys::derive(&MasterKey::new(&[0x42; 32]).unwrap(), &UUID);
        let layout = Layout::new(block_size, 1 << 30, 1 << 20, false).unwrap();
        Tagger::new(&keys, algorithm, &layout)
    }

    /// Every algorithm, and every way to it.
    fn taggers(block_size: u32) -> impl Iterator<Item = (TagAlgorithm, Tagger)> {
        let by = move |way: Way| {
            let mut tagger = tagger(TagAlgorithm::HmacSha256, block_size);
            tagger.take(way);
            (TagAlgorithm::HmacSha256, tagger)
        };
        let others = [TagAlgorithm::Blake3, TagAlgorithm::Aegis128X2].map(|tag| (tag, tagger(tag, block_size)));
        Way::all().into_iter().map(by).chain(others)
    }

    /// The definitions of the algorithms, by the crates alone.
    fn reference(algorithm: TagAlgorithm, block_size: u32, first: u64, data: &[u8]) -> Vec<Tag> {
        let label = match algorithm {
            TagAlgorithm::HmacSha256 => "ublk-integrity v1 block tags",
            TagAlgorithm::Blake3 => "ublk-integrity v1 block tags, blake3",
            TagAlgorithm::Aegis128X2 => "ublk-integrity v1 block tags, aegis-128x2",
        };
        let mut key = [0; 32];
        hkdf::Hkdf::<Sha256>::new(Some(&UUID), &[0x42; 32]).expand(label.as_bytes(), &mut key).unwrap();
        let offsets = (first..).map(|block| block * u64::from(block_size));
        data.chunks_exact(block_size as usize)
            .zip(offsets)
            .map(|(block, offset)| match algorithm {
                TagAlgorithm::HmacSha256 => {
                    let mut mac = Hmac::<Sha256>::new_from_slice(&key).unwrap();
                    mac.update(&Sha256::digest(block));
                    mac.update(&offset.to_le_bytes());
                    mac.finalize().into_bytes().into()
                }
                TagAlgorithm::Blake3 => *blake3::keyed_hash(&key, &[block, &offset.to_le_bytes()].concat()).as_bytes(),
                TagAlgorithm::Aegis128X2 => {
                    let nonce = [offset.to_le_bytes(), [0; 8]].concat().try_into().unwrap();
                    let mut mac =
                        ::aegis::aegis128x2::Aegis128X2Mac::new_with_nonce(key[..16].try_into().unwrap(), &nonce);
                    mac.update(block);
                    mac.finalize()
                }
            })
            .collect()
    }

    proptest! {
        #[test]
        fn tags_are_as_defined_whatever_makes_them(
            shift in 9u32..=12,
            count in 1usize..=40,
            first in 0u64..1 << 17,
            seed in prop::collection::vec(any::<u8>(), 997),
        ) {
            let bs = 1usize << shift;
            let data: Vec<u8> = seed.iter().copied().cycle().take(count * bs).collect();
            for (algorithm, tagger) in taggers(bs as u32) {
                let expected = reference(algorithm, bs as u32, first, &data);
                let mut tags = vec![ZERO_TAG; count];
                tagger.tags(BlockIndex(first), &data, &mut tags);
                prop_assert_eq!(&tags, &expected, "{}", algorithm);
                for (i, block) in data.chunks_exact(bs).enumerate() {
                    prop_assert!(tagger.proves(&tags[i], BlockIndex(first + i as u64), block));
                }
            }
        }

        #[test]
        fn a_batch_finds_what_single_blocks_find(
            kinds in prop::collection::vec(0..5, 1..=MAX_VERIFIED),
            first in 0u64..1 << 17,
            which in any::<prop::sample::Index>(),
        ) {
            let mut data: Vec<u8> = (0..kinds.len() * 512).map(|i| (i * 31 / 8) as u8).collect();
            let taggers: Vec<_> = taggers(512).collect();
            let (_, tagger) = which.get(&taggers);
            let mut tags = vec![ZERO_TAG; kinds.len()];
            tagger.tags(BlockIndex(first), &data, &mut tags);
            let mut expected = 0;
            for (i, kind) in kinds.iter().enumerate() {
                match kind {
                    0 => tags[i] = ZERO_TAG,
                    1 => tags[i] = LOST_TAG,
                    2 => tags[i][i % 32] ^= 1 << (i % 8),
                    3 => data[i * 512 + 8 * i] ^= 0x10,
                    _ => {}
                }
                let proven = tagger.proves(&tags[i], BlockIndex(first + i as u64), &data[i * 512..(i + 1) * 512]);
                prop_assert_eq!(proven, *kind == 4);
                expected |= u64::from((1..=3).contains(kind)) << i;
            }
            prop_assert_eq!(tagger.mismatches(BlockIndex(first), &data, &tags), expected);
        }
    }
}

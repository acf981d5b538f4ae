//! How fast this processor makes tags.

use hmac::{Hmac, KeyInit, Mac as _};
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use std::{
    hint::black_box,
    time::{Duration, Instant},
};
use ublk_integrity::{BlockIndex, MasterKey, TagAlgorithm, TagMaker, hashing::Way};

/// What [`TagBench::measure`] found.
#[derive(Clone, Debug, Serialize)]
pub struct TagSpeed {
    /// The tag algorithm.
    pub algorithm: TagAlgorithm,
    /// Bytes of a block.
    pub block_size: u32,
    /// Blocks of a request.
    pub batch: usize,
    /// What hashed: "sha-ni x2" (two blocks side by side), "portable", or "blake3 crate".
    pub implementation: &'static str,
    /// Median over the passes.
    pub bytes_per_second: f64,
}

/// Makes the tags of a piece of memory, request by request, as writes and reads do.
pub struct TagBench {
    algorithm: TagAlgorithm,
    block_size: u32,
    /// Blocks of a request.
    batch: usize,
    maker: TagMaker,
    memory: Vec<u8>,
}

impl TagBench {
    /// Requests of `batch` blocks over `memory` bytes, rounded up to whole requests. A piece that
    /// fits into a cache shows the algorithm, a larger one shows the memory too.
    ///
    /// # Panics
    /// Where a volume can't have this block size, or `batch` is 0.
    pub fn new(algorithm: TagAlgorithm, block_size: u32, batch: usize, memory: usize) -> Self {
        let key = MasterKey::new(&[0x5a; 32]).expect("32 bytes are enough");
        let maker = TagMaker::new(&key, algorithm, block_size, batch).expect("512, 1024, 2048 or 4096 bytes a block");
        let request = batch * block_size as usize;
        // Not all zeros: pages that were never written to are all the same one.
        let memory = (0..memory.max(1).next_multiple_of(request)).map(|i| (i % 251) as u8).collect();
        Self { algorithm, block_size, batch, maker, memory }
    }

    /// The same, of HMAC-SHA256 by one way alone.
    pub fn by(way: Way, block_size: u32, batch: usize, memory: usize) -> Self {
        let mut bench = Self::new(TagAlgorithm::HmacSha256, block_size, batch, memory);
        bench.maker.take(way);
        bench
    }

    /// Goes through the memory once and returns its size in bytes.
    pub fn pass(&mut self) -> usize {
        let blocks = (0u64..).step_by(self.batch).map(BlockIndex);
        let request = self.batch * self.block_size as usize;
        for (first, data) in blocks.zip(self.memory.chunks_exact(request)) {
            black_box(self.maker.tags(first, data));
        }
        self.memory.len()
    }

    /// Repeats passes for about so long, three at least; one more before them warms the caches.
    pub fn measure(&mut self, time: Duration) -> TagSpeed {
        self.pass();
        let begin = Instant::now();
        let mut speeds = Vec::new();
        while speeds.len() < 3 || begin.elapsed() < time {
            let begin = Instant::now();
            let bytes = self.pass();
            speeds.push(bytes as f64 / begin.elapsed().as_secs_f64());
        }
        TagSpeed {
            algorithm: self.algorithm,
            block_size: self.block_size,
            batch: self.batch,
            implementation: self.maker.implementation(),
            bytes_per_second: median(&mut speeds),
        }
    }
}

/// Bytes per second that the `sha2` and `hmac` crates make of HMAC-SHA256 tags, block after block.
pub fn measure_crates(block_size: usize, memory: usize, time: Duration) -> f64 {
    let key = Hmac::<Sha256>::new_from_slice(&[0x5a; 32]).expect("HMAC takes a key of any length");
    let memory: Vec<u8> = (0..memory.next_multiple_of(block_size)).map(|i| (i % 251) as u8).collect();
    let mut speeds = Vec::new();
    let begin = Instant::now();
    while speeds.len() < 4 || begin.elapsed() < time {
        let turn = Instant::now();
        for (block, data) in (0u64..).zip(memory.chunks_exact(block_size)) {
            let offset = (block * block_size as u64).to_le_bytes();
            black_box(key.clone().chain_update(Sha256::digest(data)).chain_update(offset).finalize());
        }
        speeds.push(memory.len() as f64 / turn.elapsed().as_secs_f64());
    }
    median(&mut speeds)
}

/// The middle one; of an even number the higher of the two. There must be at least one.
pub fn median(values: &mut [f64]) -> f64 {
    let middle = values.len() / 2;
    *values.select_nth_unstable_by(middle, f64::total_cmp).1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measures_what_was_asked_for() {
        for algorithm in TagAlgorithm::ALL {
            let mut bench = TagBench::new(algorithm, 512, 3, 5000);
            assert_eq!(bench.pass(), 4 * 3 * 512);
            let speed = bench.measure(Duration::ZERO);
            assert_eq!((speed.algorithm, speed.block_size, speed.batch), (algorithm, 512, 3));
            assert!(speed.bytes_per_second > 0.0 && !speed.implementation.is_empty());
        }
    }
}

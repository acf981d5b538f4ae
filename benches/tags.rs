//! Tags of requests, in bytes per second, beside what the `sha2` and `hmac` crates make of the same.

use criterion::{BenchmarkId, Criterion, Throughput};
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};
use std::{hint::black_box, time::Duration};
use ublk_integrity::{TagAlgorithm, speed::TagBench};

/// Fits into a second-level cache, as a request does that was just read or is about to be written.
const MEMORY: usize = 256 << 10;

fn tags(c: &mut Criterion) {
    for algorithm in TagAlgorithm::ALL {
        let mut group = c.benchmark_group(algorithm.to_string());
        for (block_size, batch) in [(512, 8), (512, 64), (4096, 1), (4096, 2), (4096, 8), (4096, 32)] {
            let mut bench = TagBench::new(algorithm, block_size, batch, MEMORY);
            group.throughput(Throughput::Bytes(bench.pass() as u64));
            group.bench_function(BenchmarkId::new(block_size.to_string(), batch), |b| b.iter(|| bench.pass()));
        }
    }
}

/// HMAC-SHA256 tags, block after block.
fn crates(c: &mut Criterion) {
    let mut group = c.benchmark_group("sha2 and hmac crates");
    let key = Hmac::<Sha256>::new_from_slice(&[7; 32]).expect("HMAC takes a key of any length");
    let memory: Vec<u8> = (0..MEMORY).map(|i| (i % 251) as u8).collect();
    for block_size in [512, 4096] {
        group.throughput(Throughput::Bytes(MEMORY as u64));
        group.bench_function(block_size.to_string(), |b| {
            b.iter(|| {
                for (block, data) in (0u64..).zip(memory.chunks_exact(block_size)) {
                    let digest = Sha256::digest(data);
                    let offset = (block * block_size as u64).to_le_bytes();
                    black_box(key.clone().chain_update(digest).chain_update(offset).finalize());
                }
            });
        });
    }
}

fn main() {
    let mut c = Criterion::default().configure_from_args().sample_size(20);
    c = c.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    tags(&mut c);
    crates(&mut c);
    c.final_summary();
}

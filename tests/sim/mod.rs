//! A deterministic world for the library: one executor, one simulated pair of disks, one seed.
#![allow(unreachable_pub)] // a program of tests has no outside

pub mod anchor;
pub mod answered;
pub mod craft;
pub mod disk;
pub mod elsewhere;
pub mod endings;
pub mod exec;
pub mod faults;
pub mod floors;
pub mod image;
pub mod lab;
pub mod life;
pub mod logged;
pub mod oracle;
pub mod rng;
pub mod rot;
pub mod scrubs;
pub mod seeds;
pub mod sick;
pub mod storage;
pub mod time;
pub mod told;
pub mod watch;
pub mod world;

pub use disk::Disk;
pub use exec::{Executor, block_on};
pub use lab::Lab;
pub use rng::Rng;
pub use storage::SimStorage;

use ublk_integrity::{
    Access, MasterKey, OpenOptions, TagAlgorithm, Volume,
    create::{FormatOptions, format},
    open::{OpenError, open},
};

pub const KEY: [u8; 32] = [0x42; 32];

pub fn key() -> MasterKey {
    MasterKey::new(&KEY).unwrap()
}

pub fn format_options(block_size: u32) -> FormatOptions {
    FormatOptions { size: Some(1 << 20), log_size: Some(64 << 10), ..FormatOptions::new(block_size, [9; 16]) }
}

/// Any, by the seed.
pub fn tag_algorithm(seed: u64) -> TagAlgorithm {
    TagAlgorithm::ALL[seed as usize % TagAlgorithm::ALL.len()]
}

pub fn open_options(rng: &mut Rng) -> OpenOptions {
    OpenOptions {
        cache_bytes: 64 << 10,
        max_requests: 8,
        threads: 2,
        max_request_bytes: 128 << 10,
        hash_threads: Some(elsewhere::hash_threads()),
        ..OpenOptions::new(Access::ReadWrite, rng.bytes())
    }
}

/// A disk with an empty volume on it, and room for as much as that can grow.
pub fn formatted(options: &FormatOptions, seed: u64) -> SimStorage {
    let size = ublk_integrity::create::plan(options).unwrap();
    let meta = size.meta_device_bytes;
    let data = size.data_device_bytes + size.max_size - size.size;
    let io = SimStorage::new(Disk::new(data, meta, options.block_size, seed));
    block_on(&io, format(&io, &key(), options)).unwrap();
    io
}

pub fn reopen(io: &SimStorage, options: &OpenOptions) -> Result<Volume, OpenError> {
    block_on(io, open(io, &key(), options))
}

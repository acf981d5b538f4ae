//! The verification core of ublk-integrity: an authenticated block device on untrusted devices.
//!
//! ```
//! use ublk_integrity::{
//!     Access, BlockIndex, BlockRange, Buf, Durability, MasterKey, MemoryStorage, OpenOptions, ReadError,
//!     create::{FormatOptions, format, plan},
//!     open::open,
//! };
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let options = FormatOptions { size: Some(1 << 20), ..FormatOptions::new(4096, *b"an example's own") };
//! let disk = MemoryStorage::new(vec![0; plan(&options)?.data_device_bytes as usize], 4096);
//! let key = MasterKey::new(&[7; 32])?;
//! disk.run(format(&disk, &key, &options))?;
//! let volume = disk.run(open(&disk, &key, &OpenOptions::new(Access::ReadWrite, [1; 32])))?;
//!
//! // The memory of a request is taken once; its buffer comes back with the result.
//! let (mut context, mut buf) = (volume.context(0), Buf::new(4096));
//! let range = BlockRange::new(BlockIndex(5), 1);
//! buf.fill(0xab);
//! let (written, buf) = disk.run(volume.write(&disk, &mut context, range, buf, Durability::Durable));
//! written?;
//!
//! // Somebody changes the disk.
//! disk.tamper(|bytes| bytes.iter_mut().filter(|byte| **byte == 0xab).for_each(|byte| *byte = 0xba));
//! let (read, buf) = disk.run(volume.read(&disk, &mut context, range, buf));
//! assert_eq!(read, Err(ReadError::Mismatch { block: BlockIndex(5) }));
//! # Ok(())
//! # }
//! ```
//!
//! More is in `examples/`; the program with io_uring and ublk is the crate `ublk-target`.
//!
//! # Modules
//!
//! ```text
//!   target.rs     BlockTarget: what a front end (ublk) asks of a volume, or of another format
//!   volume/       the open volume: eight components, and the operations on them
//!   request/      a request's memory, the range it locks, read, write, hash batches
//!   metadata/     tags: pending ones, the hash tree, its page cache, prefetch hints
//!   log/          append, group commit, flush
//!   write_back.rs small writes that are answered before they are written back
//!   maintenance/  checkpoint, check, scrub
//!   anchor/       a place outside the disk that holds how far the volume has got
//!   lifecycle/    format, superblocks, staged open, recovery
//!   format/       what lies on the devices, byte by byte
//!   crypto/       keys, tags, SHA-256 side by side
//!   io/           Storage (a disk), Scheduler (the thread), owned buffers
//! ```
//!
//! Modules use what stands below them, with few exceptions; no two files import each other in a
//! circle (`scripts/house`).
//!
//! ```text
//!   Volume::read ──── range_lock ── metadata/lookup ─┬─ pending: logged since the last checkpoint
//!        │                                           └─ tree ── page_cache
//!        └─ data read ── hash_batch ── compare
//!   Volume::write ─── range_lock ── hash_batch ── log/append ── log/commit ── data write ── pending
//!   checkpoint ────── pending ── tree_update ── superblocks
//!   open ──────────── superblocks ── staged ── recovery: log ── candidates ── one tag a block
//! ```
//!
//! # What is durable when
//!
//! 1. A write's tags are in a durable **log record** before its data is submitted. It is never the
//!    case that data is on the medium that nothing vouches for.
//! 2. Data is written **once**, in place. After a crash each block is matched against the tags that
//!    it may rightly carry ([`open`](open::open), `lifecycle/recovery/`).
//! 3. A **flush** makes the data durable, and then the log is told which numbers are; so does a
//!    write that asks for it (FUA). What the log was told is never answered with something older
//!    (`log/flush.rs`).
//! 4. A **checkpoint** makes the data durable, then writes tag pages and tree to slots that nothing
//!    current names, makes those durable, and only then moves both superblock copies on.
//! 5. Nothing that belongs to an older epoch (a slot, log space) is used again before both copies
//!    name the newer one.
//!
//! # What is believed
//!
//! A data block because its tag verifies, a tag because its page's digest is named by its parent, the
//! root because the superblock's MAC holds, a logged tag because the chain of MACs that begins in the
//! superblock reaches it. Nothing else on the devices is believed, whatever it says.
//!
//! # Who waits for whom
//!
//! A request waits
//! - for its own I/O, and for the batch boundary of its thread,
//! - for earlier requests whose range overlaps (`request/range_lock.rs`),
//! - a read, for another read of its thread that brings its tag pages just now (`metadata/loads.rs`),
//! - for a hash worker that computes its tags (`request/hash_batch.rs`),
//! - for log space, before it has logged anything; then for the log write that carries its record,
//! - for the sync that it has joined; a flush also for writes that were answered before it and are
//!   not written back yet (`write_back.rs`), which wait for no flush.
//!
//! The checkpoint waits for requests that have logged, for a sync, and, a second at most, for
//! lookups that began anew since earlier checkpoints moved the root under them. Those requests wait for I/O and for the batch boundary of the thread
//! that writes their record. So nothing waits in a circle, and nothing ever waits for a hint;
//! `docs/architecture.md` has each edge.
//!
//! The library has no thread, no ring and no clock: it is async code over
//! [`Storage`], so that the code which runs in production is the code that runs in the simulator.
// Not `forbid`: the SHA instructions of x86 (`crypto/sha256/sha_ni.rs`) can't be had without.
#![deny(unsafe_code)]

pub mod anchor;
mod counters;
mod crypto;
mod error;
mod format;
mod info;
mod io;
mod lifecycle;
mod log;
mod maintenance;
mod metadata;
mod options;
mod request;
mod sync;
mod target;
mod units;
mod volume;
mod wait_list;
mod write_back;

pub use counters::CounterValues;
pub use crypto::keys::{KeyLength, MAX_KEY_BYTES, MIN_KEY_BYTES, MasterKey, TagAlgorithm, UnknownTagAlgorithm};
pub use crypto::tagger::TagMaker;
pub use crypto::wrapping::Credential;
pub use error::{AnchorLoss, BadReason, DeviceError, Latched, PageName, ReadError, WriteError};
pub use format::{hex, read_hex};
pub use info::{Status, VolumeInfo};
pub use io::{
    buffer::{BUF_ALIGN, Buf, BufMark},
    memory_storage::MemoryStorage,
    scheduler::{Io, Phase, Scheduler},
    sectors::BelowSector,
    storage::{Device, Durability, Errno, Geometry, Storage},
};
pub use lifecycle::{create, key_slots, open};
pub use log::CheckpointerWork;
pub use maintenance::{check, heal, scrub};
pub use metadata::hints::{self, Hint, HintReceiver, HintSender};
pub use options::{Access, OnMismatch, OpenOptions};
pub use request::{
    context::RequestContext,
    hash_batch::{HashJob, HashThreads},
};
pub use target::{AdmittedWrite, BlockTarget};
pub use units::{BlockIndex, BlockRange, ByteOffset, Epoch, RecordNumber, Seq};
pub use volume::{Volume, most_memory_bytes};
pub use write_back::{Admitted, WriteBackId};

/// The ways of this processor to SHA-256, to be measured by who has a clock.
pub mod hashing {
    pub use crate::crypto::sha256::{Timing, Way, choose};
}

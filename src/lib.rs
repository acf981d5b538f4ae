//! The verification core of ublk-integrity: an authenticated block device on untrusted devices.
// Not `forbid`: the SHA instructions of x86 (`sha256/sha_ni.rs`) can't be had without.
#![deny(unsafe_code)]

mod buf;
mod cache;
mod error;
mod format;
mod keys;
mod log;
mod pending;
mod ranges;
mod root;
mod sha256;
pub mod speed;
mod storage;
mod sync;
mod tag;
mod tree;
mod units;

pub use buf::{BUF_ALIGN, Buf};
pub use error::{DeviceError, Latched, PageName, ReadError, WriteError};
pub use keys::{KeyLength, MAX_KEY_BYTES, MIN_KEY_BYTES, MasterKey, TagAlgorithm, UnknownTagAlgorithm};
pub use log::Work;
pub use storage::{Device, Durability, Errno, Geometry, Storage};
pub use units::{BlockIndex, BlockRange, ByteOffset, Epoch, RecordNumber, Seq};

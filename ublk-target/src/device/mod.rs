//! The backing devices: opening and locking them, and what must be known before they are used.

mod backing;
pub mod claim;
pub mod counters;
mod lock;
pub mod signature;
pub mod stack;
pub mod users;
mod whole_disk;
mod witness;

pub use backing::{Backing, Backings, DYING, Use, is_same, is_same_device, number};

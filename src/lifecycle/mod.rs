//! From bare devices to an open volume.

pub mod create;
mod devices;
pub(crate) mod grow_error;
mod growth;
pub(crate) mod identity_block;
pub mod key_slots;
pub mod open;
pub(crate) mod open_error;
pub(crate) mod recovery;
pub(crate) mod staged;
pub(crate) mod superblocks;

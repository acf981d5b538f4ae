//! From bare devices to an open volume.

pub mod create;
pub mod open;
pub(crate) mod recovery;
pub(crate) mod staged;
pub(crate) mod superblocks;

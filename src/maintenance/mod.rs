//! What is done beside requests.

pub mod check;
pub(crate) mod checkpoint;
pub mod heal;
pub mod scrub;

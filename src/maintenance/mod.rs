//! What is done beside requests.

pub mod check;
mod checkpoint;

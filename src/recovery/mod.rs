//! Recovery: from a superblock and a log to the one tag of every block.
//!
//! `chain` follows the log, `candidates` says which tags each block may rightly carry, `settle`
//! looks at the data and chooses among them by the table of `docs/crash-safety.md`. Recovery
//! chooses among tags that it can prove; it never makes one.

mod candidates;
mod chain;
mod settle;

pub(crate) use candidates::Candidates;
pub(crate) use chain::follow;
pub(crate) use settle::settle;

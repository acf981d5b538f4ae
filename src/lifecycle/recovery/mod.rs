//! Recovery: from a superblock and a log to the one tag of every block.
//!
//! `chain` follows the log (`ring` reads it), `candidates` says which tags each block may rightly
//! carry, `settle` looks at the data, and `judge` chooses among them by the table of
//! `docs/crash-safety.md`. A block whose content lies in the log (`in_log`) goes to its place (`place`).
//! Recovery chooses among tags that it can prove; it never makes one, and
//! where it can prove nothing because something can't be read it does not choose. `patience` bounds
//! how long all of it bears with devices that fail.

mod candidates;
mod chain;
pub(crate) mod in_log;
mod judge;
mod patience;
mod place;
mod ring;
mod settle;
pub(crate) mod undecided;

pub(crate) use candidates::{BlockCandidates, Budget, Candidates, TooMuch};
pub(crate) use chain::{Torn, Unread, follow};
pub(crate) use place::Placer;
pub(crate) use settle::Settle;

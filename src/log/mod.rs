//! The tag log: one ring, one chain, gathered by all queues.
//!
//! *Append* gives an entry its epoch, its sequence number, its place in the in-flight list and its
//! place in the gathering buffer in one indivisible step, so that a flush or an epoch switch sees
//! either all of it or nothing. *Commit* makes the record durable: whoever finds room
//! for another log write leads, writes what has gathered on its own ring and wakes the others.
//!
//! Who waits: an append waits for space, before it has logged anything; a commit waits for the end of a thread's turn, where
//! somebody looks at what has gathered, and for the leader's write and those before it, which some ring completes. The
//! checkpoint frees space and waits for neither.

mod append;
mod claim;
mod commit;
mod flush;
mod state;
mod waiters;

pub(crate) use append::{Appended, Change, Requester, Reserved};
pub(crate) use commit::next_position;
pub use state::Work;
pub(crate) use state::{Log, LogConfig, LogPoint, RECORDS_IN_FLIGHT, Unfinished};

//! The tag log: one ring, one chain, gathered by all threads.
//!
//! *Append* gives an entry its epoch and its sequence number, and enters it in the in-flight list
//! and the gathering buffer. It is one indivisible step, so a flush or an epoch switch sees either
//! all of it or nothing. *Commit* makes the record durable: the request that finds room for another
//! log write is the leader. It writes what has gathered on its own ring and wakes the others.
//! *Complete* and *fail* end a change: its data is in place, or may not be.
//!
//! Who waits: an append waits for space, before it has logged anything. A commit waits for a batch
//! boundary of its thread, and for the leader's write and the log writes before it, which some ring
//! completes. The checkpoint frees space, and waits for neither an append nor a commit. A flush that the anchor holds back
//! waits for a round of whoever tells the anchor.

mod append;
mod carry;
mod commit;
mod flush;
mod held;
mod recorded;
mod state;
mod sync_state;

pub(crate) use append::{Appended, Change, Logged, Requester, Reserved};
pub(crate) use commit::next_position;
pub(crate) use recorded::Recorded;
pub use state::CheckpointerWork;
pub(crate) use state::{Log, LogConfig, LogPoint, RECORDS_IN_FLIGHT, Unfinished};
pub(crate) use sync_state::Unsynced;

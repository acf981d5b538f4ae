//! The kernel's ublk driver, through libublk. Nothing outside this folder names that crate.

mod answer;
mod command;
mod control;
mod disk_size;
mod failed;
mod features;
mod gate;
mod load;
mod mark;
mod queue;
mod request;
mod run_folder;
mod shared;
mod stopwatch;
#[cfg(test)]
mod tests;
mod transfer;
mod write_back;

pub use control::{Device, Proof, Shape, Whose, block_path, delete_marked, exists, kernel_state, need_driver};
pub use disk_size::disk_size;
pub use features::{may_be_asked, resizes_in_use, shares_queues};
pub use gate::Gate;
pub use mark::Mark;
pub use request::{BlockShift, Request, UnknownRequest};
pub use run_folder::secure_run_folder;
pub use shared::Shared;
pub use stopwatch::Latencies;

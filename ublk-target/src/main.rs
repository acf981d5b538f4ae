//! The command line of ublk-integrity.

// A program has no outside: what is public here is public to its other modules.
#![allow(unreachable_pub)]
// They panic where nothing can be written: `output` has what does not.
#![cfg_attr(not(test), warn(clippy::print_stdout, clippy::print_stderr))]

mod boot;
mod checkpoints;
mod cli;
mod daemon;
mod device;
mod event_loop;
mod failure;
mod hashing;
mod huge;
mod interrupt;
mod key;
mod key_hint;
mod name;
mod notice;
mod offline;
mod os;
mod output;
mod random;
mod replay;
mod report;
mod run_dir;
#[cfg(all(test, shuttle))]
#[path = "../../tests/sim/shared.rs"]
mod shared;
mod size;
mod sync;
mod threads;
mod ublk;
mod unnamed;
mod wait;
mod write_back_file;

/// Gives the request buffers and the page cache huge pages, and all else to the system's
/// allocator (`docs/decisions/003-huge-pages.md`). The tests' own counts allocations, and passes
/// them on to this one.
#[cfg(not(test))]
#[global_allocator]
static ALLOCATOR: huge::LargeApart = huge::LargeApart;

fn main() -> std::process::ExitCode {
    os::set_signals();
    let args: Vec<_> = std::env::args_os().collect();
    cli::run(&args)
}

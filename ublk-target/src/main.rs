//! The command line of ublk-integrity.

// A program has no outside: what is public here is public to its other modules.
#![allow(unreachable_pub)]

mod checkpoints;
mod cli;
mod daemon;
mod device;
mod executor;
mod failure;
mod hash_queue;
mod huge;
mod interrupt;
mod kept;
mod key;
mod notice;
mod offline;
mod os;
mod report;
mod ring;
#[cfg(all(test, shuttle))]
#[path = "../../tests/sim/shared.rs"]
mod shared;
mod size;
mod sync;
mod tasks;
mod ublk;
mod wait;

fn main() -> std::process::ExitCode {
    os::default_signals();
    let args: Vec<_> = std::env::args_os().collect();
    cli::run(&args)
}

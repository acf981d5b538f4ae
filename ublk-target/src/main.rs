//! The command line of ublk-integrity, and the daemon behind each of its devices.
//!
//! ```text
//!   cli ─┬─ format, check, export, import … ──> offline ───────────────────────┐
//!        ├─ add, recover ──> daemon ──> opening ──> serving ──> ublk ──────────┤
//!        │                     │                     │           └─ I/O threads, a task a tag
//!        │                     │                     └─ threads: log, checkpoint, prefetch, hashing
//!        └─ status, metrics ──> watch ──> control sockets                       │
//!                                                                              ▼
//!          device (backing devices) <── event_loop/ring <── the library, run by event_loop
//! ```
//!
//! ```text
//!   cli/             one file for each command: options, words, exit codes
//!   anchor/          where a volume's newest state is held outside its disk: the file, the daemon's thread
//!   boot/            /etc/ublk-integritytab, and the units made from it
//!   daemon/          a device's process: its start, what it refuses, threads, state files, end
//!   ublk/            the kernel's driver: devices, queues, requests, answers, write-back
//!   write_back_file/ writes that are answered and not in place: they outlive the daemon
//!   replay.rs        puts them in place after the next open
//!   offline.rs       volumes without ublk: a pipeline of requests on a ring of its own
//!   checkpoints.rs   the loop of the checkpoint thread
//!   event_loop/      poll batches, tasks, hash pool; ring/ is the library's Storage on io_uring
//!   rings.rs         where rings are made: no thread closes its last one
//!   watch/           all devices, from outside: their health, metrics
//!   event/           what somebody should hear of: its classes, files, and who follows them
//!   device/          backing devices: opened, locked, who uses them, what they already hold
//!   key.rs           the master key; key_hint.rs, hashing.rs, random.rs, size.rs, name.rs: values
//!   failure.rs       one line for a person, one exit code; output.rs, report.rs, notice.rs: words
//!   run_dir.rs       /run/ublk-integrity; unnamed.rs: files that are locked before they have a name
//!   new_file.rs      files that are there whole, or not at all
//!   wait.rs          waits with an end; interrupt.rs: Ctrl-C; threads.rs, sync.rs: threads
//!   os.rs, huge.rs   system calls, the allocator: with event_loop/ring/ all that is `unsafe`
//! ```
//!
//! `docs/architecture.md` has the threads, the event loop and who waits for whom.

// A program has no outside: what is public here is public to its other modules.
#![allow(unreachable_pub)]
// They panic where nothing can be written: `output` has what does not.
#![cfg_attr(not(test), warn(clippy::print_stdout, clippy::print_stderr))]

mod anchor;
mod boot;
mod checkpoints;
mod cli;
mod daemon;
mod device;
mod event;
mod event_loop;
mod failure;
mod hashing;
mod huge;
mod interrupt;
mod key;
mod key_hint;
mod latency;
mod name;
mod new_file;
mod notice;
mod offline;
mod os;
mod ourselves;
mod output;
mod random;
mod replay;
mod report;
mod rings;
mod run_dir;
mod scrub_status;
#[cfg(all(test, shuttle))]
#[path = "../../tests/sim/shared.rs"]
mod shared;
mod size;
mod sync;
mod threads;
mod ublk;
mod unnamed;
mod wait;
mod watch;
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

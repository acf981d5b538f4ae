//! `ublk-anchor-tpm`: keeps the anchors of ublk-integrity in a TPM 2.0. `docs/anchor-agents.md` says
//! how it is used, `docs/anchor-protocol.md` what it is asked.
//!
//! - `options.rs`: the command line.
//! - `chip.rs`: commands to the TPM, and what its refusals mean.
//! - `index.rs`: which NV index is a volume's, and what kind of index that must be.
//! - `counter.rs`: the counter, on top of both.
//! - `wear.rs`: how many increments a day the chip's cells are given.

mod chip;
mod counter;
mod index;
mod options;
mod wear;

use counter::TpmCounter;
use options::Run;
use std::process::ExitCode;
use ublk_anchor_protocol::{Backend, process};

const PROGRAM: &str = "ublk-anchor-tpm";

/// libtss2 writes a line for each index that is not there, unless it is told otherwise.
#[allow(unsafe_code)]
fn quieten_library() {
    if std::env::var_os("TSS2_LOG").is_none() {
        // SAFETY: this is the only thread, so nobody reads the environment meanwhile.
        unsafe { std::env::set_var("TSS2_LOG", "all+none") };
    }
}

fn main() -> ExitCode {
    quieten_library();
    match options::parse(lexopt::Parser::from_env()) {
        Ok(Run::Help) => {
            print!("{}", options::HELP);
            ExitCode::SUCCESS
        }
        Ok(Run::Version) => {
            println!("{PROGRAM} {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        Ok(Run::Serve(options)) => {
            let socket = options.socket.clone();
            process::run(PROGRAM, &socket, &mut Backend::Counter(&mut TpmCounter::new(options)))
        }
        Err(ended) => ended.told(PROGRAM),
    }
}

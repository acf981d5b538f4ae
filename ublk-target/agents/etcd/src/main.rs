//! `ublk-anchor-etcd`: keeps the anchors of ublk-integrity in an etcd cluster. `docs/anchor-agents.md`
//! says how it is used, `docs/anchor-protocol.md` what it is asked.
//!
//! - `options.rs`: the command line.
//! - `endpoints.rs`: where the members are. Names are looked up at start, never later.
//! - `cluster.rs`: requests to a member, with a limit of time, and another member when one fails.
//! - `store.rs`: the store. A body is the value of one key; a change compares that key's revision.

mod cluster;
mod endpoints;
mod options;
mod store;

use cluster::Cluster;
use options::{Options, Run};
use std::process::ExitCode;
use store::EtcdStore;
use ublk_anchor_protocol::{
    Backend,
    process::{self, Ended},
};

const PROGRAM: &str = "ublk-anchor-etcd";

fn main() -> ExitCode {
    match options::parse(lexopt::Parser::from_env()) {
        Ok(Run::Help) => {
            print!("{}", options::HELP);
            ExitCode::SUCCESS
        }
        Ok(Run::Version) => {
            println!("{PROGRAM} {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        Ok(Run::Serve(options)) => match store(&options) {
            Ok(mut store) => process::run(PROGRAM, &options.socket, &mut Backend::Store(&mut store)),
            Err(ended) => ended.told(PROGRAM),
        },
        Err(ended) => ended.told(PROGRAM),
    }
}

fn store(options: &Options) -> Result<EtcdStore, Ended> {
    let endpoints = endpoints::resolve(&options.endpoints, &options.files)?;
    Ok(EtcdStore::new(Cluster::new(endpoints, options.timeout)?, options.prefix.clone()))
}

//! `list`: the devices.

use crate::{daemon::state::State, failure::Outcome, output::Output, ublk};
use serde_json::json;

/// List the devices of ublk-integrity
#[derive(clap::Args)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Outcome {
    let devices: Vec<_> = State::all()
        .into_iter()
        .map(|state| (state.is_alive(), state.has_device(), state))
        .filter(|(alive, exists, _)| *alive || *exists)
        .collect();
    if args.json {
        let all: Vec<_> = devices
            .iter()
            .map(|(alive, _, state)| {
                let mut entry = json!(state);
                entry["device"] = json!(ublk::block_path(state.id));
                entry["pid"] = if *alive { json!(state.pid) } else { json!(null) };
                entry
            })
            .collect();
        return Output::json(&all).print();
    }
    let mut out = Output::new();
    for (alive, _, state) in &devices {
        let daemon = if *alive { format!("pid {}", state.pid) } else { format!("daemon dead: {}", state.remedy()) };
        let meta = state.settings.meta.as_ref().map_or_else(String::new, |m| format!(", metadata {}", m.display()));
        let name = state.settings.name.as_ref().map_or_else(String::new, |name| format!("{name}, "));
        let (device, data) = (ublk::block_path(state.id), state.settings.data.display());
        out.line(format_args!("{}: {name}{data}{meta} ({daemon})", device.display()));
    }
    out.print()
}

//! `list`: the devices.

use crate::{
    daemon::state::{Change, State},
    failure::Outcome,
    output::Output,
    ublk,
};
use serde_json::{Value, json};
use std::fs;

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
        let all: Vec<_> = devices.iter().map(|(alive, _, state)| json(state, *alive)).collect();
        return Output::json(&all).print();
    }
    let mut out = Output::new();
    for (alive, _, state) in &devices {
        let daemon = match alive {
            true => format!("pid {}", state.pid),
            false if Change::is_under_way(state.id) => "handed over to its next daemon just now".into(),
            false => format!("daemon dead: {}", state.remedy()),
        };
        let meta = state.settings.meta.as_ref().map_or_else(String::new, |m| format!(", metadata {}", m.display()));
        let name = state.settings.name.as_ref().map_or_else(String::new, |name| format!("{name}, "));
        let program = alive.then(|| outdated(state)).flatten().map_or_else(String::new, |runs| {
            format!(", runs {runs}, installed {}: `upgrade -n {}`", env!("CARGO_PKG_VERSION"), state.id)
        });
        let (device, data) = (ublk::block_path(state.id), state.settings.data.display());
        out.line(format_args!("{}: {name}{data}{meta} ({daemon}){program}", device.display()));
    }
    out.print()
}

/// One device, with a daemon that lives or without.
pub fn json(state: &State, alive: bool) -> Value {
    let mut entry = json!(state);
    entry.as_object_mut().expect("of fields").remove("life");
    entry["device"] = json!(ublk::block_path(state.id));
    entry["pid"] = if alive { json!(state.pid) } else { json!(null) };
    entry["outdated"] = json!(alive && outdated(state).is_some());
    entry
}

/// What its daemon runs, where that is not what lists.
fn outdated(state: &State) -> Option<String> {
    let program = fs::read_link(format!("/proc/{}/exe", state.pid)).ok();
    let replaced = program.is_some_and(|path| path.to_string_lossy().ends_with(" (deleted)"));
    runs_another(state.version.as_deref(), replaced)
}

fn runs_another(version: Option<&str>, replaced: bool) -> Option<String> {
    match version {
        Some(version) if version == env!("CARGO_PKG_VERSION") => {
            replaced.then(|| format!("{version} from a file that was replaced"))
        }
        Some(version) => Some(version.into()),
        None => Some("an older version".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_runs_another_program_is_said_to() {
        let own = env!("CARGO_PKG_VERSION");
        assert_eq!(runs_another(Some(own), false), None);
        assert!(runs_another(Some(own), true).unwrap().contains("replaced"));
        assert_eq!(runs_another(Some("0.0.9"), false).as_deref(), Some("0.0.9"));
        assert_eq!(runs_another(None, false).as_deref(), Some("an older version"));
    }
}

//! `clear`: what was found is acknowledged, as `zpool clear` does.

use super::{one_or_all, status};
use crate::{
    daemon::{
        followed,
        protocol::{ANSWERS_WITHIN, Request},
        state::State,
    },
    failure::{Exit, Failure, Outcome},
    output::Output,
    ublk,
    watch::{
        health::{self, Finding, Health},
        survey::{Daemon, Seen},
    },
};
use nix::unistd::geteuid;
use serde_json::Value;

/// Acknowledge what was found, so that a device is ok again: counters go on, and what comes later counts
#[derive(clap::Args)]
#[command(mut_group("device", |group| group.arg("all")))]
pub struct Args {
    #[command(flatten)]
    device: Option<super::OneDevice>,
    /// All devices of ublk-integrity
    #[arg(short, long)]
    all: bool,
}

pub fn run(args: &Args) -> Outcome {
    if !geteuid().is_root() {
        return Err(Failure::new(Exit::KeyOrPermission, "clear changes what others see of a device: it is for root"));
    }
    let devices = status::devices(one_or_all(args.device.as_ref(), args.all)?, false)?;
    let (mut out, mut left) = (Output::new(), Vec::new());
    for seen in &devices {
        match clear(seen) {
            Ok((line, health)) => {
                out.line(format_args!("{}: {line}", path(&seen.state)));
                if let Some(exit) = health.exit() {
                    let why = format!("{} stays {health}: that can't be cleared", path(&seen.state));
                    left.push(Failure::new(exit, why));
                }
            }
            Err(failure) => left.push(failure),
        }
    }
    out.print_with(worst(&left))
}

fn path(state: &State) -> String {
    ublk::block_path(state.id).display().to_string()
}

/// In words what is acknowledged, and how the device is then.
fn clear(seen: &Seen) -> Outcome<(String, Health)> {
    let Daemon::Answers(status) = &seen.daemon else {
        let health = Health::of(seen);
        let message = format!("{}: nothing is cleared: {health}", path(&seen.state));
        return Err(Failure::new(health.exit().unwrap_or(Exit::Device), message));
    };
    let found: Vec<_> = health::findings(status).into_iter().filter(Finding::has_happened).collect();
    if found.is_empty() {
        return Ok(("there is nothing to clear".into(), Health::of(seen)));
    }
    let after = ask(&seen.state, &found)?;
    let words: Vec<_> = found.iter().map(Finding::to_string).collect();
    Ok((format!("cleared {}", words.join(", ")), Health::of_status(&after)))
}

/// The status after these were acknowledged, as they were seen: not what has come since.
fn ask(state: &State, found: &[Finding]) -> Outcome<Value> {
    let findings = found.iter().map(|finding| (finding.field.to_owned(), finding.count)).collect();
    let late = || {
        let seconds = ANSWERS_WITHIN.as_secs();
        let message = format!("its daemon has not answered within {seconds} s: `status` says whether it has cleared");
        Failure::new(Exit::Busy, message)
    };
    let answer = followed::answer(state, &Request::Clear { findings });
    answer.map_err(|unanswered| unanswered.failure(late).context(path(state)))
}

/// All in one line.
fn worst(left: &[Failure]) -> Outcome {
    let Some(exit) = health::worst_of(left.iter().map(|failure| failure.exit)) else { return Ok(()) };
    let messages: Vec<_> = left.iter().map(|failure| failure.message.as_str()).collect();
    Err(Failure::new(exit, messages.join("; ")))
}

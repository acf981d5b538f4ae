//! `status`: state and counters of a device.

use crate::{
    daemon::{
        client::{self, Unanswered},
        protocol::{ANSWERS_WITHIN, Request},
        state::{State, socket_path},
    },
    failure::{Exit, Failure, Outcome, with_paths},
    output::Output,
    report,
    size::Size,
    ublk,
};
use serde_json::{Value, json};
use std::{fs, path::Path};

/// Show state and counters of a device
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    device: super::OneDevice,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Outcome {
    let number = args.device.number()?;
    let state = State::load(number)?;
    if !state.is_alive() {
        let message = format!("the daemon of device {number} (pid {}) is dead: {}", state.pid, state.remedy());
        return Err(Failure::new(Exit::Device, message));
    }
    match client::ask(&socket_path(number), &Request::Status {}) {
        Ok(status) if args.json => Output::json(&status).print(),
        Ok(status) => lines(&status).print(),
        Err(Unanswered::Failed(failure)) => Err(failure),
        Err(Unanswered::Late) => {
            let known = known(&state);
            let out = if args.json {
                Output::json(&known)
            } else {
                let mut out = Output::new();
                print_lines(&mut out, KNOWN, &known);
                out
            };
            let message = format!(
                "the daemon of device {number} (pid {}) has not answered within {} s: this is what is known without it",
                state.pid,
                ANSWERS_WITHIN.as_secs()
            );
            out.print_with(Err(Failure::new(Exit::Busy, message)))
        }
    }
}

/// What can be known of a device without its daemon: from the state file and the kernel.
fn known(state: &State) -> Value {
    let mut known = json!(state);
    known["device"] = json!(ublk::block_path(state.id));
    known["kernel_state"] = json!(ublk::kernel_state(state.id).unwrap_or("unknown"));
    known["process_state"] = json!(process_state(state.pid));
    known["requests_under_way"] = json!(requests_under_way(state.id));
    known
}

/// What the kernel says that a process does: "T (stopped)", "D (disk sleep)".
fn process_state(pid: u32) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let state = status.lines().find_map(|line| line.strip_prefix("State:"));
    state.map_or_else(|| "unknown".into(), |state| state.trim().into())
}

/// Reads and writes that the device has taken and not answered.
fn requests_under_way(number: u32) -> Option<u64> {
    let counts = fs::read_to_string(format!("/sys/block/ublkb{number}/inflight")).ok()?;
    counts.split_whitespace().map(|count| count.parse::<u64>().ok()).sum()
}

/// Of that what a person wants to know.
const KNOWN: &[(&str, &str)] = &[
    ("name", "{name}"),
    ("device", "{device}: {kernel_state}, {requests_under_way} requests under way"),
    ("daemon", "pid {pid}: {process_state}"),
    ("volume", "{uuid}, {size:size} in blocks of {block_size}"),
    ("label", "{label}"),
    ("atomic", "{assumed_atomic_bytes} bytes, as the user says"),
    ("data", "{data}"),
    ("metadata", "{meta}"),
];

/// What a person wants to know first; `--json` has every value. `{name}` stands for a value,
/// `{name:size}` for bytes.
const LINES: &[(&str, &str)] = &[
    ("name", "{name}"),
    ("device", "{device}, pid {pid}"),
    ("volume", "{uuid}, {size:size} in blocks of {block_size}, {tag}"),
    ("label", "{label}"),
    ("atomic", "{assumed_atomic_bytes} bytes, as the user says"),
    ("data", "{data}"),
    ("metadata", "{meta}"),
    ("state", "{state}"),
    (
        "verified",
        "{blocks_verified} blocks: {mismatches} mismatches, {bad_pages} damaged pages met, {pages_lost} pages lost, {fixed_blocks} blocks fixed",
    ),
    ("reads", "{reads} ({read_bytes:size})"),
    (
        "writes",
        "{writes} ({written_bytes:size}), {write_back_writes} answered early, {carried_writes} carried by the log, {failed_writes} failed; {zeroes} zeroes, {flushes} flushes",
    ),
    (
        "cache",
        "{cache:size}: {cache_hits} hits, {cache_misses} misses; hints: {hints_sent} sent, {hints_used} used, {hints_dropped} dropped",
    ),
    (
        "log",
        "{log_used:size} of {log_size:size} in use, {log_records} records written; {pending_tags} tags pending, {checkpoints} checkpoints",
    ),
    ("sync log", "{sync_log}"),
    (
        "queues",
        "{queues} of {depth} requests up to {max_io:size}, {threads} threads each, {hash_threads} that hash for them",
    ),
    ("memory", "{daemon_memory_bytes:size}"),
];

fn lines(status: &Value) -> Output {
    let mut out = Output::new();
    let mut shown = status.clone();
    shown["state"] = state(status).into();
    shown["sync_log"] = if status["sync_log"] == true { "on" } else { "off" }.into();
    print_lines(&mut out, LINES, &shown);
    let found = serde_json::from_value(status["recovery"].clone()).unwrap_or_default();
    let data = Path::new(status["data"].as_str().unwrap_or_default());
    let named = |line: &String| with_paths(line, data, status["meta"].as_str().map(Path::new));
    report::recovery(&found).iter().map(named).for_each(|line| out.line(line));
    out
}

fn print_lines(out: &mut Output, lines: &[(&str, &str)], values: &Value) {
    filled(lines, values).for_each(|line| out.line(line));
}

/// Each line that there is something to say in.
fn filled<'a>(lines: &'a [(&str, &str)], values: &'a Value) -> impl Iterator<Item = String> + 'a {
    let is_there = |what: &str| match what {
        "metadata" => values["meta"].is_string(),
        "name" => values["name"].is_string(),
        "label" => values["label"].as_str().is_some_and(|label| !label.is_empty()),
        "atomic" => values["assumed_atomic_bytes"].is_u64(),
        _ => true,
    };
    let lines = lines.iter().filter(move |(what, _)| is_there(what));
    lines.map(|(what, template)| format!("{what:<10}{}", fill(template, values)))
}

fn fill(template: &str, values: &Value) -> String {
    let mut parts = template.split(['{', '}']);
    let mut text = parts.next().unwrap_or_default().to_owned();
    while let (Some(name), Some(rest)) = (parts.next(), parts.next()) {
        text += &match name.strip_suffix(":size") {
            Some(name) => Size(values[name].as_u64().unwrap_or(0)).to_string(),
            None => values[name].as_str().map_or_else(|| values[name].to_string(), str::to_owned),
        };
        text += rest;
    }
    text
}

fn state(status: &Value) -> String {
    let access = match (&status["latched"], status["read_only"].as_bool()) {
        (Value::String(why), _) => format!("READ-ONLY since a failure: {why}"),
        (_, Some(true)) => "read-only".into(),
        _ => "read and write".into(),
    };
    match status["on_mismatch"].as_str() {
        Some("fail") | None => access,
        Some(other) => format!("{access}; ON MISMATCH: {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn label_and_assumed_atomicity_are_shown_where_there_are_any() {
        let has = |lines, values: &Value, wanted: &str| filled(lines, values).any(|line| line == wanted);
        let some = json!({ "label": "home", "assumed_atomic_bytes": 4096, "sync_log": "on" });
        let none = json!({ "label": "", "assumed_atomic_bytes": null });
        for lines in [LINES, KNOWN] {
            assert!(has(lines, &some, "label     home") && has(lines, &some, "atomic    4096 bytes, as the user says"));
            assert!(!filled(lines, &none).any(|line| line.starts_with("label") || line.starts_with("atomic")));
        }
        assert!(has(LINES, &some, "sync log  on"));
    }

    #[test]
    fn templates_are_filled() {
        let values = serde_json::json!({ "a": 3, "b": "text", "c": 2048 });
        assert_eq!(fill("{a} of {b}: {c:size}.", &values), "3 of text: 2.00 KiB.");
        assert_eq!(fill("plain", &values), "plain");
    }
}

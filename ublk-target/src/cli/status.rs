//! `status`: state and counters of a device.

use crate::{
    daemon::{control, state::State},
    failure::{Exit, Failure, Outcome},
    output::Output,
    report,
    size::Size,
};
use serde_json::Value;

/// Show state and counters of a device
#[derive(clap::Args)]
pub struct Args {
    /// The device: its number, or /dev/ublkbN
    #[arg(short, long, value_name = "N", value_parser = super::device_number)]
    number: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Outcome {
    let number = args.number;
    let state = State::load(number)?;
    if !state.is_alive() {
        let message = format!("the daemon of device {number} (pid {}) is dead: {}", state.pid, state.remedy());
        return Err(Failure::new(Exit::Device, message));
    }
    let status = control::status(number)?;
    if args.json { Output::json(&status).print() } else { lines(&status).print() }
}

/// What a person wants to know first; `--json` has every value. `{name}` stands for a value, `{name:size}` for bytes.
const LINES: &[(&str, &str)] = &[
    ("device", "{device}, pid {pid}"),
    ("volume", "{uuid}, {size:size} in blocks of {block_size}, {tag}"),
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
        "{writes} ({written_bytes:size}), {accepted_writes} answered early, {failed_writes} failed; {zeroes} zeroes, {flushes} flushes",
    ),
    (
        "cache",
        "{cache:size}: {cache_hits} hits, {cache_misses} misses; hints: {hints_sent} sent, {hints_used} used, {hints_dropped} dropped",
    ),
    (
        "log",
        "{log_used:size} of {log_size:size} in use, {log_records} records written; {pending_tags} tags pending, {checkpoints} checkpoints",
    ),
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
    let lines = LINES.iter().filter(|(what, _)| *what != "metadata" || status["meta"].is_string());
    lines.for_each(|(what, template)| out.line(format_args!("{what:<10}{}", fill(template, &shown))));
    let found = serde_json::from_value(status["recovery"].clone()).unwrap_or_default();
    report::recovery(&found).iter().for_each(|line| out.line(line));
    out
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
    fn templates_are_filled() {
        let values = serde_json::json!({ "a": 3, "b": "text", "c": 2048 });
        assert_eq!(fill("{a} of {b}: {c:size}.", &values), "3 of text: 2.00 KiB.");
        assert_eq!(fill("plain", &values), "plain");
    }
}

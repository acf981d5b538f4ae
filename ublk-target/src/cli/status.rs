//! `status`: state, counters and health of devices.

use crate::{
    daemon::{protocol::ANSWERS_WITHIN, state::State},
    event::time,
    failure::{Exit, Failure, Outcome, with_paths},
    latency::{Distribution, Op, rounded},
    output::{self, Output},
    report,
    scrub_status::ScrubStatus,
    size::Size,
    ublk,
    watch::{
        health::{self, Health},
        survey::{self, Daemon, Seen},
    },
};
use serde::Deserialize;
use serde_json::{Value, json};
use std::{
    fs,
    io::{self, IsTerminal},
    path::Path,
    thread,
    time::Duration,
};

/// Show state, counters and health of a device, or of all
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    device: super::AnyDevice,
    /// Only what is not ok, a line each; exits with 4 for what has failed, 5 for what waits, 6 for what was found
    #[arg(short = 'x', long)]
    unhealthy: bool,
    /// Show it again and again, every 2 seconds or so many
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, require_equals = true, default_missing_value = "2", value_parser = period)]
    watch: Option<Duration>,
    /// Print JSON
    #[arg(long, conflicts_with_all = ["watch", "unhealthy"])]
    json: bool,
}

/// Seconds between two looks.
pub(super) fn period(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().ok().filter(|seconds| (0.1..=3600.0).contains(seconds));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| "must be seconds from 0.1 to 3600".into())
}

pub fn run(args: &Args) -> Outcome {
    let Some(period) = args.watch else {
        let (out, verdict) = look(args)?;
        return out.print_with(verdict);
    };
    let clear = if io::stdout().is_terminal() { "\x1b[H\x1b[2J" } else { "" };
    loop {
        // A device that ends, or does not answer for once, is shown as it is.
        let (out, verdict) = look(args).unwrap_or_else(|failure| (Output::new(), Err(failure)));
        out.after(clear).print()?;
        verdict.unwrap_or_else(output::tell);
        thread::sleep(period);
    }
}

/// What there is to show, and what comes of it.
fn look(args: &Args) -> Outcome<(Output, Outcome)> {
    let one = args.device.number()?;
    let devices: Vec<_> =
        devices(one, args.watch.is_some())?.into_iter().map(|seen| (Health::of(&seen), seen)).collect();
    match (one, &devices[..]) {
        _ if args.unhealthy => Ok(unhealthy(&devices)),
        (Some(_), [(health, seen)]) => one_device(seen, health, args.json),
        _ if args.json => {
            let all: Vec<_> = devices.iter().map(|(health, seen)| json_of(seen, health)).collect();
            Ok((Output::json(&all), Ok(())))
        }
        _ => Ok((all_devices(&devices), Ok(()))),
    }
}

/// The device of this number, which must be there, or all. Who looks `again` sees them as they are; who does not, one that is
/// handed over when that is done.
pub(super) fn devices(one: Option<u32>, again: bool) -> Outcome<Vec<Seen>> {
    match one {
        Some(number) => Ok(vec![seen(number, again)?]),
        None => Ok(if again { survey::all() } else { survey::all_settled() }),
    }
}

fn seen(number: u32, again: bool) -> Outcome<Seen> {
    let look = if again { survey::look } else { survey::look_settled };
    look(State::load(number)?).ok_or_else(|| {
        Failure::new(
            Exit::Device,
            format_args!("device {number} is gone: `ublk-integrity list` shows those that are there"),
        )
    })
}

/// One device must answer.
fn one_device(seen: &Seen, health: &Health, json: bool) -> Outcome<(Output, Outcome)> {
    let (number, pid) = (seen.state.id, seen.state.pid);
    let verdict = match &seen.daemon {
        Daemon::Answers(_) => Ok(()),
        Daemon::Unasked(failure) | Daemon::Refused(failure) => return Err(Failure::new(failure.exit, failure)),
        Daemon::Dead => return Err(seen.state.daemon_is_dead()),
        Daemon::Late => {
            let seconds = ANSWERS_WITHIN.as_secs();
            let message = format!(
                "the daemon of device {number} (pid {pid}) has not answered within {seconds} s: this is what is known without it"
            );
            Err(Failure::new(Exit::Busy, message))
        }
    };
    let out = if json { Output::json(&json_of(seen, health)) } else { lines(seen, health) };
    Ok((out, verdict))
}

fn all_devices(devices: &[(Health, Seen)]) -> Output {
    let mut out = Output::new();
    for (i, (health, seen)) in devices.iter().enumerate() {
        if i > 0 {
            out.line("");
        }
        out.append(lines(seen, health));
    }
    out
}

/// Only what is not ok; and one exit code for all.
fn unhealthy(devices: &[(Health, Seen)]) -> (Output, Outcome) {
    let mut out = Output::new();
    let ill: Vec<_> = devices.iter().filter(|(health, _)| *health != Health::Ok).collect();
    for (health, Seen { state, .. }) in &ill {
        let name = state.settings.name.as_ref().map_or_else(String::new, |name| format!(" ({name})"));
        out.line(format_args!("{}{name}: {health}", ublk::block_path(state.id).display()));
    }
    let verdict = health::worst(ill.iter().map(|(health, _)| health)).map(|exit| {
        Failure::new(
            exit,
            format_args!("{} of {} devices not ok: `ublk-integrity status` shows more", ill.len(), devices.len()),
        )
    });
    match verdict {
        Some(failure) => (out, Err(failure)),
        None => {
            out.line(if devices.is_empty() { "no devices" } else { "all devices are ok" });
            (out, Ok(()))
        }
    }
}

fn json_of(seen: &Seen, health: &Health) -> Value {
    let mut all = match &seen.daemon {
        Daemon::Answers(status) => status.clone(),
        _ => known(seen),
    };
    all["health"] = health.json();
    all
}

/// What can be known of a device without its daemon: from the state file and the kernel.
pub fn known(seen: &Seen) -> Value {
    let state = &seen.state;
    let mut known = json!(state);
    known.as_object_mut().expect("of fields").remove("life");
    known["device"] = json!(ublk::block_path(state.id));
    known["kernel_state"] = json!(ublk::kernel_state(state.id).unwrap_or("unknown"));
    // Its number may be another's by now.
    let process = if matches!(seen.daemon, Daemon::Dead) { "dead".into() } else { process_state(state.pid) };
    known["process_state"] = json!(process);
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
    ("anchor", "{anchor}"),
    ("device", "{device}, pid {pid}"),
    ("volume", "{uuid}, {size:size} in blocks of {block_size}, {tag}"),
    ("label", "{label}"),
    ("atomic", "{assumed_atomic_bytes} bytes, as the user says"),
    ("data", "{data}"),
    ("metadata", "{meta}"),
    ("state", "{state}"),
    (
        "verified",
        "{blocks_verified} blocks: {mismatches} mismatches, {bad_pages} damaged pages met, {pages_lost} pages lost, {fixed_blocks} blocks fixed, {healed_blocks} healed",
    ),
    ("scrub", "{scrub}"),
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
    ("latency", "{latency}"),
    (
        "queues",
        "{queues} of {depth} requests up to {max_io:size}, {threads} threads each, {hash_threads} that hash for them",
    ),
    ("memory", "{daemon_memory_bytes:size}"),
];

/// A device for people; its health last.
fn lines(seen: &Seen, health: &Health) -> Output {
    let mut out = Output::new();
    match &seen.daemon {
        Daemon::Answers(status) => print_status(&mut out, status),
        _ => print_lines(&mut out, KNOWN, &known(seen)),
    }
    out.line(format_args!("{:<10}{health}", "health"));
    out
}

fn print_status(out: &mut Output, status: &Value) {
    let mut shown = status.clone();
    shown["state"] = state(status).into();
    shown["anchor"] = anchor(&status["anchor"]).into();
    let scrub = ScrubStatus::deserialize(&status["scrub"]).ok();
    shown["scrub"] = scrub.filter(|scrub| scrub.report.pass > 0).map(|scrub| scrub.summary().to_string()).into();
    shown["sync_log"] = if status["sync_log"] == true { "on" } else { "off" }.into();
    shown["latency"] = latency(status).into();
    print_lines(out, LINES, &shown);
    let found = serde_json::from_value(status["recovery"].clone()).unwrap_or_default();
    let data = Path::new(status["data"].as_str().unwrap_or_default());
    let named = |line: &String| with_paths(line, data, status["meta"].as_str().map(Path::new));
    report::recovery(&found).iter().map(named).for_each(|line| out.line(line));
}

/// As of when older states are refused; first of all what is wrong with that.
fn anchor(anchor: &Value) -> Option<String> {
    let place = anchor["place"].as_str()?;
    let number = |field: &str| anchor[field].as_u64().unwrap_or(0);
    let fresh = format!("fresh as of {}, {} s ago", time(number("fresh_seconds")), number("age_seconds"));
    let why = anchor["why"].as_str().unwrap_or_default();
    let wrong = match anchor["state"].as_str() {
        Some("away") => format!("AWAY ({why}), "),
        Some("stale") => format!("STALE ({why}), what was written since can be rolled back: "),
        Some("lost") => format!("LOST ({why}), "),
        _ => String::new(),
    };
    let resets = match number("resets") {
        0 => String::new(),
        resets => format!(", {resets} resets, the last {}", time(number("reset_seconds"))),
    };
    // A counter's generation is what it has counted to, and it wears.
    let of = if anchor["counter"] == true { "counter at" } else { "generation" };
    let (generation, lag) = (number("generation"), number("lag_records"));
    Some(format!("{wrong}{fresh}; {lag} records behind, {of} {generation}{resets}, {place}"))
}

/// How long requests of each kind take that there were, if there were any.
fn latency(status: &Value) -> Option<String> {
    let all = Op::ALL.iter().filter_map(|op| {
        let took = Distribution::in_status(status, *op)?;
        let [half, most] = [0.5, 0.99].map(|share| took.within(share).map(rounded));
        Some(format!("{} p50 {}, p99 {}", op.word(), half?, most?))
    });
    Some(all.collect::<Vec<_>>().join("; ")).filter(|text| !text.is_empty())
}

fn print_lines(out: &mut Output, lines: &[(&str, &str)], values: &Value) {
    filled(lines, values).for_each(|line| out.line(line));
}

/// Each line that there is something to say in.
fn filled<'a>(lines: &'a [(&str, &str)], values: &'a Value) -> impl Iterator<Item = String> + 'a {
    let is_there = |what: &str| match what {
        "metadata" => values["meta"].is_string(),
        "name" | "anchor" | "scrub" | "latency" => values[what].is_string(),
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
    fn only_what_is_not_ok_is_said_and_the_worst_decides() {
        let devices = |all: &[Value]| {
            let seen = all.iter().zip(0..).map(|(more, id)| Seen::answering(id, more));
            seen.map(|seen| (Health::of(&seen), seen)).collect::<Vec<_>>()
        };
        let (ok, found, latched) = (json!({}), json!({ "mismatches": 2 }), json!({ "latched": "a sync failed" }));
        let (out, verdict) = unhealthy(&devices(&[ok.clone(), ok.clone()]));
        assert!(verdict.is_ok() && out.text() == "all devices are ok\n");
        assert_eq!(unhealthy(&devices(&[])).0.text(), "no devices\n");
        let (out, verdict) = unhealthy(&devices(&[ok.clone(), found.clone()]));
        assert_eq!(out.text(), "/dev/ublkb1: degraded: 2 mismatches\n");
        let failure = verdict.unwrap_err();
        assert!(failure.exit == Exit::Integrity && failure.message.starts_with("1 of 2 devices"), "{failure}");
        let (out, verdict) = unhealthy(&devices(&[latched, ok, found]));
        assert_eq!((out.text().lines().count(), verdict.unwrap_err().exit), (2, Exit::Device));
    }

    #[test]
    fn each_device_ends_with_its_health() {
        let seen = Seen::answering(0, &json!({ "bad_pages": 1 }));
        let health = Health::of(&seen);
        assert!(lines(&seen, &health).text().ends_with("\nhealth    degraded: 1 damaged pages met\n"));
        assert_eq!(json_of(&seen, &health)["health"], json!({ "word": "degraded", "why": "1 damaged pages met" }));
        let dead = Seen { daemon: Daemon::Dead, ..seen };
        let text = lines(&dead, &Health::of(&dead)).text().to_owned();
        assert!(text.contains("daemon    pid 1: dead\n") && text.contains("\nhealth    failed: its daemon"), "{text}");
        let two = all_devices(&[(Health::Ok, Seen::answering(0, &json!({}))), (Health::Ok, dead)]);
        assert_eq!(two.text().matches("\n\n").count(), 1);
    }

    #[test]
    fn an_anchor_says_first_how_fresh_the_volume_is() {
        let with = |state: &str, why: Value| {
            let fields = json!({ "place": "file:/a", "fresh_seconds": 86400, "age_seconds": 2, "generation": 7 });
            let mut fields = fields.as_object().unwrap().clone();
            fields.extend([("state".into(), state.into()), ("why".into(), why), ("lag_records".into(), 3.into())]);
            anchor(&Value::Object(fields)).unwrap()
        };
        let fresh = "fresh as of 1970-01-02T00:00:00Z, 2 s ago; 3 records behind, generation 7, file:/a";
        assert_eq!(with("ok", Value::Null), fresh);
        assert!(with("away", "gone".into()).starts_with("AWAY (gone), fresh as of"));
        assert!(with("stale", "gone".into()).contains("can be rolled back: fresh"));
        assert_eq!(anchor(&Value::Null), None);
    }

    #[test]
    fn periods_have_limits() {
        assert_eq!(period("0.5"), Ok(Duration::from_millis(500)));
        for text in ["0", "-1", "NaN", "1e9", "often"] {
            assert!(period(text).is_err(), "{text}");
        }
    }

    #[test]
    fn latencies_are_shown_of_what_there_was() {
        let took = |buckets: Value| json!({ "sum_seconds": 1, "buckets": buckets });
        let some =
            json!({ "latency": { "read": took(json!([[0.000096, 98], [0.004096, 2]])), "write": took(json!([])) } });
        assert_eq!(latency(&some).unwrap(), "read p50 88 us, p99 3.8 ms");
        assert_eq!((latency(&json!({})), latency(&json!({ "latency": { "read": took(json!([])) } }))), (None, None));
    }

    #[test]
    fn templates_are_filled() {
        let values = serde_json::json!({ "a": 3, "b": "text", "c": 2048 });
        assert_eq!(fill("{a} of {b}: {c:size}.", &values), "3 of text: 2.00 KiB.");
        assert_eq!(fill("plain", &values), "plain");
    }
}

//! Whether a device is well: one word, why not, and one exit code.

use super::survey::{Daemon, Seen};
use crate::{
    daemon::protocol::{ANSWERS_WITHIN, count_of},
    failure::Exit,
    os,
};
use serde_json::{Value, json};
use std::fmt;

/// How a device is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Health {
    /// Nothing is wrong.
    Ok,
    /// It serves, and somebody should look at it: why.
    Degraded(String),
    /// It does not serve as it should: why, and what a script is told.
    Failed(Exit, String),
}

/// The words, from well to ill.
pub const WORDS: [&str; 3] = ["ok", "degraded", "failed"];

/// Fields of a status that count what must not be, and what they count.
const FINDINGS: &[(&str, &str)] = &[
    ("/mismatches", "mismatches"),
    ("/bad_pages", "damaged pages met"),
    ("/pages_lost", "pages lost"),
    ("/undecided_blocks", "undecided blocks"),
    ("/fixed_blocks", "blocks fixed"),
    ("/failed_writes", "failed writes"),
    ("/log_lines_dropped", "lines of the log dropped"),
    ("/scrub/bad_blocks", "bad blocks found by a pass"),
    ("/scrub/unreadable_blocks", "unreadable blocks found by a pass"),
    ("/scrub/unmended_metadata", "damaged pieces of metadata found by a pass"),
    ("/recovery/corrupt", "blocks found corrupt at recovery"),
    ("/recovery/pages_lost", "pages lost at recovery"),
    ("/recovery/torn_was_durable", "damaged log records that were durable once"),
];

/// Those that say how things are, not what has happened: nobody can acknowledge them away. What a pass
/// has found is so until the next one, which counts anew.
const LASTING: &[&str] =
    &["/undecided_blocks", "/scrub/bad_blocks", "/scrub/unreadable_blocks", "/scrub/unmended_metadata"];

/// A pass that has begun longer ago than this is too old: it may be monthly, up to a week late.
const PASS_DAYS: u64 = 45;

/// Something that must not be.
pub struct Finding {
    /// Where in the status it is counted.
    pub field: &'static str,
    /// What that says.
    pub count: u64,
    /// How much of it nobody has acknowledged: more than 0.
    pub open: u64,
    what: &'static str,
}

impl Finding {
    /// Whether it is of what has happened, so that it can be acknowledged.
    pub fn has_happened(&self) -> bool {
        !LASTING.contains(&self.field)
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.open, self.what)
    }
}

/// What the status of a daemon has that must not be, but for what was acknowledged.
pub fn findings(status: &Value) -> Vec<Finding> {
    let count = |value: &Value| count_of(value).unwrap_or(0);
    let finding = |&(field, what): &(&'static str, &'static str)| {
        let count_now = status.pointer(field).map_or(0, count);
        let open = count_now.saturating_sub(count(&status["cleared"][field]));
        (open > 0).then_some(Finding { field, count: count_now, open, what })
    };
    FINDINGS.iter().filter_map(finding).collect()
}

/// That no pass has begun for too long, at a moment in seconds since 1970. Where none is known of, as the volume may not
/// remember it, what counts is how long the daemon has run.
fn unscrubbed(status: &Value, now: u64) -> Option<String> {
    let number = |pointer: &str| status.pointer(pointer).and_then(Value::as_u64);
    let days = |seconds: u64| Some(seconds / 86_400).filter(|days| *days >= PASS_DAYS);
    // How long one takes is up to the disk and to --rate; but one that is paused may have been forgotten.
    if status["scrub"]["under_way"] == true && status["scrub"]["state"] == "running" {
        return None;
    }
    match (number("/scrub/pass")?, number("/scrub/begun_seconds")?) {
        (0, _) => days(number("/running_seconds")?)
            .map(|days| format!("no pass over it since its daemon has started, {days} days ago")),
        (_, 0) => None,
        (_, begun) => days(now.saturating_sub(begun)).map(|days| format!("the last pass has begun {days} days ago")),
    }
}

impl Health {
    /// Of a device.
    pub fn of(seen: &Seen) -> Self {
        match &seen.daemon {
            Daemon::Answers(status) => Self::of_status(status),
            Daemon::Late => {
                let pid = seen.state.pid;
                let why = format!("its daemon (pid {pid}) has not answered within {} s", ANSWERS_WITHIN.as_secs());
                Self::Failed(Exit::Busy, why)
            }
            Daemon::Unasked(failure) | Daemon::Refused(failure) => Self::Failed(failure.exit, failure.message.clone()),
            Daemon::Dead => {
                // What waits goes on with the next daemon; without recovery nothing does.
                let exit = if seen.state.settings.recovery { Exit::Busy } else { Exit::Device };
                Self::Failed(exit, format!("its daemon (pid {}) is dead: {}", seen.state.pid, seen.state.remedy()))
            }
        }
    }

    /// Of one whose daemon has answered so.
    pub fn of_status(status: &Value) -> Self {
        if let Some(why) = status["latched"].as_str() {
            return Self::Failed(Exit::Device, format!("read-only since a failure: {why}"));
        }
        let mut why: Vec<_> = findings(status).iter().map(Finding::to_string).collect();
        if let Some(other) = status["on_mismatch"].as_str().filter(|what| *what != "fail") {
            why.push(format!("--on-mismatch {other}"));
        }
        if let Some(state @ ("away" | "stale")) = status["anchor"]["state"].as_str() {
            let reason = status["anchor"]["why"].as_str().unwrap_or_default();
            let then = if state == "stale" { ", and what was written since can be rolled back" } else { "" };
            why.push(format!("the anchor can't be asked{then}: {reason}"));
        }
        if let Some(failure) = status["scrub"]["failure"].as_str() {
            why.push(format!("a pass could not go on: {failure}"));
        }
        why.extend(unscrubbed(status, os::since_1970().as_secs()));
        if why.is_empty() { Self::Ok } else { Self::Degraded(why.join(", ")) }
    }

    /// In one word.
    pub fn word(&self) -> &'static str {
        let [ok, degraded, failed] = WORDS;
        match self {
            Self::Ok => ok,
            Self::Degraded(_) => degraded,
            Self::Failed(..) => failed,
        }
    }

    /// Why it is not well.
    pub fn why(&self) -> Option<&str> {
        match self {
            Self::Ok => None,
            Self::Degraded(why) | Self::Failed(_, why) => Some(why),
        }
    }

    /// What a script is told; `None` of one that is well.
    pub fn exit(&self) -> Option<Exit> {
        match self {
            Self::Ok => None,
            Self::Degraded(_) => Some(Exit::Integrity),
            Self::Failed(exit, _) => Some(*exit),
        }
    }

    /// For `--json`.
    pub fn json(&self) -> Value {
        json!({ "word": self.word(), "why": self.why() })
    }
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())?;
        self.why().map_or(Ok(()), |why| write!(f, ": {why}"))
    }
}

/// One exit code for all: what no longer serves comes before what waits, and that before what was
/// found.
pub fn worst<'h>(all: impl IntoIterator<Item = &'h Health>) -> Option<Exit> {
    worst_of(all.into_iter().filter_map(Health::exit))
}

/// The same of the exit codes.
pub fn worst_of(all: impl Iterator<Item = Exit>) -> Option<Exit> {
    all.max_by_key(|exit| match exit {
        Exit::Integrity => 0,
        Exit::Busy => 1,
        _ => 2,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::Failure;

    fn of(more: &Value) -> Health {
        Health::of(&Seen::answering(3, more))
    }

    #[test]
    fn what_must_not_be_degrades() {
        assert_eq!(of(&json!({})), Health::Ok);
        assert_eq!(of(&json!({ "mismatches": 0, "reads": 7, "recovery": { "older": 3 } })), Health::Ok);
        for (field, what) in FINDINGS {
            let more = match field[1..].split_once('/') {
                Some((part, name)) => json!({ part: { name: 5 } }),
                None => json!({ &field[1..]: 5 }),
            };
            let health = of(&more);
            assert_eq!((health.word(), health.exit()), ("degraded", Some(Exit::Integrity)), "{field}");
            assert_eq!(health.to_string(), format!("degraded: 5 {what}"));
        }
        let several = of(&json!({ "mismatches": 2, "bad_pages": 1, "on_mismatch": "zero" }));
        assert_eq!(several.to_string(), "degraded: 2 mismatches, 1 damaged pages met, --on-mismatch zero");
        assert_eq!(of(&json!({ "recovery": { "torn_was_durable": true } })).word(), "degraded");
        assert_eq!(of(&json!({ "recovery": { "torn_was_durable": false } })), Health::Ok);
        assert_eq!(of(&json!({ "scrub": { "waiting_metadata": 1, "unsettled_blocks": 2 } })), Health::Ok);
        assert_eq!(of(&json!({ "anchor": { "state": "ok" } })), Health::Ok);
        let away = of(&json!({ "anchor": { "state": "away", "why": "gone" } }));
        assert_eq!(away.to_string(), "degraded: the anchor can't be asked: gone");
        assert!(of(&json!({ "scrub": { "failure": "no ring" } })).to_string().ends_with("could not go on: no ring"));
    }

    #[test]
    fn a_volume_that_nobody_has_verified_for_long_is_degraded() {
        const DAY: u64 = 86_400;
        let now = os::since_1970().as_secs();
        let scrubbed = |days: u64| json!({ "scrub": { "pass": 3, "begun_seconds": now - days * DAY } });
        assert_eq!(of(&scrubbed(44)), Health::Ok);
        assert_eq!(of(&scrubbed(45)).to_string(), "degraded: the last pass has begun 45 days ago");
        let mut slow = scrubbed(50);
        (slow["scrub"]["under_way"], slow["scrub"]["state"]) = (true.into(), "running".into());
        assert_eq!(of(&slow), Health::Ok, "it runs yet");
        slow["scrub"]["state"] = "paused".into();
        assert_eq!(of(&slow).word(), "degraded");
        // Of one that can't remember, or has never had a pass: as long as its daemon runs.
        let never = |seconds: u64| json!({ "scrub": { "pass": 0, "begun_seconds": 0 }, "running_seconds": seconds });
        assert_eq!(of(&never(45 * DAY - 1)), Health::Ok);
        let why = "degraded: no pass over it since its daemon has started, 50 days ago";
        assert_eq!(of(&never(50 * DAY)).to_string(), why);
        // A daemon of before that was told; a clock that was wrong when the pass began.
        let other = [json!({ "pass": 0, "begun_seconds": 0 }), json!({ "pass": 1, "begun_seconds": now + DAY })];
        assert!(other.iter().all(|scrub| of(&json!({ "scrub": scrub })) == Health::Ok));
        // The alert speaks of the same days.
        let rules = include_str!("../../../contrib/prometheus/ublk-integrity.rules.yml");
        assert_eq!(rules.matches(&format!("> {PASS_DAYS} * 86400")).count(), 2);
    }

    #[test]
    fn what_was_acknowledged_degrades_no_more_but_what_comes_later_does() {
        let cleared = |more: Value| {
            let mut status = json!({ "cleared": { "/mismatches": 2, "/recovery/torn_was_durable": 1 } });
            more.as_object().unwrap().iter().for_each(|(field, value)| status[field] = value.clone());
            of(&status)
        };
        assert_eq!(cleared(json!({ "mismatches": 2, "recovery": { "torn_was_durable": true } })), Health::Ok);
        assert_eq!(cleared(json!({ "mismatches": 5 })).to_string(), "degraded: 3 mismatches");
        assert_eq!(cleared(json!({ "mismatches": 2, "latched": "x" })).word(), "failed");
        assert_eq!(cleared(json!({ "mismatches": 2, "on_mismatch": "zero" })).word(), "degraded");
        let both = findings(&json!({ "mismatches": 1, "undecided_blocks": 3 }));
        assert_eq!(both.iter().map(Finding::has_happened).collect::<Vec<_>>(), [true, false]);
        assert!(LASTING.iter().all(|field| FINDINGS.iter().any(|(known, _)| known == field)));
    }

    #[test]
    fn what_does_not_serve_has_failed() {
        let latched = of(&json!({ "latched": "write of /dev/a failed", "mismatches": 4 }));
        assert_eq!(latched.to_string(), "failed: read-only since a failure: write of /dev/a failed");
        assert_eq!(latched.exit(), Some(Exit::Device));
        let seen = |daemon| Seen { daemon, ..Seen::answering(3, &json!({})) };
        assert_eq!(Health::of(&seen(Daemon::Late)).exit(), Some(Exit::Busy));
        let denied = Failure::new(Exit::KeyOrPermission, "can't reach it");
        assert_eq!(Health::of(&seen(Daemon::Refused(denied))).exit(), Some(Exit::KeyOrPermission));
        let mut dead = seen(Daemon::Dead);
        for (recovery, exit, remedy) in [(true, Exit::Busy, "recover -n 3"), (false, Exit::Device, "del -n 3")] {
            dead.state.settings.recovery = recovery;
            let health = Health::of(&dead);
            assert_eq!((health.word(), health.exit()), ("failed", Some(exit)));
            assert!(health.to_string().contains(remedy), "{health}");
        }
    }

    #[test]
    fn the_worst_decides_for_all() {
        let (degraded, waits) = (Health::Degraded("x".into()), Health::Failed(Exit::Busy, "x".into()));
        let failed = Health::Failed(Exit::Device, "x".into());
        assert_eq!(worst([&Health::Ok, &Health::Ok]), None);
        assert_eq!(worst([&Health::Ok, &degraded]), Some(Exit::Integrity));
        assert_eq!(worst([&waits, &degraded]), Some(Exit::Busy));
        assert_eq!(worst([&waits, &failed, &degraded]), Some(Exit::Device));
    }
}

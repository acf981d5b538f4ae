//! What is measured of a device: docs/metrics.md has all of it, by a test.

use super::{
    exposition::{self, Family, Kind, Sample},
    health::{Health, WORDS},
    survey::{Daemon, Seen},
};
use crate::{
    daemon::protocol::count_of,
    latency::{Distribution, Op, metric_bounds},
};
use ublk_integrity::CounterValues;

const PREFIX: &str = "ublk_integrity_";

/// Numbers of a status that go up and down: where in it, the metric's name, what it is.
const GAUGES: &[(&str, &str, &str)] = &[
    ("/running_seconds", "running_seconds", "Seconds since the daemon has started."),
    ("/size", "size_bytes", "Usable size of the volume."),
    ("/cache", "cache_bytes", "Memory for verified pages."),
    ("/daemon_memory_bytes", "memory_bytes", "Memory that the daemon has taken and locked."),
    ("/log_size", "log_size_bytes", "Size of the tag log."),
    ("/log_used", "log_used_bytes", "What of the tag log is in use, until the next checkpoint."),
    ("/pending_tags", "pending_tags", "Blocks whose tags wait for the next checkpoint."),
    ("/undecided_blocks", "undecided_blocks", "Blocks that recovery could not decide about and that read as errors."),
    ("/read_only", "read_only", "Whether writes are refused, wanted so or not."),
    ("/sync_log", "sync_log", "Whether small writes that must be durable at once may lie in the log with their data."),
];

/// The same of its anchor, where it has one.
const ANCHOR: &[(&str, &str, &str)] = &[
    ("/anchor/age_seconds", "anchor_age_seconds", "Seconds since the moment as of which older states are refused."),
    ("/anchor/lag_records", "anchor_lag_records", "Records of the log that are durable and not covered by the anchor."),
    ("/anchor/generation", "anchor_generation", "Writes to the anchor."),
    ("/anchor/resets", "anchor_resets", "How often an older state was accepted, on purpose."),
];

/// How that is, in a word.
const ANCHOR_STATES: [&str; 4] = ["ok", "away", "stale", "lost"];

/// The same of the last pass over the volume.
const SCRUB: &[(&str, &str, &str)] = &[
    ("/scrub/pass", "scrub_pass", "Number of the last pass over the volume; 0: there was none."),
    ("/scrub/begun_seconds", "scrub_begun_timestamp_seconds", "When it began, in seconds since 1970."),
    ("/scrub/ended_seconds", "scrub_ended_timestamp_seconds", "When it ended; 0: it has not."),
    ("/scrub/blocks", "scrub_blocks", "Blocks of the volume."),
    ("/scrub/cursor", "scrub_passed_blocks", "Blocks that it has come past."),
    ("/scrub/verified_blocks", "scrub_verified_blocks", "Blocks that it has verified."),
    ("/scrub/bad_blocks", "scrub_bad_blocks", "Blocks that do not match their tags, or whose tags are not known."),
    ("/scrub/unreadable_blocks", "scrub_unreadable_blocks", "Blocks that the device could not read."),
    ("/scrub/unsettled_blocks", "scrub_unsettled_blocks", "Blocks that were being written whenever it looked."),
    ("/scrub/unmended_metadata", "scrub_unmended_metadata", "Damaged pieces of metadata that stay so."),
    ("/scrub/mended_metadata", "scrub_mended_metadata", "Damaged pieces of metadata that have been written anew."),
];

/// How that is, in a word.
const SCRUB_STATES: [&str; 5] = ["none", "running", "paused", "ended", "stopped"];

/// What recovery says of blocks, as a label, and where.
const RECOVERED: &[(&str, &str)] = &[
    ("settled", "/recovery/settled"),
    ("older", "/recovery/older"),
    ("corrupt", "/recovery/corrupt"),
    ("unreadable", "/recovery/unreadable"),
];

/// What the daemon counts beside the volume.
const DROPPED: (&str, &str) =
    ("log_lines_dropped", "Lines of the daemon's log that found no room, and are counted here alone.");

/// All metrics of these devices.
pub(super) fn of(devices: &[Seen]) -> Vec<Family> {
    let health: Vec<_> = devices.iter().map(Health::of).collect();
    let each = |sample: &dyn Fn(&Seen, &Health) -> Vec<Sample>| -> Vec<Sample> {
        devices.iter().zip(&health).flat_map(|(seen, health)| sample(seen, health)).collect()
    };
    let flag = |name: &str, help, is_so: &dyn Fn(&Seen, &Health) -> bool| {
        family(name, Kind::Gauge, help, each(&|seen, health| vec![sample(seen, &[], is_so(seen, health).into())]))
    };
    let mut all = vec![
        Family {
            name: format!("{PREFIX}devices"),
            kind: Kind::Gauge,
            help: "Devices on this machine.",
            samples: vec![Sample {
                part: "",
                labels: Vec::new(),
                value: exposition::Value::Whole(devices.len() as u64),
            }],
        },
        family("device", Kind::Info, "What a device is made of.", each(&|seen, _| vec![info(seen)])),
        flag("up", "Whether the daemon lives.", &|seen, _| !matches!(seen.daemon, Daemon::Dead)),
        flag("answers", "Whether the daemon has answered in time.", &|seen, _| seen.status().is_some()),
        family("health", Kind::StateSet, "How a device is, in one word.", each(&states)),
        flag("latched", "Whether a failure has made the volume read-only.", &|seen, _| {
            seen.status().is_some_and(|status| status["latched"].is_string())
        }),
    ];
    let number = |pointer: &str| {
        let pointer = pointer.to_owned();
        move |seen: &Seen| {
            number_at(seen, &pointer).map(|value| sample(seen, &[], value)).into_iter().collect::<Vec<_>>()
        }
    };
    for (pointer, name, help) in GAUGES.iter().chain(ANCHOR).chain(SCRUB) {
        let number = number(pointer);
        all.push(family(name, Kind::Gauge, help, each(&|seen, _| number(seen))));
    }
    let help = "How the anchor is, in a word.";
    all.push(family("anchor_state", Kind::StateSet, help, each(&|seen, _| anchor_states(seen))));
    let help = "How the last pass over the volume is, in a word.";
    all.push(family("scrub_state", Kind::StateSet, help, each(&|seen, _| scrub_states(seen))));
    for (name, help) in CounterValues::ALL.iter().chain([&DROPPED]) {
        let number = number(&format!("/{name}"));
        all.push(family(name, Kind::Counter, help.trim(), each(&|seen, _| number(seen))));
    }
    let recovered = |seen: &Seen| {
        let found = RECOVERED.iter().filter_map(|(result, at)| Some((*result, number_at(seen, at)?)));
        found.map(|(result, value)| sample(seen, &[("result", result)], value)).collect()
    };
    let help = "Blocks that the last recovery has looked at, by what became of them.";
    all.push(family("recovery_blocks", Kind::Gauge, help, each(&|seen, _| recovered(seen))));
    let help = "How long requests have taken, from when the daemon has seen them to when their answers go out.";
    all.push(family("request_duration_seconds", Kind::Histogram, help, each(&|seen, _| durations(seen))));
    all
}

fn family(name: &str, kind: Kind, help: &'static str, samples: Vec<Sample>) -> Family {
    Family { name: format!("{PREFIX}{name}"), kind, help, samples }
}

/// A number of a device, with what tells it from other devices.
fn sample(seen: &Seen, more: &[(&'static str, &str)], value: u64) -> Sample {
    let state = &seen.state;
    let name = state.settings.name.as_ref().map(|name| ("name", name.as_str().to_owned()));
    let mut labels = vec![("device", format!("ublkb{}", state.id)), ("volume", state.volume.uuid.clone())];
    labels.extend(name);
    labels.extend(more.iter().map(|(name, value)| (*name, (*value).to_owned())));
    Sample { part: "", labels, value: exposition::Value::Whole(value) }
}

/// A number or a yes in the daemon's answer, if there is one: one of another version may not have it.
fn number_at(seen: &Seen, pointer: &str) -> Option<u64> {
    count_of(seen.status()?.pointer(pointer)?)
}

/// The histograms of a device's requests.
fn durations(seen: &Seen) -> Vec<Sample> {
    let mut all = Vec::new();
    for op in Op::ALL {
        let Some(took) = seen.status().and_then(|status| Distribution::in_status(status, op)) else { continue };
        let bucket =
            |bound: &str, count| Sample { part: "_bucket", ..sample(seen, &[("op", op.word()), ("le", bound)], count) };
        // No bound is a whole second, so this is what each program takes for the number.
        let seconds = |bound| format!("{}", bound as f64 / 1e6);
        all.extend(metric_bounds().map(|bound| bucket(&seconds(bound), took.at_most(bound))));
        let count = took.count();
        all.push(bucket("+Inf", count));
        let whole = |part| Sample { part, ..sample(seen, &[("op", op.word())], count) };
        all.extend([whole("_count"), Sample { value: exposition::Value::Seconds(took.seconds()), ..whole("_sum") }]);
    }
    all
}

/// A sample for each word there is: one of them holds.
fn state_set(seen: &Seen, label: &'static str, words: &[&str], holds: &str) -> Vec<Sample> {
    words.iter().map(|word| sample(seen, &[(label, *word)], (*word == holds).into())).collect()
}

fn states(seen: &Seen, health: &Health) -> Vec<Sample> {
    state_set(seen, "ublk_integrity_health", &WORDS, health.word())
}

fn scrub_states(seen: &Seen) -> Vec<Sample> {
    let state = seen.status().and_then(|status| status["scrub"]["state"].as_str());
    state.map_or_else(Vec::new, |state| state_set(seen, "ublk_integrity_scrub_state", &SCRUB_STATES, state))
}

fn anchor_states(seen: &Seen) -> Vec<Sample> {
    let state = seen.status().and_then(|status| status["anchor"]["state"].as_str());
    state.map_or_else(Vec::new, |state| state_set(seen, "ublk_integrity_anchor_state", &ANCHOR_STATES, state))
}

fn info(seen: &Seen) -> Sample {
    let (state, settings) = (&seen.state, &seen.state.settings);
    let path = |path: &std::path::Path| path.display().to_string();
    let text = |field: &str| seen.status().and_then(|status| status[field].as_str()).unwrap_or_default().to_owned();
    let more = [
        ("data", path(&settings.data)),
        ("meta", settings.meta.as_deref().map(path).unwrap_or_default()),
        ("label", state.label.clone()),
        ("block_size", state.volume.block_size.to_string()),
        ("tag", text("tag")),
    ];
    let mut sample = sample(seen, &[], 1);
    // One that is empty says what one that is not there does.
    sample.labels.extend(more.into_iter().filter(|(_, value)| !value.is_empty()));
    sample
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::watch::exposition::{Dialect, grammar, text};
    use serde_json::{Value, json};
    use std::collections::BTreeSet;

    /// A device that has everything, one that is dead, and one whose daemon knows little.
    fn devices() -> Vec<Seen> {
        let mut all = json!(CounterValues { reads: 5, read_bytes: 20480, ..Default::default() });
        for (pointer, ..) in GAUGES {
            all[&pointer[1..]] = 7.into();
        }
        let scrub: Vec<_> =
            SCRUB.iter().map(|(pointer, ..)| (pointer["/scrub/".len()..].to_owned(), json!(8))).collect();
        all["scrub"] = Value::Object(scrub.into_iter().collect());
        all["scrub"]["state"] = "paused".into();
        all["anchor"] = json!({ "age_seconds": 1, "lag_records": 2, "generation": 3, "resets": 0, "state": "ok" });
        all["read_only"] = true.into();
        all["log_lines_dropped"] = 0.into();
        all["tag"] = "hmac-sha256".into();
        all["recovery"] = json!({ "settled": 1, "older": 2, "corrupt": 3, "unreadable": 4 });
        let mut took = Distribution::default().json();
        (took["sum_seconds"], took["buckets"]) = (0.5.into(), json!([[0.000003, 2], [0.0001, 4], [null, 1]]));
        all["latency"] = json!({ "read": took, "write": Distribution::default().json() });
        let mut whole = Seen::answering(0, &all);
        whole.state.settings.name = Some("home".parse().unwrap());
        let dead = Seen { daemon: Daemon::Dead, ..Seen::answering(1, &json!({})) };
        vec![whole, dead, Seen::answering(2, &json!({ "reads": 9 }))]
    }

    /// The names of all samples, by the grammar.
    fn names() -> BTreeSet<String> {
        grammar::check(&text(&of(&devices()), Dialect::OpenMetrics), Dialect::OpenMetrics).unwrap()
    }

    #[test]
    fn the_text_is_in_order_with_any_devices() {
        let mut odd = devices();
        odd[0].state.settings.data = "/dev/\"a\\b\nc".into();
        for devices in [Vec::new(), devices(), odd] {
            for dialect in [Dialect::OpenMetrics, Dialect::Prometheus] {
                grammar::check(&text(&of(&devices), dialect), dialect).unwrap();
            }
        }
        let text = text(&of(&devices()), Dialect::OpenMetrics);
        let has = |line: &str| assert!(text.lines().any(|l| l == line), "no {line} in {text}");
        let volume = format!("volume=\"{}\"", uuid::Uuid::nil());
        has("ublk_integrity_devices 3");
        has(&format!("ublk_integrity_reads_total{{device=\"ublkb0\",{volume},name=\"home\"}} 5"));
        has(&format!("ublk_integrity_reads_total{{device=\"ublkb2\",{volume}}} 9"));
        has(&format!("ublk_integrity_read_only{{device=\"ublkb0\",{volume},name=\"home\"}} 1"));
        has(&format!("ublk_integrity_up{{device=\"ublkb1\",{volume}}} 0"));
        has(&format!("ublk_integrity_health{{device=\"ublkb1\",{volume},ublk_integrity_health=\"failed\"}} 1"));
        has(&format!("ublk_integrity_health{{device=\"ublkb2\",{volume},ublk_integrity_health=\"ok\"}} 1"));
        has(&format!(
            "ublk_integrity_scrub_state{{device=\"ublkb0\",{volume},name=\"home\",ublk_integrity_scrub_state=\"paused\"}} 1"
        ));
        has("# UNIT ublk_integrity_read_bytes bytes");
        let labels = format!("device=\"ublkb0\",{volume},name=\"home\",op=\"read\"");
        for (rest, value) in [
            ("bucket{LABELS,le=\"0.000004\"}", "2"),
            ("bucket{LABELS,le=\"0.000064\"}", "2"),
            ("bucket{LABELS,le=\"0.000128\"}", "6"),
            ("bucket{LABELS,le=\"16.777216\"}", "6"),
            ("bucket{LABELS,le=\"+Inf\"}", "7"),
            ("count{LABELS}", "7"),
            ("sum{LABELS}", "0.5"),
        ] {
            has(&format!("ublk_integrity_request_duration_seconds_{} {value}", rest.replace("LABELS", &labels)));
        }
    }

    #[test]
    fn each_counter_of_the_engine_has_a_metric() {
        let names = names();
        let fields = json!(CounterValues::default());
        let fields = fields.as_object().unwrap();
        assert!(fields.len() > 20 && fields.len() == CounterValues::ALL.len());
        for field in fields.keys() {
            assert!(names.contains(&format!("{PREFIX}{field}_total")), "{field}");
        }
    }

    #[test]
    fn each_state_of_a_pass_is_a_state_here() {
        use ublk_integrity::scrub::ScrubState;
        let states =
            [ScrubState::None, ScrubState::Running, ScrubState::Paused, ScrubState::Ended, ScrubState::Stopped];
        assert_eq!(states.map(|state| json!(state)), SCRUB_STATES.map(|word| json!(word)));
        let report = json!(ublk_integrity::scrub::ScrubReport::default());
        assert!(SCRUB.iter().all(|(pointer, ..)| report[&pointer["/scrub/".len()..]].is_u64()));
    }

    /// Words of a text that look like metrics of ours.
    fn named_in(text: &str) -> BTreeSet<String> {
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        words.filter(|word| word.starts_with(PREFIX)).map(str::to_owned).collect()
    }

    #[test]
    fn the_page_has_each_metric_and_no_other() {
        assert_eq!(named_in(include_str!("../../../docs/metrics.md")), names());
    }

    #[test]
    fn what_dashboard_and_alerts_ask_for_exists() {
        let names = names();
        for (file, text) in [
            ("dashboard", include_str!("../../../contrib/grafana/ublk-integrity.json")),
            ("alerts", include_str!("../../../contrib/prometheus/ublk-integrity.rules.yml")),
        ] {
            let asked = named_in(text);
            assert!(asked.len() >= 5, "{file}");
            let unknown: Vec<_> = asked.difference(&names).collect();
            assert!(unknown.is_empty(), "{file} asks for {unknown:?}");
        }
        let dashboard: Value =
            serde_json::from_str(include_str!("../../../contrib/grafana/ublk-integrity.json")).unwrap();
        assert!(dashboard["panels"].as_array().unwrap().len() >= 5);
    }
}

//! All devices in a table, a line for each: what they have done between two looks.

use super::{health::Health, survey::Seen};
use crate::latency::{Distribution, Op, rounded};
use serde_json::Value;
use std::time::Instant;

/// All devices at one moment.
pub struct Look {
    at: Instant,
    devices: Vec<Seen>,
}

impl Look {
    /// Of now.
    pub fn of(devices: Vec<Seen>) -> Self {
        Self { at: Instant::now(), devices }
    }
}

/// How many characters and lines there is room for.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    pub columns: usize,
    pub lines: usize,
}

impl Room {
    /// Enough for all there is.
    pub const ENDLESS: Self = Self { columns: usize::MAX, lines: usize::MAX };
}

/// A column, from the left in the order in which they are wanted: those that find no room are left out.
struct Column {
    title: &'static str,
    left: bool,
    cell: fn(&Row<'_>) -> Option<String>,
}

const fn text(title: &'static str, cell: fn(&Row<'_>) -> Option<String>) -> Column {
    Column { title, left: true, cell }
}

const fn number(title: &'static str, cell: fn(&Row<'_>) -> Option<String>) -> Column {
    Column { title, left: false, cell }
}

/// The numbers of requests and bytes are of a second, the times of half of the requests and of 99 %.
const COLUMNS: &[Column] = &[
    text("DEVICE", |row| Some(format!("ublkb{}", row.seen.state.id))),
    text("HEALTH", |row| Some(row.health.word().into())),
    number("r/s", |row| Some(count(row.rate("reads")?))),
    number("w/s", |row| Some(count(row.rate("writes")?))),
    number("rB/s", |row| Some(bytes(row.rate("read_bytes")?))),
    number("wB/s", |row| Some(bytes(row.rate("written_bytes")?))),
    number("r50", |row| row.took(Op::Read, 0.5)),
    number("r99", |row| row.took(Op::Read, 0.99)),
    number("w50", |row| row.took(Op::Write, 0.5)),
    number("w99", |row| row.took(Op::Write, 0.99)),
    number("f99", |row| row.took(Op::Flush, 0.99)),
    number("hit", |row| row.share(row.more("cache_hits")?, row.more("cache_misses")? + row.more("cache_hits")?)),
    number("log", |row| row.share(row.now("log_used")?, row.now("log_size")?)),
    number("scrub", |row| row.pass()),
    number("f/s", |row| Some(count(row.rate("flushes")?))),
    number("early", |row| row.share(row.more("write_back_writes")?, row.more("writes")?)),
    text("NAME", |row| row.seen.state.settings.name.as_ref().map(|name| name.as_str().to_owned())),
];

/// A device, and what is known of the time between the looks.
struct Row<'l> {
    seen: &'l Seen,
    health: Health,
    now: Option<&'l Value>,
    /// What the same daemon has said at the look before.
    before: Option<&'l Value>,
    seconds: f64,
}

impl<'l> Row<'l> {
    fn of(seen: &'l Seen, before: Option<&'l Look>, at: Instant) -> Self {
        let now = seen.status();
        let same = |other: &&Value| now.is_some_and(|now| ["id", "pid"].iter().all(|field| now[field] == other[field]));
        let at_before = before.and_then(|look| look.devices.iter().filter_map(Seen::status).find(same));
        let seconds = before.map_or(0.0, |before| at.duration_since(before.at).as_secs_f64());
        Self { seen, health: Health::of(seen), now, before: at_before.filter(|_| seconds > 0.0), seconds }
    }

    fn now(&self, field: &str) -> Option<f64> {
        self.now?[field].as_f64()
    }

    /// By how much a counter has grown.
    fn more(&self, field: &str) -> Option<f64> {
        Some(self.now(field)? - self.before?[field].as_f64()?)
    }

    fn rate(&self, field: &str) -> Option<f64> {
        Some(self.more(field)? / self.seconds)
    }

    /// In per cent.
    fn share(&self, part: f64, of: f64) -> Option<String> {
        (of > 0.0).then(|| format!("{:.0}%", part / of * 100.0))
    }

    /// How far a pass over the volume is, while there is one.
    fn pass(&self) -> Option<String> {
        let scrub = &self.now?["scrub"];
        match scrub["state"].as_str().filter(|_| scrub["under_way"] == true)? {
            "paused" => Some("paused".into()),
            _ => self.share(scrub["cursor"].as_f64()?, scrub["blocks"].as_f64()?),
        }
    }

    fn took(&self, op: Op, share: f64) -> Option<String> {
        let before = Distribution::in_status(self.before?, op)?;
        let took = Distribution::in_status(self.now?, op)?.since(&before)?.within(share)?;
        Some(rounded(took).replace(' ', ""))
    }
}

/// The table, and below it what is not ok, in a place of this size. Without a look before there is no
/// time that anything could have happened in.
pub fn lines(before: Option<&Look>, now: &Look, room: Room) -> Vec<String> {
    let rows: Vec<_> = now.devices.iter().map(|seen| Row::of(seen, before, now.at)).collect();
    let ill = rows.iter().filter(|row| row.health != Health::Ok);
    let ill: Vec<_> = ill.map(|row| format!("ublkb{} is {}", row.seen.state.id, row.health)).collect();
    let mut lines = if rows.is_empty() { vec!["no devices".into()] } else { grid(&rows, room.columns) };
    lines.extend(ill);
    if lines.len() > room.lines {
        let left = lines.len() - room.lines.saturating_sub(1);
        lines.truncate(room.lines.saturating_sub(1));
        lines.push(format!("{left} more lines"));
    }
    lines.iter().map(|line| line.chars().take(room.columns).collect()).collect()
}

fn grid(rows: &[Row<'_>], room: usize) -> Vec<String> {
    let mut lines = vec![String::new(); rows.len() + 1];
    let mut used = 0;
    for (i, Column { title, left, cell }) in COLUMNS.iter().enumerate() {
        let cells = rows.iter().map(|row| cell(row).unwrap_or_else(|| "-".into()));
        let cells: Vec<_> = std::iter::once((*title).to_owned()).chain(cells).collect();
        let width = cells.iter().map(String::len).max().unwrap_or(0);
        let gap = usize::from(i > 0);
        if i > 0 && used + gap + width > room {
            break;
        }
        used += gap + width;
        for (line, cell) in lines.iter_mut().zip(&cells) {
            *line += &" ".repeat(gap);
            *line += &if *left { format!("{cell:<width$}") } else { format!("{cell:>width$}") };
        }
    }
    lines.iter().map(|line| line.trim_end().to_owned()).collect()
}

fn count(number: f64) -> String {
    scaled(number, 1000.0, &["", "k", "M", "G"])
}

fn bytes(number: f64) -> String {
    scaled(number, 1024.0, &["", "K", "M", "G", "T"])
}

/// Two or three digits, and the unit.
fn scaled(number: f64, step: f64, units: &[&str]) -> String {
    let mut number = number.max(0.0);
    let mut units = units.iter();
    let mut unit = units.next().expect("there is one");
    while number >= step - 0.5 {
        let Some(next) = units.next() else { break };
        (number, unit) = (number / step, next);
    }
    let digits = usize::from(number < 9.95 && number > 0.0);
    format!("{number:.digits$}{unit}")
}

#[cfg(test)]
mod tests {
    use super::{super::survey::Daemon, *};
    use crate::scrub_status::ScrubStatus;
    use serde_json::json;
    use std::time::Duration;
    use ublk_integrity::scrub::ScrubReport;

    fn took(buckets: &Value) -> Value {
        json!({ "sum_seconds": 1, "buckets": buckets })
    }

    /// Two looks, two seconds from one another, at one device.
    fn looks(before: &Value, now: &Value) -> (Look, Look) {
        let before = Look::of(vec![Seen::answering(0, before)]);
        let now = Look { at: before.at + Duration::from_secs(2), devices: vec![Seen::answering(0, now)] };
        (before, now)
    }

    #[test]
    fn a_line_says_what_a_device_has_done_meanwhile() {
        let (before, mut now) = looks(
            &json!({ "reads": 10, "writes": 0, "read_bytes": 0, "written_bytes": 0, "flushes": 1, "cache_hits": 50, "cache_misses": 50,
                     "write_back_writes": 0, "latency": { "read": took(&json!([[0.001024, 9]])) } }),
            &json!({ "reads": 2510, "writes": 4, "read_bytes": 2 << 20, "written_bytes": 16384, "flushes": 1, "cache_hits": 140,
                     "cache_misses": 60, "write_back_writes": 3, "log_used": 1, "log_size": 4,
                     "latency": { "read": took(&json!([[0.000096, 100], [0.001024, 9]])), "write": took(&json!([])) } }),
        );
        let table = |before, now: &Look| lines(before, now, Room::ENDLESS);
        assert_eq!(
            table(Some(&before), &now),
            [
                "DEVICE HEALTH  r/s w/s rB/s wB/s  r50  r99 w50 w99 f99 hit log scrub f/s early NAME",
                "ublkb0 ok     1.2k 2.0 1.0M 8.0K 88us 96us   -   -   - 90% 25%     -   0   75% -",
            ]
        );
        let first = table(None, &now);
        assert!(first[1].starts_with("ublkb0 ok       -   -") && first[1].contains("25%"), "{first:?}");
        // Another daemon has begun to count anew.
        let Daemon::Answers(status) = &mut now.devices[0].daemon else { unreachable!() };
        status["pid"] = 77.into();
        assert_eq!(table(Some(&before), &now), first);
    }

    #[test]
    fn a_pass_that_is_under_way_is_told_in_per_cent() {
        let told = |under_way, state: &str| {
            let report = ScrubReport { cursor: 410, blocks: 1000, ..ScrubReport::default() };
            let mut scrub = json!(ScrubStatus { under_way, failure: None, report });
            scrub["state"] = state.into();
            let seen = Seen::answering(0, &json!({ "log_used": 1, "log_size": 4, "scrub": scrub }));
            let shown = lines(None, &Look::of(vec![seen]), Room::ENDLESS);
            let of_log = |word: &&str| *word == "25%";
            shown[1].split_whitespace().skip_while(|word| !of_log(word)).nth(1).unwrap().to_owned()
        };
        assert_eq!([told(true, "running"), told(true, "paused")], ["41%", "paused"]);
        // One that has left with the daemon, or could not go on, is as far as before, and goes no further.
        assert_eq!([told(false, "running"), told(false, "ended"), told(false, "none")], ["-", "-", "-"]);
    }

    #[test]
    fn it_keeps_to_its_place() {
        let many: Vec<_> = (0..20).map(|id| Seen::answering(id, &json!({ "mismatches": id % 2 }))).collect();
        let look = Look::of(many);
        let all = lines(None, &look, Room::ENDLESS);
        assert_eq!((all.len(), all[21].as_str()), (1 + 20 + 10, "ublkb1 is degraded: 1 mismatches"));
        for (columns, count) in [(80, 24), (17, 5), (3, 1), (0, 0)] {
            let shown = lines(None, &look, Room { columns, lines: count });
            assert!(shown.len() <= count.max(1) && shown.iter().all(|line| line.len() <= columns), "{shown:?}");
        }
        let narrow = lines(None, &look, Room { columns: 17, lines: 3 });
        assert_eq!(narrow, ["DEVICE  HEALTH", "ublkb0  ok", "29 more lines"]);
        assert_eq!(lines(None, &Look::of(Vec::new()), Room::ENDLESS), ["no devices"]);
    }

    #[test]
    fn what_does_not_answer_has_a_line_too() {
        let dead = Seen { daemon: Daemon::Dead, ..Seen::answering(3, &json!({})) };
        let shown = lines(None, &Look::of(vec![dead]), Room::ENDLESS);
        assert!(shown[1].starts_with("ublkb3 failed ") && shown[2].starts_with("ublkb3 is failed: its daemon"));
    }

    #[test]
    fn numbers_are_short() {
        for (number, text) in
            [(0.0, "0"), (0.5, "0.5"), (9.97, "10"), (999.4, "999"), (999.7, "1.0k"), (12_345.0, "12k")]
        {
            assert_eq!(count(number), text);
        }
        assert_eq!([bytes(1023.7), bytes(5e15)], ["1.0K", "4547T"]);
    }
}

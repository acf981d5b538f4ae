//! Metrics as text, for those who collect them.
//!
//! OpenMetrics 1.0 has types that say what is meant, units and an end. The older text format of
//! Prometheus has none of these, and readers that know it alone refuse a file with a type that they
//! do not know: node_exporter's textfile collector is one.

use std::fmt::{self, Write};

/// The text's format.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dialect {
    /// OpenMetrics 1.0.
    OpenMetrics,
    /// The text format of Prometheus, 0.0.4.
    Prometheus,
}

impl Dialect {
    /// What HTTP calls it.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// What the numbers of a family are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// Only grows, until its daemon ends.
    Counter,
    /// Goes up and down.
    Gauge,
    /// 1, and labels that say something.
    Info,
    /// 1 for the state that it is in, 0 for the others.
    StateSet,
    /// How many are no more than each of some bounds, how many there are, and their sum.
    Histogram,
}

/// Metrics that differ in their labels alone.
pub(super) struct Family {
    /// Without what the kind adds to it.
    pub(super) name: String,
    pub(super) kind: Kind,
    /// In words, for people.
    pub(super) help: &'static str,
    pub(super) samples: Vec<Sample>,
}

/// One number.
pub(super) struct Sample {
    /// Behind the family's name, of a histogram.
    pub(super) part: &'static str,
    pub(super) labels: Vec<(&'static str, String)>,
    pub(super) value: Value,
}

/// What it is.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum Value {
    Whole(u64),
    Seconds(f64),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole(number) => number.fmt(f),
            Self::Seconds(number) => number.fmt(f),
        }
    }
}

impl Family {
    /// The name of its samples.
    pub(super) fn sample_name(&self) -> String {
        let suffix = match self.kind {
            Kind::Counter => "_total",
            Kind::Info => "_info",
            Kind::Gauge | Kind::StateSet | Kind::Histogram => "",
        };
        format!("{}{suffix}", self.name)
    }

    /// Its unit is the last word of its name, where that is one.
    fn unit(&self) -> Option<&'static str> {
        ["bytes", "seconds"].into_iter().find(|unit| self.name.ends_with(&format!("_{unit}")))
    }

    fn head(&self, dialect: Dialect) -> String {
        let (name, kind) = match (dialect, self.kind) {
            (Dialect::OpenMetrics, Kind::Info) => (self.name.clone(), "info"),
            (Dialect::OpenMetrics, Kind::StateSet) => (self.name.clone(), "stateset"),
            (Dialect::OpenMetrics, Kind::Counter) => (self.name.clone(), "counter"),
            (Dialect::Prometheus, Kind::Counter) => (self.sample_name(), "counter"),
            (_, Kind::Histogram) => (self.name.clone(), "histogram"),
            (_, Kind::Gauge) | (Dialect::Prometheus, _) => (self.sample_name(), "gauge"),
        };
        let unit = self.unit().filter(|_| dialect == Dialect::OpenMetrics);
        let unit = unit.map_or_else(String::new, |unit| format!("# UNIT {name} {unit}\n"));
        format!("# TYPE {name} {kind}\n{unit}# HELP {name} {}\n", self.help)
    }
}

/// All of it. Families without a sample are left out.
pub(super) fn text(families: &[Family], dialect: Dialect) -> String {
    let mut text = String::new();
    for family in families.iter().filter(|family| !family.samples.is_empty()) {
        text += &family.head(dialect);
        let name = family.sample_name();
        for Sample { part, labels, value } in &family.samples {
            let labels: Vec<_> = labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
            let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
            writeln!(text, "{name}{part}{labels} {value}").expect("a string takes everything");
        }
    }
    if dialect == Dialect::OpenMetrics {
        text += "# EOF\n";
    }
    text
}

/// A label's value: whatever a path or a name may hold.
fn escaped(value: &str) -> String {
    value.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n")
}

#[cfg(test)]
pub(super) mod grammar {
    //! Whether a text is what its format allows. Written from the formats' descriptions, not from
    //! the code above.

    use super::Dialect;
    use std::collections::BTreeSet;

    fn is_name(text: &str) -> bool {
        !text.is_empty()
            && !text.starts_with(|c: char| c.is_ascii_digit())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
    }

    type Labels = Vec<(String, String)>;

    /// `name="value",…}` and what follows it.
    fn labels(mut text: &str) -> Result<(Labels, &str), String> {
        let mut found = Vec::new();
        loop {
            let (name, rest) = text.split_once("=\"").ok_or("a label without a value")?;
            if !is_name(name) {
                return Err(format!("{name:?} is no label"));
            }
            let (mut value, mut chars) = (String::new(), rest.char_indices());
            let end = loop {
                match chars.next().ok_or("a value without an end")? {
                    (at, '"') => break at,
                    (_, '\\') => match chars.next() {
                        Some((_, c @ ('\\' | '"' | 'n'))) => value.push(c),
                        other => return Err(format!("escape {other:?}")),
                    },
                    (_, '\n') => return Err("a line end in a value".into()),
                    (_, c) => value.push(c),
                }
            };
            found.push((name.to_owned(), value));
            match rest[end + 1..].chars().next() {
                Some(',') => text = &rest[end + 2..],
                Some('}') => return Ok((found, &rest[end + 2..])),
                other => return Err(format!("{other:?} behind a label")),
            }
        }
    }

    /// What has come of a histogram: its labels, the last bound, and how many are within that.
    #[derive(Default)]
    struct Buckets(Option<(Labels, f64, f64)>);

    impl Buckets {
        /// Whether the next sample goes on with it: buckets that grow, in order, then the number of all,
        /// and what they add up to.
        fn take(&mut self, name: &str, labels: &Labels, value: f64) -> bool {
            let others: Labels = labels.iter().filter(|(name, _)| name != "le").cloned().collect();
            let bound = labels.iter().find(|(name, _)| name == "le").map(|(_, bound)| bound.parse::<f64>());
            match (bound, self.0.take()) {
                (Some(Ok(bound)), before) if name.ends_with("_bucket") => {
                    let grows = before.is_none_or(|(of, last, count)| of == others && last < bound && count <= value);
                    self.0 = Some((others, bound, value));
                    grows
                }
                (None, Some((of, bound, count))) if name.ends_with("_count") => {
                    of == others && bound == f64::INFINITY && count == value
                }
                (None, None) => name.ends_with("_sum"),
                _ => false,
            }
        }
    }

    /// The samples' names. Fails with the line that is wrong.
    pub(crate) fn check(text: &str, dialect: Dialect) -> Result<BTreeSet<String>, String> {
        let body = match dialect {
            Dialect::OpenMetrics => text.strip_suffix("# EOF\n").ok_or("no end")?,
            Dialect::Prometheus => text,
        };
        if !body.is_empty() && !body.ends_with('\n') {
            return Err("the last line has no end".into());
        }
        let (mut families, mut series, mut names) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        let (mut family, mut kind, mut buckets) = (String::new(), String::new(), Buckets::default());
        for line in body.lines() {
            let wrong = |why: &str| Err(format!("{why}: {line}"));
            if let Some(comment) = line.strip_prefix("# ") {
                let mut words = comment.splitn(3, ' ');
                let (what, name, rest) = (words.next(), words.next().unwrap_or(""), words.next().unwrap_or(""));
                match what {
                    Some("TYPE") => {
                        let known: &[_] = match dialect {
                            Dialect::OpenMetrics => &["counter", "gauge", "info", "stateset", "histogram"],
                            Dialect::Prometheus => &["counter", "gauge", "histogram"],
                        };
                        if !is_name(name) || !known.contains(&rest) || !families.insert(name.to_owned()) {
                            return wrong("no new family of a known type");
                        }
                        (family, kind) = (name.to_owned(), rest.to_owned());
                    }
                    Some("UNIT") if dialect == Dialect::OpenMetrics => {
                        if name != family || !family.ends_with(&format!("_{rest}")) {
                            return wrong("not the unit that the name ends with");
                        }
                    }
                    Some("HELP") if name == family && !rest.is_empty() && !rest.contains(['\\', '"']) => {}
                    _ => return wrong("no such comment"),
                }
                continue;
            }
            let end = line.find(['{', ' ']).ok_or("no value")?;
            let (name, rest) = line.split_at(end);
            let (labels, value) = match rest.strip_prefix('{') {
                Some(rest) => labels(rest)?,
                None => (Vec::new(), rest),
            };
            let expected = match (dialect, kind.as_str()) {
                (Dialect::OpenMetrics, "counter") => format!("{family}_total"),
                (Dialect::OpenMetrics, "info") => format!("{family}_info"),
                (_, "histogram") => {
                    let parts = ["_bucket", "_count", "_sum"].map(|part| format!("{family}{part}"));
                    parts.into_iter().find(|part| part == name).unwrap_or_default()
                }
                _ => family.clone(),
            };
            if name != expected || dialect == Dialect::Prometheus && kind == "counter" && !name.ends_with("_total") {
                return wrong("not a sample of its family");
            }
            let states = labels.iter().filter(|(name, _)| *name == family).count();
            if (kind == "stateset") != (states == 1) && dialect == Dialect::OpenMetrics {
                return wrong("a state set has one label of its name");
            }
            let distinct: BTreeSet<_> = labels.iter().map(|(name, _)| name).collect();
            if distinct.len() != labels.len() || !series.insert((name.to_owned(), labels.clone())) {
                return wrong("twice");
            }
            let value = match value.strip_prefix(' ').map(str::parse::<f64>) {
                Some(Ok(value)) if value.is_finite() && value >= 0.0 => value,
                _ => return wrong("no value"),
            };
            if kind == "histogram" && !buckets.take(name, &labels, value) {
                return wrong("no buckets that go up to all of them");
            }
            names.insert(name.to_owned());
        }
        Ok(names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn families() -> Vec<Family> {
        let sample = |labels: &[(&'static str, &str)], value| Sample {
            part: "",
            labels: labels.iter().map(|(name, value)| (*name, (*value).to_owned())).collect(),
            value: Value::Whole(value),
        };
        let part = |part, le: &[(&'static str, &str)], value| Sample { part, value, ..sample(le, 0) };
        let family = |name: &str, kind, samples| Family { name: name.into(), kind, help: "What it is.", samples };
        vec![
            family("a_read_bytes", Kind::Counter, vec![sample(&[("device", "ublkb0")], 7)]),
            family("a_depth", Kind::Gauge, vec![sample(&[], 3)]),
            family("a_device", Kind::Info, vec![sample(&[("path", "/dev/\"odd\\name\n")], 1)]),
            family(
                "a_health",
                Kind::StateSet,
                vec![sample(&[("a_health", "ok")], 1), sample(&[("a_health", "ill")], 0)],
            ),
            family("a_nothing", Kind::Gauge, vec![]),
            family(
                "a_wait_seconds",
                Kind::Histogram,
                vec![
                    part("_bucket", &[("le", "0.000004")], Value::Whole(1)),
                    part("_bucket", &[("le", "+Inf")], Value::Whole(3)),
                    part("_count", &[], Value::Whole(3)),
                    part("_sum", &[], Value::Seconds(0.25)),
                ],
            ),
        ]
    }

    #[test]
    fn the_text_is_what_each_format_says() {
        let open = text(&families(), Dialect::OpenMetrics);
        let wanted = "\
# TYPE a_read_bytes counter
# UNIT a_read_bytes bytes
# HELP a_read_bytes What it is.
a_read_bytes_total{device=\"ublkb0\"} 7
# TYPE a_depth gauge
# HELP a_depth What it is.
a_depth 3
# TYPE a_device info
# HELP a_device What it is.
a_device_info{path=\"/dev/\\\"odd\\\\name\\n\"} 1
# TYPE a_health stateset
# HELP a_health What it is.
a_health{a_health=\"ok\"} 1
a_health{a_health=\"ill\"} 0
# TYPE a_wait_seconds histogram
# UNIT a_wait_seconds seconds
# HELP a_wait_seconds What it is.
a_wait_seconds_bucket{le=\"0.000004\"} 1
a_wait_seconds_bucket{le=\"+Inf\"} 3
a_wait_seconds_count 3
a_wait_seconds_sum 0.25
# EOF
";
        assert_eq!(open, wanted);
        let old = text(&families(), Dialect::Prometheus);
        assert!(old.contains("# TYPE a_read_bytes_total counter\n") && old.contains("# TYPE a_device_info gauge\n"));
        assert!(!old.contains("UNIT") && !old.contains("EOF") && !old.contains("stateset"), "{old}");
        for dialect in [Dialect::OpenMetrics, Dialect::Prometheus] {
            let names = grammar::check(&text(&families(), dialect), dialect).unwrap();
            assert_eq!(
                names.into_iter().collect::<Vec<_>>(),
                [
                    "a_depth",
                    "a_device_info",
                    "a_health",
                    "a_read_bytes_total",
                    "a_wait_seconds_bucket",
                    "a_wait_seconds_count",
                    "a_wait_seconds_sum"
                ]
            );
            assert!(grammar::check(&text(&[], dialect), dialect).unwrap().is_empty());
        }
    }

    #[test]
    fn the_grammar_is_strict() {
        let open = |text: &str| grammar::check(text, Dialect::OpenMetrics);
        let old = |text: &str| grammar::check(text, Dialect::Prometheus);
        for wrong in [
            "# TYPE a counter\na 1\n# EOF\n",
            "# TYPE a counter\na_total 1\n",
            "# TYPE a gauge\n# UNIT a bytes\na 1\n# EOF\n",
            "# TYPE a gauge\na 1\na 1\n# EOF\n",
            "# TYPE a gauge\na{x=\"1\",x=\"2\"} 1\n# EOF\n",
            "# TYPE a gauge\na{x=\"\\x\"} 1\n# EOF\n",
            "# TYPE a gauge\na 1\n# TYPE a gauge\na{x=\"2\"} 1\n# EOF\n",
            "# TYPE a gauge\nb 1\n# EOF\n",
            "# TYPE a stateset\na{state=\"ok\"} 1\n# EOF\n",
            "# TYPE a gauge\na NaN\n# EOF\n",
            "# TYPE a gauge\na  1\n# EOF\n",
            "# TYPE a histogram\na 1\n# EOF\n",
            "# TYPE a histogram\na_bucket{le=\"1\"} 1\na_count 1\na_sum 1\n# EOF\n",
            "# TYPE a histogram\na_bucket{le=\"+Inf\"} 1\na_count 2\na_sum 1\n# EOF\n",
            "# TYPE a histogram\na_bucket{le=\"1\"} 2\na_bucket{le=\"+Inf\"} 1\na_count 1\na_sum 1\n# EOF\n",
            "# TYPE a histogram\na_bucket{le=\"2\"} 1\na_bucket{le=\"1\"} 1\n# EOF\n",
            "# TYPE a histogram\na_sum 1\na_count 1\n# EOF\n",
        ] {
            assert!(open(wrong).is_err(), "{wrong}");
        }
        for wrong in
            ["# TYPE a counter\na 1\n", "# TYPE a info\na 1\n", "# UNIT a_bytes bytes\n", "# TYPE a gauge\na 1"]
        {
            assert!(old(wrong).is_err(), "{wrong}");
        }
    }
}

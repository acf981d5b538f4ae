//! Findings that somebody has acknowledged. Counters go on as they are: whoever judges a status takes
//! off from each what was seen of it.

use super::protocol::count_of;
use serde_json::{Value, json};
use std::{cell::RefCell, collections::BTreeMap};

/// How many were seen, by where in the status. As long as the daemon lives, as the counters.
#[derive(Default)]
pub(super) struct Cleared(RefCell<BTreeMap<String, u64>>);

impl Cleared {
    /// Takes note of what was seen, but never of more than there is: what comes later counts. In
    /// words what is new of it; fails where the status has no such number.
    pub(super) fn clear(&self, findings: &BTreeMap<String, u64>, status: &Value) -> Result<Option<String>, String> {
        let mut seen = Vec::new();
        for (finding, count) in findings {
            let Some(now) = status.pointer(finding).and_then(count_of) else {
                return Err(format!("clear: the status has no number at {finding:?}"));
            };
            seen.push((finding, now.min(*count)));
        }
        let mut cleared = self.0.borrow_mut();
        let mut words = Vec::new();
        for (finding, count) in seen {
            let before = cleared.entry(finding.clone()).or_default();
            if count > *before {
                words.push(format!("{} {}", count - *before, finding.trim_start_matches('/')));
                *before = count;
            }
        }
        Ok(Some(words.join(", ")).filter(|words| !words.is_empty()))
    }

    /// For a status.
    pub(super) fn json(&self) -> Value {
        json!(*self.0.borrow())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_seen_is_taken_note_of_and_no_more() {
        let cleared = Cleared::default();
        let clear = |findings: &[(&str, u64)], mismatches: u64| {
            let findings = findings.iter().map(|(finding, count)| ((*finding).to_owned(), *count)).collect();
            let status = json!({ "mismatches": mismatches, "uuid": "x", "recovery": { "torn_was_durable": true } });
            cleared.clear(&findings, &status)
        };
        assert_eq!(clear(&[], 2), Ok(None));
        assert_eq!(clear(&[("/mismatches", 2)], 3), Ok(Some("2 mismatches".into())), "the third came since");
        assert_eq!(cleared.json(), json!({ "/mismatches": 2 }));
        assert_eq!(clear(&[("/mismatches", 1)], 3), Ok(None), "an older look");
        let all = [("/mismatches", u64::MAX), ("/recovery/torn_was_durable", 1)];
        assert_eq!(clear(&all, 5), Ok(Some("3 mismatches, 1 recovery/torn_was_durable".into())));
        let known = json!({ "/mismatches": 5, "/recovery/torn_was_durable": 1 });
        assert_eq!(cleared.json(), known);
        // All or nothing.
        for odd in ["/uuid", "mismatches", "/none", ""] {
            assert!(clear(&[("/mismatches", 9), (odd, 1)], 9).unwrap_err().contains(&format!("{odd:?}")));
        }
        assert_eq!(cleared.json(), known);
    }
}

//! What is said on a daemon's control socket: docs/control-socket.md.
//!
//! One JSON object in a line asks, one in a line answers. A request that changes something is root's.

use crate::failure::{Exit, Failure, Outcome};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{collections::BTreeMap, num::NonZeroU64, time::Duration};
use ublk_integrity::{
    BlockIndex,
    anchor::{KeyAreaMark, KeyAreaStep},
    heal::Healed,
    hex, read_hex,
};

/// Bytes of the longest line, either way.
pub(super) const MOST_BYTES: usize = 64 << 10;

/// How long a daemon may take to answer.
pub const ANSWERS_WITHIN: Duration = Duration::from_secs(2);

/// What a daemon can be asked.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// State and counters.
    Status {},
    /// To end, and leave the device to another daemon. Answered when nobody can give that up any
    /// more, and when it is over.
    HandOver {},
    /// To take note of findings that somebody has seen. Answered with the status as it is then.
    Clear {
        /// Where in a status they stand, as JSON pointers, and how many were seen there.
        #[serde(default)]
        findings: BTreeMap<String, u64>,
    },
    /// A pass over the volume begins.
    ScrubStart {
        /// Bytes that it reads in a second at most.
        #[serde(default)]
        rate: Option<NonZeroU64>,
    },
    /// The pass waits.
    ScrubPause {},
    /// It goes on.
    ScrubResume {},
    /// It ends where it is.
    ScrubStop {},
    /// Blocks that have rotted are to be healed from replicas, which follow on the same connection.
    Heal {},
    /// How far it is, or the last one came, and what it has found.
    ScrubStatus {},
    /// The key slots are about to be changed, or are: the anchor is to permit this key area, and the next one besides, or to say
    /// whether it does.
    KeyArea {
        /// The one that lies there.
        #[serde(default)]
        found: Option<KeyArea>,
        /// The one that is about to be written in its place.
        #[serde(default)]
        next: Option<KeyArea>,
        /// It is to say so, and no more. A daemon that does not know the word refuses the line.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        judge: bool,
    },
}

/// Which key area.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyArea {
    /// How often it was changed.
    pub generation: u64,
    /// Its checksum, hexadecimal.
    pub digest: String,
}

impl From<KeyAreaMark> for KeyArea {
    fn from(KeyAreaMark { generation, digest }: KeyAreaMark) -> Self {
        Self { generation, digest: hex(&digest) }
    }
}

impl KeyArea {
    /// What a [request](Request::key_area) asks for.
    pub(super) fn step(
        (found, next): (Option<&Self>, Option<&Self>),
        judge: bool,
    ) -> Outcome<(KeyAreaMark, KeyAreaStep)> {
        let wrong = |what: &str| Failure::new(Exit::Arguments, format_args!("key-area: {what}"));
        let mark = |area: &Self| area.mark().ok_or_else(|| wrong("a digest has 64 digits, and is not zero"));
        let found = found.ok_or_else(|| wrong("which is \"found\"?"))?;
        let step = match (next, judge) {
            (None, true) => KeyAreaStep::Judge,
            (Some(next), false) => KeyAreaStep::Begin(mark(next)?),
            (None, false) => KeyAreaStep::End,
            (Some(_), true) => return Err(wrong("it takes \"next\" or \"judge\", not both")),
        };
        Ok((mark(found)?, step))
    }

    /// The same, if its digest is one.
    fn mark(&self) -> Option<KeyAreaMark> {
        let mut digest = [0; 32];
        let is_one = read_hex(&self.digest, &mut digest) && digest != [0; 32];
        is_one.then_some(KeyAreaMark { generation: self.generation, digest })
    }
}

/// A block as it should be: what is said once [`Request::Heal`] has been answered.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Offer {
    /// Which.
    pub block: BlockIndex,
    /// Its bytes, hexadecimal.
    pub replica: String,
}

/// What is answered: of which block, so that nobody takes it for another's.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
pub enum Offered {
    Done { block: BlockIndex, outcome: Healed },
    Failed { block: BlockIndex, failed: String, exit: u8 },
}

/// All of them, by the word that asks.
const VERBS: &[&str] = &[
    "status",
    "hand-over",
    "clear",
    "scrub-start",
    "scrub-pause",
    "scrub-resume",
    "scrub-stop",
    "scrub-status",
    "heal",
    "key-area",
];

impl Request {
    /// A step of a change of the key slots, of which this area lies on the disk.
    pub fn key_area(found: KeyAreaMark, step: KeyAreaStep) -> Self {
        let (next, judge) = match step {
            KeyAreaStep::Judge => (None, true),
            KeyAreaStep::Begin(next) => (Some(next.into()), false),
            KeyAreaStep::End => (None, false),
        };
        Self::KeyArea { found: Some(found.into()), next, judge }
    }

    /// From a line. What is wrong is told in words for whoever asked.
    pub(super) fn parse(line: &[u8]) -> Result<Self, String> {
        let value: Value = serde_json::from_slice(line).map_err(|e| format!("not a JSON object in a line: {e}"))?;
        let Some(verb) = value["verb"].as_str() else {
            return Err("a request is a JSON object with a \"verb\"".into());
        };
        if !VERBS.contains(&verb) {
            let (version, known) = (env!("CARGO_PKG_VERSION"), VERBS.join(", "));
            return Err(format!("this daemon (version {version}) knows no {verb}: it knows {known}"));
        }
        let verb = verb.to_owned();
        serde_json::from_value(value).map_err(|e| format!("{verb}: {e}"))
    }

    /// Whether it changes something. Who may connect may ask the others.
    pub(super) fn changes(&self) -> bool {
        match self {
            Self::Status {} | Self::ScrubStatus {} => false,
            Self::HandOver {} | Self::Clear { .. } | Self::Heal {} | Self::KeyArea { .. } => true,
            Self::ScrubStart { .. } | Self::ScrubPause {} | Self::ScrubResume {} | Self::ScrubStop {} => true,
        }
    }
}

/// An answer that says what is wrong.
pub(super) fn error(why: impl Into<String>) -> Value {
    json!({ "error": why.into() })
}

/// The same with the exit code that a command has for it.
pub(super) fn failed(failure: &Failure) -> Value {
    json!({ "error": failure.message, "exit": failure.exit as u8 })
}

/// Why a daemon does not do what it was asked to.
#[derive(Debug)]
pub(super) enum Refusal {
    /// It is about to leave, and begins nothing: the next one may.
    Leaving,
    /// It is final, as long as this daemon serves.
    Final(Failure),
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        Self::Final(failure)
    }
}

impl Refusal {
    /// As it is answered.
    pub(super) fn answer(&self) -> Value {
        match self {
            Self::Final(failure) => failed(failure),
            Self::Leaving => {
                let why = "the device is being stopped or handed over: try again";
                json!({ "error": why, "exit": Exit::Busy as u8, "leaving": true })
            }
        }
    }

    /// Whether an answer is that of a daemon which leaves.
    pub(super) fn is_of_leaving(answer: &Value) -> bool {
        answer["leaving"] == true
    }
}

/// Whether an error says that a daemon knows no such verb: what [`Request::parse`] says of it.
fn knows_no(error: &str, verb: &str) -> bool {
    let rest = error.strip_prefix("this daemon (version ").and_then(|rest| rest.split_once(')'));
    rest.is_some_and(|(_, rest)| rest.starts_with(&format!(" knows no {verb}: it knows ")))
}

/// What a daemon makes of a hand-over, as far as its first line says.
#[derive(PartialEq, Eq, Debug)]
pub enum HandOver {
    /// It comes: the daemon is about to end.
    Closing,
    /// It does not: the daemon goes on.
    Refused(String),
    /// The daemon knows nothing of that.
    Unknown,
}

impl HandOver {
    /// From an answer. `pid`: of the daemon, which one of before there were requests says of itself
    /// to whoever connects.
    pub(super) fn of(answer: &Value, pid: u32) -> Self {
        match answer["error"].as_str() {
            Some(why) if knows_no(why, "hand-over") => Self::Unknown,
            Some(why) => Self::Refused(why.to_owned()),
            None if answer["closing"] == true => Self::Closing,
            None if answer["pid"] == pid => Self::Unknown,
            None => {
                let said: String = answer.to_string().chars().take(200).collect();
                Self::Refused(format!("its daemon has answered what is not understood: {said}"))
            }
        }
    }
}

/// A value as a line. A longer one than the other side would read is replaced by an error.
pub(super) fn line(value: &Value) -> Vec<u8> {
    let mut text = value.to_string();
    if text.len() >= MOST_BYTES {
        text = error(format!("the answer has {} bytes, more than {MOST_BYTES}", text.len())).to_string();
    }
    text.push('\n');
    text.into_bytes()
}

/// What a status counts: a number, or a yes.
pub fn count_of(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_bool().map(u64::from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read_as_they_are_written() {
        let status = Request::Status {};
        assert_eq!(serde_json::to_string(&status).unwrap(), r#"{"verb":"status"}"#);
        assert_eq!(Request::parse(br#"{"verb":"status"}"#), Ok(status));
        let start = Request::ScrubStart { rate: NonZeroU64::new(5) };
        assert_eq!(Request::parse(&serde_json::to_vec(&start).unwrap()), Ok(start));
        for verb in VERBS {
            assert!(Request::parse(json!({ "verb": verb }).to_string().as_bytes()).is_ok(), "{verb}");
        }
    }

    #[test]
    fn a_key_area_is_told_as_it_is() {
        let mark = KeyAreaMark { generation: 7, digest: [0xa5; 32] };
        let request = Request::KeyArea { found: Some(mark.into()), next: None, judge: false };
        let Ok(Request::KeyArea { found: Some(found), next: None, judge: false }) =
            Request::parse(&serde_json::to_vec(&request).unwrap())
        else {
            panic!("it is one")
        };
        assert_eq!(found.mark(), Some(mark));
        for digest in ["", "a5", &"0".repeat(64), &"x".repeat(64)] {
            assert_eq!(KeyArea { generation: 7, digest: digest.into() }.mark(), None, "{digest}");
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        let wrong = |line: &str| Request::parse(line.as_bytes()).unwrap_err();
        let version = env!("CARGO_PKG_VERSION");
        let unknown = wrong(r#"{"verb":"shrink","rate":3}"#);
        assert!(unknown.starts_with(&format!("this daemon (version {version}) knows no shrink: ")), "{unknown}");
        assert!(wrong("status").contains("JSON"));
        assert!(wrong("[]").contains("verb") && wrong(r#"{"verb":1}"#).contains("verb"));
        assert!(wrong(r#"{"verb":"status","rate":3}"#).contains("rate"), "never passed over");
        assert!(wrong(r#"{"verb":"scrub-start","rate":0}"#).contains("scrub-start: "), "no pass would ever end");
        let deep = "[".repeat(MOST_BYTES);
        assert!(wrong(&deep).contains("JSON"));
    }

    #[test]
    fn only_a_daemon_that_says_so_knows_no_hand_over() {
        let of = |answer: Value| HandOver::of(&answer, 7);
        let unknown = Request::parse(br#"{"verb":"scrub"}"#).unwrap_err().replace("scrub", "hand-over");
        assert_eq!(of(error(unknown)), HandOver::Unknown);
        assert_eq!(of(json!({ "id": 0, "pid": 7, "reads": 1 })), HandOver::Unknown, "it says its status");
        assert_eq!(of(json!({ "closing": true })), HandOver::Closing);
        for other in
            [error("it was busy, and knows no rest"), json!({ "pid": 8 }), json!({ "closing": 1 }), json!(null)]
        {
            assert!(matches!(of(other.clone()), HandOver::Refused(_)), "{other}");
        }
    }

    #[test]
    fn a_line_is_never_too_long() {
        assert_eq!(line(&json!({ "a": 1 })), b"{\"a\":1}\n");
        let long = line(&json!("x".repeat(MOST_BYTES)));
        assert!(long.len() < 200 && long.starts_with(b"{\"error\":"));
        assert_eq!(line(&json!("x".repeat(MOST_BYTES - 3))).len(), MOST_BYTES, "the newline counts");
    }
}

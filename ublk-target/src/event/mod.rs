//! Events: what somebody should hear of, in a form for programs. docs/events.md has all classes, by
//! a test.
//!
//! ```text
//!   daemon/log ─┬─> journald, syslog
//!               └─> file, one for each volume ─> feed ─┬─> `events`
//!        `monitor` (a daemon has died) ─> file         └─> `monitor` ─> a program for each event
//!                                                              └─> position: how far it has come
//! ```

mod feed;
mod file;
mod position;

pub use feed::Feed;
pub use file::EventFile;
pub use position::Position;

use crate::os;
use serde::{Deserialize, Serialize};
use std::{
    path::{Path, PathBuf},
    time::Duration,
};

/// How urgent it is, as syslog(3) and journald count.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Severity {
    Crit = 2,
    Err = 3,
    Warning = 4,
    Notice = 5,
    Debug = 7,
}

impl Severity {
    /// As syslog(3) calls it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Crit => "crit",
            Self::Err => "err",
            Self::Warning => "warning",
            Self::Notice => "notice",
            Self::Debug => "debug",
        }
    }
}

macro_rules! classes {
    ($($(#[doc = $doc:literal])+ $name:ident = $word:literal, $severity:ident, $id:literal;)*) => {
        /// What kind of event it is.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum Class {
            $($(#[doc = $doc])+ $name,)*
        }

        impl Class {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// Its name for programs, which stays.
            pub fn word(self) -> &'static str {
                match self {
                    $(Self::$name => $word,)*
                }
            }

            /// How urgent it is.
            pub fn severity(self) -> Severity {
                match self {
                    $(Self::$name => Severity::$severity,)*
                }
            }

            /// journald's MESSAGE_ID.
            pub fn message_id(self) -> &'static str {
                match self {
                    $(Self::$name => $id,)*
                }
            }
        }
    };
}

classes! {
    /// Blocks do not match their tags: the disk rots, or somebody tampers with it.
    Mismatch = "mismatch", Err, "7180734fc5164e90ba35a614684cc8e0";
    /// A page of the metadata is damaged.
    BadPage = "bad-page", Err, "9f00f70c0ecc4c5fa045762a05ed0336";
    /// A read failed otherwise: the disk has.
    ReadFailed = "read-failed", Err, "b4206e0d38834b5faeb09366889ca260";
    /// A write, discard or flush failed.
    WriteFailed = "write-failed", Err, "f28e090c88574a5884dd018fa71ccd41";
    /// A failure has made the volume read-only.
    Latched = "latched", Crit, "e29931e6404340c1ac9d29b5d42c7d1f";
    /// The anchor could not be asked for a while, or can be again.
    Anchor = "anchor", Warning, "dcb9a863e931485fa9a966ded9d45264";
    /// Something was found when the volume was opened that is not as it should be.
    Opening = "opening", Warning, "cedd43ba36314327b9fb23c4e14d084a";
    /// The volume was not closed in order, and has been recovered: how much there was to do.
    Recovered = "recovered", Notice, "1daa2218016f412d81eaea2491fd9ce5";
    /// Writes that the daemon before had answered early were put in place.
    WritesPlaced = "writes-placed", Notice, "bce2835200cf4b61b315a10514577d04";
    /// Writes that were answered early could not be put in place: they are in memory, for the next `add`.
    WritesKept = "writes-kept", Err, "4deb9cdd498843f8b6d0b9916dd4cf68";
    /// A checkpoint had to write a page anew that was damaged: what hung on it reads as errors.
    PagesLost = "pages-lost", Err, "e1b40ab4f42a4b3eb9e5b9d86a34a386";
    /// The kernel has asked for what was not offered.
    Refused = "refused", Warning, "3fcb1d437c9d4ffb980ae097336b244f";
    /// A pass over the volume has found blocks or metadata that are bad.
    ScrubFound = "scrub-found", Err, "6338e03f957c4f259957b29d39d0077c";
    /// A pass over the volume has found damaged metadata that it can write anew, or has done that.
    ScrubMended = "scrub-mended", Warning, "f4d49df0036c4b5f8a8c1377f960a874";
    /// Bad blocks were put back in place from a replica.
    Healed = "healed", Notice, "7c11073759894376b8b1d94a1cff608f";
    /// A pass over the volume has ended, or leaves with the daemon.
    ScrubEnded = "scrub-ended", Notice, "f5349c31e166459cbd5d3025b2d5bed3";
    /// A pass over the volume can't go on.
    ScrubFailed = "scrub-failed", Warning, "16b2a9ce9e5544299b51fcf38a1d4990";
    /// The log had no room for so many lines.
    Dropped = "dropped", Warning, "8e9bcd9a762a42eb8330bcb1319f176c";
    /// How the daemon ends, or does not yet.
    Stopping = "stopping", Notice, "b4df8ea3dcac4e34a533d8f1b25d0071";
    /// A checkpoint, which is told with `add --verbose` only.
    Checkpoint = "checkpoint", Debug, "d34957dfd3cb4ead96a1ec219192d391";
    /// Somebody has acknowledged findings: `clear`.
    Cleared = "cleared", Notice, "0061bb1d5c1841ceaff19e7edeb4d50c";
    /// A daemon is gone, and its device waits or is left. `monitor` tells it.
    DaemonDied = "daemon-died", Crit, "a95e0b611b99412dae049d07e52fb447";
    /// Nothing has happened: `monitor --test` tries its program.
    Test = "test", Notice, "833405d8dd694c62b372cc79bd223422";
}

/// One event, as a line of JSON.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Of this form; it changes where a field changes its meaning.
    pub schema: u32,
    /// When it was told: UTC, RFC 3339.
    pub time: String,
    /// The class's word.
    pub class: String,
    /// The severity's word.
    pub severity: String,
    /// The volume's UUID.
    pub volume: String,
    /// The device's name, if it has one.
    #[serde(default)]
    pub name: Option<String>,
    /// The data device.
    pub data: String,
    /// The daemon.
    pub pid: u32,
    /// In words, for people.
    pub message: String,
    /// How many events this one stands for.
    pub count: u64,
    /// The first block that it is about.
    #[serde(default)]
    pub first_block: Option<u64>,
    /// How many it is about.
    #[serde(default)]
    pub blocks: Option<u64>,
    /// The kernel's error number.
    #[serde(default)]
    pub errno: Option<i32>,
}

/// What it is about.
#[derive(Clone, Default, Debug)]
pub struct About {
    /// The volume's UUID.
    pub volume: String,
    /// The device's name.
    pub name: Option<String>,
    /// The data device.
    pub data: String,
    /// The daemon.
    pub pid: u32,
}

impl Record {
    /// An event of now.
    pub fn new(class: Class, about: &About, message: String) -> Self {
        let About { volume, name, data, pid } = about.clone();
        Self {
            schema: 1,
            time: utc(os::since_1970()),
            class: class.word().into(),
            severity: class.severity().word().into(),
            volume,
            name,
            data,
            pid,
            message,
            count: 1,
            first_block: None,
            blocks: None,
            errno: None,
        }
    }
}

/// Behind a volume's UUID: the file of its newest events.
const SUFFIX: &str = ".events";

/// Where the events of a volume are kept: the newest, and those before.
fn files(folder: &Path, volume: &str) -> [PathBuf; 2] {
    ["", "-before"].map(|which| folder.join(format!("{volume}{SUFFIX}{which}")))
}

/// A moment, by its seconds since 1970, for people and programs.
pub fn time(seconds: u64) -> String {
    utc(Duration::from_secs(seconds))
}

/// A time since 1970, for people and programs. By the proleptic Gregorian calendar, whose years
/// begin in March here, so that the day which not each of them has is their last.
fn utc(since: Duration) -> String {
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let day = days + 719_468;
    let (era, day_of_era) = (day / 146_097, day % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day_of_month:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn times_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_000_000_000, "2001-09-09T01:46:40Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(utc(Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn the_page_has_each_class_with_its_id() {
        let page = include_str!("../../../docs/events.md");
        let row =
            |class: &Class| format!("| `{}` | {} | `{}` |", class.word(), class.severity().word(), class.message_id());
        let guide = include_str!("../../../docs/operating.md");
        for class in Class::ALL {
            assert!(page.contains(&row(class)), "docs/events.md has not {}", row(class));
            assert!(
                guide.contains(&format!("`{}`", class.word())),
                "docs/operating.md does not say what to do on {}",
                class.word()
            );
        }
        let ids: BTreeSet<_> = Class::ALL.iter().map(|class| class.message_id()).collect();
        assert!(ids.len() == Class::ALL.len() && ids.iter().all(|id| uuid::Uuid::try_parse(id).is_ok()));
        let fields = serde_json::to_value(Record::new(Class::Latched, &About::default(), String::new())).unwrap();
        for field in fields.as_object().unwrap().keys() {
            assert!(page.contains(&format!("| `{field}` |")), "docs/events.md has no field {field}");
        }
    }
}

//! Anchors: where a volume's newest state is held outside its disk (docs/anchor.md).
//!
//! ```text
//!   options (cli/anchored.rs) ──> Place ──> AnyAnchor ──> the library's open, tick, finish
//!                                     └── keeping: the daemon's thread ──> report: what `status` says of it
//! ```

mod agent;
mod any;
mod asks;
mod file;
mod keeping;
mod lines;
mod meta_device;
mod place;
mod report;
mod slots;

pub use agent::AgentAnchor;
pub use any::AnyAnchor;
pub use asks::Ask;
pub use file::FileAnchor;
pub use keeping::{Keeping, Kept};
pub use meta_device::MetaDevice;
pub use place::Place;
pub use report::AnchorReport;

use crate::{
    failure::{Exit, Failure, Outcome},
    os,
};
use futures_util::FutureExt;
use serde::{Deserialize, Serialize};
use std::{future::Future, path::Path, str::FromStr, time::Duration};
use ublk_integrity::{VolumeInfo, anchor::AnchorNote};

/// What a device was told of its volume's anchor; kept in its state file, for the next daemon.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct AnchorSettings {
    /// Where it is.
    pub place: Place,
    /// How long to wait for it at an open, in seconds.
    pub wait_seconds: u64,
    /// How long an agent may take for an answer, in seconds.
    #[serde(default = "five")]
    pub timeout_seconds: u64,
    /// Between two ticks, in milliseconds; `None`: as is usual for what it is.
    pub every_milliseconds: Option<u64>,
    /// How long it may be away while the volume is served, in seconds; the same.
    pub grace_seconds: Option<u64>,
    /// What comes then.
    pub lost: Lost,
    /// Whether a flush is answered only once the anchor covers it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub holds_flushes: bool,
    /// Whether it may be on the volume's own disk.
    #[serde(default)]
    pub same_disk: bool,
    /// Whether a counter may be told more often than spares it.
    #[serde(default)]
    pub wear_ok: bool,
}

/// How often an anchor is told, and how long it may be away.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pace {
    /// Between two ticks.
    pub every: Duration,
    /// How long it may be away while the volume is served.
    pub grace: Duration,
}

impl Pace {
    const STORE: Self = Self { every: Duration::from_secs(1), grace: Duration::from_secs(60) };
    /// Each tick wears a cell of a chip, which bears some 100,000.
    const COUNTER: Self = Self { every: Duration::from_secs(3600), grace: Duration::from_secs(24 * 3600) };
    /// So that the ticks of a day are half of the increments that a TPM's agent makes in one: an open, too, is some of them, and
    /// beyond the limit nothing opens.
    const LEAST_OF_COUNTER: Duration = Duration::from_secs(1800);
    /// Who asks for less of a counter does not know what it is.
    const LEAST_ASKED: Duration = Duration::from_secs(60);
}

/// When the anchor is told how far the volume has got.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mode {
    /// Between two ticks; `None`: as is usual for what the anchor is.
    pub every: Option<Duration>,
    /// Whether a flush is answered only once the anchor covers it.
    pub holds_flushes: bool,
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "flush" {
            return Ok(Self { every: None, holds_flushes: true });
        }
        let seconds = match text.strip_prefix("interval") {
            Some("") => return Ok(Self { every: None, holds_flushes: false }),
            Some(rest) => rest.strip_prefix(':').and_then(|seconds| seconds.parse::<f64>().ok()),
            None => None,
        };
        let seconds = seconds.filter(|seconds| (0.1..=86_400.0).contains(seconds));
        let every = seconds
            .map(Duration::from_secs_f64)
            .ok_or("must be flush, interval, or interval: and seconds from 0.1 to 86400")?;
        Ok(Self { every: Some(every), holds_flushes: false })
    }
}

/// Of what is usual.
fn five() -> u64 {
    5
}

/// What becomes of a device whose anchor is away for too long.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Lost {
    /// It becomes read-only
    Readonly,
    /// It goes on, and what is written from then on can be rolled back
    Continue,
}

impl AnchorSettings {
    /// Opens that of `volume` for a daemon.
    pub fn open<'a>(
        &self,
        devices: impl IntoIterator<Item = &'a Path>,
        volume: Option<&VolumeInfo>,
    ) -> Outcome<AnyAnchor> {
        let [wait, timeout] = [self.wait_seconds, self.timeout_seconds].map(Duration::from_secs);
        let anchor = self.place.open((wait, timeout), volume)?;
        if !self.same_disk {
            self.place.refuse_same_disk(devices)?;
        }
        Ok(anchor)
    }

    /// How often it is told. One that is a counter is not worn out unasked.
    pub fn pace(&self, is_counter: bool) -> Outcome<Pace> {
        let usual = if is_counter { Pace::COUNTER } else { Pace::STORE };
        let every = self.every_milliseconds.map_or(usual.every, Duration::from_millis);
        let grace = self.grace_seconds.map_or(usual.grace, Duration::from_secs);
        let often = match self.holds_flushes {
            true => Some("mode flush".to_owned()),
            false if every < Pace::LEAST_ASKED => Some(format!("an interval of {} s", every.as_secs_f64())),
            false => None,
        };
        // Longer than what is asked for: a device or a table that has said less before is not refused.
        let wears = is_counter && !self.wear_ok;
        let every = if wears { every.max(Pace::LEAST_OF_COUNTER) } else { every };
        match often.filter(|_| wears) {
            Some(often) => Err(Failure::new(
                Exit::Arguments,
                format_args!(
                    "the anchor {} is a counter, and {often} wears out a chip, whose agent counts 100 times a day, opens included, and then refuses: --anchor-mode interval:{} or longer, or --anchor-wear-ok",
                    self.place,
                    Pace::LEAST_OF_COUNTER.as_secs(),
                ),
            )),
            None => Ok(Pace { every, grace }),
        }
    }
}

/// What a body says besides, of now and here.
pub fn note() -> AnchorNote {
    AnchorNote { seconds: os::since_1970().as_secs(), host: host_name() }
}

/// What this host calls itself; empty where it does not say.
fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
}

/// Runs what asks anchors alone. Those of this program block, and are never pending.
pub fn asked<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("an anchor of this program blocks")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_is_told_each_hour_and_not_worn_out_unasked() {
        let usual = AnchorSettings {
            place: "unix:/run/a".parse().unwrap(),
            wait_seconds: 0,
            timeout_seconds: 5,
            every_milliseconds: None,
            grace_seconds: None,
            lost: Lost::Readonly,
            holds_flushes: false,
            same_disk: false,
            wear_ok: false,
        };
        assert_eq!((usual.pace(false).unwrap(), usual.pace(true).unwrap()), (Pace::STORE, Pace::COUNTER));
        let flush = AnchorSettings { holds_flushes: true, ..usual.clone() };
        assert!(flush.pace(true).is_err() && flush.pace(false).is_ok());
        let often = AnchorSettings { every_milliseconds: Some(59_000), ..usual.clone() };
        let said = often.pace(true).unwrap_err();
        assert!(said.exit == Exit::Arguments && said.message.contains("59 s") && said.message.contains("wear-ok"));
        assert_eq!(often.pace(false).unwrap().every.as_secs(), 59);
        assert_eq!(AnchorSettings { wear_ok: true, ..often }.pace(true).unwrap().every.as_secs(), 59);
        let every_minute = AnchorSettings { every_milliseconds: Some(60_000), ..usual.clone() };
        assert_eq!(
            every_minute.pace(true).unwrap().every,
            Pace::LEAST_OF_COUNTER,
            "a device may have been told so before"
        );
        // The least that is taken leaves as much of a day for opens, of 100 increments that the agent of a TPM makes.
        let least = AnchorSettings { every_milliseconds: Some(1_800_000), ..usual }.pace(true).unwrap();
        assert!(2 * (24 * 3600 / least.every.as_secs()) <= 100);
    }

    #[test]
    fn intervals_have_limits() {
        let every = |milliseconds: Option<u64>| {
            Ok(Mode { every: milliseconds.map(Duration::from_millis), holds_flushes: false })
        };
        assert_eq!(("interval".parse(), "interval:0.5".parse()), (every(None), every(Some(500))));
        assert!("flush".parse::<Mode>().unwrap().holds_flushes);
        for text in ["", "1", "flush:1", "interval:", "interval:0", "interval:-1", "interval:NaN", "interval:1e9"] {
            assert!(text.parse::<Mode>().unwrap_err().contains("0.1"), "{text}");
        }
    }
}

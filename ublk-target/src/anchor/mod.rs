//! Anchors: where a volume's newest state is held outside its disk (docs/anchor.md).
//!
//! ```text
//!   options (cli/anchored.rs) ──> Place ──> AnyAnchor ──> the library's open, tick, finish
//!                                     └── keeping: the daemon's thread ──> report: what `status` says of it
//! ```

mod agent;
mod any;
mod file;
mod keeping;
mod place;
mod report;
mod slots;

pub use agent::AgentAnchor;
pub use any::AnyAnchor;
pub use file::FileAnchor;
pub use keeping::{Keeping, Kept};
pub use place::Place;
pub use report::AnchorReport;

use crate::{failure::Outcome, os};
use futures_util::FutureExt;
use serde::{Deserialize, Serialize};
use std::{future::Future, path::Path, time::Duration};
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
    /// Between two ticks, in milliseconds.
    pub every_milliseconds: u64,
    /// How long it may be away while the volume is served, in seconds.
    pub grace_seconds: u64,
    /// What comes then.
    pub lost: Lost,
    /// Whether a flush is answered only once the anchor covers it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub holds_flushes: bool,
    /// Whether it may be on the volume's own disk.
    #[serde(default)]
    pub same_disk: bool,
}

/// When the anchor is told how far the volume has got.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mode {
    /// Between two ticks.
    pub every: Duration,
    /// Whether a flush is answered only once the anchor covers it.
    pub holds_flushes: bool,
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

    /// Between two ticks.
    pub fn every(&self) -> Duration {
        Duration::from_millis(self.every_milliseconds)
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

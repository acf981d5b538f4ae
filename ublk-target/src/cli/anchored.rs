//! The options that name an anchor.

use super::DeviceArgs;
use crate::{
    anchor::{AnchorSettings, AnyAnchor, Lost, Mode, Place},
    daemon::peek,
    failure::{Exit, Failure, Outcome},
};
use std::time::Duration;

/// How long an anchor is waited for at an open, in seconds, if nothing else is said.
const WAIT: u64 = 30;
/// How long an answer of it may take.
const TIMEOUT: u64 = 5;

/// Where a volume's anchor is.
#[derive(clap::Args, Clone, Debug)]
pub struct AnchorArgs {
    /// Anchor of the volume, which knows how new its newest state is: file:PATH, on another disk, or unix:PATH of an agent
    #[arg(long, value_name = "URI")]
    pub anchor: Option<Place>,
    /// How long to wait for an anchor that is not there. If it is not given: 30, and for `recover` what the device was told
    #[arg(long, value_name = "SECONDS", requires = "anchor")]
    pub anchor_wait: Option<u64>,
    /// How long an agent may take for an answer. If it is not given: 5, and for `recover` what the device was told
    #[arg(long, value_name = "SECONDS", requires = "anchor", value_parser = clap::value_parser!(u64).range(1..=60))]
    pub anchor_timeout: Option<u64>,
    /// Take an anchor on the volume's own disk, which protects from nothing: to try things out
    #[arg(long, requires = "anchor")]
    pub anchor_same_disk: bool,
}

/// For what writes nothing.
#[derive(clap::Args, Clone, Copy, Debug)]
pub struct WithoutAnchor {
    /// Read a volume that has an anchor without it: what is read may be an older state
    #[arg(long, conflicts_with = "anchor")]
    pub without_anchor: bool,
}

/// How a daemon keeps an anchor told. In the table of volumes they have the same names (`boot/table.rs`).
#[derive(clap::Args, Clone, Debug)]
pub struct KeepArgs {
    /// How often the anchor is told how far the volume has got: interval, or interval:SECONDS, and what was written since can be
    /// rolled back; flush: no flush is answered before. An interval is a second if nothing else is said, and an hour where the
    /// anchor is a counter
    #[arg(long, value_name = "MODE", requires = "anchor", default_value = "interval")]
    pub anchor_mode: Mode,
    /// How long the anchor may be away while the device is served. If it is not given: 60, and a day where it is a counter
    #[arg(long, value_name = "SECONDS", requires = "anchor")]
    pub anchor_grace: Option<u64>,
    /// What becomes of the device then
    #[arg(long, value_enum, requires = "anchor", default_value = "readonly")]
    pub anchor_lost: Lost,
    /// Tell an anchor that is a counter more often than each half hour, which wears out a chip: for counters in software
    #[arg(long, requires = "anchor")]
    pub anchor_wear_ok: bool,
}

impl AnchorArgs {
    /// Opens the anchor, if one was named. Refuses one that protects from nothing.
    pub fn open(&self, devices: &DeviceArgs) -> Outcome<Option<AnyAnchor>> {
        let Some(place) = &self.anchor else { return Ok(None) };
        // Whoever reads it in earnest says what is wrong with it.
        let volume = if place.file().is_none() { peek::look(devices.meta_path()) } else { None };
        let wait = Duration::from_secs(self.anchor_wait.unwrap_or(WAIT));
        let anchor = place.open((wait, self.timeout()), volume.as_ref())?;
        self.refuse_same_disk(place, devices)?;
        Ok(Some(anchor))
    }

    /// The same, and makes what holds it, if there is none: whether it did.
    pub fn make(&self, devices: &DeviceArgs) -> Outcome<(AnyAnchor, bool)> {
        let place = self.needed()?;
        let (anchor, is_new) = place.make(self.timeout())?;
        self.refuse_same_disk(place, devices).inspect_err(|_| {
            if is_new {
                place.unmake();
            }
        })?;
        Ok((anchor, is_new))
    }

    fn timeout(&self) -> Duration {
        Duration::from_secs(self.anchor_timeout.unwrap_or(TIMEOUT))
    }

    /// The place, which must be named.
    pub fn needed(&self) -> Outcome<&Place> {
        self.anchor.as_ref().ok_or_else(|| {
            Failure::new(Exit::Arguments, "no anchor given: --anchor file:PATH, or unix:PATH of an agent")
        })
    }

    fn refuse_same_disk(&self, place: &Place, DeviceArgs { data, meta }: &DeviceArgs) -> Outcome {
        if self.anchor_same_disk {
            return Ok(());
        }
        place.refuse_same_disk([Some(data.as_path()), meta.as_deref()].into_iter().flatten())
    }

    /// What a daemon is told.
    pub fn settings(&self, keep: &KeepArgs) -> Option<AnchorSettings> {
        self.anchor.clone().map(|place| AnchorSettings {
            place,
            wait_seconds: self.anchor_wait.unwrap_or(WAIT),
            timeout_seconds: self.anchor_timeout.unwrap_or(TIMEOUT),
            every_milliseconds: keep.anchor_mode.every.map(|every| every.as_millis() as u64),
            holds_flushes: keep.anchor_mode.holds_flushes,
            grace_seconds: keep.anchor_grace,
            lost: keep.anchor_lost,
            same_disk: self.anchor_same_disk,
            wear_ok: keep.anchor_wear_ok,
        })
    }

    /// The same for a device that was told before: where the anchor is by now, if another place was named.
    pub fn instead_of(&self, before: Option<AnchorSettings>) -> Option<AnchorSettings> {
        let named = self.settings(&KeepArgs::default());
        match (named, before) {
            (Some(AnchorSettings { place, same_disk, .. }), Some(before)) => {
                let wait_seconds = self.anchor_wait.unwrap_or(before.wait_seconds);
                let timeout_seconds = self.anchor_timeout.unwrap_or(before.timeout_seconds);
                Some(AnchorSettings { place, wait_seconds, timeout_seconds, same_disk, ..before })
            }
            (named, before) => named.or(before),
        }
    }
}

impl KeepArgs {
    /// Refuses what contradicts itself.
    pub fn refuse_contradiction(&self) -> Outcome {
        if self.anchor_mode.holds_flushes && self.anchor_lost == Lost::Continue {
            let message = "--anchor-lost continue goes with --anchor-mode interval alone: a flush that the anchor does not cover fails, and the device is read-only then";
            return Err(Failure::new(Exit::Arguments, message));
        }
        Ok(())
    }
}

impl Default for KeepArgs {
    fn default() -> Self {
        let anchor_mode = Mode { every: None, holds_flushes: false };
        Self { anchor_mode, anchor_grace: None, anchor_lost: Lost::Readonly, anchor_wear_ok: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_keeps_what_it_was_told_but_for_the_place() {
        let args = |anchor: Option<&str>, anchor_wait| AnchorArgs {
            anchor: anchor.map(|place| place.parse().unwrap()),
            anchor_wait,
            anchor_timeout: anchor_wait.map(|_| 9),
            anchor_same_disk: false,
        };
        let keep = KeepArgs { anchor_grace: Some(9), anchor_mode: "flush".parse().unwrap(), ..KeepArgs::default() };
        let before = args(Some("file:/a"), Some(7)).settings(&keep);
        assert_eq!(args(None, None).instead_of(before.clone()), before);
        let now = args(Some("file:/b"), None).instead_of(before.clone()).unwrap();
        assert_eq!((now.place.to_string().as_str(), now.grace_seconds), ("file:/b", Some(9)));
        assert_eq!((now.wait_seconds, now.timeout_seconds), (7, 9), "it was not asked for anything else");
        assert!(now.holds_flushes);
        assert_eq!(args(Some("file:/b"), Some(3)).instead_of(before).unwrap().wait_seconds, 3);
        let first = args(Some("file:/b"), None).instead_of(None).unwrap();
        assert_eq!((first.grace_seconds, first.wait_seconds, first.timeout_seconds), (None, 30, 5));
    }
}

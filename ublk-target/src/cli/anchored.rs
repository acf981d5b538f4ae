//! The options that name an anchor.

use super::DeviceArgs;
use crate::{
    anchor::{AnchorSettings, AnyAnchor, Lost, Place},
    daemon::peek,
    failure::{Exit, Failure, Outcome},
};
use std::time::Duration;

/// Where a volume's anchor is.
#[derive(clap::Args, Clone, Debug)]
pub struct AnchorArgs {
    /// Anchor of the volume, which knows how new its newest state is: file:PATH, on another disk, or unix:PATH of an agent
    #[arg(long, value_name = "URI")]
    pub anchor: Option<Place>,
    /// How long to wait for an anchor that is not there
    #[arg(long, value_name = "SECONDS", requires = "anchor", default_value_t = 30)]
    pub anchor_wait: u64,
    /// How long an agent may take for an answer
    #[arg(long, value_name = "SECONDS", requires = "anchor", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=60))]
    pub anchor_timeout: u64,
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

/// How a daemon keeps an anchor told.
#[derive(clap::Args, Clone, Debug)]
pub struct KeepArgs {
    /// How often the anchor is told how far the volume has got: interval, or interval:SECONDS. What was written since can be
    /// rolled back
    #[arg(long, value_name = "MODE", requires = "anchor", default_value = "interval:1", value_parser = interval)]
    pub anchor_mode: Duration,
    /// How long the anchor may be away while the device is served
    #[arg(long, value_name = "SECONDS", requires = "anchor", default_value_t = 60)]
    pub anchor_grace: u64,
    /// What becomes of the device then
    #[arg(long, value_enum, requires = "anchor", default_value = "readonly")]
    pub anchor_lost: Lost,
}

fn interval(text: &str) -> Result<Duration, String> {
    let seconds = match text.strip_prefix("interval") {
        Some("") => Some(1.0),
        Some(rest) => rest.strip_prefix(':').and_then(|seconds| seconds.parse::<f64>().ok()),
        None => None,
    };
    let seconds = seconds.filter(|seconds| (0.1..=86_400.0).contains(seconds));
    seconds
        .map(Duration::from_secs_f64)
        .ok_or_else(|| "must be interval, or interval: and seconds from 0.1 to 86400".into())
}

impl AnchorArgs {
    /// Opens the anchor, if one was named. Refuses one that protects from nothing.
    pub fn open(&self, devices: &DeviceArgs) -> Outcome<Option<AnyAnchor>> {
        let Some(place) = &self.anchor else { return Ok(None) };
        // Whoever reads it in earnest says what is wrong with it.
        let volume = peek::look(devices.meta_path());
        let anchor = place.open((Duration::from_secs(self.anchor_wait), self.timeout()), volume.as_ref())?;
        self.refuse_same_disk(place, devices)?;
        Ok(Some(anchor))
    }

    /// The same, and makes what holds it, if there is none.
    pub fn make(&self, devices: &DeviceArgs) -> Outcome<AnyAnchor> {
        let place = self.needed()?;
        let is_new = place.is_new();
        let anchor = place.make(self.timeout())?;
        self.refuse_same_disk(place, devices).inspect_err(|_| {
            if is_new {
                place.unmake();
            }
        })?;
        Ok(anchor)
    }

    fn timeout(&self) -> Duration {
        Duration::from_secs(self.anchor_timeout)
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
            wait_seconds: self.anchor_wait,
            timeout_seconds: self.anchor_timeout,
            every_milliseconds: keep.anchor_mode.as_millis() as u64,
            grace_seconds: keep.anchor_grace,
            lost: keep.anchor_lost,
            same_disk: self.anchor_same_disk,
        })
    }

    /// The same for a device that was told before: where the anchor is by now, if another place was named.
    pub fn instead_of(&self, before: Option<AnchorSettings>) -> Option<AnchorSettings> {
        let named = self.settings(&KeepArgs::default());
        match (named, before) {
            (Some(named), Some(AnchorSettings { every_milliseconds, grace_seconds, lost, .. })) => {
                Some(AnchorSettings { every_milliseconds, grace_seconds, lost, ..named })
            }
            (named, before) => named.or(before),
        }
    }
}

impl Default for KeepArgs {
    fn default() -> Self {
        Self { anchor_mode: Duration::from_secs(1), anchor_grace: 60, anchor_lost: Lost::Readonly }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_have_limits() {
        assert_eq!(interval("interval"), Ok(Duration::from_secs(1)));
        assert_eq!(interval("interval:0.5"), Ok(Duration::from_millis(500)));
        for text in ["", "1", "flush", "interval:", "interval:0", "interval:-1", "interval:NaN", "interval:1e9"] {
            assert!(interval(text).unwrap_err().contains("0.1"), "{text}");
        }
    }

    #[test]
    fn a_device_keeps_what_it_was_told_but_for_the_place() {
        let args = |anchor: Option<&str>| AnchorArgs {
            anchor: anchor.map(|place| place.parse().unwrap()),
            anchor_wait: 7,
            anchor_timeout: 5,
            anchor_same_disk: false,
        };
        let keep = KeepArgs { anchor_grace: 9, ..KeepArgs::default() };
        let before = args(Some("file:/a")).settings(&keep);
        assert_eq!(args(None).instead_of(before.clone()), before);
        let now = args(Some("file:/b")).instead_of(before).unwrap();
        assert_eq!((now.place.to_string().as_str(), now.grace_seconds, now.wait_seconds), ("file:/b", 9, 7));
        assert_eq!(args(Some("file:/b")).instead_of(None).unwrap().grace_seconds, 60);
    }
}

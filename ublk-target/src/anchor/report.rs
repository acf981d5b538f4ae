//! What is known of the anchor of a volume that is served: its thread says it, `status` shows it.

use super::{AnchorSettings, Ask, Lost, Pace, asks::Asks};
use crate::os;
use serde::Serialize;
use std::sync::{Mutex, MutexGuard, PoisonError};
use ublk_integrity::{Volume, anchor::AnchorStatus};

/// What is known of the anchor of a volume that is served.
pub struct AnchorReport {
    pub(super) settings: AnchorSettings,
    pub(super) pace: Pace,
    is_counter: bool,
    now: Mutex<Now>,
    /// What its thread is asked.
    pub(super) asks: Asks,
}

#[derive(Clone)]
pub(super) struct Now {
    pub(super) held: AnchorStatus,
    /// All that was answered by then is covered, in seconds since 1970.
    pub(super) fresh_seconds: u64,
    /// Records before this one hold nothing that is not covered.
    pub(super) covered_to: u64,
    pub(super) state: State,
    pub(super) why: Option<String>,
}

/// How the anchor is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum State {
    /// It follows.
    Ok,
    /// It could not be asked the last time.
    Away,
    /// It has been away for longer than it may, and the device goes on.
    Stale,
    /// It does not follow any more: the volume is read-only.
    Lost,
}

/// The same as JSON.
#[derive(Serialize)]
pub struct Shown {
    place: String,
    state: State,
    /// What is wrong with it.
    why: Option<String>,
    fresh_seconds: u64,
    age_seconds: u64,
    generation: u64,
    /// Whether that is how often a counter was incremented.
    counter: bool,
    record: u64,
    /// Records of the log that are durable and not covered.
    lag_records: u64,
    resets: u64,
    reset_seconds: u64,
    host: String,
    /// "interval" or "flush".
    mode: &'static str,
    interval_seconds: f64,
    grace_seconds: u64,
    lost: Lost,
}

impl AnchorReport {
    pub(super) fn new((settings, pace): (AnchorSettings, Pace), is_counter: bool, held: AnchorStatus) -> Self {
        let fresh_seconds = os::since_1970().as_secs();
        let now = Now { covered_to: held.record, held, fresh_seconds, state: State::Ok, why: None };
        Self { settings, pace, is_counter, now: Mutex::new(now), asks: Asks::default() }
    }

    pub(super) fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the thread answer this when it has come to it.
    pub fn ask(&self, ask: Ask) {
        self.asks.put(ask);
    }

    /// For `status`.
    pub fn shown(&self, volume: &Volume) -> Shown {
        let Now { held, fresh_seconds, covered_to, state, why } = self.now().clone();
        Shown {
            place: self.settings.place.to_string(),
            state,
            why,
            fresh_seconds,
            age_seconds: os::since_1970().as_secs().saturating_sub(fresh_seconds),
            generation: held.generation,
            counter: self.is_counter,
            record: held.record,
            lag_records: volume.next_record().0.saturating_sub(covered_to),
            resets: held.resets,
            reset_seconds: held.reset_seconds,
            host: held.host,
            mode: if self.settings.holds_flushes { "flush" } else { "interval" },
            interval_seconds: self.pace.every.as_secs_f64(),
            grace_seconds: self.pace.grace.as_secs(),
            lost: self.settings.lost,
        }
    }
}

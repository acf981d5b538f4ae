//! An anchor that is open.

use super::{AnchorSettings, AnyAnchor, note};
use crate::failure::Outcome;
use std::{path::Path, time::Duration};
use ublk_integrity::anchor::{Anchor, AnchorPurpose, AnchorUse};

/// An anchor that is open, for a command.
pub struct Chosen {
    pub anchor: AnyAnchor,
}

impl Chosen {
    /// Whether a file has no body in it yet. An agent has one place for each volume.
    pub async fn holds_nothing(&self) -> bool {
        match &self.anchor {
            AnyAnchor::File(anchor) => anchor.load(&[0; 16]).await == Ok(None),
            AnyAnchor::Agent(_) => true,
        }
    }

    /// For an open.
    pub fn used(&self, purpose: AnchorPurpose) -> AnchorUse<'_, AnyAnchor> {
        AnchorUse { anchor: &self.anchor, purpose, note: note() }
    }
}

impl AnchorSettings {
    /// Opens it for a daemon.
    pub fn open<'a>(&self, devices: impl IntoIterator<Item = &'a Path>) -> Outcome<AnyAnchor> {
        let [wait, timeout] = [self.wait_seconds, self.timeout_seconds].map(Duration::from_secs);
        let anchor = self.place.open(wait, timeout)?;
        if !self.same_disk {
            self.place.refuse_same_disk(devices)?;
        }
        Ok(anchor)
    }
}

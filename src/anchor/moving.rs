//! The bodies that follow each other in an anchor, and why each may.

use super::{AnchorError, AnchorNote, KeyAreaStep, judge::judge_key_area};
use crate::{
    Epoch,
    format::{AnchorBody, AnchorPoint, AnchorState, HostName, KeyAreaMark, OpenId, Superblock},
    log::LogPoint,
};

/// As much of it as a body has room for.
fn host(note: &AnchorNote) -> HostName {
    let mut name = HostName::new();
    let fitting = note.host.chars().filter(|c| !c.is_control());
    let _ = fitting.map(|c| name.try_push(c)).take_while(Result::is_ok).count();
    name
}

impl AnchorBody {
    /// Whether it was written by the host that says this of itself.
    pub(super) fn is_by(&self, note: &AnchorNote) -> bool {
        self.host == host(note)
    }

    fn followed(self, note: &AnchorNote) -> Self {
        Self { generation: self.generation + 1, written_seconds: note.seconds, host: host(note), ..self }
    }

    /// An open is under way that will give the superblocks this id. What the devices hold stays permitted, and what they will
    /// hold is: nothing has been served yet.
    ///
    /// Where they hold the superblock of an open that was cut short, *that* is what stays permitted from here on. Both copies
    /// have it by now, and the state before is on the disk no more.
    pub(super) fn intent(self, presented: &Superblock, id: OpenId, note: &AnchorNote) -> Self {
        let base = match presented.open_id == self.id {
            true => self,
            false => Self {
                id: presented.open_id,
                point: AnchorPoint { number: presented.record_number, link: presented.link },
                ..self
            },
        };
        Self { state: AnchorState::Moving, next: Some(id), epoch: presented.epoch, ..base.followed(note) }
    }

    /// Both copies of the superblock have the id: every state from before is refused. What is permitted of the key area is not for an
    /// open to say: it reads one copy that is whole, while the other may hold another area, or a command be about to write one.
    pub(super) fn commit(self, written: &Superblock, note: &AnchorNote) -> Self {
        let point = AnchorPoint { number: written.record_number, link: written.link };
        let (state, id, next) = (AnchorState::Serving, written.open_id, None);
        Self { state, id, next, point, epoch: written.epoch, ..self.followed(note) }
    }

    /// While the key area is changed: `found` is the one that lies there, which this must permit. Whoever has the volume open, or tries
    /// to, is where it was. `None`: it was only asked.
    pub(super) fn with_key_area(
        self,
        (found, step): (KeyAreaMark, KeyAreaStep),
        note: &AnchorNote,
    ) -> Result<Option<Self>, AnchorError> {
        judge_key_area(&self, Some(&found))?;
        // Also where this says so already: what was sent before, and is under way still, must find another body in its place.
        let next_key_area = match step {
            KeyAreaStep::Judge => return Ok(None),
            KeyAreaStep::Begin(next) => Some(next),
            KeyAreaStep::End => None,
        };
        Ok(Some(Self { key_area: Some(found), next_key_area, ..self.followed(note) }))
    }

    /// The log has got so far in the life that is served.
    pub(super) fn at(self, point: LogPoint, epoch: Epoch, note: &AnchorNote) -> Self {
        let point = AnchorPoint { number: point.number, link: point.link };
        Self { point, epoch, ..self.followed(note) }
    }

    /// Somebody else speaks for the volume from now on, or nobody.
    pub(super) fn moved_away(self, note: &AnchorNote) -> Self {
        Self { state: AnchorState::MovedAway, next: None, ..self.followed(note) }
    }

    /// The first of a volume, or the first after a reset, of which it says how often such has been.
    pub(super) fn first(
        (written, key_area): (&Superblock, Option<KeyAreaMark>),
        (generation, era): (u64, u64),
        note: &AnchorNote,
        (resets, reset): (u64, u64),
    ) -> Self {
        Self {
            state: AnchorState::Serving,
            uuid: written.uuid,
            generation,
            id: written.open_id,
            next: None,
            point: AnchorPoint { number: written.record_number, link: written.link },
            epoch: written.epoch,
            written_seconds: note.seconds,
            resets,
            reset_seconds: reset,
            host: host(note),
            key_area,
            next_key_area: None,
            era,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::anchor_of_test;

    #[test]
    fn a_host_name_is_cut_where_it_does_not_fit() {
        let named = |name: &str| host(&AnchorNote { seconds: 1, host: name.into() }).to_string();
        assert_eq!(named("alpha\n"), "alpha");
        assert_eq!(named(&"é".repeat(40)), "é".repeat(32));
        let next = anchor_of_test().moved_away(&AnchorNote { seconds: 5, host: "beta".into() });
        assert_eq!((next.generation, next.written_seconds, next.host.as_str()), (8, 5, "beta"));
    }
}

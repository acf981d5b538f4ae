//! Whether what the devices hold may be what the anchor speaks of.

use super::AnchorError;
use crate::{
    RecordNumber,
    format::{AnchorBody, KeyAreaMark, Link, OpenId, Superblock},
};

/// What the devices hold, as far as an anchor asks.
pub(super) struct Presented {
    /// Of the newest superblock.
    pub(super) open_id: OpenId,
    /// Where its log begins.
    pub(super) record_number: RecordNumber,
    /// Where the chain ends.
    pub(super) followed_to: RecordNumber,
    /// The link that the chain has at the anchor's point, if it gets there.
    pub(super) link_at_point: Option<Link>,
}

impl Presented {
    pub(super) fn of(superblock: &Superblock, followed_to: RecordNumber, link_at_point: Option<Link>) -> Self {
        let Superblock { open_id, record_number, .. } = *superblock;
        Self { open_id, record_number, followed_to, link_at_point }
    }
}

/// Accepts what is of the life that the anchor speaks of, and holds all that was in its log by then; or was written by the
/// open that was under way, which has served nothing.
///
/// A number alone says nothing: another branch has the same. Nor does the link where a checkpoint has passed the point. That
/// is why lives have ids.
pub(super) fn judge(body: &AnchorBody, presented: &Presented) -> Result<(), AnchorError> {
    let Presented { open_id, record_number, followed_to, link_at_point } = *presented;
    let of_this_life = open_id == body.id;
    // A later checkpoint of the same life has all of it in its tree.
    let has_point = record_number > body.point.number || link_at_point == Some(body.point.link);
    if (of_this_life && has_point) || Some(open_id) == body.next {
        return Ok(());
    }
    Err(AnchorError::Older {
        least: body.point.number,
        followed_to: of_this_life.then_some(followed_to),
        host: body.host.to_string(),
        seconds: body.written_seconds,
    })
}

/// Accepts the key area that the anchor speaks of, and the one that is being written in its place. Which of them counts is settled when
/// the change has ended, or the next one.
///
/// Whoever knows a passphrase that was removed has the volume's key with the area of that time, and could sign another one, or
/// a superblock that names it. So nothing on the disk can say which area counts.
pub(super) fn judge_key_area(body: &AnchorBody, found: Option<&KeyAreaMark>) -> Result<(), AnchorError> {
    // What programs have written that did not ask says nothing of it.
    let Some(anchored) = &body.key_area else { return Ok(()) };
    let permitted = [Some(anchored), body.next_key_area.as_ref()];
    if found.is_some() && permitted.contains(&found) {
        return Ok(());
    }
    Err(AnchorError::KeyArea {
        anchored: anchored.generation,
        found: found.map(|found| found.generation),
        host: body.host.to_string(),
        seconds: body.written_seconds,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{AnchorPoint, AnchorState, anchor_of_test, key_area_of_test as mark};

    #[test]
    fn the_key_area_is_the_anchors_or_the_next_one() {
        let accepts = |body: &AnchorBody, found: Option<KeyAreaMark>| judge_key_area(body, found.as_ref()).is_ok();
        let before = anchor_of_test();
        assert!(accepts(&before, None) && accepts(&before, Some(mark(1))), "it was not asked for then");
        let body = AnchorBody { key_area: Some(mark(3)), ..before };
        assert!(accepts(&body, Some(mark(3))));
        let same_count = KeyAreaMark { generation: 3, ..mark(4) };
        for other in [None, Some(mark(2)), Some(mark(4)), Some(same_count)] {
            assert!(!accepts(&body, other), "{other:?}");
        }
        let changing = AnchorBody { next_key_area: Some(mark(4)), ..body };
        assert!(accepts(&changing, Some(mark(3))) && accepts(&changing, Some(mark(4))));
        assert!(!accepts(&changing, Some(mark(2))) && !accepts(&changing, None));
        let said = judge_key_area(&body, Some(&mark(2))).unwrap_err().to_string();
        assert!(said.contains("generation 2, and it was of generation 3 when") && said.contains("alpha"), "{said}");
    }

    const LIFE: OpenId = [2; 32];
    const NEXT: OpenId = [8; 32];
    const LINK: Link = [3; 32];

    fn accepts(body: &AnchorBody, open_id: OpenId, record_number: u64, link_at_point: Option<Link>) -> bool {
        let [record_number, followed_to] = [record_number, 50].map(RecordNumber);
        judge(body, &Presented { open_id, record_number, followed_to, link_at_point }).is_ok()
    }

    #[test]
    fn of_its_life_a_state_must_have_the_point_or_have_passed_it() {
        let point = AnchorPoint { number: RecordNumber(9), link: LINK };
        let body = AnchorBody { id: LIFE, point, ..anchor_of_test() };
        assert!(accepts(&body, LIFE, 4, Some(LINK)), "the log has it");
        assert!(accepts(&body, LIFE, 9, Some(LINK)), "the log begins with it");
        assert!(accepts(&body, LIFE, 10, None), "a checkpoint has passed it");
        assert!(!accepts(&body, LIFE, 4, None), "the log ends before it");
        assert!(!accepts(&body, LIFE, 9, None) && !accepts(&body, LIFE, 4, Some([7; 32])), "another record is there");
        assert!(!accepts(&body, [7; 32], 4, Some(LINK)) && !accepts(&body, [7; 32], 10, None), "another life");
        assert!(!accepts(&body, [0; 32], 4, None), "no open is under way: zeros are none");
    }

    #[test]
    fn the_open_that_was_under_way_may_have_written() {
        let point = AnchorPoint { number: RecordNumber(9), link: LINK };
        let (state, next) = (AnchorState::Moving, Some(NEXT));
        let body = AnchorBody { id: LIFE, point, state, next, ..anchor_of_test() };
        assert!(accepts(&body, NEXT, 9, None) && accepts(&body, LIFE, 4, Some(LINK)));
        assert!(!accepts(&body, LIFE, 4, None) && !accepts(&body, [7; 32], 9, Some(LINK)));
    }

    #[test]
    fn who_is_refused_hears_how_far_behind_the_devices_are() {
        let body = anchor_of_test();
        let presented = Presented {
            open_id: body.id,
            record_number: RecordNumber(1),
            followed_to: RecordNumber(5),
            link_at_point: None,
        };
        let said = judge(&body, &presented).unwrap_err().to_string();
        assert!(said.contains("got to record 5: record 9") && said.contains("by alpha at 2023-11-14"), "{said}");
    }
}

//! The anchor's part in an open for writing, and its word on one for reading.

use super::{
    Anchor, AnchorError, AnchorKeeper, AnchorPurpose, AnchorUse, exchange,
    judge::{Presented, judge},
};
use crate::{
    RecordNumber,
    crypto::keys::AnchorKey,
    format::{AnchorBody, AnchorState, BodyError, Link, OpenId, Superblock},
};

/// An open that goes on with an anchor.
pub(crate) struct Opening<'a, A> {
    with: AnchorUse<'a, A>,
    key: AnchorKey,
    /// The generation of what it holds; 0: of nothing.
    expected: u64,
    /// What it holds, if that is a body of the volume.
    held: Option<AnchorBody>,
    is_committed: bool,
}

impl<'a, A: Anchor> Opening<'a, A> {
    /// Asks the anchor. Before anything is written.
    pub(crate) async fn begin(
        with: AnchorUse<'a, A>,
        key: &AnchorKey,
        superblock: &Superblock,
    ) -> Result<Self, AnchorError> {
        let there = exchange::load(with.anchor, &superblock.uuid).await?;
        let held = there.map(|bytes| AnchorBody::verify(&bytes, key, &superblock.uuid));
        let expected = super::generation(there.as_ref());
        let held = match (with.purpose, held) {
            (AnchorPurpose::Keep | AnchorPurpose::End, None) => return Err(AnchorError::Absent),
            (AnchorPurpose::Keep | AnchorPurpose::End, Some(held)) => Some(in_use(held?)?),
            (AnchorPurpose::Begin, Some(Err(e))) => return Err(e.into()),
            (AnchorPurpose::Begin, Some(Ok(held))) if held.state != AnchorState::MovedAway => {
                let (generation, host) = (held.generation, held.host.to_string());
                return Err(AnchorError::Present { generation, host, seconds: held.written_seconds });
            }
            // With another place, or one that was left, an older state would be taken for the newest.
            (AnchorPurpose::Begin, _) if superblock.is_anchored() => return Err(AnchorError::Begun),
            // What is whole and somebody else's is not written over, whatever is accepted of our own.
            (AnchorPurpose::Reset, Some(Err(e))) if e != BodyError::Damaged => return Err(e.into()),
            (AnchorPurpose::Begin | AnchorPurpose::Reset, held) => held.and_then(Result::ok),
        };
        Ok(Self { with, key: key.clone(), expected, held, is_committed: false })
    }

    /// Which record of the log the anchor asks for.
    pub(crate) fn asks_for(&self) -> Option<RecordNumber> {
        self.judged().map(|held| held.point.number)
    }

    /// Refuses a state that is older than the anchor says.
    pub(crate) fn judge(
        &self,
        superblock: &Superblock,
        followed_to: RecordNumber,
        link_at_point: Option<Link>,
    ) -> Result<(), AnchorError> {
        self.judged().map_or(Ok(()), |held| judge(held, &Presented::of(superblock, followed_to, link_at_point)))
    }

    /// What the devices have to measure up to.
    fn judged(&self) -> Option<&AnchorBody> {
        let asks = matches!(self.with.purpose, AnchorPurpose::Keep | AnchorPurpose::End);
        self.held.as_ref().filter(|_| asks)
    }

    /// Whether the superblock says from now on that there is an anchor.
    pub(crate) fn is_kept(&self) -> bool {
        self.with.purpose != AnchorPurpose::End
    }

    /// The superblocks are about to get this id. Both copies are equal to `presented`.
    pub(crate) async fn intent(&mut self, presented: &Superblock, id: OpenId) -> Result<(), AnchorError> {
        match self.judged() {
            Some(held) => self.replace(held.intent(presented, id, &self.with.note)).await,
            // A crash before the end refuses the disk, and whoever began or reset does so again.
            None => Ok(()),
        }
    }

    /// Both copies of the superblock are `written`. Before anything is served.
    pub(crate) async fn commit(&mut self, written: &Superblock) -> Result<(), AnchorError> {
        let note = &self.with.note;
        let body = match (self.with.purpose, self.held) {
            (AnchorPurpose::Keep, Some(held)) => held.commit(written, note),
            (AnchorPurpose::End, Some(held)) => held.moved_away(note),
            (AnchorPurpose::Reset, held) => {
                let resets = held.map_or(0, |held| held.resets) + 1;
                AnchorBody::first(written, self.expected, note, (resets, note.seconds))
            }
            (_, held) => {
                let resets = held.map_or((0, 0), |held| (held.resets, held.reset_seconds));
                AnchorBody::first(written, self.expected, note, resets)
            }
        };
        self.replace(body).await?;
        self.is_committed = true;
        Ok(())
    }

    async fn replace(&mut self, body: AnchorBody) -> Result<(), AnchorError> {
        exchange::replace(self.with.anchor, &self.key, self.expected, &body).await?;
        (self.expected, self.held) = (body.generation, Some(body));
        Ok(())
    }

    /// Who goes on telling the anchor. `None`: it was to be begun, reset or ended, and nothing could be written.
    pub(crate) fn keeper(self) -> Option<AnchorKeeper> {
        let Self { with, key, held, is_committed, .. } = self;
        let is_done = is_committed || with.purpose == AnchorPurpose::Keep;
        held.filter(|_| is_done).map(|held| AnchorKeeper::new(key, held))
    }
}

/// A body that somebody goes by.
pub(super) fn in_use(held: AnchorBody) -> Result<AnchorBody, AnchorError> {
    let (host, seconds) = (held.host.to_string(), held.written_seconds);
    if held.state == AnchorState::MovedAway { Err(AnchorError::MovedAway { host, seconds }) } else { Ok(held) }
}

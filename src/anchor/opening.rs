//! The anchor's part in an open for writing, and its word on one for reading.

use super::{
    Anchor, AnchorError, AnchorKeeper, AnchorPurpose, AnchorUse, Beginning, Held,
    exchange::{self, Change},
    judge::{Presented, judge, judge_key_area},
};
use crate::{
    RecordNumber,
    crypto::keys::AnchorKey,
    format::{AnchorBody, AnchorState, KeyAreaMark, Link, OpenId, Superblock},
};

/// How often a disk is judged: what a crash has left under way is one request.
const JUDGED: usize = 3;

/// An open that goes on with an anchor.
pub(crate) struct Opening<'a, A> {
    with: AnchorUse<'a, A>,
    key: AnchorKey,
    /// Where the volume's key was had from.
    key_area: Option<KeyAreaMark>,
    /// What it held at first.
    found: Held,
    /// Where the next body goes.
    next: Beginning,
    /// What it holds, if that is a body of the volume.
    held: Option<AnchorBody>,
    is_committed: bool,
    /// Who was found to have changed it since the disk was judged, each time.
    changed: Vec<AnchorError>,
}

impl<'a, A: Anchor> Opening<'a, A> {
    /// Asks the anchor. Before anything is written.
    pub(crate) async fn begin(
        with: AnchorUse<'a, A>,
        key: &AnchorKey,
        (superblock, key_area): (&Superblock, Option<KeyAreaMark>),
    ) -> Result<Self, AnchorError> {
        let found = exchange::load(with.anchor, &superblock.uuid).await?;
        let held = match (with.purpose, exchange::whole(&found, key, &superblock.uuid)) {
            (AnchorPurpose::Keep | AnchorPurpose::End, held) => Some(in_use(held?)?),
            (AnchorPurpose::Begin, Ok(held)) if held.state != AnchorState::MovedAway => {
                let (generation, host) = (held.generation, held.host.to_string());
                return Err(AnchorError::Present { generation, host, seconds: held.written_seconds });
            }
            (AnchorPurpose::Begin, Err(e)) if e != AnchorError::Absent && !is_bare(&e) => return Err(e),
            // With another place, or one that was left, an older state would be taken for the newest.
            (AnchorPurpose::Begin, _) if superblock.is_anchored() => return Err(AnchorError::Begun),
            // A counter that has counted for the volume: so would it here.
            (AnchorPurpose::Begin, Err(e)) if is_bare(&e) => return Err(e),
            // What is whole and somebody else's is not written over, whatever is accepted of our own.
            (AnchorPurpose::Reset, Err(e)) if !may_be_reset(&e, with.anchor) => return Err(e),
            // How often there was a reset is known where an older body is.
            (AnchorPurpose::Begin | AnchorPurpose::Reset, held) => {
                held.ok().or_else(|| exchange::older(&found, key, &superblock.uuid))
            }
        };
        let next = Beginning { expected: found.counted(), generation: 0, era: 0 };
        Ok(Self { with, key: key.clone(), key_area, found, next, held, is_committed: false, changed: Vec::new() })
    }

    /// Which record of the log the anchor asks for.
    pub(crate) fn asks_for(&self) -> Option<RecordNumber> {
        self.judged().map(|held| held.point.number)
    }

    /// Refuses a state, or a key area, that is older than the anchor says.
    pub(crate) fn judge(
        &self,
        superblock: &Superblock,
        followed_to: RecordNumber,
        link_at_point: Option<Link>,
    ) -> Result<(), AnchorError> {
        let presented = Presented::of(superblock, followed_to, link_at_point);
        let judge = |held| judge(held, &presented).and_then(|()| judge_key_area(held, self.key_area.as_ref()));
        let judged = self.judged().map_or(Ok(()), judge);
        // What was good a moment ago is not older, but somebody else has opened it.
        judged.map_err(|older| self.changed.first().cloned().unwrap_or(older))
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

    /// The superblocks are about to get this id. Both copies are equal to `presented`. `false`: the anchor holds another body by now,
    /// by which the disk is to be judged once more.
    pub(crate) async fn intent(&mut self, presented: &Superblock, id: OpenId) -> Result<bool, AnchorError> {
        let (anchor, uuid) = (self.with.anchor, &presented.uuid);
        let Some(held) = self.judged().copied() else {
            // A crash before the end refuses the disk, and whoever began or reset does so again.
            self.next = exchange::begin(anchor, uuid, &self.found, 0).await?;
            return Ok(true);
        };
        if let Held::Prepared(_) = self.found {
            // What was begun is ended first: else two bodies would have one generation.
            exchange::forward(anchor, uuid, held.generation).await?;
        }
        self.next.expected = held.generation;
        match self.replace(held.intent(presented, id, &self.with.note)).await {
            // Of a counter the body is this disk's own, and nothing tells whose increment that was.
            Err(taken @ AnchorError::Taken { .. })
                if self.changed.len() + 1 < JUDGED && !self.with.anchor.is_counter() =>
            {
                self.ask_again(uuid, taken).await
            }
            done => done.map(|()| true),
        }
    }

    /// Something has taken the place of the body that the disk was judged by: perhaps what an open or a tick before this one has sent,
    /// and a crash kept from hearing of. What another host has put there is not passed: that one may be at its disk.
    async fn ask_again(&mut self, uuid: &[u8; 16], taken: AnchorError) -> Result<bool, AnchorError> {
        let found = exchange::load(self.with.anchor, uuid).await?;
        let held = exchange::whole(&found, &self.key, uuid).and_then(in_use).map_err(|_| taken.clone())?;
        if !held.is_by(&self.with.note) {
            return Err(taken);
        }
        (self.found, self.held) = (found, Some(held));
        self.changed.push(taken);
        Ok(false)
    }

    /// Both copies of the superblock are `written`. Before anything is served.
    pub(crate) async fn commit(&mut self, written: &Superblock) -> Result<(), AnchorError> {
        let (note, now) = (&self.with.note, (written, self.key_area));
        let first = (self.next.generation, self.next.era);
        let body = match (self.with.purpose, self.held) {
            (AnchorPurpose::Keep, Some(held)) => held.commit(written, note),
            (AnchorPurpose::End, Some(held)) => held.moved_away(note),
            (AnchorPurpose::Reset, held) => {
                let resets = held.map_or(0, |held| held.resets) + 1;
                AnchorBody::first(now, first, note, (resets, note.seconds))
            }
            (_, held) => {
                let resets = held.map_or((0, 0), |held| (held.resets, held.reset_seconds));
                AnchorBody::first(now, first, note, resets)
            }
        };
        self.replace(body).await?;
        self.is_committed = true;
        Ok(())
    }

    async fn replace(&mut self, body: AnchorBody) -> Result<(), AnchorError> {
        let (bytes, expected) = (body.seal(&self.key), self.next.expected);
        let change = Change { volume: &body.uuid, expected, bytes, is_again: false };
        exchange::replace(self.with.anchor, &self.key, change).await?;
        (self.next.expected, self.held) = (body.generation, Some(body));
        Ok(())
    }

    /// Who goes on telling the anchor. `None`: it was to be begun, reset or ended, and nothing could be written.
    pub(crate) fn keeper(self) -> Option<AnchorKeeper> {
        let Self { with, key, held, is_committed, .. } = self;
        let is_done = is_committed || with.purpose == AnchorPurpose::Keep;
        held.filter(|_| is_done).map(|held| AnchorKeeper::new(key, held))
    }
}

fn is_bare(e: &AnchorError) -> bool {
    matches!(e, AnchorError::Bare { .. })
}

/// Whether what an anchor says of a volume, which is this, is given up with a reset. The bodies of a counter lie on the volume's own
/// disk, whatever is in them.
fn may_be_reset<A: Anchor>(e: &AnchorError, anchor: &A) -> bool {
    let is_nobodys = anchor.is_counter() && !matches!(e, AnchorError::Away(_));
    is_nobodys || is_bare(e) || matches!(e, AnchorError::Absent | AnchorError::Damaged)
}

/// A body that somebody goes by.
pub(super) fn in_use(held: AnchorBody) -> Result<AnchorBody, AnchorError> {
    let (host, seconds) = (held.host.to_string(), held.written_seconds);
    if held.state == AnchorState::MovedAway { Err(AnchorError::MovedAway { host, seconds }) } else { Ok(held) }
}

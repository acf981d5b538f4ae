//! What a verified volume has to do with its anchor.

use super::VerifiedVolume;
use crate::{
    Storage, Volume,
    anchor::{
        self, Anchor, AnchorError, AnchorKeeper, AnchorNote, AnchorStatus, AnchorUse, KeyAreaMark, KeyAreaStep,
        MoveError, Opening,
    },
    lifecycle::open_error::OpenError,
    options::OpenOptions,
};

impl VerifiedVolume {
    /// Whether the superblock says that the volume has an anchor. Somebody who has the disk can put back one that does not: whether
    /// there must be one is the caller's to know.
    pub fn is_anchored(&self) -> bool {
        self.newest.superblock.is_anchored()
    }

    /// The secret by which an anchor that is a counter knows that it is asked by who has the volume's key. It says nothing of
    /// that key, and signs no body.
    pub fn anchor_secret(&self) -> &[u8; 32] {
        &self.newest.keys.anchor().secret
    }

    /// Says where the key was had from. With an anchor that knows of key slots nothing is opened whose key was had elsewhere, or from
    /// older slots: who was removed since would open it again.
    pub fn unlocked_by(self, key_area: Option<KeyAreaMark>) -> Self {
        Self { key_area, ..self }
    }

    /// A step of a change of the key slots of a volume that nobody serves: the anchor must permit the area that lies there.
    pub async fn keep_key_area<A: Anchor>(
        &self,
        with: (&A, &AnchorNote),
        step: (KeyAreaMark, KeyAreaStep),
    ) -> Result<(), AnchorError> {
        anchor::keep_key_area(with, (self.newest.keys.anchor(), self.uuid()), step).await
    }

    /// What an anchor holds of the volume.
    pub async fn show_anchor<A: Anchor>(&self, anchor: &A) -> Result<AnchorStatus, AnchorError> {
        anchor::show(anchor, self.newest.keys.anchor(), self.uuid()).await
    }

    /// Moves what an anchor holds of the volume to another. Nobody may have it open meanwhile.
    pub async fn move_anchor<A: Anchor, B: Anchor>(
        &self,
        from_to: (&A, &B),
        note: &AnchorNote,
    ) -> Result<AnchorStatus, MoveError> {
        anchor::move_to(from_to, self.newest.keys.anchor(), self.uuid(), note).await
    }

    /// [Opens](Self::open) with an anchor: what is older than it says is refused before anything is written, and nothing is served
    /// before it says that this open is the newest. Who keeps it told while the volume is served; of one that is open
    /// read-only there is nothing to tell.
    pub async fn open_anchored<S: Storage, A: Anchor>(
        self,
        io: &S,
        options: &OpenOptions,
        anchor: AnchorUse<'_, A>,
    ) -> Result<(Volume, AnchorKeeper), OpenError> {
        let now = (&self.newest.superblock, self.key_area);
        let opening = Opening::begin(anchor, self.newest.keys.anchor(), now).await?;
        let mut opening = Some(opening);
        let volume = self.open_with(io, options, &mut opening).await?;
        let keeper = opening.and_then(Opening::keeper).ok_or_else(|| {
            OpenError::Options("nothing can be written to the volume, so its anchor was not written".into())
        })?;
        Ok((volume, keeper))
    }
}

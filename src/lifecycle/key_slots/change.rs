//! A change of key slots, written down: what must be so before, and what an anchor hears of it.

use super::{LockedSlots, SlotError, UnlockedSlots};
use crate::{
    Buf, ByteOffset, Device, DeviceError, Durability, Storage,
    anchor::{Anchor, AnchorError, AnchorNote, KeyAreaMark},
    crypto::keys::Keys,
    format::{KEY_AREA_BYTES, Layout, RawKeyArea},
    lifecycle::{open_error::OpenError, staged::VerifiedVolume},
    options::{Access, OpenOptions},
};
use zerocopy::IntoBytes;

/// Why a change of an anchored volume's slots was not made, or not to its end. `E`: what whoever tells the anchor says.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError<E> {
    /// Of the slots.
    #[error(transparent)]
    Slots(#[from] SlotError),
    /// The anchor does not permit it. Nothing was changed.
    #[error("nothing was changed: {0}")]
    Anchor(E),
    /// The anchor was not told to its end.
    #[error("the change counts, but until the next open or change the anchor permits the slots of before, too: {0}")]
    Behind(E),
}

impl UnlockedSlots {
    /// Looks at the volume anew: it must be one that this program serves, by this key, and its slots as they were read.
    pub async fn prepare<S: Storage>(self, io: &S, separate_meta: bool) -> Result<PreparedSlots, SlotError> {
        let options = OpenOptions { separate_meta, ..OpenOptions::new(Access::ReadOnly, [0; 32]) };
        let volume = VerifiedVolume::read(io, &self.master_key(), &options).await?;
        let now = LockedSlots::read(io).await?;
        let same = |raw: &RawKeyArea| now.as_ref().is_some_and(|now| now.raw.as_bytes() == raw.as_bytes());
        match self.raw.as_ref().filter(|raw| same(raw)).map(|raw| raw.mark()) {
            Some(found) => Ok(PreparedSlots { volume, found, copies: self.seal() }),
            None => Err(SlotError::Changed),
        }
    }

    /// [Prepares](Self::prepare), and writes. Of a volume without an anchor.
    pub async fn write<S: Storage>(self, io: &S, separate_meta: bool) -> Result<(), SlotError> {
        self.prepare(io, separate_meta).await?.write(io).await
    }

    /// The same without a look.
    pub(crate) async fn write_copies<S: Storage>(self, io: &S) -> Result<(), SlotError> {
        self.seal().write(io).await
    }

    fn seal(mut self) -> Copies {
        self.area.generation += 1;
        let raw = self.area.seal(&Keys::derive(&self.master_key(), &self.area.uuid));
        Copies { raw, newest: self.newest }
    }
}

/// Both copies as they are to be.
struct Copies {
    raw: Box<RawKeyArea>,
    newest: usize,
}

impl Copies {
    /// Each durable before the next: first the one that does not count, so that there is a whole one at any moment.
    async fn write<S: Storage>(&self, io: &S) -> Result<(), SlotError> {
        let offsets = Layout::key_area_offsets();
        write_copy(io, offsets[1 - self.newest], &self.raw).await.map_err(SlotError::FirstCopy)?;
        write_copy(io, offsets[self.newest], &self.raw).await.map_err(SlotError::SecondCopy)
    }
}

/// Slots that have been changed, of a volume on which they may be written.
pub struct PreparedSlots {
    volume: VerifiedVolume,
    /// The area that lies there.
    found: KeyAreaMark,
    copies: Copies,
}

impl PreparedSlots {
    /// The volume, verified.
    pub fn volume(&self) -> &VerifiedVolume {
        &self.volume
    }

    /// Writes them. A volume that has an anchor is refused: it would open no more.
    pub async fn write<S: Storage>(self, io: &S) -> Result<(), SlotError> {
        match self.volume.is_anchored() {
            true => Err(OpenError::from(AnchorError::Needed).into()),
            false => self.copies.write(io).await,
        }
    }

    /// Writes them while nobody serves the volume, and has its anchor know it.
    pub async fn write_anchored<S: Storage, A: Anchor>(
        self,
        io: &S,
        with: (&A, &AnchorNote),
    ) -> Result<(), ChangeError<AnchorError>> {
        let volume = &self.volume;
        self.write_kept(io, async |found, next| volume.keep_key_area(with, (found, next)).await).await
    }

    /// Writes them, and has whoever tells the anchor know it: `keep` must have the anchor permit the first of the two, and the second
    /// besides, before anything is written; and the new one alone when all is.
    pub async fn write_kept<S: Storage, E>(
        &self,
        io: &S,
        mut keep: impl AsyncFnMut(KeyAreaMark, Option<KeyAreaMark>) -> Result<(), E>,
    ) -> Result<(), ChangeError<E>> {
        let next = self.copies.raw.mark();
        keep(self.found, Some(next)).await.map_err(ChangeError::Anchor)?;
        self.copies.write(io).await?;
        keep(next, None).await.map_err(ChangeError::Behind)
    }
}

async fn write_copy<S: Storage>(io: &S, at: ByteOffset, raw: &RawKeyArea) -> Result<(), DeviceError> {
    let mut buf = Buf::new(KEY_AREA_BYTES);
    buf.copy_from_slice(raw.as_bytes());
    let (written, _) = io.write(Device::Meta, at, buf, 0..KEY_AREA_BYTES, Durability::Durable).await;
    written.map_err(|errno| DeviceError::new("write", Device::Meta, at, KEY_AREA_BYTES, errno))
}

//! A change of key slots, written down: what must be so before, and what an anchor hears of it.

use super::{LockedSlots, SlotError, UnlockedSlots};
use crate::{
    Buf, ByteOffset, Device, DeviceError, Durability, Storage,
    anchor::{Anchor, AnchorError, AnchorNote, KeyAreaMark, KeyAreaStep},
    crypto::keys::Keys,
    format::{KEY_AREA_BYTES, Layout, RawKeyArea},
    lifecycle::{open_error::OpenError, staged::VerifiedVolume},
    options::{Access, OpenOptions},
};
use std::convert::Infallible;
use zerocopy::IntoBytes;

/// Why a change of an anchored volume's slots was not made, or not to its end. `E`: what whoever tells the anchor says.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError<E> {
    /// Of the slots.
    #[error(transparent)]
    Slots(#[from] SlotError),
    /// The anchor does not permit it. Nothing was changed.
    #[error("no slot was changed: {0}")]
    Anchor(E),
    /// The anchor was not told to its end.
    #[error(
        "the change counts, but the anchor permits the slots of before, too, until a change is told to its end: {0}"
    )]
    Behind(E),
}

impl UnlockedSlots {
    /// Looks at the volume anew: it must be one that this program serves, by this key, and its slots as they were read. Slots in which
    /// nothing was changed can be prepared, too: to [write](PreparedSlots::write) them ends what was cut short.
    pub async fn prepare<S: Storage>(self, io: &S, separate_meta: bool) -> Result<PreparedSlots, SlotError> {
        let options = OpenOptions { separate_meta, ..OpenOptions::new(Access::ReadOnly, [0; 32]) };
        let volume = VerifiedVolume::read(io, &self.master_key(), &options).await?;
        let now = LockedSlots::read(io).await?;
        let same = |raw: &RawKeyArea| self.raw.as_ref().is_some_and(|read| read.as_bytes() == raw.as_bytes());
        match now.filter(|now| same(&now.raw)) {
            Some(LockedSlots { raw, newest, both, .. }) => {
                let behind = (!both).then(|| Layout::key_area_offsets()[1 - newest]);
                Ok(PreparedSlots { volume, found: raw, behind, next: self.is_changed.then(|| self.seal()) })
            }
            None => Err(SlotError::Changed),
        }
    }

    /// [Prepares](Self::prepare), and writes. Of a volume without an anchor.
    pub async fn write<S: Storage>(self, io: &S, separate_meta: bool) -> Result<(), SlotError> {
        self.prepare(io, separate_meta).await?.write(io).await
    }

    /// The same without a look.
    pub(crate) async fn write_copies<S: Storage>(self, io: &S) -> Result<(), SlotError> {
        write_both(io, &self.seal()).await
    }

    fn seal(mut self) -> Box<RawKeyArea> {
        self.area.generation += 1;
        self.area.seal(&Keys::derive(&self.master_key(), &self.area.uuid))
    }
}

/// Slots that may have been changed, of a volume on which they may be written.
pub struct PreparedSlots {
    volume: VerifiedVolume,
    /// The area that counts.
    found: Box<RawKeyArea>,
    /// Where the copy lies that is not as that: older, damaged or unreadable.
    behind: Option<ByteOffset>,
    /// The area with what was changed.
    next: Option<Box<RawKeyArea>>,
}

impl PreparedSlots {
    /// The volume, verified.
    pub fn volume(&self) -> &VerifiedVolume {
        &self.volume
    }

    /// Writes them. A volume that has an anchor is refused: it would open no more.
    pub async fn write<S: Storage>(self, io: &S) -> Result<(), SlotError> {
        if self.volume.is_anchored() {
            return Err(OpenError::from(AnchorError::Needed).into());
        }
        match self.write_kept(io, async |_, _| Ok::<_, Infallible>(())).await {
            Ok(()) => Ok(()),
            Err(ChangeError::Slots(e)) => Err(e),
            Err(ChangeError::Anchor(never) | ChangeError::Behind(never)) => match never {},
        }
    }

    /// Writes them while nobody serves the volume, and has its anchor know it.
    pub async fn write_anchored<S: Storage, A: Anchor>(
        self,
        io: &S,
        with: (&A, &AnchorNote),
    ) -> Result<(), ChangeError<AnchorError>> {
        let volume = &self.volume;
        self.write_kept(io, async |found, step| volume.keep_key_area(with, (found, step)).await).await
    }

    /// Writes them, and has whoever tells the anchor know it: `keep` is given the area that counts, and what the anchor is asked for.
    pub async fn write_kept<S: Storage, E>(
        &self,
        io: &S,
        mut keep: impl AsyncFnMut(KeyAreaMark, KeyAreaStep) -> Result<(), E>,
    ) -> Result<(), ChangeError<E>> {
        let found = self.found.mark();
        // What a command has written that was killed may be in the disk's cache alone.
        sync(io).await.map_err(SlotError::Settle)?;
        if let Some(behind) = self.behind {
            // Here may lie the one that the anchor permits, if it just can't be read for the moment.
            keep(found, KeyAreaStep::Judge).await.map_err(ChangeError::Anchor)?;
            write_copy(io, behind, &self.found).await.map_err(SlotError::Settle)?;
        }
        // Where nothing is changed two bodies are told all the same. Of a counter, one for the next value may be at hand to who has shown
        // an open an older disk.
        let next = self.next.as_ref().unwrap_or(&self.found);
        keep(found, KeyAreaStep::Begin(next.mark())).await.map_err(ChangeError::Anchor)?;
        if self.next.is_some() {
            write_both(io, next).await?;
        }
        keep(next.mark(), KeyAreaStep::End).await.map_err(ChangeError::Behind)
    }
}

/// Each durable before the next, so that there is a whole one at any moment.
async fn write_both<S: Storage>(io: &S, raw: &RawKeyArea) -> Result<(), SlotError> {
    let [a, b] = Layout::key_area_offsets();
    write_copy(io, a, raw).await.map_err(SlotError::FirstCopy)?;
    write_copy(io, b, raw).await.map_err(SlotError::SecondCopy)
}

async fn sync<S: Storage>(io: &S) -> Result<(), DeviceError> {
    io.sync(Device::Meta).await.map_err(|errno| DeviceError::sync(Device::Meta, errno))
}

async fn write_copy<S: Storage>(io: &S, at: ByteOffset, raw: &RawKeyArea) -> Result<(), DeviceError> {
    let mut buf = Buf::new(KEY_AREA_BYTES);
    buf.copy_from_slice(raw.as_bytes());
    let (written, _) = io.write(Device::Meta, at, buf, 0..KEY_AREA_BYTES, Durability::Durable).await;
    written.map_err(|errno| DeviceError::new("write", Device::Meta, at, KEY_AREA_BYTES, errno))
}

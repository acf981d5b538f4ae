//! Key slots: a volume's key lies wrapped in the key area, once for each credential that opens it.
//!
//! ```text
//!   locked ── read both copies: the newest whole one counts
//!     └─ unlock(credential) ── a slot gives the volume's key; by that the area's MAC is verified
//!          └─ add, change, remove ── prepare: the same as read?
//!               └─ settle: both copies are the one that counts, durable
//!                    └─ the anchor permits the new area, too ── write: one copy, durable; then the other
//!                         └─ the anchor permits the new area alone
//! ```
//!
//! A crash at any step leaves a whole copy, of before or after, and an anchor that permits it: an anchor drops an area only while
//! both copies hold one that it goes on to permit. Nobody but these commands writes the area, so a volume may be in use meanwhile;
//! two of them at a time are kept apart by the caller.

mod change;

pub use self::change::{ChangeError, PreparedSlots};
use crate::{
    Buf, ByteOffset, Device, DeviceError, MasterKey, Storage,
    anchor::KeyAreaMark,
    crypto::keys::MIN_KEY_BYTES,
    crypto::{
        keys::Keys,
        wrapping::{Credential, NoMemory, VOLUME_KEY_BYTES, VolumeKey},
    },
    format::{Feature, KEY_AREA_BYTES, KeyArea, KeySlot, Label, Layout, RawKeyArea, Superblock, master_key, uuid_text},
    lifecycle::{open_error::OpenError, staged::VerifiedVolume, superblocks::read_copies},
    options::{Access, OpenOptions},
};
pub use crate::{
    crypto::wrapping::{GuessCost, MAX_PASSPHRASE_BYTES, Passphrase, PassphraseLength},
    format::{KEY_SLOTS, NewSlot, SlotKind},
};
use serde::Serialize;
use std::ops::Deref;
use zerocopy::{FromBytes, IntoBytes};
use zeroize::Zeroizing;

/// A slot in use, as can be seen without a key.
#[derive(Clone, Debug, Serialize)]
pub struct SlotInfo {
    /// From 0 to 7.
    pub slot: usize,
    /// What opens it.
    #[serde(flatten)]
    pub kind: SlotKind,
    /// When it was made, in seconds since 1970.
    pub made_seconds: u64,
    /// Its name, for people.
    pub label: Label,
}

/// Why the slots can't be changed.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// All are in use.
    #[error("all {KEY_SLOTS} key slots of volume {0} on the metadata device are in use: remove one first")]
    Full(String),
    /// The slot is empty, or there is none of this number.
    #[error("key slot {0} of the volume on the metadata device is not in use")]
    Empty(usize),
    /// Nobody who asks could open the volume afterwards.
    #[error("key slot {0} is the one that the given key opens: give the key of another slot to remove it")]
    Own(usize),
    /// There is not the memory for a guess at this cost.
    #[error("a guess at this passphrase takes {0} bytes of memory, which can't be had")]
    Memory(u64),
    /// Somebody has changed the slots, or the volume, since they were read.
    #[error("the key slots were changed by somebody else meanwhile: nothing was written, try again")]
    Changed,
    /// The volume can't be looked at.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The copies can't be made the same and durable: one is older, damaged or unreadable, or the cache is not written out.
    #[error("no slot was changed, as the copies of the key area can't be made the same and durable: {0}")]
    Settle(DeviceError),
    /// A copy could not be written. The other is as it was; which of them counts depends on how much of
    /// the first has arrived.
    #[error("the change may count or not, `key list` shows it: {0}")]
    FirstCopy(DeviceError),
    /// What was to be changed is changed, but the second copy of the area still is as before.
    #[error("the change counts, but the other copy of the key area still holds what was there before: {0}")]
    SecondCopy(DeviceError),
}

/// A volume's slots, before any of them is opened.
pub struct LockedSlots {
    area: KeyArea,
    /// The area as it lies there, for its MAC.
    raw: Box<RawKeyArea>,
    /// The copy that counts.
    newest: usize,
    /// Whether the other one is the same.
    both: bool,
}

/// A volume's slots, and its key.
pub struct UnlockedSlots {
    area: KeyArea,
    /// The area as it was read; none in a new volume.
    raw: Option<Box<RawKeyArea>>,
    key: VolumeKey,
    opened: usize,
    is_changed: bool,
}

/// The master key of the volume that lies there, for [`open`](crate::open::open): the credential
/// itself, unless the volume has key slots.
///
/// # Errors
/// [`OpenError::NoKeySlots`] for a passphrase where there are none, [`OpenError::NoSlotOpens`], and
/// what makes the slots unreadable. A volume that is none or damaged is left to whoever opens it.
pub async fn unlock<'c, S: Storage>(io: &S, credential: &'c Credential) -> Result<Unlocked<'c>, OpenError> {
    match (LockedSlots::read(io).await?, credential) {
        (Some(slots), credential) => {
            let (copies_agree, area) = (slots.copies_agree(), slots.raw.mark());
            let key = slots.unlock(credential)?.master_key();
            Ok(Unlocked::Slot { key, area, copies_agree })
        }
        (None, Credential::Key(key)) => Ok(Unlocked::Key(key)),
        (None, Credential::Passphrase(_)) => Err(why_no_slots(io).await),
    }
}

/// What an open says of what has no superblock, or an unknown one. Any key serves for that.
async fn why_no_slots<S: Storage>(io: &S) -> OpenError {
    let key = MasterKey::new(&[0; MIN_KEY_BYTES]).expect("as long as a key must be");
    match VerifiedVolume::read(io, &key, &OpenOptions::new(Access::ReadOnly, [0; 32])).await {
        Ok(_) | Err(OpenError::WrongKey { .. }) => OpenError::NoKeySlots,
        Err(e) => e,
    }
}

/// A volume's master key, and where it was had from.
pub enum Unlocked<'c> {
    /// The credential itself.
    Key(&'c MasterKey),
    /// A key slot.
    Slot {
        /// The key that lay wrapped there.
        key: MasterKey,
        /// Which key area that slot is in.
        area: KeyAreaMark,
        /// Whether both copies of the key area say the same.
        copies_agree: bool,
    },
}

impl Unlocked<'_> {
    /// The key area that the key was had from: what an [open](VerifiedVolume::unlocked_by) has to know.
    pub fn area(&self) -> Option<KeyAreaMark> {
        if let Self::Slot { area, .. } = self { Some(*area) } else { None }
    }

    /// Whether one copy of the key area is older than the other, damaged or unreadable.
    pub fn has_one_copy(&self) -> bool {
        matches!(self, Self::Slot { copies_agree: false, .. })
    }
}

impl Deref for Unlocked<'_> {
    type Target = MasterKey;

    fn deref(&self) -> &MasterKey {
        match self {
            Self::Key(key) => key,
            Self::Slot { key, .. } => key,
        }
    }
}

impl LockedSlots {
    /// Those of the volume on the metadata device, by its newest superblock; `None` where it has none.
    pub async fn read<S: Storage>(io: &S) -> Result<Option<Self>, OpenError> {
        let superblocks = read_copies(io).await?;
        let whole = superblocks.raw.iter().filter_map(|raw| raw.parse().ok());
        let Some(superblock) = whole.max_by_key(|superblock| superblock.epoch) else { return Ok(None) };
        if !superblock.features().has(Feature::KeyArea) {
            return Ok(None);
        }
        match Self::of(io, &superblock).await {
            // A change that has just gone from one copy to the other: each was torn when it was looked at.
            Err(OpenError::KeyAreaDamaged { .. }) => Self::of(io, &superblock).await.map(Some),
            slots => slots.map(Some),
        }
    }

    async fn of<S: Storage>(io: &S, superblock: &Superblock) -> Result<Self, OpenError> {
        let mut found: Vec<Self> = Vec::with_capacity(2);
        let (mut unreadable, mut unknown) = (None, None);
        for (copy, at) in Layout::key_area_offsets().into_iter().enumerate() {
            match read_copy(io, at).await {
                Ok(raw) => match raw.parse() {
                    Ok(Some(area)) if area.uuid == superblock.uuid => {
                        found.push(Self { area, raw, newest: copy, both: false });
                    }
                    Ok(_) => {}
                    Err(e) => unknown = Some(e),
                },
                Err(e) => unreadable = Some(e),
            }
        }
        // A copy that is not understood may be the newer one.
        if let Some(unknown) = unknown {
            return Err(unknown.into());
        }
        let same = matches!(&found[..], [a, b] if a.raw.as_bytes() == b.raw.as_bytes());
        if matches!(&found[..], [a, b] if a.area.generation == b.area.generation && !same) {
            return Err(OpenError::Tampered { what: "key area" });
        }
        let newest = found.into_iter().max_by_key(|copy| copy.area.generation);
        match (newest, unreadable) {
            (Some(newest), _) => Ok(Self { both: same, ..newest }),
            (None, Some(e)) => Err(e.into()),
            (None, None) => Err(OpenError::KeyAreaDamaged { uuid: uuid_text(&superblock.uuid) }),
        }
    }

    /// Those in use.
    pub fn list(&self) -> Vec<SlotInfo> {
        let used = self.area.slots.iter().enumerate().filter_map(|(slot, used)| Some((slot, used.as_ref()?)));
        let info = |(slot, KeySlot { kind, made_seconds, label, .. }): (usize, &KeySlot)| SlotInfo {
            slot,
            kind: *kind,
            made_seconds: *made_seconds,
            label: *label,
        };
        used.map(info).collect()
    }

    /// Whether both copies say the same. A crash in the middle of a change leaves the older one,
    /// until the next change, or whoever makes the same once more.
    pub fn copies_agree(&self) -> bool {
        self.both
    }

    /// Opens the first slot that this credential opens.
    pub fn unlock(self, credential: &Credential) -> Result<UnlockedSlots, OpenError> {
        let Self { area, raw, .. } = self;
        let (uuid, mut too_much) = (area.uuid, None);
        for (number, slot) in area.slots.iter().enumerate() {
            let Some(slot) = slot else { continue };
            match slot.unwrap(credential, (&uuid, number)) {
                Ok(None) => {}
                Ok(Some(key)) if raw.verify(&Keys::derive(&master_key(&key), &uuid)) => {
                    return Ok(UnlockedSlots { area, raw: Some(raw), key, opened: number, is_changed: false });
                }
                Ok(Some(_)) => return Err(OpenError::Tampered { what: "key area" }),
                // A later one may ask for less.
                Err(NoMemory) => too_much = too_much.max(Some(slot.kind.memory_bytes())),
            }
        }
        Err(match too_much {
            Some(needed) => OpenError::PassphraseMemory { needed },
            None => OpenError::NoSlotOpens { uuid: uuid_text(&uuid) },
        })
    }
}

impl UnlockedSlots {
    pub(crate) fn uuid(&self) -> [u8; 16] {
        self.area.uuid
    }

    /// The key of the volume.
    pub fn master_key(&self) -> MasterKey {
        master_key(&self.key)
    }

    /// The slot that was opened.
    pub fn opened(&self) -> usize {
        self.opened
    }

    /// Wraps the volume's key for one more credential, in the first slot that is free: its number.
    pub fn add(&mut self, credential: &Credential, new: &NewSlot) -> Result<usize, SlotError> {
        let free = self.area.slots.iter().position(Option::is_none);
        let free = free.ok_or_else(|| SlotError::Full(uuid_text(&self.area.uuid)))?;
        self.fill(free, credential, new).map(|()| free)
    }

    /// Has the opened slot opened by another credential.
    pub fn change(&mut self, credential: &Credential, new: &NewSlot) -> Result<(), SlotError> {
        self.fill(self.opened, credential, new)
    }

    /// Empties a slot; not the opened one: whoever asks keeps a way in.
    pub fn remove(&mut self, slot: usize) -> Result<(), SlotError> {
        if slot == self.opened {
            return Err(SlotError::Own(slot));
        }
        let emptied = self.area.slots.get_mut(slot).and_then(Option::take);
        emptied.map(|_| self.is_changed = true).ok_or(SlotError::Empty(slot))
    }

    fn fill(&mut self, slot: usize, credential: &Credential, new: &NewSlot) -> Result<(), SlotError> {
        let wrapped = KeySlot::wrap(credential, new, (&self.area.uuid, slot), &self.key);
        self.area.slots[slot] = Some(wrapped.map_err(|NoMemory| SlotError::Memory(new.cost.memory_bytes()))?);
        self.is_changed = true;
        Ok(())
    }
}

/// A key area with one slot, and the volume's key that is wrapped there, 32 fresh random bytes: for a
/// new volume of this UUID ([`format_with_slots`](crate::create::format_with_slots)).
pub fn first(
    (uuid, key): (&[u8; 16], &[u8; VOLUME_KEY_BYTES]),
    credential: &Credential,
    new: &NewSlot,
) -> Result<UnlockedSlots, SlotError> {
    let area = KeyArea { uuid: *uuid, generation: 0, slots: [const { None }; KEY_SLOTS] };
    let mut slots = UnlockedSlots { area, raw: None, key: Zeroizing::new(*key), opened: 0, is_changed: false };
    slots.add(credential, new)?;
    Ok(slots)
}

async fn read_copy<S: Storage>(io: &S, at: ByteOffset) -> Result<Box<RawKeyArea>, DeviceError> {
    let (read, buf) = io.read(Device::Meta, at, Buf::new(KEY_AREA_BYTES), 0..KEY_AREA_BYTES).await;
    read.map_err(|errno| DeviceError::new("read", Device::Meta, at, KEY_AREA_BYTES, errno))?;
    Ok(Box::new(RawKeyArea::read_from_bytes(&buf).expect("the buffer is as long as the struct")))
}

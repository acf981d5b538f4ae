//! The key area: the volume's key, wrapped for each of those who may open it.

use super::{KeyAreaMark, Label, Unknown};
use crate::crypto::{
    keys::{Digest, Keys, Mac, MasterKey},
    wrapping::{Credential, GuessCost, NoMemory, VolumeKey, WRAPPED_BYTES, WrappingKey},
};
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use std::mem::offset_of;
use zerocopy::{
    FromBytes, FromZeros as _, Immutable, IntoBytes, KnownLayout,
    little_endian::{U32, U64},
};

/// Bytes of a copy.
pub(crate) const KEY_AREA_BYTES: usize = 32 << 10;
/// Slots of an area.
pub const KEY_SLOTS: usize = 8;
const MAGIC: [u8; 8] = *b"UBLKIKEY";
/// Its own count, beside that of the superblock.
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 768;

/// 4 kind, 4 + 4 + 4 cost of a guess, 8 made, 32 label, 32 salt, 24 nonce, 48 wrapped key, 3840
/// reserved: 4000 bytes.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(crate) struct RawSlot {
    kind: U32,
    memory_kib: U32,
    passes: U32,
    lanes: U32,
    made: U64,
    label: [u8; 32],
    salt: [u8; 32],
    nonce: [u8; 24],
    wrapped: [u8; WRAPPED_BYTES],
    reserved: [u8; 3840],
}
const _: () = assert!(size_of::<RawSlot>() == 4000);
const _: () = assert!(offset_of!(RawSlot, salt) == 56 && offset_of!(RawSlot, wrapped) == 112);

/// 8 magic, 4 version, 4 reserved, 16 UUID, 8 generation, 664 reserved, 32 checksum, 32 MAC: 768
/// bytes. Then 8 slots of 4000 bytes: 32 KiB.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(crate) struct RawKeyArea {
    magic: [u8; 8],
    version: U32,
    reserved0: U32,
    uuid: [u8; 16],
    generation: U64,
    reserved: [u8; 664],
    checksum: Digest,
    mac: Mac,
    slots: [RawSlot; KEY_SLOTS],
}
const _: () = assert!(size_of::<RawKeyArea>() == KEY_AREA_BYTES);
const _: () = assert!(offset_of!(RawKeyArea, checksum) == 704 && offset_of!(RawKeyArea, slots) == HEADER_BYTES);

/// What a slot is opened with.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum SlotKind {
    /// A key file, or a key from a keyring.
    KeyFile,
    /// A passphrase, at this cost a guess.
    Passphrase(GuessCost),
}

/// What is in the place of a cost where there is none.
const NO_COST: GuessCost = GuessCost { memory_kib: 0, passes: 0, lanes: 0 };

impl SlotKind {
    /// Bytes of memory that trying a credential takes.
    pub(crate) fn memory_bytes(self) -> u64 {
        match self {
            Self::KeyFile => 0,
            Self::Passphrase(cost) => cost.memory_bytes(),
        }
    }
}

/// A slot in use.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct KeySlot {
    pub(crate) kind: SlotKind,
    /// When it was made, in seconds since 1970.
    pub(crate) made_seconds: u64,
    /// Its name, for people.
    pub(crate) label: Label,
    salt: [u8; 32],
    nonce: [u8; 24],
    wrapped: [u8; WRAPPED_BYTES],
}

/// All slots of a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct KeyArea {
    pub(crate) uuid: [u8; 16],
    /// Counts the changes.
    pub(crate) generation: u64,
    pub(crate) slots: [Option<KeySlot>; KEY_SLOTS],
}

/// What [`Unknown`] calls this struct.
const OF: &str = "key area";

/// A field of it that no known version allows.
fn odd(field: &'static str) -> Unknown {
    Unknown::Field { of: OF, field }
}

impl RawKeyArea {
    /// What it says, not authenticated; `None` where there is no whole area.
    pub(crate) fn parse(&self) -> Result<Option<KeyArea>, Unknown> {
        if self.magic != MAGIC || self.checksum != self.sum() {
            return Ok(None);
        }
        if self.version.get() != VERSION {
            return Err(Unknown::KeyAreaVersion(self.version.get()));
        }
        Unknown::refuse_reserved(OF, offset_of!(Self, reserved0), self.reserved0.as_bytes())?;
        Unknown::refuse_reserved(OF, offset_of!(Self, reserved), &self.reserved)?;
        if self.generation.get() > u64::MAX / 2 {
            return Err(odd("generation"));
        }
        let mut slots = [const { None }; KEY_SLOTS];
        for (number, (slot, raw)) in slots.iter_mut().zip(&self.slots).enumerate() {
            *slot = raw.parse(number)?;
        }
        Ok(Some(KeyArea { uuid: self.uuid, generation: self.generation.get(), slots }))
    }

    /// Whether it was written by somebody who has the volume's key.
    pub(crate) fn verify(&self, keys: &Keys) -> bool {
        keys.key_area().verify(&self.sum(), &self.mac)
    }

    /// What an anchor holds of it. Of one that is whole.
    pub(crate) fn mark(&self) -> KeyAreaMark {
        KeyAreaMark { generation: self.generation.get(), digest: self.checksum }
    }

    /// What the MAC is of, in place of 32 KiB with a gap; the checksum is the same.
    fn sum(&self) -> Digest {
        let (header, zeros) = (&self.as_bytes()[..offset_of!(Self, checksum)], [0; 64]);
        Sha256::new().chain_update(header).chain_update(zeros).chain_update(self.slots.as_bytes()).finalize().into()
    }
}

impl RawSlot {
    fn parse(&self, number: usize) -> Result<Option<KeySlot>, Unknown> {
        let cost = GuessCost { memory_kib: self.memory_kib.get(), passes: self.passes.get(), lanes: self.lanes.get() };
        let kind = match self.kind.get() {
            0 => {
                let from = HEADER_BYTES + number * size_of::<Self>();
                return Unknown::refuse_reserved(OF, from, self.as_bytes()).map(|()| None);
            }
            1 if cost == NO_COST => SlotKind::KeyFile,
            2 if cost.is_bounded() => SlotKind::Passphrase(cost),
            1 | 2 => return Err(odd("cost of a guess")),
            kind => return Err(Unknown::SlotKind(kind)),
        };
        let from = HEADER_BYTES + number * size_of::<Self>() + offset_of!(Self, reserved);
        Unknown::refuse_reserved(OF, from, &self.reserved)?;
        Ok(Some(KeySlot {
            kind,
            made_seconds: self.made.get(),
            label: Label::parse(&self.label).ok_or(odd("label of a slot"))?,
            salt: self.salt,
            nonce: self.nonce,
            wrapped: self.wrapped,
        }))
    }
}

impl KeyArea {
    /// The bytes, with checksum and MAC.
    pub(crate) fn seal(&self, keys: &Keys) -> Box<RawKeyArea> {
        let mut raw = Box::new(RawKeyArea::new_zeroed());
        raw.magic = MAGIC;
        raw.version = U32::new(VERSION);
        raw.uuid = self.uuid;
        raw.generation = U64::new(self.generation);
        for (raw, slot) in raw.slots.iter_mut().zip(&self.slots) {
            if let Some(slot) = slot {
                *raw = slot.raw();
            }
        }
        raw.checksum = raw.sum();
        raw.mac = keys.key_area().sign(&raw.checksum);
        raw
    }
}

/// What of a new slot is drawn or said beforehand.
#[derive(Clone, Debug)]
pub struct NewSlot {
    /// What a guess costs, where it is a passphrase.
    pub cost: GuessCost,
    /// When it is made, in seconds since 1970.
    pub made_seconds: u64,
    /// Its name, for people; may be empty.
    pub label: Label,
    /// Fresh random bytes.
    pub salt: [u8; 32],
    /// Fresh random bytes.
    pub nonce: [u8; 24],
}

impl KeySlot {
    /// Wraps a volume's key for slot `number`.
    pub(crate) fn wrap(
        credential: &Credential,
        new: &NewSlot,
        (uuid, number): (&[u8; 16], usize),
        key: &VolumeKey,
    ) -> Result<Self, NoMemory> {
        let NewSlot { cost, made_seconds, label, salt, nonce } = *new;
        let kind = match credential {
            Credential::Key(_) => SlotKind::KeyFile,
            Credential::Passphrase(_) => SlotKind::Passphrase(cost),
        };
        let mut slot = Self { kind, made_seconds, label, salt, nonce, wrapped: [0; WRAPPED_BYTES] };
        let wrapping = slot.wrapping_key(credential)?.expect("a slot of the credential's own kind");
        slot.wrapped = wrapping.wrap(key, &nonce, &slot.bound_to(uuid, number));
        Ok(slot)
    }

    /// The volume's key, if this credential opens the slot. A passphrase is stretched for it.
    pub(crate) fn unwrap(
        &self,
        credential: &Credential,
        (uuid, number): (&[u8; 16], usize),
    ) -> Result<Option<VolumeKey>, NoMemory> {
        let wrapping = self.wrapping_key(credential)?;
        Ok(wrapping.and_then(|wrapping| wrapping.unwrap(&self.wrapped, &self.nonce, &self.bound_to(uuid, number))))
    }

    fn wrapping_key(&self, credential: &Credential) -> Result<Option<WrappingKey>, NoMemory> {
        Ok(match (credential, self.kind) {
            (Credential::Key(key), SlotKind::KeyFile) => Some(WrappingKey::of_key(key, &self.salt)),
            (Credential::Passphrase(passphrase), SlotKind::Passphrase(cost)) => {
                Some(WrappingKey::of_passphrase(passphrase, &self.salt, cost)?)
            }
            _ => None,
        })
    }

    /// All that the slot says before the wrapped key, and whose it is: a slot is of no use elsewhere.
    fn bound_to(&self, uuid: &[u8; 16], number: usize) -> Vec<u8> {
        let raw = self.raw();
        let said = &raw.as_bytes()[..offset_of!(RawSlot, wrapped)];
        [&b"ublk-integrity v1 key slot"[..], uuid, &(number as u32).to_le_bytes(), said].concat()
    }

    fn raw(&self) -> RawSlot {
        let (kind, cost) = match self.kind {
            SlotKind::KeyFile => (1, NO_COST),
            SlotKind::Passphrase(cost) => (2, cost),
        };
        RawSlot {
            kind: U32::new(kind),
            memory_kib: U32::new(cost.memory_kib),
            passes: U32::new(cost.passes),
            lanes: U32::new(cost.lanes),
            made: U64::new(self.made_seconds),
            label: self.label.bytes(),
            salt: self.salt,
            nonce: self.nonce,
            wrapped: self.wrapped,
            reserved: [0; 3840],
        }
    }
}

/// The volume's key, as that from which all others are derived.
pub(crate) fn master_key(key: &VolumeKey) -> MasterKey {
    MasterKey::new(&**key).expect("32 bytes are enough")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::wrapping::Passphrase;
    use zeroize::Zeroizing;

    const UUID: [u8; 16] = [1; 16];

    fn key() -> VolumeKey {
        Zeroizing::new([9; 32])
    }

    fn keys() -> Keys {
        Keys::derive(&master_key(&key()), &UUID)
    }

    fn new(salt: u8) -> NewSlot {
        let cost = GuessCost { memory_kib: 64, passes: 1, lanes: 1 };
        NewSlot { cost, made_seconds: 77, label: "rescue".parse().unwrap(), salt: [salt; 32], nonce: [salt; 24] }
    }

    fn file(byte: u8) -> Credential {
        Credential::Key(MasterKey::new(&[byte; 32]).unwrap())
    }

    fn passphrase(text: &str) -> Credential {
        Credential::Passphrase(Passphrase::new(text.as_bytes()).unwrap())
    }

    fn area() -> KeyArea {
        let mut slots = [const { None }; KEY_SLOTS];
        slots[0] = Some(KeySlot::wrap(&file(1), &new(1), (&UUID, 0), &key()).unwrap());
        slots[5] = Some(KeySlot::wrap(&passphrase("word"), &new(2), (&UUID, 5), &key()).unwrap());
        KeyArea { uuid: UUID, generation: 3, slots }
    }

    #[test]
    fn an_area_is_read_as_it_was_sealed() {
        let raw = area().seal(&keys());
        assert_eq!(raw.parse(), Ok(Some(area())));
        assert!(raw.verify(&keys()));
        assert!(!raw.verify(&Keys::derive(&MasterKey::new(&[8; 32]).unwrap(), &UUID)));
    }

    #[test]
    fn each_slot_is_opened_by_its_own_credential_and_in_its_own_place() {
        let KeyArea { slots, .. } = area();
        let (by_file, by_word) = (slots[0].as_ref().unwrap(), slots[5].as_ref().unwrap());
        let opens = |slot: &KeySlot, credential: &Credential, number| {
            slot.unwrap(credential, (&UUID, number)).unwrap().is_some_and(|found| found == key())
        };
        assert!(opens(by_file, &file(1), 0) && opens(by_word, &passphrase("word"), 5));
        assert!(!opens(by_file, &file(2), 0) && !opens(by_word, &passphrase("Word"), 5));
        assert!(!opens(by_file, &passphrase("word"), 0) && !opens(by_word, &file(1), 5));
        assert!(!opens(by_file, &file(1), 1) && !opens(by_word, &passphrase("word"), 0));
        assert!(by_file.unwrap(&file(1), (&[2; 16], 0)).unwrap().is_none(), "another volume's");
        let cheaper = KeySlot {
            kind: SlotKind::Passphrase(GuessCost { memory_kib: 32, passes: 1, lanes: 1 }),
            ..by_word.clone()
        };
        assert!(!opens(&cheaper, &passphrase("word"), 5));
    }

    #[test]
    fn damage_is_told_from_what_is_not_known() {
        let whole = || area().seal(&keys());
        for at in [0, 20, 39, 100, 705, HEADER_BYTES + 60, KEY_AREA_BYTES - 1] {
            let mut raw = whole();
            raw.as_mut_bytes()[at] ^= 1;
            assert_eq!(raw.parse(), Ok(None), "byte {at}");
        }
        let foreign = |change: &dyn Fn(&mut RawKeyArea)| {
            let mut raw = whole();
            change(&mut raw);
            raw.checksum = raw.sum();
            raw.parse().unwrap_err()
        };
        assert_eq!(foreign(&|raw| raw.version = U32::new(2)), Unknown::KeyAreaVersion(2));
        assert_eq!(foreign(&|raw| raw.reserved[3] = 1), Unknown::Reserved { of: OF, at: 43 });
        assert_eq!(foreign(&|raw| raw.reserved0 = U32::new(1)), Unknown::Reserved { of: OF, at: 12 });
        assert_eq!(foreign(&|raw| raw.slots[0].reserved[1] = 1), Unknown::Reserved { of: OF, at: 768 + 161 });
        assert_eq!(foreign(&|raw| raw.slots[1].salt[0] = 1), Unknown::Reserved { of: OF, at: 768 + 4000 + 56 });
        assert_eq!(foreign(&|raw| raw.slots[0].kind = U32::new(3)), Unknown::SlotKind(3));
        assert_eq!(foreign(&|raw| raw.slots[0].passes = U32::new(1)), odd("cost of a guess"));
        assert_eq!(foreign(&|raw| raw.slots[5].memory_kib = U32::new(u32::MAX)), odd("cost of a guess"));
        assert_eq!(foreign(&|raw| raw.slots[5].label[3] = 7), odd("label of a slot"));
        assert_eq!(foreign(&|raw| raw.generation = U64::new(u64::MAX)), odd("generation"));
    }
}

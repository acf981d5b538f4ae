//! The anchor body: what an anchor outside the disk holds of a volume's newest state.

use super::{Link, Unknown};
use crate::{
    Epoch, RecordNumber,
    crypto::keys::{AnchorKey, Digest, Mac},
};
use arrayvec::ArrayString;
use std::mem::offset_of;
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout,
    little_endian::{U32, U64},
};

/// Bytes of a body.
pub const ANCHOR_BODY_BYTES: usize = 512;
/// Most bytes of a host's name.
const HOST_BYTES: usize = 64;
const MAGIC: [u8; 8] = *b"UBLKIANC";
/// Its own count, beside that of the superblock.
const VERSION: u32 = 1;

/// The id that was drawn when a volume was opened for writing.
pub(crate) type OpenId = [u8; 32];

/// 8 magic, 4 version, 4 state, 16 UUID, 8 generation, 32 id, 32 next, 8 number, 32 link, 8 epoch, 8 written, 8 resets, 8 reset,
/// 64 host, 8 generation and 32 digest of the key area, 16 key id, 8 generation and 32 digest of the next one, 8 era,
/// 136 reserved, 32 MAC: 512 bytes.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawBody {
    magic: [u8; 8],
    version: U32,
    state: U32,
    uuid: [u8; 16],
    generation: U64,
    id: OpenId,
    next: OpenId,
    number: U64,
    link: Link,
    epoch: U64,
    written: U64,
    resets: U64,
    reset: U64,
    host: [u8; HOST_BYTES],
    key_area_generation: U64,
    key_area: Digest,
    key_id: [u8; 16],
    next_key_area_generation: U64,
    next_key_area: Digest,
    era: U64,
    reserved: [u8; 136],
    mac: Mac,
}
const _: () = assert!(size_of::<RawBody>() == ANCHOR_BODY_BYTES);
const _: () = assert!(offset_of!(RawBody, number) == 104 && offset_of!(RawBody, host) == 176);
const _: () = assert!(offset_of!(RawBody, key_area_generation) == 240 && offset_of!(RawBody, key_id) == 280);
const _: () = assert!(offset_of!(RawBody, next_key_area_generation) == 296);
const _: () =
    assert!(offset_of!(RawBody, era) == 336 && offset_of!(RawBody, reserved) == 344 && offset_of!(RawBody, mac) == 480);

/// What a volume's life is doing, as the anchor has it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(crate) enum AnchorState {
    /// It is served, was cut off, or was closed.
    Serving = 1,
    /// An open is under way.
    Moving = 2,
    /// Another anchor has it now, or none.
    MovedAway = 3,
}

/// A place in the log that a state must have got to: the number of the next record, and the link that it carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct AnchorPoint {
    pub(crate) number: RecordNumber,
    pub(crate) link: Link,
}

/// Which key area it is: one that was changed since has another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KeyAreaMark {
    /// How often the area was changed, by its own count.
    pub generation: u64,
    /// SHA-256 of all of it but checksum and MAC. Never zeros.
    pub digest: [u8; 32],
}

impl KeyAreaMark {
    /// Zeros stand for none.
    fn of(generation: U64, digest: Digest) -> Result<Option<Self>, BodyError> {
        match digest == [0; 32] {
            true if generation == U64::ZERO => Ok(None),
            true => Err(odd("key area")),
            false => Ok(Some(Self { generation: generation.get(), digest })),
        }
    }

    fn raw(mark: Option<Self>) -> (U64, Digest) {
        mark.map_or((U64::ZERO, [0; 32]), |mark| (U64::new(mark.generation), mark.digest))
    }
}

/// The name of a host, as far as it fits.
pub(crate) type HostName = ArrayString<HOST_BYTES>;

/// What an anchor holds of a volume, authenticated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct AnchorBody {
    pub(crate) state: AnchorState,
    pub(crate) uuid: [u8; 16],
    /// One more with every write.
    pub(crate) generation: u64,
    /// The open that the point belongs to.
    pub(crate) id: OpenId,
    /// The open that is under way.
    pub(crate) next: Option<OpenId>,
    pub(crate) point: AnchorPoint,
    /// For messages, as the three that follow.
    pub(crate) epoch: Epoch,
    pub(crate) written_seconds: u64,
    pub(crate) resets: u64,
    pub(crate) reset_seconds: u64,
    pub(crate) host: HostName,
    /// The key area by which the volume is opened. `None` where it has none, and in what programs have written that did not ask.
    pub(crate) key_area: Option<KeyAreaMark>,
    /// What is being written in its place.
    pub(crate) next_key_area: Option<KeyAreaMark>,
    /// Which of the volume's counters it is for; 0 of a store, and of a counter that has none.
    pub(crate) era: u64,
}

/// Why bytes are no body of a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum BodyError {
    /// Not what this program writes, or changed.
    Damaged,
    /// Whole, of another volume.
    OtherVolume([u8; 16]),
    /// The volume's, by another key.
    OtherKey,
    Unknown(Unknown),
}

/// What [`Unknown`] calls this struct.
const OF: &str = "anchor body";

/// A field of it that no known version allows.
fn odd(field: &'static str) -> BodyError {
    BodyError::Unknown(Unknown::Field { of: OF, field })
}

/// The generation that bytes claim to have, not authenticated: what the next is counted from.
pub(crate) fn claimed_generation(bytes: &[u8; ANCHOR_BODY_BYTES]) -> u64 {
    RawBody::ref_from_bytes(bytes).map_or(0, |raw| raw.generation.get())
}

/// The same of the counter that bytes are for.
pub(crate) fn claimed_era(bytes: &[u8; ANCHOR_BODY_BYTES]) -> u64 {
    RawBody::ref_from_bytes(bytes).map_or(0, |raw| raw.era.get())
}

impl AnchorBody {
    /// The body of the volume with this key and UUID.
    pub(crate) fn verify(bytes: &[u8; ANCHOR_BODY_BYTES], key: &AnchorKey, uuid: &[u8; 16]) -> Result<Self, BodyError> {
        let raw = RawBody::ref_from_bytes(bytes).map_err(|_| BodyError::Damaged)?;
        if raw.magic != MAGIC {
            return Err(BodyError::Damaged);
        }
        if raw.version.get() != VERSION {
            return Err(BodyError::Unknown(Unknown::AnchorVersion(raw.version.get())));
        }
        if raw.uuid != *uuid {
            return Err(BodyError::OtherVolume(raw.uuid));
        }
        if raw.key_id != key.id {
            return Err(BodyError::OtherKey);
        }
        if !key.mac.verify(&bytes[..offset_of!(RawBody, mac)], &raw.mac) {
            return Err(BodyError::Damaged);
        }
        raw.fields()
    }

    /// The bytes, with their MAC.
    pub(crate) fn seal(&self, key: &AnchorKey) -> [u8; ANCHOR_BODY_BYTES] {
        let mut host = [0; HOST_BYTES];
        host[..self.host.len()].copy_from_slice(self.host.as_bytes());
        let (key_area_generation, key_area) = KeyAreaMark::raw(self.key_area);
        let (next_key_area_generation, next_key_area) = KeyAreaMark::raw(self.next_key_area);
        let mut raw = RawBody {
            magic: MAGIC,
            version: U32::new(VERSION),
            state: U32::new(self.state as u32),
            uuid: self.uuid,
            generation: U64::new(self.generation),
            id: self.id,
            next: self.next.unwrap_or_default(),
            number: U64::new(self.point.number.0),
            link: self.point.link,
            epoch: U64::new(self.epoch.0),
            written: U64::new(self.written_seconds),
            resets: U64::new(self.resets),
            reset: U64::new(self.reset_seconds),
            host,
            key_area_generation,
            key_area,
            key_id: key.id,
            next_key_area_generation,
            next_key_area,
            era: U64::new(self.era),
            reserved: [0; 136],
            mac: [0; 32],
        };
        raw.mac = key.mac.sign(&raw.as_bytes()[..offset_of!(RawBody, mac)]);
        zerocopy::transmute!(raw)
    }
}

impl RawBody {
    /// All fields. What is not known here would be lost with the next write.
    fn fields(&self) -> Result<AnchorBody, BodyError> {
        let state = match self.state.get() {
            1 => AnchorState::Serving,
            2 => AnchorState::Moving,
            3 => AnchorState::MovedAway,
            _ => return Err(odd("state")),
        };
        let next = (self.next != [0; 32]).then_some(self.next);
        if next.is_some() != (state == AnchorState::Moving) || self.id == [0; 32] {
            return Err(odd("open id"));
        }
        if self.generation.get() > u64::MAX / 2 {
            return Err(odd("generation"));
        }
        let key_area = KeyAreaMark::of(self.key_area_generation, self.key_area)?;
        let next_key_area = KeyAreaMark::of(self.next_key_area_generation, self.next_key_area)?;
        if next_key_area.is_some() && key_area.is_none() {
            return Err(odd("next key area"));
        }
        Unknown::refuse_reserved(OF, offset_of!(Self, reserved), &self.reserved).map_err(BodyError::Unknown)?;
        let end = self.host.iter().position(|byte| *byte == 0).unwrap_or(HOST_BYTES);
        let host = std::str::from_utf8(&self.host[..end]).ok().filter(|text| !text.contains(char::is_control));
        Ok(AnchorBody {
            state,
            uuid: self.uuid,
            generation: self.generation.get(),
            id: self.id,
            next,
            point: AnchorPoint { number: RecordNumber(self.number.get()), link: self.link },
            epoch: Epoch(self.epoch.get()),
            written_seconds: self.written.get(),
            resets: self.resets.get(),
            reset_seconds: self.reset.get(),
            host: host.and_then(|text| HostName::from(text).ok()).ok_or(odd("host name"))?,
            key_area,
            next_key_area,
            era: self.era.get(),
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{MasterKey, crypto::keys::Keys};

    pub(crate) const UUID: [u8; 16] = [1; 16];

    pub(crate) fn key(byte: u8) -> AnchorKey {
        Keys::derive(&MasterKey::new(&[byte; 32]).unwrap(), &UUID).anchor().clone()
    }

    pub(crate) fn body() -> AnchorBody {
        AnchorBody {
            state: AnchorState::Serving,
            uuid: UUID,
            generation: 7,
            id: [2; 32],
            next: None,
            point: AnchorPoint { number: RecordNumber(9), link: [3; 32] },
            epoch: Epoch(5),
            written_seconds: 1_700_000_000,
            resets: 1,
            reset_seconds: 1_600_000_000,
            host: HostName::from("alpha").unwrap(),
            key_area: None,
            next_key_area: None,
            era: 0,
        }
    }

    pub(crate) fn mark(byte: u8) -> KeyAreaMark {
        KeyAreaMark { generation: byte.into(), digest: [byte; 32] }
    }

    #[test]
    fn a_body_is_read_as_it_was_sealed_and_no_bit_of_it_may_change() {
        let sealed = body().seal(&key(7));
        assert_eq!(AnchorBody::verify(&sealed, &key(7), &UUID), Ok(body()));
        assert_eq!(claimed_generation(&sealed), 7);
        let moving = AnchorBody { state: AnchorState::Moving, next: Some([4; 32]), ..body() };
        assert_eq!(AnchorBody::verify(&moving.seal(&key(7)), &key(7), &UUID), Ok(moving));
        let (key_area, next_key_area) = (Some(mark(3)), Some(mark(4)));
        let changing = AnchorBody { key_area, next_key_area, ..body() };
        for changing in [changing, AnchorBody { next_key_area: None, ..changing }] {
            assert_eq!(AnchorBody::verify(&changing.seal(&key(7)), &key(7), &UUID), Ok(changing));
        }
        assert!(body().seal(&key(7))[240..280].iter().all(|byte| *byte == 0), "as programs wrote it that did not ask");
        let counted = AnchorBody { era: 77, ..body() };
        let bytes = counted.seal(&key(7));
        assert_eq!((AnchorBody::verify(&bytes, &key(7), &UUID), claimed_era(&bytes)), (Ok(counted), 77));
        for bit in 0..ANCHOR_BODY_BYTES * 8 {
            let mut other = sealed;
            other[bit / 8] ^= 1 << (bit % 8);
            assert!(AnchorBody::verify(&other, &key(7), &UUID).is_err(), "bit {bit}");
        }
        assert_eq!(AnchorBody::verify(&sealed, &key(8), &UUID), Err(BodyError::OtherKey));
        assert_eq!(AnchorBody::verify(&sealed, &key(7), &[9; 16]), Err(BodyError::OtherVolume(UUID)));
    }

    #[test]
    fn what_this_program_does_not_know_is_named() {
        let changed = |change: &dyn Fn(&mut RawBody)| {
            let mut raw: RawBody = zerocopy::transmute!(body().seal(&key(7)));
            change(&mut raw);
            raw.mac = key(7).mac.sign(&raw.as_bytes()[..480]);
            AnchorBody::verify(&zerocopy::transmute!(raw), &key(7), &UUID).unwrap_err()
        };
        assert_eq!(changed(&|raw| raw.version = U32::new(2)), BodyError::Unknown(Unknown::AnchorVersion(2)));
        assert_eq!(changed(&|raw| raw.state = U32::new(4)), odd("state"));
        assert_eq!(changed(&|raw| raw.next[3] = 1), odd("open id"));
        assert_eq!(changed(&|raw| raw.state = U32::new(2)), odd("open id"));
        assert_eq!(changed(&|raw| raw.id = [0; 32]), odd("open id"));
        assert_eq!(changed(&|raw| raw.generation = U64::new(u64::MAX)), odd("generation"));
        assert_eq!(changed(&|raw| raw.host[0] = 7), odd("host name"));
        let reserved = |at| BodyError::Unknown(Unknown::Reserved { of: OF, at });
        assert_eq!(changed(&|raw| raw.reserved[2] = 1), reserved(346));
        assert_eq!(changed(&|raw| raw.key_area_generation = U64::new(1)), odd("key area"));
        assert_eq!(changed(&|raw| raw.next_key_area[1] = 1), odd("next key area"));
    }
}

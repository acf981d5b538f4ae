//! Reading and writing the two superblock copies.

use crate::{
    Buf, ByteOffset, Device, DeviceError, Durability, MasterKey, Storage,
    crypto::keys::Keys,
    format::{Layout, PAGE_BYTES, RawSuperblock, SUPERBLOCK_BYTES, Superblock, SuperblockError, uuid_text},
    lifecycle::open_error::OpenError,
};
use zerocopy::{FromBytes, IntoBytes};

/// Both copies as they lie on the device.
pub(crate) struct Copies {
    pub(crate) raw: [RawSuperblock; 2],
    /// Places of those that could be read.
    readable: Vec<ByteOffset>,
    /// Why one of them could not be read: it is like one that is damaged, but may be well tomorrow.
    unreadable: Option<DeviceError>,
}

/// The newest copy, and whether the other must be made equal to it.
pub(crate) struct Newest {
    pub(crate) superblock: Superblock,
    pub(crate) keys: Keys,
    /// Places of copies that are not the newest.
    pub(crate) stale: Vec<ByteOffset>,
    /// Places of those that could be read, be they whole or not.
    pub(crate) readable: Vec<ByteOffset>,
    /// Whether one of them is damaged, not just older.
    pub(crate) damaged: bool,
}

pub(crate) async fn read_copies<S: Storage>(io: &S) -> Result<Copies, DeviceError> {
    let mut buf = Buf::new(PAGE_BYTES);
    let mut copies = [RawSuperblock::unreadable(); 2];
    let (mut readable, mut unreadable) = (Vec::with_capacity(2), None);
    for (copy, offset) in copies.iter_mut().zip(Layout::superblock_offsets()) {
        let result;
        (result, buf) = io.read(Device::Meta, offset, buf, 0..PAGE_BYTES).await;
        match result {
            Ok(()) => {
                *copy = RawSuperblock::read_from_prefix(&buf).expect("a page is large enough").0;
                readable.push(offset);
            }
            Err(errno) if unreadable.is_none() => {
                unreadable = Some(DeviceError::new("read", Device::Meta, offset, PAGE_BYTES, errno))
            }
            Err(errno) => return Err(DeviceError::new("read", Device::Meta, offset, PAGE_BYTES, errno)),
        }
    }
    Ok(Copies { raw: copies, readable, unreadable })
}

/// What is to become of the superblocks. Nothing else writes them, and each update is one of these.
pub(crate) enum SuperblockUpdate<'a> {
    /// Of a new volume: nothing was there.
    First(&'a Superblock),
    /// The copies at these places are damaged or older: they are made equal to the newest.
    Repair(&'a Superblock, &'a [ByteOffset]),
    /// Both copies hold the first of these and move on to the second.
    MoveOn(&'a Superblock, &'a Superblock),
}

/// Writes superblocks: the second copy only once the first is durable, so that at every instant one
/// of them is whole; and but for a new volume none while the other is not whole and newest. `buf`
/// is a page of memory, lent.
///
/// An anchor outside of the volume would hear of [`First`](SuperblockUpdate::First) and
/// [`MoveOn`](SuperblockUpdate::MoveOn) here, before the first write and after the last: these make
/// another state the newest. It would not hear of a repair, here or within `MoveOn`: that writes
/// again what is the newest already.
pub(crate) async fn publish<S: Storage>(
    io: &S,
    keys: &Keys,
    update: SuperblockUpdate<'_>,
    mut buf: Buf,
) -> (Result<(), DeviceError>, Buf) {
    let both = Layout::superblock_offsets();
    match update {
        SuperblockUpdate::First(first) => write(io, &first.seal(keys), &both, buf).await,
        SuperblockUpdate::Repair(newest, stale) => write(io, &newest.seal(keys), stale, buf).await,
        SuperblockUpdate::MoveOn(current, next) => {
            // Copy A is written only while B is whole: a B that has decayed since it was written is
            // made good first.
            let raw = current.seal(keys);
            let read;
            (read, buf) = io.read(Device::Meta, both[1], buf, 0..PAGE_BYTES).await;
            if read.is_err() || buf[..SUPERBLOCK_BYTES] != *raw.as_bytes() {
                let result;
                (result, buf) = write(io, &raw, &both[1..], buf).await;
                if result.is_err() {
                    return (result, buf);
                }
            }
            write(io, &next.seal(keys), &both, buf).await
        }
    }
}

/// Writes one superblock to several places, each durable before the next.
async fn write<S: Storage>(
    io: &S,
    raw: &RawSuperblock,
    places: &[ByteOffset],
    mut buf: Buf,
) -> (Result<(), DeviceError>, Buf) {
    for at in places {
        buf[..SUPERBLOCK_BYTES].copy_from_slice(raw.as_bytes());
        buf[SUPERBLOCK_BYTES..].fill(0);
        let result;
        (result, buf) = io.write(Device::Meta, *at, buf, 0..PAGE_BYTES, Durability::Durable).await;
        if let Err(errno) = result {
            return (Err(DeviceError::new("write", Device::Meta, *at, PAGE_BYTES, errno)), buf);
        }
    }
    (Ok(()), buf)
}

impl Copies {
    /// Chooses the newest copy that verifies. A damaged copy is passed over, one that was tampered
    /// with is not.
    pub(crate) fn newest(&self, master: &MasterKey) -> Result<Newest, OpenError> {
        let mut valid = Vec::with_capacity(2);
        let mut errors = Vec::with_capacity(2);
        for (raw, at) in self.raw.iter().zip(Layout::superblock_offsets()) {
            let keys = Keys::derive(master, &raw.uuid());
            match raw.verify(&keys) {
                Ok(superblock) => valid.push((superblock, keys, at)),
                Err(e) => errors.push((e, raw.uuid(), at)),
            }
        }
        if errors.iter().any(|(e, ..)| *e == SuperblockError::Tampered) {
            return Err(OpenError::Tampered { what: "superblock on the metadata device" });
        }
        if let [(a, ..), (b, ..)] = &valid[..] {
            if a.uuid != b.uuid || (a.epoch == b.epoch && a != b) {
                return Err(OpenError::Tampered {
                    what: "superblock on the metadata device (two copies contradict each other)",
                });
            }
        }
        // A whole copy that this program does not know, or under another key, is not damage that
        // may be repaired away.
        if let Some(unknown) = errors.iter().find_map(|(e, ..)| e.unknown()) {
            return Err(unknown.into());
        }
        if !valid.is_empty() && errors.iter().any(|(e, ..)| *e == SuperblockError::WrongKey) {
            return Err(OpenError::Tampered {
                what: "superblock on the metadata device (two copies contradict each other)",
            });
        }
        let newest = valid.iter().map(|(s, ..)| s.epoch).max();
        let mut stale: Vec<_> = errors.iter().map(|(.., at)| *at).collect();
        stale.extend(valid.iter().filter(|(s, ..)| Some(s.epoch) != newest).map(|(.., at)| *at));
        match valid.into_iter().find(|(s, ..)| Some(s.epoch) == newest) {
            Some((superblock, keys, _)) => {
                let (readable, damaged) = (self.readable.clone(), !errors.is_empty());
                Ok(Newest { superblock, keys, stale, readable, damaged })
            }
            None => Err(self.refusal(&errors)),
        }
    }

    fn refusal(&self, errors: &[(SuperblockError, [u8; 16], ByteOffset)]) -> OpenError {
        let find = |wanted: fn(&SuperblockError) -> bool| errors.iter().find(|(e, ..)| wanted(e));
        if let Some((_, uuid, _)) = find(|e| *e == SuperblockError::WrongKey) {
            return OpenError::WrongKey { uuid: uuid_text(uuid) };
        }
        match (self.unreadable, find(|e| *e == SuperblockError::Damaged)) {
            (Some(why), _) => OpenError::Device(why),
            (None, Some(_)) => OpenError::Damaged,
            (None, None) => OpenError::NotAVolume,
        }
    }
}

//! The superblock: the one place that names the current state of everything.

use super::{
    Feature, Features, Label, Layout, LayoutError, Link, TAG_BYTES, TreeEntry, Unknown,
    version2::{self, OF, RawVersion2, Scrub, Version2, odd},
};
use crate::{
    Epoch, RecordNumber,
    crypto::keys::{Digest, Keys, Mac, TagAlgorithm},
};
use sha2::{Digest as _, Sha256};
use std::mem::offset_of;
use zerocopy::{
    FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout,
    little_endian::{U16, U32, U64},
};

/// Bytes of the struct; it is written at the front of a zeroed 4096-byte page.
pub(crate) const SUPERBLOCK_BYTES: usize = 512;
const MAGIC: [u8; 8] = *b"UBLKINTG";
/// Version 1 knows one flag, and has zeros where version 2 has more fields. It is what is written
/// wherever it says enough: it is what older programs open.
pub(super) const VERSION_1: u32 = 1;
pub(super) const VERSION_2: u32 = 2;

/// The bytes of a superblock copy; says nothing about their truth.
///
/// 8 magic, 4 version, 4 flags, 16 uuid, 4 block size, 2 tag algorithm, 2 tag size, 8 blocks, 8 log
/// size, 4 physical block, 4 reserved: 64 bytes. 8 epoch, 64 root, 8 log begin, 8 record number, 32
/// link, 32 open id, 16 key id: 168. Then 216 of version 2, 32 checksum, 32 MAC: 512 bytes.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(crate) struct RawSuperblock {
    magic: [u8; 8],
    version: U32,
    flags: U32,
    uuid: [u8; 16],
    block_size: U32,
    tag_algorithm: U16,
    tag_size: U16,
    blocks: U64,
    log_size: U64,
    physical_block: U32,
    reserved0: U32,
    epoch: U64,
    root: TreeEntry,
    log_begin: U64,
    record_number: U64,
    link: Link,
    open_id: [u8; 32],
    key_id: [u8; 16],
    version2: RawVersion2,
    checksum: Digest,
    mac: Mac,
}
const _: () = assert!(size_of::<RawSuperblock>() == SUPERBLOCK_BYTES);
const _: () = assert!(offset_of!(RawSuperblock, epoch) == 64 && offset_of!(RawSuperblock, log_begin) == 136);
const _: () = assert!(offset_of!(RawSuperblock, version2) == version2::AT);
const _: () = assert!(offset_of!(RawSuperblock, checksum) == 448);

/// A superblock whose checksum, key id and MAC hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Superblock {
    pub(crate) uuid: [u8; 16],
    pub(crate) layout: Layout,
    pub(crate) tag: TagAlgorithm,
    /// What log records are padded to, in bytes.
    pub(crate) physical_block: u32,
    pub(crate) epoch: Epoch,
    /// Names the root page.
    pub(crate) root: TreeEntry,
    /// Where the live log begins, in bytes ever written to the ring; modulo its size, the place.
    pub(crate) log_begin: u64,
    /// Number of the record expected there.
    pub(crate) record_number: RecordNumber,
    /// Link expected in that record.
    pub(crate) link: Link,
    /// Drawn at every open.
    pub(crate) open_id: [u8; 32],
    /// What version 2 has besides; sealed as it was read.
    pub(crate) version2: Option<(Features, Version2)>,
}

/// Why a copy is no superblock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum SuperblockError {
    /// No magic number here.
    Absent,
    /// The checksum does not hold.
    Damaged,
    /// The checksum holds: it is what somebody wrote, but not what this program knows.
    Unknown(Unknown),
    WrongKey,
    /// Checksum and key id hold, the MAC does not.
    Tampered,
}

impl SuperblockError {
    pub(crate) fn unknown(&self) -> Option<Unknown> {
        if let Self::Unknown(unknown) = self { Some(*unknown) } else { None }
    }
}

impl RawSuperblock {
    /// What stands for a copy that the device can't read: right magic, wrong checksum.
    pub(crate) fn unreadable() -> Self {
        let mut raw = Self::new_zeroed();
        raw.magic = MAGIC;
        raw
    }

    /// Magic, version and checksum, without a key.
    pub(crate) fn check(&self) -> Result<(), SuperblockError> {
        if self.magic != MAGIC {
            return Err(SuperblockError::Absent);
        }
        if self.checksum != self.sum() {
            return Err(SuperblockError::Damaged);
        }
        match self.version.get() {
            VERSION_1 | VERSION_2 => Ok(()),
            v => Err(SuperblockError::Unknown(Unknown::Version(v))),
        }
    }

    /// What the fields say, not authenticated: for `dump`, and as the step before the MAC.
    pub(crate) fn parse(&self) -> Result<Superblock, SuperblockError> {
        self.check()?;
        self.fields().map_err(SuperblockError::Unknown)
    }

    /// All fields. Nothing is passed over: what is not understood here would be lost with
    /// the next superblock.
    fn fields(&self) -> Result<Superblock, Unknown> {
        let version = self.version.get();
        let known = if version == VERSION_1 { &[Feature::SeparateMeta][..] } else { &Feature::ALL };
        let features = Features::parse(self.flags.get(), known)?;
        let code = self.tag_algorithm.get();
        let tag = TagAlgorithm::from_code(code).ok_or(Unknown::TagAlgorithm(code))?;
        let physical = self.physical_block.get();
        if usize::from(self.tag_size.get()) != TAG_BYTES {
            return Err(odd("tag size"));
        }
        if !physical.is_power_of_two() || !(512..=4096).contains(&physical) {
            return Err(odd("record padding"));
        }
        // They only ever grow by one or by a record's length, from small numbers.
        if [self.epoch, self.log_begin, self.record_number].iter().any(|count| count.get() > u64::MAX / 2) {
            return Err(odd("epoch, log position or record number"));
        }
        if self.log_begin.get() % u64::from(physical) != 0 {
            return Err(odd("log position"));
        }
        if !self.root.known(version) {
            return Err(odd("root"));
        }
        Unknown::refuse_reserved(OF, offset_of!(Self, reserved0), self.reserved0.as_bytes())?;
        let version2 = match version {
            VERSION_1 => {
                Unknown::refuse_reserved(OF, version2::AT, self.version2.as_bytes())?;
                None
            }
            _ => Some((features, self.version2.parse(features)?)),
        };
        Ok(Superblock {
            uuid: self.uuid,
            layout: self.layout(features)?,
            tag,
            physical_block: physical,
            epoch: Epoch(self.epoch.get()),
            root: self.root,
            log_begin: self.log_begin.get(),
            record_number: RecordNumber(self.record_number.get()),
            link: self.link,
            open_id: self.open_id,
            version2,
        })
    }

    fn layout(&self, features: Features) -> Result<Layout, Unknown> {
        let field = |error: LayoutError| match error {
            LayoutError::BlockSize => odd("block size"),
            LayoutError::Size | LayoutError::Capacity => odd("number of blocks"),
            LayoutError::LogSize => odd("log size"),
            LayoutError::Place(place) => odd(place),
        };
        let block_size = self.block_size.get();
        let size = self.blocks.get().checked_mul(block_size.into()).ok_or(field(LayoutError::Size))?;
        let separate = features.has(Feature::SeparateMeta);
        let computed = Layout::new(block_size, size, self.log_size.get(), separate).map_err(field)?;
        let places = self.version2.places(features, *computed.places())?;
        computed.with_places(places).map_err(field)
    }

    /// Everything: the only way to a [`Superblock`] that may be believed.
    pub(crate) fn verify(&self, keys: &Keys) -> Result<Superblock, SuperblockError> {
        self.check()?;
        if self.key_id != keys.id() {
            return Err(SuperblockError::WrongKey);
        }
        if !keys.superblock().verify(self.authenticated(), &self.mac) {
            return Err(SuperblockError::Tampered);
        }
        self.parse()
    }

    pub(crate) fn uuid(&self) -> [u8; 16] {
        self.uuid
    }
    pub(crate) fn key_id(&self) -> [u8; 16] {
        self.key_id
    }
    pub(crate) fn open_id(&self) -> [u8; 32] {
        self.open_id
    }
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.get()
    }
    pub(crate) fn version(&self) -> u32 {
        self.version.get()
    }
    fn authenticated(&self) -> &[u8] {
        &self.as_bytes()[..SUPERBLOCK_BYTES - 64]
    }
    fn sum(&self) -> Digest {
        Sha256::digest(self.authenticated()).into()
    }
    fn sign(&mut self, keys: &Keys) {
        self.checksum = self.sum();
        self.mac = keys.superblock().sign(self.authenticated());
    }
}

impl Superblock {
    /// What a reader must know to touch the volume.
    pub(crate) fn features(&self) -> Features {
        let separate =
            if self.layout.separate_meta { Features::of(&[Feature::SeparateMeta]) } else { Features::default() };
        self.version2.map_or(separate, |(features, _)| features)
    }

    /// The same with the sync log or without. Only an empty log goes without: a program that knows
    /// none would take blocks in the live log for what nobody knows.
    pub(crate) fn with_sync_log(self, sync_log: bool) -> Self {
        self.with_feature(Feature::SyncLog, sync_log)
    }

    /// The same with an anchor that holds its newest state, too, or without.
    pub(crate) fn with_anchor(self, anchored: bool) -> Self {
        self.with_feature(Feature::Anchored, anchored)
    }

    fn with_feature(self, feature: Feature, is: bool) -> Self {
        let fields = self.version2.map_or_else(Version2::default, |(_, fields)| fields);
        let features = if is { self.features().with(feature) } else { self.features().without(feature) };
        // How far a scrub was is not worth that older programs don't open it.
        let fields =
            Version2 { scrub: Scrub::default(), ..fields }.if_needed(features).map(|(features, _)| (features, fields));
        Self { version2: fields, ..self }
    }

    /// How far the last verification of the volume is; `None` in version 1, which has no place for it.
    pub(crate) fn scrub(&self) -> Option<Scrub> {
        self.version2.map(|(_, fields)| fields.scrub)
    }

    /// The same with another, where there is a place for it.
    pub(crate) fn with_scrub(self, scrub: Scrub) -> Self {
        Self { version2: self.version2.map(|(features, fields)| (features, Version2 { scrub, ..fields })), ..self }
    }

    /// The same with its key in the key area.
    pub(crate) fn with_key_area(self) -> Self {
        let (features, fields) = self.version2.unwrap_or((self.features(), Version2::default()));
        Self { version2: Some((features.with(Feature::KeyArea), fields)), ..self }
    }

    /// Whether it says that an anchor holds its newest state, too.
    pub(crate) fn is_anchored(&self) -> bool {
        self.features().has(Feature::Anchored)
    }

    /// Whether the live log may hold blocks.
    pub(crate) fn has_sync_log(&self) -> bool {
        self.features().has(Feature::SyncLog)
    }

    /// Bytes that the user says the data device writes atomically.
    pub(crate) fn assumed_atomic_bytes(&self) -> Option<u32> {
        self.version2.and_then(|(_, fields)| fields.assumed_atomic_bytes)
    }

    /// The volume's name; empty where it has none.
    pub(crate) fn label(&self) -> Label {
        self.version2.map_or_else(Label::default, |(_, fields)| fields.label)
    }

    /// The bytes, with checksum and MAC. A superblock of version 1 where nothing of version 2 was
    /// read or set.
    pub(crate) fn seal(&self, keys: &Keys) -> RawSuperblock {
        let places = self.layout.places();
        let version2 = self.version2.map(|(features, fields)| RawVersion2::new(&fields, features, places));
        let mut raw = RawSuperblock {
            magic: MAGIC,
            version: U32::new(if version2.is_some() { VERSION_2 } else { VERSION_1 }),
            flags: U32::new(self.features().bits()),
            uuid: self.uuid,
            block_size: U32::new(self.layout.block_size),
            tag_algorithm: U16::new(self.tag.code()),
            tag_size: U16::new(TAG_BYTES as u16),
            blocks: U64::new(self.layout.blocks),
            log_size: U64::new(self.layout.log_size),
            physical_block: U32::new(self.physical_block),
            reserved0: U32::ZERO,
            epoch: U64::new(self.epoch.0),
            root: self.root,
            log_begin: U64::new(self.log_begin),
            record_number: U64::new(self.record_number.0),
            link: self.link,
            open_id: self.open_id,
            key_id: keys.id(),
            version2: version2.unwrap_or(RawVersion2::ZERO),
            checksum: [0; 32],
            mac: [0; 32],
        };
        raw.sign(keys);
        raw
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        crypto::keys::MasterKey,
        format::{
            ScrubState,
            places::{PageArea, Places},
        },
    };
    use proptest::{prelude::*, sample::subsequence};

    fn keys() -> Keys {
        Keys::derive(&MasterKey::new(&[7; 32]).unwrap(), &[1; 16])
    }

    /// All that may stand together; one of the two that may not is left out.
    fn features() -> impl Strategy<Value = Vec<Feature>> {
        (subsequence(Feature::ALL.to_vec(), 0..=Feature::ALL.len()), any::<bool>()).prop_map(|(mut all, adopting)| {
            all.retain(|f| *f != if adopting { Feature::Releasing } else { Feature::Adopting });
            // Blocks from 0 on are a place that has to be said.
            if all.contains(&Feature::MovedHead) && !all.contains(&Feature::ExplicitPlaces) {
                all.push(Feature::ExplicitPlaces);
            }
            all
        })
    }

    /// Regions one behind the other with gaps, in the order of `order`.
    fn places(layout: &Layout, features: Features, order: &[usize], gaps: &[u64], spare: u64) -> Places {
        let explicit = features.has(Feature::ExplicitPlaces);
        let mut places = *layout.places();
        let mut at = layout.meta_device_bytes().next_multiple_of(1 << 20);
        let mut take = |bytes: u64, gap: u64| {
            let begin = (at + gap * 8192).next_multiple_of(1 << 20);
            at = begin + bytes;
            begin
        };
        for (region, gap) in order.iter().zip(gaps) {
            match region {
                0 if explicit => places.log = take(layout.log_size, *gap),
                1 if explicit => {
                    // Laid out for more: room for growing.
                    let blocks = layout.blocks + spare;
                    let offset = take(blocks * 80, *gap);
                    places.areas[usize::from(spare % 2 == 0)] = PageArea { offset, blocks };
                }
                2 if features.has(Feature::MovedHead) => {
                    (places.head, places.data) = (take(1 << 20, *gap), 0);
                }
                2 if explicit => places.data = take(layout.size(), *gap),
                3 if features.has(Feature::HeaderCopy) => places.header_copy = take(1 << 20, *gap),
                _ => {}
            }
        }
        if features.has(Feature::MovedHead) && !layout.separate_meta {
            // The blocks are where they were before they were ours, in front of all else.
            let moved = layout.size().next_multiple_of(1 << 20);
            places.areas.iter_mut().filter(|area| area.blocks > 0).for_each(|area| area.offset += moved);
            places.log += moved;
            places.head += moved;
            if places.header_copy > 0 {
                places.header_copy += moved;
            }
        }
        places
    }

    fn named(label: &str) -> Label {
        let mut bytes = [0; 32];
        bytes[..label.len()].copy_from_slice(label.as_bytes());
        Label::parse(&bytes).unwrap()
    }

    fn version2(adopting: bool) -> impl Strategy<Value = Version2> {
        let scrub = (any::<[u64; 5]>(), 0u32..5);
        (any::<u64>(), scrub, prop::option::of(9u32..=12), "[a-z\u{e9}\u{4e2d} ]{0,10}").prop_map(
            move |(adopted, ([pass, cursor, begun, ended, bad], state), atomic, label)| Version2 {
                adopted_blocks: if adopting { adopted } else { 0 },
                scrub: Scrub {
                    pass,
                    cursor,
                    begun_seconds: begun,
                    ended_seconds: ended,
                    bad_blocks: bad,
                    state: ScrubState::ALL[state as usize],
                },
                assumed_atomic_bytes: atomic.map(|shift| 1 << shift),
                label: named(&label),
            },
        )
    }

    fn superblocks() -> impl Strategy<Value = Superblock> {
        let order = Just((0..4).collect::<Vec<_>>()).prop_shuffle();
        let layout = (9u32..=12, 2048u64..1 << 24, 16u64..4096, prop::array::uniform4(0u64..999), order, 0u64..9999);
        let state = (prop::array::uniform3(0u64..1 << 62), any::<[[u8; 32]; 2]>());
        (prop::option::of(features()), layout, state).prop_flat_map(|(features, layout, state)| {
            let all = features.clone().unwrap_or_default();
            version2(all.contains(&Feature::Adopting)).prop_map(move |fields| {
                let (shift, blocks, log, gaps, order, spare) = &layout;
                let known = Features::of(&all);
                let separate = known.has(Feature::SeparateMeta);
                let computed = Layout::new(1 << shift, blocks << shift, log * 4096, separate).unwrap();
                let places = places(&computed, known, order, gaps, *spare);
                let ([epoch, log_begin, number], [link, open_id]) = state;
                Superblock {
                    uuid: [1; 16],
                    layout: computed.with_places(places).expect("regions apart"),
                    tag: TagAlgorithm::Blake3,
                    physical_block: 1 << shift,
                    epoch: Epoch(epoch),
                    root: TreeEntry::LOST,
                    log_begin: log_begin >> shift << shift,
                    record_number: RecordNumber(number),
                    link,
                    open_id,
                    version2: features.is_some().then_some((known, fields)),
                }
            })
        })
    }

    proptest! {
        #[test]
        fn what_is_sealed_is_parsed(superblock in superblocks()) {
            let sealed = superblock.seal(&keys());
            prop_assert_eq!(sealed.version(), if superblock.version2.is_some() { 2 } else { 1 });
            prop_assert!(sealed.verify(&keys()) == Ok(superblock));
        }

        /// Nothing that a superblock says is lost by the program that writes the next one.
        #[test]
        fn whatever_verifies_is_sealed_as_it_was(
            superblock in superblocks(),
            changes in prop::collection::vec((8usize..448, any::<u8>()), 0..4),
            bit in prop::option::of((8usize..448, 0u8..8)),
        ) {
            let mut bytes = superblock.seal(&keys()).as_bytes().to_vec();
            // UUID and key id stay, or it is another volume's.
            let fixed = |at: usize| (16..32).contains(&at) || (216..232).contains(&at);
            changes.iter().filter(|(at, _)| !fixed(*at)).for_each(|(at, byte)| bytes[*at] = *byte);
            bit.iter().filter(|(at, _)| !fixed(*at)).for_each(|(at, bit)| bytes[*at] ^= 1 << bit);
            let mut raw = RawSuperblock::read_from_bytes(&bytes).unwrap();
            raw.sign(&keys());
            match raw.verify(&keys()) {
                Ok(parsed) => prop_assert!(parsed.seal(&keys()).as_bytes() == raw.as_bytes(), "{:?}", parsed),
                Err(e) => prop_assert!(e.unknown().is_some(), "{:?}: whole, so not damage", e),
            }
        }

        #[test]
        fn random_bytes_do_no_harm(mut bytes in prop::collection::vec(any::<u8>(), SUPERBLOCK_BYTES), version in 0u32..4) {
            bytes[..8].copy_from_slice(&MAGIC);
            bytes[8..12].copy_from_slice(&version.to_le_bytes());
            let mut raw = RawSuperblock::read_from_bytes(&bytes).unwrap();
            prop_assert!(raw.parse() == Err(SuperblockError::Damaged));
            raw.sign(&keys());
            prop_assert!(matches!(raw.parse(), Err(SuperblockError::Unknown(_))));
        }
    }
}

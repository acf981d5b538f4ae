//! The fuzz targets: one for each thing that is read off the devices. The tests run them, and
//! libFuzzer (`fuzz/`).
//!
//! An input is no image but a script of changes to one, so that it is tens of bytes and nearly
//! every byte of it counts:
//!
//! | bytes | what |
//! |---|---|
//! | 1 | which image: one of the golden ones, one whose metadata is on a device of its own, or one whose log holds blocks |
//! | 1 | bits: what is made good again after the changes, and how the volume is opened |
//! | 4 + n, repeated | a change: area, operation and width, place (two bytes, little-endian), value |
//!
//! Each target has its areas. Without a signature nothing behind the checksums and MACs would be
//! reached: half of the scripts should have one. Whatever lies on the devices is an error or an
//! open volume, never a panic, a hang or too much memory. And whatever a block reads as was once
//! written there, for nobody who changes bytes can make a tag; and what is written to the open
//! volume can be read back, for as long as nobody with the key has changed it.

#![allow(unreachable_pub)] // a program of tests has no outside

use crate::{
    golden::{self, CAN_GROW, SYNC_LOG_CRASHED, VERSION_1, may_read_as},
    sim::{
        Lab, Rng, SimStorage, block_on, format_options,
        image::{self, LOG_OFFSET, PAGE, Page, SUPERBLOCK_BYTES, SUPERBLOCKS, Superblock},
        open_options, reopen,
    },
};
use std::collections::BTreeSet;
use ublk_integrity::{
    Access, Device, OpenOptions, ReadError, RecordNumber,
    create::FormatOptions,
    open::{self, OpenError, Unknown},
};

/// Checksums, MACs, links and digests are made good: as if the holder of the key had
/// written what is there.
const SIGNED: u8 = 1;
/// So is the key id of blocks with another UUID.
const KEY_ID: u8 = 2;
/// The volume is opened as the one that it was.
const EXPECTED_UUID: u8 = 4;
/// The number of the log's next record is known.
const LEAST_RECORD: u8 = 8;
/// There is no more memory than the unchanged image takes.
const LITTLE_MEMORY: u8 = 16;
/// The devices transfer no less than 4096 bytes.
const LARGE_SECTORS: u8 = 32;
const READ_ONLY: u8 = 64;

/// In the place of an area's number: the change is made in all of them.
const EVERYWHERE: u8 = 0x80;
/// More changes say nothing more, and take time.
const MOST_CHANGES: usize = 12;
/// In pages, in the log only, in both, in neither; and the last one is asked for, which may no
/// longer be there.
const BLOCKS: [u64; 8] = [0, 1, 2, 3, 130, 131, 200, 201];

/// The names of the errors that an input has led to.
pub type Reached = BTreeSet<&'static str>;

/// Sorts an error's variants by whether changed bytes can lead to them. A new variant does not
/// compile before it is in one of the two lists.
macro_rules! sort_variants {
    ($error:ident, $all:ident, $name:ident: reached [$($reached:ident)*] never [$($never:ident: $why:literal)*]) => {
        pub const $all: &[&str] = &[$(concat!(stringify!($error), "::", stringify!($reached))),*];
        fn $name(error: &$error) -> &'static str {
            match error {
                $($error::$reached { .. } => concat!(stringify!($error), "::", stringify!($reached)),)*
                $($error::$never { .. } => panic!("{error}: this can't be, for {}", $why),)*
            }
        }
    };
}

sort_variants! { OpenError, REFUSALS, name_of_refusal:
    reached [
        NotAVolume Unknown NotServed Damaged WrongKey Tampered Foreign TooSmall BelowSector Memory OtherVolume OlderState
        Anchor
    ]
    never [
        Options: "options are no bytes of a device"
        Grow: "nobody asks for another size"
        LogUnreadable: "the devices read what they hold"
        Away: "the devices answer"
        Device: "the devices do not fail"
        NoSlotOpens: "an open is given the volume's key"
        NoKeySlots: "an open is given the volume's key"
        KeyAreaDamaged: "an open is given the volume's key"
        PassphraseMemory: "an open is given the volume's key"
    ]
}
sort_variants! { Unknown, UNKNOWNS, name_of_unknown:
    reached [Version Feature TagAlgorithm EntryKind IdentityVersion Reserved Field]
    never [
        KeyAreaVersion: "an open is given the volume's key"
        SlotKind: "an open is given the volume's key"
        AnchorVersion: "no anchor is asked"
    ]
}
sort_variants! { ReadError, READ_ERRORS, name_of_read_error:
    reached [Mismatch BadPage BadRange]
    never [
        Device: "the devices do not fail"
        MayBeOlder: "all of the log can be read"
        NotInPlace: "no write fails"
    ]
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Target {
    /// Both superblock copies.
    Superblock,
    /// The identity block of a data device, and the superblocks that it belongs to.
    Identity,
    /// The records of the live log.
    Record,
    /// The current pages.
    Page,
    /// Recovery on a damaged log: every sector of the ring.
    Recovery,
}

/// An image before it is changed.
struct Image {
    io: SimStorage,
    options: OpenOptions,
    superblock: Superblock,
    pages: Vec<Page>,
    next_record: u64,
    /// What opening it takes, and no byte more.
    least_memory: u64,
}

thread_local! {
    static IMAGES: Vec<Image> = {
        let others = [separate(), golden::image_of(&SYNC_LOG_CRASHED), golden::with_payload(), golden::image_of(&CAN_GROW)];
        VERSION_1.iter().map(golden::image_of).chain(others).map(Image::new).collect()
    };
}

/// No version has a golden image with two devices: today's code makes one.
fn separate() -> (SimStorage, OpenOptions) {
    let format = FormatOptions { separate_meta: true, ..format_options(512) };
    let options = OpenOptions { separate_meta: true, ..open_options(&mut Rng::new(1)) };
    let mut lab = Lab::new(&format, &options);
    golden::fill(&mut lab);
    (lab.io, options)
}

impl Image {
    fn new((io, options): (SimStorage, OpenOptions)) -> Self {
        let superblock = Superblock::newest(&io.disk());
        let pages = superblock.pages(&io.disk());
        let next_record = image::records(&io.disk()).last().expect("a live log").number + 1;
        let mut least_memory = 0;
        let enough = |max_memory_bytes| {
            let options = OpenOptions { max_memory_bytes, ..options.clone() };
            match reopen(&SimStorage::new(io.disk().fork(1)), &options) {
                Err(OpenError::Memory { needed, .. }) => Err(needed),
                other => other.map(|_| ()).map_err(|e| panic!("{e}")),
            }
        };
        while let Err(needed) = enough(least_memory) {
            least_memory = needed;
        }
        Self { io, options, superblock, pages, next_record, least_memory }
    }

    /// How a script's bits want it opened.
    fn options(&self, bits: u8) -> OpenOptions {
        let mut options = self.options.clone();
        if bits & EXPECTED_UUID != 0 {
            options.expected_uuid = Some(self.superblock.uuid);
        }
        if bits & LEAST_RECORD != 0 {
            options.first_not_durable = RecordNumber(self.next_record);
        }
        if bits & LITTLE_MEMORY != 0 {
            options.max_memory_bytes = self.least_memory;
        }
        if bits & READ_ONLY != 0 {
            options.access = Access::ReadOnly;
        }
        options
    }
}

/// A part of a device that a target changes.
struct Area {
    device: Device,
    offset: u64,
    before: Vec<u8>,
    bytes: Vec<u8>,
}

/// One change, as the script says it.
struct Change<'a> {
    area: u8,
    operation: u8,
    place: usize,
    value: &'a [u8],
}

/// Reads a script; one that is cut off ends with its last whole change.
struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    fn take(&mut self, bytes: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(bytes)?;
        self.0 = rest;
        Some(taken)
    }
}

impl<'a> Iterator for Script<'a> {
    type Item = Change<'a>;

    fn next(&mut self) -> Option<Change<'a>> {
        let &[area, operation, low, high] = self.take(4)? else { return None };
        let value = self.take(1 << (operation & 3))?;
        Some(Change { area, operation: operation >> 2, place: u16::from_le_bytes([low, high]).into(), value })
    }
}

impl Change<'_> {
    fn number(bytes: &[u8]) -> u64 {
        bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    fn make(&self, areas: &mut [Area]) {
        let (count, width) = (areas.len(), self.value.len());
        let chosen = if self.area & EVERYWHERE != 0 {
            0..count
        } else {
            usize::from(self.area) % count..usize::from(self.area) % count + 1
        };
        for which in chosen {
            let at = self.place % (areas[which].bytes.len() - width + 1);
            let field = at..at + width;
            match self.operation % 4 {
                0 => areas[which].bytes[field].copy_from_slice(self.value),
                1 => {
                    let sum = Self::number(&areas[which].bytes[field.clone()]).wrapping_add(Self::number(self.value));
                    areas[which].bytes[field].copy_from_slice(&sum.to_le_bytes()[..width]);
                }
                // What was at another place of the area.
                2 => {
                    let from = Self::number(self.value) as usize % (areas[which].bytes.len() - width + 1);
                    let old = areas[which].before[from..from + width].to_vec();
                    areas[which].bytes[field].copy_from_slice(&old);
                }
                // All that was in another area.
                _ => {
                    let from = Self::number(self.value) as usize % count;
                    let bytes = areas[from].before.len().min(areas[which].bytes.len());
                    let old = areas[from].before[..bytes].to_vec();
                    areas[which].bytes[..bytes].copy_from_slice(&old);
                }
            }
        }
    }
}

impl Target {
    pub const ALL: [Self; 5] = [Self::Superblock, Self::Identity, Self::Record, Self::Page, Self::Recovery];

    /// That of its corpus and of its program.
    pub fn name(self) -> &'static str {
        match self {
            Self::Superblock => "superblock",
            Self::Identity => "identity",
            Self::Record => "record",
            Self::Page => "page",
            Self::Recovery => "recovery",
        }
    }

    /// Changes an image as the script says, and does all that is done with a device whose content
    /// is not known.
    pub fn run(self, script: &[u8]) -> Reached {
        let Some((&[image, bits], changes)) = script.split_first_chunk() else { return Reached::new() };
        IMAGES.with(|images| {
            // All others have no identity block.
            let image = if self == Self::Identity { VERSION_1.len() } else { usize::from(image) % images.len() };
            let image = &images[image];
            let io = SimStorage::new(image.io.disk().fork(1));
            self.change(&io, image, bits, Script(changes));
            if bits & LARGE_SECTORS != 0 {
                io.disk().logical = [4096; 2];
            }
            look_at(&io, image, bits)
        })
    }

    fn areas(self, image: &Image) -> Vec<(Device, u64, u64)> {
        let superblocks = SUPERBLOCKS.map(|at| (Device::Meta, at, SUPERBLOCK_BYTES as u64));
        match self {
            Self::Superblock => superblocks.to_vec(),
            Self::Identity => [(Device::Data, 0, SUPERBLOCK_BYTES as u64)].into_iter().chain(superblocks).collect(),
            Self::Record => {
                let records = image::records(&image.io.disk());
                records.iter().map(|record| (Device::Meta, record.offset, record.bytes)).collect()
            }
            Self::Page => image.pages.iter().map(|page| (Device::Meta, page.offset, PAGE)).collect(),
            Self::Recovery => {
                let places = (LOG_OFFSET..LOG_OFFSET + image.superblock.log_size).step_by(512);
                places.map(|at| (Device::Meta, at, 512)).collect()
            }
        }
    }

    fn change(self, io: &SimStorage, image: &Image, bits: u8, script: Script<'_>) {
        let mut disk = io.disk();
        let area = |(device, offset, bytes): (Device, u64, u64)| {
            let bytes = disk.peek(device, offset, bytes as usize);
            Area { device, offset, before: bytes.clone(), bytes }
        };
        let mut areas: Vec<Area> = self.areas(image).into_iter().map(area).collect();
        script.take(MOST_CHANGES).for_each(|change| change.make(&mut areas));
        for area in &mut areas {
            if area.bytes == area.before {
                continue;
            }
            if bits & SIGNED != 0 && matches!(self, Self::Superblock | Self::Identity) {
                if bits & KEY_ID != 0 {
                    image::set_key_id(&mut area.bytes);
                }
                image::sign_block(&mut area.bytes);
            }
            disk.poke(area.device, area.offset, &area.bytes);
        }
        if bits & SIGNED != 0 {
            match self {
                Self::Superblock | Self::Identity => {}
                Self::Record | Self::Recovery => image::sign_log(&mut disk, &image.superblock),
                Self::Page => image::sign_pages(&mut disk, &image.superblock, &image.pages),
            }
        }
    }
}

/// Shows and opens the volume, reads, writes, and opens it once more.
fn look_at(io: &SimStorage, image: &Image, bits: u8) -> Reached {
    let is_signed = bits & SIGNED != 0;
    let mut reached = Reached::new();
    let mut note = |error: &OpenError| {
        reached.insert(name_of_refusal(error));
        if let OpenError::Unknown(unknown) = error {
            reached.insert(name_of_unknown(unknown));
        }
    };
    let _ = block_on(io, open::dump(io)).inspect_err(&mut note);
    let options = image.options(bits);
    let mut lab = match Lab::open(io.clone(), &options).inspect_err(&mut note) {
        Ok(lab) => lab,
        Err(_) => return reached,
    };
    for block in BLOCKS.into_iter().chain([image.superblock.blocks - 1]) {
        match lab.read(block) {
            // Who has the key can say of a block that it is zeros.
            Ok(bytes) if is_signed && bytes.iter().all(|byte| *byte == 0) => {}
            Ok(bytes) => assert!(may_read_as(block, &bytes), "block {block} reads as what was never written there"),
            Err(error) => _ = reached.insert(name_of_read_error(&error)),
        }
    }
    if lab.try_write(1, 1, 9).is_err() {
        return reached;
    }
    assert!(lab.reads_as(1, 9), "what was just written is not read");
    if lab.try_checkpoint().is_err() {
        return reached;
    }
    // Who has the key can make a volume that ends with its next record, or one whose pages are of
    // epochs to come, so that the cache takes an old one for the new: that is his affair.
    assert!(lab.reads_as(1, 9) || is_signed, "after a checkpoint, what was just written is not read");
    match lab.reopened() {
        Ok(mut lab) => assert!(lab.reads_as(1, 9) || is_signed, "what was checkpointed is not read after another open"),
        Err(error) => assert!(is_signed, "what was open can't be opened again: {error}"),
    }
    reached
}

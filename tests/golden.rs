//! Volumes of every format version that there has been, opened for ever.
//!
//! `tests/golden/*.pages` are small volumes as they lay on the disk after a power cut, or after an
//! orderly end: 8 bytes of offset and 4096 bytes of content for each page that is not all zeros.
//! `GOLDEN_WRITE=1` makes the files that are not there; one that is there is never written again.

use crate::sim::{
    Disk, Lab, Rng, SimStorage, block_on,
    craft::{Next, append},
    format_options,
    image::{self, Logged, Superblock},
    lab::content,
    open_options,
    oracle::VersionId,
};
use std::{
    fs,
    path::{Path, PathBuf},
};
use ublk_integrity::{
    BlockIndex, Device, OpenOptions, TagAlgorithm, VolumeInfo,
    create::{Capacity, FormatOptions},
};

const PAGE: usize = 4096;

pub(crate) struct Golden {
    name: &'static str,
    block_size: u32,
    tag: TagAlgorithm,
    version: u32,
    /// Whether it ended in good order.
    closed: bool,
    /// Whether it can grow: its superblock says where all lies.
    grows: bool,
}

const fn version_1(name: &'static str, block_size: u32, tag: TagAlgorithm) -> Golden {
    Golden { name, block_size, tag, version: 1, closed: false, grows: false }
}

pub(crate) const VERSION_1: [Golden; 3] = [
    version_1("v1-hmac-sha256-4096", 4096, TagAlgorithm::HmacSha256),
    version_1("v1-blake3-512", 512, TagAlgorithm::Blake3),
    version_1("v1-aegis-128x2-4096", 4096, TagAlgorithm::Aegis128X2),
];

/// With a sync log that holds no blocks, a label, and a device that is trusted.
pub(crate) const SYNC_LOG_CRASHED: Golden =
    Golden { version: 2, ..version_1("v2-sync-log-crashed", 512, TagAlgorithm::HmacSha256) };
/// The same after an orderly end: without the feature, for the label of version 2.
const SYNC_LOG_CLOSED: Golden = Golden { name: "v2-sync-log-closed", closed: true, ..SYNC_LOG_CRASHED };

/// With room for a tree of one level more, and no sync log.
pub(crate) const CAN_GROW: Golden =
    Golden { version: 2, grows: true, ..version_1("v2-explicit-places", 512, TagAlgorithm::HmacSha256) };

const ALL: [&Golden; 6] = [&VERSION_1[0], &VERSION_1[1], &VERSION_1[2], &SYNC_LOG_CRASHED, &SYNC_LOG_CLOSED, &CAN_GROW];

/// First block, blocks, version: in pages, in the log only, zeroed again, written once more.
const WRITES: [(u64, u64, VersionId); 4] = [(0, 3, 1), (130, 2, 2), (1, 1, 3), (200, 1, 4)];
/// What each block reads as in the end.
const CONTENT: [(u64, VersionId); 7] = [(0, 1), (1, 3), (2, 0), (130, 2), (131, 2), (200, 4), (201, 0)];

fn options(golden: &Golden) -> (FormatOptions, OpenOptions) {
    let mut format = FormatOptions { tag: golden.tag, ..format_options(golden.block_size) };
    let mut open = OpenOptions { open_id: [7; 32], ..open_options(&mut Rng::new(1)) };
    if golden.grows {
        format.capacity = Capacity::Bytes(8 << 20);
    } else if golden.version == 2 {
        format.log_size = Some(VolumeInfo::LEAST_SYNC_LOG);
        format.label = "golden".parse().unwrap();
        format.assumed_atomic_bytes = Some(4096);
        open.sync_log = true;
    }
    (format, open)
}

/// The requests after which the power was cut.
pub(crate) fn fill(lab: &mut Lab) {
    let [first, second, third, fourth] = WRITES;
    lab.write(first.0, first.1, first.2);
    lab.write(second.0, second.1, second.2);
    lab.checkpoint();
    lab.write(third.0, third.1, third.2);
    lab.zero(2, 1);
    lab.flush();
    lab.write(fourth.0, fourth.1, fourth.2);
}

/// A volume with a sync log: blocks that lie in the log alone, the newest and under newer tags whose
/// data never arrived, others that are in place.
pub(crate) fn with_payload() -> (SimStorage, OpenOptions) {
    let format = FormatOptions { log_size: Some(320 << 10), ..format_options(512) };
    let options = OpenOptions { sync_log: true, ..open_options(&mut Rng::new(1)) };
    let mut lab = Lab::new(&format, &options);
    fill(&mut lab);
    let log = |writes: &[(u64, u64, bool)]| {
        let mut disk = lab.disk();
        let (superblock, next) = (Superblock::newest(&disk), Next::of(&disk));
        let entry = |(seq, (first, version, with_blocks)): (u64, &(u64, u64, bool))| {
            let blocks = content(512, *first, *version);
            let tags = vec![image::tag(&superblock, BlockIndex(*first), &blocks)];
            match with_blocks {
                true => Logged::Payload { seq, first: *first, tags, blocks },
                false => Logged::Tags { seq, first: *first, tags },
            }
        };
        let entries: Vec<_> = (next.seq..).zip(writes).map(entry).collect();
        append(&mut disk, 0, &entries)
    };
    log(&[(130, 2, true), (131, 2, true)]);
    log(&[(0, 1, true), (200, 4, true)]);
    log(&[(1, 1, true)]);
    log(&[(1, 3, false), (131, 2, false)]);
    log(&[(130, 2, true)]);
    for (block, bytes) in [(1, content(512, 1, 1)), (130, vec![0xee; 512]), (200, vec![0xee; 512])] {
        lab.poke(Device::Data, lab.block_offset(block), &bytes);
    }
    (lab.io, options)
}

/// Whether the block may read so after a crash: as one of the versions that were written, or as
/// zeros before the first of them and after it was zeroed. What the checkpoint has found written
/// does not read as zeros again.
pub(crate) fn may_read_as(block: u64, bytes: &[u8]) -> bool {
    let holds = |(first, count, _): &&(u64, u64, VersionId)| (*first..first + count).contains(&block);
    let is_zeroed = block == 2 || !WRITES[..2].iter().any(|write| holds(&write));
    (is_zeroed && bytes.iter().all(|byte| *byte == 0))
        || WRITES.iter().filter(holds).any(|(.., version)| bytes == content(bytes.len(), block, *version))
}

/// What today's code makes of the same requests.
fn made_today(golden: &Golden) -> Vec<u8> {
    let (format, open) = options(golden);
    let mut lab = Lab::new(&format, &open);
    fill(&mut lab);
    if golden.closed {
        block_on(&lab.io, lab.volume.close(&lab.io)).unwrap();
    }
    pages_of(&lab.io, &format)
}

/// What is on the disk, as the files have it.
pub(crate) fn pages_of(io: &SimStorage, format: &FormatOptions) -> Vec<u8> {
    let size = ublk_integrity::create::plan(format).unwrap().data_device_bytes as usize;
    let image = io.disk().peek(Device::Data, 0, size);
    let mut pages = Vec::new();
    for (i, page) in image.chunks(PAGE).enumerate().filter(|(_, page)| page.iter().any(|b| *b != 0)) {
        pages.extend((i as u64 * PAGE as u64).to_le_bytes());
        pages.extend_from_slice(page);
        pages.resize(pages.len().next_multiple_of(8 + PAGE), 0);
    }
    pages
}

/// A folder in `tests/`: beside this package, and above the one of the fuzz targets,
/// which has this file too.
pub(crate) fn tests_folder(name: &str) -> PathBuf {
    let mut above = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().map(|top| top.join("tests").join(name));
    above.find(|folder| folder.is_dir()).unwrap_or_else(|| panic!("no folder tests/{name}"))
}

fn path(golden: &Golden) -> PathBuf {
    tests_folder("golden").join(golden.name).with_extension("pages")
}

/// Such a file on a disk.
pub(crate) fn on_disk(format: &FormatOptions, pages: &[u8]) -> SimStorage {
    let size = ublk_integrity::create::plan(format).unwrap().data_device_bytes;
    // The least that is ever written, whatever a changed superblock makes of it: no power is cut here.
    let mut disk = Disk::new(size, None, 512, 1);
    for page in pages.chunks_exact(8 + PAGE) {
        let (offset, bytes) = page.split_at(8);
        disk.poke(Device::Data, u64::from_le_bytes(offset.try_into().unwrap()), bytes);
    }
    SimStorage::new(disk)
}

/// The golden image on a disk, and how it is opened.
pub(crate) fn image_of(golden: &Golden) -> (SimStorage, OpenOptions) {
    let pages = fs::read(path(golden)).unwrap_or_else(|e| panic!("{}: {e}", path(golden).display()));
    let (format, open) = options(golden);
    (on_disk(&format, &pages), open)
}

#[test]
fn volumes_of_every_version_open_and_hold_what_was_written() {
    for golden in ALL {
        if std::env::var_os("GOLDEN_WRITE").is_some() && !path(golden).exists() {
            fs::write(path(golden), made_today(golden)).unwrap();
        }
        let (io, opening) = image_of(golden);
        let dump = block_on(&io, ublk_integrity::open::dump(&io)).unwrap();
        assert!(dump.copies.iter().all(|copy| copy.version == Some(golden.version)), "{}", golden.name);
        let features: &[ublk_integrity::open::Feature] = match golden {
            Golden { grows: true, .. } => &[ublk_integrity::open::Feature::ExplicitPlaces],
            Golden { version: 2, closed: false, .. } => &[ublk_integrity::open::Feature::SyncLog],
            _ => &[],
        };
        assert!(dump.copies.iter().all(|copy| copy.features == features), "{}", golden.name);
        let mut lab = Lab::open(io, &opening).unwrap();
        let expected = options(golden).0;
        let info = lab.volume.info();
        assert_eq!((info.label, info.assumed_atomic_bytes), (expected.label, expected.assumed_atomic_bytes));
        let found = lab.volume.recovery().clone();
        // Zeros are settled by the log alone and not counted.
        let logged = if golden.closed { 0 } else { 2 };
        assert_eq!((found.blocks, found.settled), (logged, logged), "{}: {found:?}", golden.name);
        holds_what_was_written(&mut lab, golden.name);
    }
}

pub(crate) fn holds_what_was_written(lab: &mut Lab, name: &str) {
    for (block, version) in CONTENT {
        let bs = lab.block_size();
        let expected = if version == 0 { vec![0; bs] } else { content(bs, block, version) };
        assert_eq!(lab.read(block).unwrap(), expected, "{name}: block {block}");
    }
}

/// Not a must for ever, but a byte that changes unasked is a format that changes unasked.
#[test]
fn today_the_same_requests_make_the_same_bytes() {
    for golden in ALL {
        let pages = fs::read(path(golden)).unwrap_or_default();
        assert!(made_today(golden) == pages, "{}: the bytes on the disk have changed", golden.name);
    }
}

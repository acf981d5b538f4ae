//! Reads a volume's image by the byte maps of the format alone: the library itself is not asked, so
//! that a test does not believe what it is there to judge.

mod signing;

use self::signing::{derived, mac};
pub use self::signing::{page_digest, set_key_id, sign_block, sign_log, sign_pages, sign_record, tag};
use super::Disk;
use sha2::{Digest, Sha256};
use ublk_integrity::Device;

pub const PAGE: u64 = 4096;
pub const SUPERBLOCKS: [u64; 2] = [0, 1 << 19];
pub const SUPERBLOCK_BYTES: usize = 512;
pub const LOG_OFFSET: u64 = 1 << 20;
pub const TAG_BYTES: u64 = 32;
pub const ENTRY_BYTES: u64 = 64;
pub const TAGS_PER_PAGE: u64 = 128;
pub const FANOUT: u64 = 64;
/// Of a record's header, before its entries.
const RECORD_HEADER: usize = 72;
const MAX_RECORD: u64 = 64 << 10;

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap())
}
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// What a superblock copy or a tree page says of a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    pub epoch: u64,
    /// 0 or 1; `None` where there is no page (absent or lost).
    pub slot: Option<u8>,
}

fn entry(bytes: &[u8]) -> Entry {
    let slot = match bytes[40] {
        1 => Some(0),
        2 => Some(1),
        _ => None,
    };
    Entry { epoch: u64_at(bytes, 32), slot }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Superblock {
    pub uuid: [u8; 16],
    pub block_size: u64,
    pub blocks: u64,
    pub log_size: u64,
    pub separate_meta: bool,
    pub physical: u64,
    pub epoch: u64,
    pub root: Entry,
    pub log_begin: u64,
    pub record_number: u64,
    pub link: [u8; 32],
    /// Where the superblock says it: the blocks, the page area, and the blocks that this is laid out for.
    pub places: Option<[u64; 3]>,
}

const EXPLICIT_PLACES: u32 = 1 << 3;

impl Superblock {
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let sum: [u8; 32] = Sha256::digest(&bytes[..448]).into();
        (&bytes[..8] == b"UBLKINTG" && bytes[448..480] == sum).then(|| Self {
            uuid: bytes[16..32].try_into().unwrap(),
            block_size: u32_at(bytes, 32).into(),
            blocks: u64_at(bytes, 40),
            log_size: u64_at(bytes, 48),
            separate_meta: u32_at(bytes, 12) & 1 != 0,
            physical: u32_at(bytes, 56).into(),
            epoch: u64_at(bytes, 64),
            root: entry(&bytes[72..136]),
            log_begin: u64_at(bytes, 136),
            record_number: u64_at(bytes, 144),
            link: bytes[152..184].try_into().unwrap(),
            places: (u32_at(bytes, 12) & EXPLICIT_PLACES != 0).then(|| [232, 256, 264].map(|at| u64_at(bytes, at))),
        })
    }
    /// The newest copy whose checksum holds.
    pub fn newest(disk: &Disk) -> Self {
        Self::parse(&Self::newest_bytes(disk)).expect("its checksum holds")
    }
    /// Its bytes.
    pub fn newest_bytes(disk: &Disk) -> Vec<u8> {
        let whole = Self::copies(disk).into_iter().filter_map(|copy| Some((Self::parse(&copy)?.epoch, copy)));
        whole.max_by_key(|(epoch, _)| *epoch).expect("a superblock").1
    }
    /// The bytes of both copies.
    pub fn copies(disk: &Disk) -> [Vec<u8>; 2] {
        SUPERBLOCKS.map(|at| disk.peek(Device::Meta, at, SUPERBLOCK_BYTES))
    }

    pub fn levels(&self) -> u8 {
        (0..).find(|l| self.pages_in(*l) == 1).unwrap() + 1
    }
    pub fn pages_in(&self, level: u8) -> u64 {
        pages_over(self.blocks, level)
    }
    fn first_page(&self) -> u64 {
        let computed = (LOG_OFFSET + self.log_size).next_multiple_of(2 * PAGE);
        self.places.map_or(computed, |[_, area, _]| area)
    }
    pub fn slot_offset(&self, level: u8, index: u64, slot: u8) -> u64 {
        let laid_out_for = self.places.map_or(self.blocks, |[.., blocks]| blocks);
        let before: u64 = (0..level).map(|l| pages_over(laid_out_for, l)).sum();
        self.first_page() + (before + index) * 2 * PAGE + u64::from(slot) * PAGE
    }
    /// Where that ends of a volume whose places are computed.
    pub fn metadata_end(&self) -> u64 {
        self.slot_offset(self.levels(), 0, 0)
    }
    pub fn data_offset(&self) -> u64 {
        if let Some([data, ..]) = self.places {
            return data;
        }
        if self.separate_meta { 1 << 20 } else { self.metadata_end().next_multiple_of(1 << 20) }
    }
    pub fn block_offset(&self, block: u64) -> u64 {
        self.data_offset() + block * self.block_size
    }

    /// Every page that this superblock names, from the root down.
    pub fn pages(&self, disk: &Disk) -> Vec<Page> {
        let mut found = Vec::new();
        self.collect(disk, self.levels() - 1, 0, self.root, &mut found);
        found
    }
    /// The tag that the tree holds for a block; zeros where there is none.
    pub fn tag_of(&self, disk: &Disk, block: u64) -> [u8; 32] {
        let mut entry_of = self.root;
        for level in (0..self.levels()).rev() {
            let Some(slot) = entry_of.slot else { return [0; 32] };
            let index = (block / TAGS_PER_PAGE) >> (6 * u32::from(level));
            let page = disk.peek(Device::Meta, self.slot_offset(level, index, slot), PAGE as usize);
            if level == 0 {
                let at = (block % TAGS_PER_PAGE * TAG_BYTES) as usize;
                return page[at..at + 32].try_into().unwrap();
            }
            let child = (block / TAGS_PER_PAGE) >> (6 * u32::from(level - 1));
            entry_of = entry(&page[(child % FANOUT * ENTRY_BYTES) as usize..]);
        }
        unreachable!("level 0 returns")
    }
    fn collect(&self, disk: &Disk, level: u8, index: u64, entry_of: Entry, found: &mut Vec<Page>) {
        let Some(slot) = entry_of.slot else { return };
        let offset = self.slot_offset(level, index, slot);
        found.push(Page { level, index, slot, offset });
        if level == 0 {
            return;
        }
        let bytes = disk.peek(Device::Meta, offset, PAGE as usize);
        for child in index * FANOUT..self.pages_in(level - 1).min((index + 1) * FANOUT) {
            let at = ((child % FANOUT) * ENTRY_BYTES) as usize;
            self.collect(disk, level - 1, child, entry(&bytes[at..]), found);
        }
    }
}

/// Pages in a level of a tree over so many blocks.
fn pages_over(blocks: u64, level: u8) -> u64 {
    (0..level).fold(blocks.div_ceil(TAGS_PER_PAGE), |pages, _| pages.div_ceil(FANOUT))
}

/// A page that is current, and where it lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Page {
    pub level: u8,
    pub index: u64,
    pub slot: u8,
    pub offset: u64,
}

/// One logged change or flush.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Logged {
    Tags {
        seq: u64,
        first: u64,
        tags: Vec<[u8; 32]>,
    },
    Zeros {
        seq: u64,
        first: u64,
        count: u64,
    },
    Flush {
        highest: u64,
        except: Vec<u64>,
    },
    /// Tags, and the blocks that they are of, one behind the other.
    Payload {
        seq: u64,
        first: u64,
        tags: Vec<[u8; 32]>,
        blocks: Vec<u8>,
    },
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Record {
    pub epoch: u64,
    pub number: u64,
    pub position: u64,
    pub offset: u64,
    /// On the device, padding included.
    pub bytes: u64,
    /// How many records before it were not known to be durable when it was sealed.
    pub under_way: u64,
    pub entries: Vec<Logged>,
}

/// The live log: the records whose numbers follow the superblock's, as far as they run on.
pub fn records(disk: &Disk) -> Vec<Record> {
    let superblock = Superblock::newest(disk);
    let mut live = ring(disk, &superblock);
    live.retain(|r| r.number >= superblock.record_number);
    let run = live.iter().zip(superblock.record_number..).take_while(|(r, number)| r.number == *number).count();
    live.truncate(run);
    live
}

/// Every record in the ring, old ones too, by number.
pub fn ring(disk: &Disk, superblock: &Superblock) -> Vec<Record> {
    let ring = disk.peek(Device::Meta, LOG_OFFSET, superblock.log_size as usize);
    let starts = (0..ring.len()).step_by(superblock.physical as usize).filter(|at| &ring[*at..at + 8] == b"UBLKILOG");
    let mut all: Vec<Record> = starts.filter_map(|at| record(superblock, &ring, at)).collect();
    all.sort_by_key(|r| r.number);
    all
}

/// The record at a place on the device.
pub fn record_at(disk: &Disk, superblock: &Superblock, offset: u64) -> Option<Record> {
    let end = LOG_OFFSET + superblock.log_size;
    let bytes = disk.peek(Device::Meta, offset, (end - offset).min(MAX_RECORD) as usize);
    let found = record(superblock, &bytes, 0)?;
    Some(Record { offset, ..found })
}

fn record(superblock: &Superblock, ring: &[u8], at: usize) -> Option<Record> {
    let bytes = u32_at(ring, at + 32) as usize;
    let body = ring[at..].get(..bytes)?;
    let key = derived(&superblock.uuid, "ublk-integrity v1 tag log");
    if mac(&key, &body[..bytes - 32]) != body[bytes - 32..] {
        return None;
    }
    let mut entries = Vec::new();
    let mut rest = RECORD_HEADER;
    let mut payload = bytes.next_multiple_of(superblock.physical as usize);
    for _ in 0..u16_at(body, 36) {
        let (kind, count) = (u32_at(body, rest), u64::from(u32_at(body, rest + 4)));
        let (first, seq) = (u64_at(body, rest + 8), u64_at(body, rest + 16));
        rest += 24;
        entries.push(match kind {
            1 | 4 => {
                let tags = (0..count as usize).map(|i| body[rest + i * 32..][..32].try_into().unwrap()).collect();
                rest += count as usize * 32;
                if kind == 1 {
                    Logged::Tags { seq, first, tags }
                } else {
                    let blocks = ring[at + payload..][..(count * superblock.block_size) as usize].to_vec();
                    payload += blocks.len();
                    Logged::Payload { seq, first, tags, blocks }
                }
            }
            2 => Logged::Zeros { seq, first, count },
            _ => {
                let except = (0..count as usize).map(|i| u64_at(body, rest + i * 8)).collect();
                rest += count as usize * 8;
                Logged::Flush { highest: first, except }
            }
        });
    }
    Some(Record {
        epoch: u64_at(body, 8),
        number: u64_at(body, 16),
        position: u64_at(body, 24),
        offset: LOG_OFFSET + at as u64,
        bytes: (payload as u64).next_multiple_of(superblock.physical),
        under_way: u16_at(body, 38).into(),
        entries,
    })
}

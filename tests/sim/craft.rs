//! Log records made by hand, by the byte map of the format: for crash states that no run leads to at
//! will.

use super::{
    Disk,
    image::{self, LOG_OFFSET, Logged, Record, Superblock},
};
use ublk_integrity::Device;

/// What the next record of a log carries.
#[derive(Clone, Copy)]
pub struct Next {
    pub epoch: u64,
    pub number: u64,
    pub position: u64,
    pub link: [u8; 32],
    /// Of the next change.
    pub seq: u64,
}

impl Next {
    /// At the end of the live log.
    pub fn of(disk: &Disk) -> Self {
        let superblock = Superblock::newest(disk);
        let live = image::records(disk);
        let Superblock { epoch, log_begin: position, record_number: number, link, .. } = superblock;
        let last = live.last().map_or(Self { epoch: epoch + 1, number, position, link, seq: 1 }, |last| {
            let head = disk.peek(Device::Meta, last.offset, 36);
            let bytes = u64::from(u32::from_le_bytes(head[32..36].try_into().unwrap()));
            let link = disk.peek(Device::Meta, last.offset + bytes - 32, 32).try_into().unwrap();
            let (position, number) = (last.position + last.bytes, last.number + 1);
            Self { epoch: last.epoch, number, position, link, seq: 1 }
        });
        let seqs = live.iter().flat_map(|record| &record.entries).map(|entry| match entry {
            Logged::Tags { seq, .. } | Logged::Zeros { seq, .. } | Logged::Payload { seq, .. } => *seq,
            Logged::Flush { .. } => 0,
        });
        let left = superblock.log_size - last.position % superblock.log_size;
        let wraps = left < (superblock.log_size / 16).next_multiple_of(4096).min(64 << 10);
        let position = last.position + if wraps { left } else { 0 };
        Self { position, seq: seqs.max().unwrap_or(0) + 1, ..last }
    }

    /// The record's bytes, payload and padding included, and its MAC.
    pub fn seal(&self, superblock: &Superblock, under_way: u16, entries: &[Logged]) -> (Vec<u8>, [u8; 32]) {
        let mut bytes = b"UBLKILOG".to_vec();
        [self.epoch, self.number, self.position].iter().for_each(|field| bytes.extend(field.to_le_bytes()));
        bytes.extend([0; 4]);
        bytes.extend((entries.len() as u16).to_le_bytes());
        bytes.extend(under_way.to_le_bytes());
        bytes.extend(self.link);
        let mut payload = Vec::new();
        for entry in entries {
            let (kind, count, first, seq, rest) = match entry {
                Logged::Tags { seq, first, tags } => (1, tags.len() as u64, *first, *seq, tags.concat()),
                Logged::Zeros { seq, first, count } => (2, *count, *first, *seq, Vec::new()),
                Logged::Flush { highest, except } => {
                    let rest = except.iter().flat_map(|number| number.to_le_bytes()).collect();
                    (3, except.len() as u64, *highest, 0, rest)
                }
                Logged::Payload { seq, first, tags, blocks } => {
                    payload.extend(blocks);
                    (4, tags.len() as u64, *first, *seq, tags.concat())
                }
            };
            bytes.extend(u32::to_le_bytes(kind));
            bytes.extend((count as u32).to_le_bytes());
            bytes.extend(first.to_le_bytes());
            bytes.extend(seq.to_le_bytes());
            bytes.extend(rest);
        }
        let end = bytes.len() + 32;
        bytes[32..36].copy_from_slice(&(end as u32).to_le_bytes());
        bytes.resize(end, 0);
        image::sign_record(superblock, &mut bytes);
        let mac = bytes[end - 32..].try_into().unwrap();
        for part in [&payload[..], &[]] {
            bytes.resize(bytes.len().next_multiple_of(superblock.physical as usize), 0);
            bytes.extend(part);
        }
        (bytes, mac)
    }
}

/// Appends a record to the live log, durably.
pub fn append(disk: &mut Disk, under_way: u16, entries: &[Logged]) -> Record {
    let (superblock, next) = (Superblock::newest(disk), Next::of(disk));
    let (bytes, _) = next.seal(&superblock, under_way, entries);
    let offset = LOG_OFFSET + next.position % superblock.log_size;
    disk.poke(Device::Meta, offset, &bytes);
    image::record_at(disk, &superblock, offset).expect("what was just made")
}

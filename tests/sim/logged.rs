//! A volume whose log holds blocks, each crash state laid out by hand.

use super::{
    Lab, Rng, SimStorage,
    craft::{Next, append},
    disk::BadRange,
    format_options,
    image::{self, Logged, Record},
    lab::content,
    open_options,
};
use ublk_integrity::{Access, BlockIndex, Device, OpenOptions, create::FormatOptions, open::OpenError};

pub fn options() -> OpenOptions {
    OpenOptions { separate_meta: true, sync_log: true, ..open_options(&mut Rng::new(3)) }
}
pub fn read_only() -> OpenOptions {
    OpenOptions { access: Access::ReadOnly, sync_log: false, ..options() }
}

/// Data and metadata apart, so that a trace tells them apart too.
pub fn lab() -> Lab {
    let format = FormatOptions { separate_meta: true, log_size: Some(1 << 20), ..format_options(512) };
    Lab::new(&format, &options())
}

/// The blocks from `first` on, each of this version, as the log has them next.
pub fn payload(lab: &Lab, first: u64, versions: &[u64]) -> Logged {
    let blocks: Vec<_> = (first..).zip(versions).map(|(block, version)| content(512, block, *version)).collect();
    payload_of(lab, first, &blocks)
}
pub fn payload_of(lab: &Lab, first: u64, blocks: &[Vec<u8>]) -> Logged {
    let tag = |(block, content): (u64, &Vec<u8>)| image::tag(&lab.superblock(), BlockIndex(block), content);
    let tags = (first..).zip(blocks).map(tag).collect();
    Logged::Payload { seq: next_seq(lab), first, tags, blocks: blocks.concat() }
}
/// The tags alone.
pub fn tags(lab: &Lab, first: u64, versions: &[u64]) -> Logged {
    match payload(lab, first, versions) {
        Logged::Payload { seq, first, tags, .. } => Logged::Tags { seq, first, tags },
        _ => unreachable!(),
    }
}
pub fn log(lab: &Lab, entry: Logged) -> Record {
    append(&mut lab.disk(), 0, &[entry])
}
/// The number of the next change.
pub fn next_seq(lab: &Lab) -> u64 {
    Next::of(&lab.disk()).seq
}
pub fn log_zeros(lab: &Lab, first: u64) {
    let seq = next_seq(lab);
    log(lab, Logged::Zeros { seq, first, count: 1 });
}
pub fn log_payload(lab: &Lab, block: u64, version: u64) -> Record {
    log(lab, payload(lab, block, &[version]))
}
pub fn log_tags(lab: &Lab, block: u64, version: u64) -> Record {
    log(lab, tags(lab, block, &[version]))
}

pub fn put_data(lab: &Lab, block: u64, bytes: &[u8]) {
    lab.poke(Device::Data, lab.block_offset(block), bytes);
}
pub fn put_version(lab: &Lab, block: u64, version: u64) {
    put_data(lab, block, &content(512, block, version));
}
/// Whether this version lies in the block's place.
pub fn lies_there(lab: &Lab, block: u64, version: u64) -> bool {
    lab.peek(Device::Data, lab.block_offset(block), 512) == content(512, block, version)
}
pub fn bad(lab: &Lab, block: u64) -> BadRange {
    let at = lab.block_offset(block);
    BadRange::unreadable(Device::Data, at..at + 512)
}
/// The place of the first block of a record's payload: behind the sector with its entries.
pub fn payload_at(record: &Record) -> u64 {
    record.offset + 512
}
/// A power cut has torn the record's write: its payload is what was in the ring before.
pub fn tear(lab: &Lab, record: &Record) {
    lab.poke(Device::Meta, payload_at(record), &[0xee; 512]);
}

/// What an open has found: settled, older, corrupt, undecided; and put in place.
pub type Found = ([u64; 4], u64);

pub fn found(lab: &Lab) -> Found {
    let report = lab.volume.recovery();
    ([report.settled, report.older, report.corrupt, report.unreadable], report.placed)
}
pub fn recovered(lab: Lab) -> (Lab, Found) {
    let lab = lab.reopened().expect("recovery does not refuse");
    let found = found(&lab);
    (lab, found)
}
/// The same disk, opened by somebody else.
pub fn forked(lab: &Lab, options: &OpenOptions) -> Result<Lab, OpenError> {
    let mut disk = lab.disk().fork(1);
    disk.bad_ranges.clone_from(&lab.disk().bad_ranges);
    Lab::open(SimStorage::new(disk), options)
}

//! Makes what was changed in an image good again: as if the key's holder had written it.

use super::*;
use hkdf::Hkdf;
use hmac::{Hmac, KeyInit, Mac};
use ublk_integrity::BlockIndex;

pub(super) fn derived(uuid: &[u8; 16], label: &str) -> [u8; 32] {
    let mut key = [0; 32];
    // The tests' master key, see `sim::key`.
    Hkdf::<Sha256>::new(Some(uuid), &crate::sim::KEY).expand(label.as_bytes(), &mut key).unwrap();
    key
}

pub(super) fn mac(key: &[u8; 32], message: &[u8]) -> [u8; 32] {
    Hmac::<Sha256>::new_from_slice(key).unwrap().chain_update(message).finalize().into_bytes().into()
}

/// Makes checksum and MAC of a changed superblock or identity block good: as if the key's holder
/// had written it.
pub fn sign_block(block: &mut [u8]) {
    let label = match &block[..8] {
        b"UBLKINTG" => "ublk-integrity v1 superblock",
        _ => "ublk-integrity v1 identity",
    };
    let (sum, uuid) = (Sha256::digest(&block[..448]), block[16..32].try_into().unwrap());
    block[448..480].copy_from_slice(&sum);
    let mac = mac(&derived(&uuid, label), &block[..448]);
    block[480..512].copy_from_slice(&mac);
}

/// The same for a log record, where its length allows it.
pub fn sign_record(superblock: &Superblock, record: &mut [u8]) {
    let end = u32_at(record, 32) as usize;
    if !(RECORD_HEADER + 32..=record.len()).contains(&end) {
        return;
    }
    let mac = mac(&derived(&superblock.uuid, "ublk-integrity v1 tag log"), &record[..end - 32]);
    record[end - 32..end].copy_from_slice(&mac);
}

/// Makes the key id of a superblock or identity block with another UUID good: that of the same key.
pub fn set_key_id(block: &mut [u8]) {
    let at = if &block[..8] == b"UBLKINTG" { 216 } else { 40 };
    let uuid = block[16..32].try_into().unwrap();
    block[at..at + 16].copy_from_slice(&derived(&uuid, "ublk-integrity v1 key id")[..16]);
}

/// Makes links and MACs of the live log good from its beginning on, as far as there are records one
/// behind the other.
pub fn sign_log(disk: &mut Disk, superblock: &Superblock) {
    let ring = disk.peek(Device::Meta, LOG_OFFSET, superblock.log_size as usize);
    let mut at = (superblock.log_begin % superblock.log_size) as usize;
    let mut link = superblock.link;
    while ring[at..].starts_with(b"UBLKILOG") {
        let bytes = u32_at(&ring, at + 32) as usize;
        let Some(body) =
            ring.get(at..at + bytes).filter(|_| (RECORD_HEADER + 32..=MAX_RECORD as usize).contains(&bytes))
        else {
            return;
        };
        let mut record = body.to_vec();
        record[40..72].copy_from_slice(&link);
        sign_record(superblock, &mut record);
        disk.poke(Device::Meta, LOG_OFFSET + at as u64, &record);
        link = record[bytes - 32..].try_into().unwrap();
        at += bytes.next_multiple_of(superblock.physical as usize);
        at += payload_bytes(&record, superblock.block_size).next_multiple_of(superblock.physical) as usize;
        if at >= ring.len() {
            return;
        }
    }
}

/// Bytes of the blocks that a record's entries name, as far as those make sense.
fn payload_bytes(record: &[u8], block_size: u64) -> u64 {
    let (mut rest, mut payload) = (&record[RECORD_HEADER..record.len() - 32], 0);
    for _ in 0..u16_at(record, 36) {
        let Some((entry, behind)) = rest.split_at_checked(24) else { break };
        let (kind, count) = (u32_at(entry, 0), u32_at(entry, 4) as usize);
        let listed = match kind {
            1 | 4 => count * 32,
            2 => 0,
            _ => count * 8,
        };
        let Some(behind) = behind.get(listed..) else { break };
        payload += if kind == 4 { count as u64 * block_size } else { 0 };
        rest = behind;
    }
    payload
}

/// By which the page above, or the superblock, proves a page.
pub fn page_digest(level: u8, index: u64, bytes: &[u8]) -> [u8; 32] {
    let digest = Sha256::new().chain_update(b"ublk-integrity page v1\0\0");
    let digest = digest.chain_update(u64::from(level).to_le_bytes()).chain_update(index.to_le_bytes());
    digest.chain_update(bytes).finalize().into()
}

/// Makes the digests of these pages good, in the pages above them and in both superblock copies.
pub fn sign_pages(disk: &mut Disk, superblock: &Superblock, pages: &[Page]) {
    let mut upwards = pages.to_vec();
    upwards.sort_by_key(|page| page.level);
    for page in &upwards {
        let digest = page_digest(page.level, page.index, &disk.peek(Device::Meta, page.offset, PAGE as usize));
        match upwards.iter().find(|above| above.level == page.level + 1 && above.index == page.index / FANOUT) {
            Some(above) => disk.poke(Device::Meta, above.offset + page.index % FANOUT * ENTRY_BYTES, &digest),
            None => SUPERBLOCKS.iter().for_each(|at| {
                let mut block = disk.peek(Device::Meta, *at, SUPERBLOCK_BYTES);
                if Superblock::parse(&block).is_some_and(|copy| copy.root == superblock.root) {
                    block[72..104].copy_from_slice(&digest);
                    sign_block(&mut block);
                    disk.poke(Device::Meta, *at, &block);
                }
            }),
        }
    }
}

/// The tag that a block with this content carries.
pub fn tag(superblock: &Superblock, block: BlockIndex, content: &[u8]) -> [u8; 32] {
    let mut message = [0; 40];
    message[..32].copy_from_slice(&Sha256::digest(content));
    message[32..].copy_from_slice(&(block.0 * superblock.block_size).to_le_bytes());
    mac(&derived(&superblock.uuid, "ublk-integrity v1 block tags"), &message)
}

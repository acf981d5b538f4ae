//! Following the chain of records.

use super::Candidates;
use crate::{
    Buf, ByteOffset, Device, DeviceError, RecordNumber, Storage,
    format::{PAGE_BYTES, RawRecord, Superblock},
    keys::Keys,
    log::{LogPoint, next_position},
    lookup::{READ_PAUSE, READ_TRIES},
    open::OpenError,
    superblocks::meta_error,
};

/// How much of the ring is read at a time.
const READ_BYTES: usize = 1 << 20;

/// What the log says, and where it ends.
pub(crate) struct Chain {
    pub(crate) candidates: Candidates,
    pub(crate) records: u64,
    /// Where the next record goes, what its number is; the link is the one that a torn record there would need.
    pub(crate) end: LogPoint,
    /// A part of the ring that could not be read: the chain may go on in it, so nothing may be written down.
    pub(crate) unreadable: Option<DeviceError>,
}

/// Follows the chain that the superblock begins. Refuses a log that goes on after the chain's end:
/// then the superblock is older than the log, or a record in the middle is damaged.
pub(crate) async fn follow<S: Storage>(io: &S, superblock: &Superblock, keys: &Keys) -> Result<Chain, OpenError> {
    let (ring, unreadable) = read_ring(io, superblock).await;
    let layout = &superblock.layout;
    let max_record = layout.max_record();
    let size = layout.log_size;
    let mut chain = Chain {
        candidates: Candidates::default(),
        records: 0,
        end: LogPoint { position: superblock.log_begin, number: superblock.record_number, link: superblock.link },
        unreadable,
    };
    let mut epoch = superblock.epoch;
    while chain.end.position - superblock.log_begin <= size {
        let position = next_position(chain.end.position, size, max_record as u64);
        let at = (position % size) as usize;
        let bytes = &ring[at..(at + max_record).min(ring.len())];
        let Some((head, entries, mac)) = RawRecord::verify(bytes, keys.log()) else { break };
        let next = head.number == chain.end.number && head.link == chain.end.link && head.position == position;
        if !next {
            break;
        }
        // A record of a later epoch than the one after the superblock's can't be: its predecessor's
        // log space is only free once both copies name it.
        if !(epoch..=superblock.epoch.next()).contains(&head.epoch) {
            return Err(OpenError::Tampered { what: "tag log" });
        }
        epoch = head.epoch;
        entries.for_each(|entry| chain.candidates.add(entry));
        chain.records += 1;
        chain.end = LogPoint {
            position: position + padded(bytes, superblock.physical_block),
            number: RecordNumber(head.number.0 + 1),
            link: mac,
        };
    }
    match (after_stranded(&ring, superblock, chain.end.number, keys), chain.unreadable) {
        // What could not be read may be the record in between.
        (Err(_), Some(unreadable)) => Err(unreadable.into()),
        (Err(refusal), None) => Err(refusal),
        (Ok(number), _) => Ok(Chain { end: LogPoint { number, ..chain.end }, ..chain }),
    }
}

fn padded(record: &[u8], physical_block: u32) -> u64 {
    (RawRecord::bytes_of(record) as u64).next_multiple_of(u64::from(physical_block))
}

/// Looks for records behind the end of the chain, where `expected` is missing; returns the number to go on with.
///
/// A crash may lose a record and leave one that was sent before the lost one was durable. Nothing hangs on the one that it
/// leaves, for the data that it speaks of was never sent. Any other refuses the log. The numbers go on after those left,
/// so that they can't be mistaken for records of the next life.
fn after_stranded(
    ring: &[u8],
    superblock: &Superblock,
    expected: RecordNumber,
    keys: &Keys,
) -> Result<RecordNumber, OpenError> {
    let mut next = expected;
    for at in (0..ring.len()).step_by(superblock.physical_block as usize) {
        // No record is larger, whatever its header claims: what is hashed here is bounded.
        let bytes = &ring[at..(at + superblock.layout.max_record()).min(ring.len())];
        if RawRecord::peek(bytes).is_none_or(|number| number < expected) {
            continue;
        }
        let Some((head, ..)) = RawRecord::verify(bytes, keys.log()) else { continue };
        if head.number == expected || head.follows_durable(expected) {
            return Err(OpenError::Tampered { what: "tag log (it holds a record newer than the superblock allows)" });
        }
        next = next.max(RecordNumber(head.number.0 + 1));
    }
    Ok(next)
}

/// The whole ring; what can't be read is zeros, and the first error comes with it.
async fn read_ring<S: Storage>(io: &S, superblock: &Superblock) -> (Vec<u8>, Option<DeviceError>) {
    let size = superblock.layout.log_size as usize;
    let mut ring = vec![0; size];
    let mut buf = Buf::new(READ_BYTES.min(size));
    let mut unreadable = None;
    for (i, chunk) in ring.chunks_mut(READ_BYTES).enumerate() {
        let offset = superblock.layout.log_offset().0 + (i * READ_BYTES) as u64;
        let result;
        (result, buf) = read_patiently(io, ByteOffset(offset), buf, chunk).await;
        if result.is_ok() {
            continue;
        }
        // One bad sector must not take its neighbours along.
        for (piece, at) in chunk.chunks_mut(PAGE_BYTES).zip((offset..).step_by(PAGE_BYTES)) {
            let result;
            (result, buf) = read_patiently(io, ByteOffset(at), buf, piece).await;
            unreadable = unreadable.or(result.err());
        }
    }
    (ring, unreadable)
}

async fn read_patiently<S: Storage>(
    io: &S,
    offset: ByteOffset,
    mut buf: Buf,
    into: &mut [u8],
) -> (Result<(), DeviceError>, Buf) {
    let mut result = Ok(());
    for attempt in 0..READ_TRIES {
        if attempt > 0 {
            let _ = io.sleep(READ_PAUSE).await;
        }
        (result, buf) = io.read(Device::Meta, offset, buf, 0..into.len()).await;
        if result.is_ok() {
            into.copy_from_slice(&buf[..into.len()]);
            break;
        }
    }
    (result.map_err(|errno| meta_error("read", offset, into.len(), errno)), buf)
}

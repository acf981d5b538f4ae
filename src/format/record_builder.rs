//! Gathering a record, and sealing it.

use super::{
    ENTRY_BYTES, Link, RawRecord, RecordHead, TAG_BYTES, Tag,
    record::{KIND_FLUSH, KIND_PAYLOAD, KIND_TAGS, KIND_ZEROS, MAC_BYTES, MAGIC, RECORD_OVERHEAD, RawEntry},
};
use crate::{BlockIndex, BlockRange, Buf, Seq, crypto::keys::MacKey};
use std::ops::Range;
use zerocopy::{
    IntoBytes,
    little_endian::{U16, U32, U64},
};

/// Where payload gathers in a record's buffer: what records are padded to is never larger. Header,
/// entries and MAC of a record with payload end here at the latest.
const PAYLOAD_AT: usize = 4096;

/// A record being gathered in a preallocated buffer. All its entries belong to one epoch.
pub(crate) struct RecordBuilder {
    buf: Buf,
    /// Header and entries, from the buffer's beginning on.
    used: usize,
    entries: u16,
    /// Bytes of payload, from [`PAYLOAD_AT`] on.
    payload: usize,
}

impl RecordBuilder {
    pub(crate) fn new(buf: Buf) -> Self {
        Self { buf, used: size_of::<RawRecord>(), entries: 0, payload: 0 }
    }
    /// Whether nothing has been gathered.
    pub(crate) fn is_empty(&self) -> bool {
        self.entries == 0
    }
    /// Bytes of what has been gathered, header included, payload not.
    pub(crate) fn content(&self) -> usize {
        self.used
    }
    /// Whether an entry of this many bytes, [`ENTRY_BYTES`] included, still fits.
    pub(crate) fn fits(&self, entry: usize) -> bool {
        let room = if self.has_payload() { PAYLOAD_AT } else { self.buf.len() };
        self.used + entry + MAC_BYTES <= room
    }
    /// Whether some of it is payload.
    pub(crate) fn has_payload(&self) -> bool {
        self.payload > 0
    }
    /// Whether a payload entry of so many tags, and its blocks of so many bytes together, still fit.
    pub(crate) fn fits_payload(&self, tags: usize, bytes: usize) -> bool {
        Self::fits_beside((self.used, self.payload), self.buf.len(), tags, bytes)
    }
    /// Whether they would fit a record of `max_record` bytes that has nothing else.
    pub(crate) fn can_carry(max_record: usize, tags: usize, bytes: usize) -> bool {
        Self::fits_beside((size_of::<RawRecord>(), 0), max_record, tags, bytes)
    }
    fn fits_beside((used, payload): (usize, usize), max_record: usize, tags: usize, bytes: usize) -> bool {
        let entries = used + ENTRY_BYTES + tags * TAG_BYTES + MAC_BYTES;
        entries <= PAYLOAD_AT && PAYLOAD_AT + payload + bytes <= max_record
    }
    fn push(&mut self, raw: RawEntry, payload: &[u8]) {
        debug_assert!(self.fits(ENTRY_BYTES + payload.len()));
        for bytes in [raw.as_bytes(), payload] {
            self.buf[self.used..self.used + bytes.len()].copy_from_slice(bytes);
            self.used += bytes.len();
        }
        self.entries += 1;
    }
    pub(crate) fn push_tags(&mut self, seq: Seq, first: BlockIndex, tags: &[Tag]) {
        self.push(RawEntry::of(KIND_TAGS, tags.len() as u64, first, seq), tags.as_flattened());
    }
    /// There is at least one block; `blocks` are as many as `tags`.
    pub(crate) fn push_payload(&mut self, seq: Seq, first: BlockIndex, tags: &[Tag], blocks: &[u8]) {
        debug_assert!(!tags.is_empty() && self.fits_payload(tags.len(), blocks.len()));
        self.push(RawEntry::of(KIND_PAYLOAD, tags.len() as u64, first, seq), tags.as_flattened());
        let at = PAYLOAD_AT + self.payload;
        self.buf[at..at + blocks.len()].copy_from_slice(blocks);
        self.payload += blocks.len();
    }
    /// The run's count must fit 32 bits.
    pub(crate) fn push_zeros(&mut self, seq: Seq, range: BlockRange) {
        self.push(RawEntry::of(KIND_ZEROS, range.count, range.first, seq), &[]);
    }
    /// `except` lists at most as many numbers as [`Self::fits`] was asked for, by
    /// [`flush_bytes`](Self::flush_bytes).
    pub(crate) fn push_flush(&mut self, highest: Seq, except: impl Iterator<Item = Seq>) {
        let at = self.used;
        self.push(RawEntry::of(KIND_FLUSH, 0, BlockIndex(highest.0), Seq(0)), &[]);
        let mut count = 0;
        for seq in except {
            self.buf[self.used..self.used + 8].copy_from_slice(&seq.0.to_le_bytes());
            self.used += 8;
            count += 1;
        }
        self.buf[at + 4..at + 8].copy_from_slice(&u32::to_le_bytes(count));
    }
    /// Header, MAC and padding: the buffer, which of its bytes to write, and the record's MAC.
    pub(crate) fn seal(mut self, head: &RecordHead, padding: usize, key: &MacKey) -> (Buf, Range<usize>, Link) {
        let raw = RawRecord {
            magic: MAGIC,
            epoch: U64::new(head.epoch.0),
            number: U64::new(head.number.0),
            position: U64::new(head.position),
            bytes: U32::new((self.used + MAC_BYTES) as u32),
            entries: U16::new(self.entries),
            under_way: U16::new(head.under_way),
            link: head.link,
        };
        self.buf[..size_of::<RawRecord>()].copy_from_slice(raw.as_bytes());
        let mac = key.sign(&self.buf[..self.used]);
        let padded = self.padded(padding);
        let front = self.padded_front(padding);
        // The entries move up to the payload: they are few, and it is large.
        let from = if self.has_payload() { PAYLOAD_AT - front } else { 0 };
        if from > 0 {
            self.buf.copy_within(..self.used, from);
        }
        let end = from + self.used;
        self.buf[end..end + MAC_BYTES].copy_from_slice(&mac);
        self.buf[end + MAC_BYTES..from + front].fill(0);
        self.buf[from + front + self.payload..from + padded].fill(0);
        (self.buf, from..from + padded, mac)
    }
    /// Header, entries and MAC, padded.
    fn padded_front(&self, padding: usize) -> usize {
        (self.used + MAC_BYTES).next_multiple_of(padding)
    }
    /// Bytes that the record takes in the ring as it stands, with its payload.
    pub(crate) fn padded(&self, padding: usize) -> usize {
        self.padded_front(padding) + self.payload.next_multiple_of(padding)
    }
    /// Bytes that a record with this one entry takes in the ring.
    pub(crate) fn padded_alone(entry: usize, padding: usize) -> usize {
        (RECORD_OVERHEAD + entry).next_multiple_of(padding)
    }
    /// The same for a payload entry of so many tags, and its blocks of so many bytes together.
    pub(crate) fn padded_alone_payload(tags: usize, bytes: usize, padding: usize) -> usize {
        Self::padded_alone(ENTRY_BYTES + tags * TAG_BYTES, padding) + bytes.next_multiple_of(padding)
    }
    /// The most tags that one record of `max_record` bytes can carry in one entry.
    pub(crate) fn max_tags(max_record: usize) -> usize {
        (max_record - RECORD_OVERHEAD - ENTRY_BYTES) / TAG_BYTES
    }
    /// Bytes of a flush entry that lists so many numbers.
    pub(crate) fn flush_bytes(listed: usize) -> usize {
        ENTRY_BYTES + listed * size_of::<U64>()
    }
    /// The most numbers that a flush entry can list in a record of `max_record` bytes.
    pub(crate) fn max_listed(max_record: usize) -> usize {
        (max_record - RECORD_OVERHEAD - ENTRY_BYTES) / size_of::<U64>()
    }
}

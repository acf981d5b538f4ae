//! Log records: a chain in which each link is the MAC of the record before.

use super::{Layout, TAG_BYTES, Tag, Unknown};
use crate::{
    BlockIndex, BlockRange, Buf, Epoch, RecordNumber, Seq,
    crypto::keys::{Mac, MacKey},
};
use std::ops::Range;
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout,
    little_endian::{U16, U32, U64},
};

const MAGIC: [u8; 8] = *b"UBLKILOG";
/// What a record expects to come after: the MAC of the record before, or the link in the superblock.
pub(crate) type Link = Mac;

/// Bytes of an entry before its tags or numbers.
pub(crate) const ENTRY_BYTES: usize = size_of::<RawEntry>();
/// Bytes of a record besides its entries: header and MAC, 72 + 32.
pub(crate) const RECORD_OVERHEAD: usize = size_of::<RawRecord>() + MAC_BYTES;
const MAC_BYTES: usize = 32;

const KIND_TAGS: u32 = 1;
const KIND_ZEROS: u32 = 2;
const KIND_FLUSH: u32 = 3;
const KIND_PAYLOAD: u32 = 4;

/// Where payload gathers in a record's buffer: what records are padded to is never larger. Header,
/// entries and MAC of a record with payload end here at the latest.
const PAYLOAD_AT: usize = 4096;

/// Header of a record: 8 magic + 8 epoch + 8 number + 8 position + 4 bytes + 2 entries + 2 under
/// way + 32 link = 72 bytes. Entries follow, then the MAC over all before it; the rest, up to the
/// record padding, is zeros. Then the blocks of the payload entries, in their order, padded too.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(crate) struct RawRecord {
    magic: [u8; 8],
    epoch: U64,
    number: U64,
    /// Bytes ever written to the ring before this record: a record moved elsewhere does not verify.
    position: U64,
    /// Header, entries and MAC.
    bytes: U32,
    entries: U16,
    under_way: U16,
    link: Link,
}
const _: () = assert!(size_of::<RawRecord>() == 72);

/// 4 kind + 4 count + 8 first block (flush: highest number) + 8 number = 24 bytes.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawEntry {
    kind: U32,
    /// Blocks, or for a flush the numbers that are listed.
    count: U32,
    first: U64,
    seq: U64,
}
const _: () = assert!(size_of::<RawEntry>() == 24);

impl RawEntry {
    /// Of a change to blocks.
    fn of(kind: u32, count: u64, first: BlockIndex, seq: Seq) -> Self {
        Self { kind: U32::new(kind), count: U32::new(count as u32), first: U64::new(first.0), seq: U64::new(seq.0) }
    }
}

/// The header's fields, once the MAC holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct RecordHead {
    pub(crate) epoch: Epoch,
    pub(crate) number: RecordNumber,
    pub(crate) position: u64,
    /// How many of the records before this one were not known to be durable when it was sealed: a
    /// crash may lose those and leave this one.
    pub(crate) under_way: u16,
    pub(crate) link: Link,
}

impl RecordHead {
    /// Whether the record with this number was durable when this one was sealed.
    pub(crate) fn follows_durable(&self, number: RecordNumber) -> bool {
        number.0 < self.number.0.saturating_sub(self.under_way.into())
    }
}

/// One logged change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Entry<'a> {
    /// New tags for a run of blocks.
    Tags { seq: Seq, first: BlockIndex, tags: &'a [Tag] },
    /// New tags for a run of blocks, and the blocks themselves: done once logged, as zeros are. The
    /// MAC does not cover the blocks; their tags do.
    Payload { seq: Seq, first: BlockIndex, tags: &'a [Tag], blocks: &'a [u8] },
    /// A run that reads as zeros.
    Zeros { seq: Seq, range: BlockRange },
    /// Everything up to `highest` is durable, but what is listed.
    Flush { highest: Seq, except: &'a [U64] },
}

impl Entry<'_> {
    /// The number of the change, for one that has its own.
    pub(crate) fn seq(&self) -> Option<Seq> {
        match self {
            Entry::Tags { seq, .. } | Entry::Payload { seq, .. } | Entry::Zeros { seq, .. } => Some(*seq),
            Entry::Flush { .. } => None,
        }
    }

    /// Refuses blocks that a volume of this layout does not have.
    pub(crate) fn within(self, layout: &Layout) -> Result<Self, Unknown> {
        let range = match &self {
            Entry::Tags { first, tags, .. } | Entry::Payload { first, tags, .. } => {
                BlockRange::new(*first, tags.len() as u64)
            }
            Entry::Zeros { range, .. } => *range,
            Entry::Flush { .. } => return Ok(self),
        };
        let known = layout.contains(range);
        if known { Ok(self) } else { Err(Unknown::Field { of: "log record", field: "range of blocks" }) }
    }
}

impl RawRecord {
    /// Bytes of the header.
    pub(crate) const HEAD_BYTES: u64 = size_of::<Self>() as u64;

    /// A cheap look before the MAC is computed: what the header claims to be, if this may be a
    /// record at all, and how many bytes it claims for header, entries and MAC.
    pub(crate) fn claim(bytes: &[u8]) -> Option<(RecordHead, usize)> {
        let (raw, _) = Self::read_from_prefix(bytes).ok()?;
        let len = raw.bytes.get() as usize;
        let whole = raw.magic == MAGIC && (RECORD_OVERHEAD..=bytes.len()).contains(&len);
        let head = RecordHead {
            epoch: Epoch(raw.epoch.get()),
            number: RecordNumber(raw.number.get()),
            position: raw.position.get(),
            under_way: raw.under_way.get(),
            link: raw.link,
        };
        whole.then_some((head, len))
    }

    /// The record at the front of `bytes`, if its MAC holds. That says nothing of its payload yet.
    pub(crate) fn verify<'a>(bytes: &'a [u8], key: &MacKey, shape: RecordShape) -> Option<VerifiedRecord<'a>> {
        let (head, end) = Self::claim(bytes)?;
        let (raw, _) = Self::read_from_prefix(bytes).ok()?;
        let (body, mac) = bytes[..end].split_at(end - MAC_BYTES);
        let mac: Mac = mac.try_into().ok()?;
        if !key.verify(body, &mac) {
            return None;
        }
        let rest = &body[size_of::<Self>()..];
        Some(VerifiedRecord { head, link: mac, bytes, end, rest, entries: raw.entries.get(), shape })
    }
}

/// How the records of a volume lie in its ring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct RecordShape {
    /// What records are padded to, and their payload again.
    pub(crate) padding: usize,
    pub(crate) block_size: usize,
    /// Whether the log may hold payload: otherwise its kind of entry is unknown.
    pub(crate) payload: bool,
}

/// A record whose MAC holds.
#[derive(Clone, Copy)]
pub(crate) struct VerifiedRecord<'a> {
    pub(crate) head: RecordHead,
    /// Its own MAC: the next link.
    pub(crate) link: Link,
    /// The record, and what follows it in the ring.
    bytes: &'a [u8],
    /// Header, entries and MAC.
    end: usize,
    rest: &'a [u8],
    entries: u16,
    shape: RecordShape,
}

impl<'a> VerifiedRecord<'a> {
    /// Bytes from the record's beginning to its payload.
    pub(crate) fn payload_at(&self) -> usize {
        self.end.next_multiple_of(self.shape.padding)
    }

    /// What it says. Blocks that lie beyond the bytes at hand make an entry that makes no sense.
    pub(crate) fn entries(&self) -> EntryReader<'a> {
        let payload = self.bytes.get(self.payload_at()..).unwrap_or_default();
        let block_size = self.shape.payload.then_some(self.shape.block_size);
        EntryReader { rest: self.rest, left: self.entries.into(), payload, block_size }
    }

    /// The bytes that it takes in the ring, payload and padding included.
    pub(crate) fn padded(&self) -> Result<usize, Unknown> {
        let mut payload = 0;
        for entry in self.entries() {
            if let Entry::Payload { blocks, .. } = entry? {
                payload += blocks.len();
            }
        }
        Ok(self.payload_at() + payload.next_multiple_of(self.shape.padding))
    }
}

/// Reads the entries of a record whose MAC holds. An entry that makes no sense is the last:
/// it was written by a program that knows more, and what it and those behind it say must not
/// be taken for unsaid.
pub(crate) struct EntryReader<'a> {
    rest: &'a [u8],
    left: u32,
    /// The blocks of the payload entries that are left, and what follows them in the ring.
    payload: &'a [u8],
    /// `None`: the log has no payload.
    block_size: Option<usize>,
}

impl<'a> EntryReader<'a> {
    fn read(&mut self) -> Result<Entry<'a>, Unknown> {
        let long = Unknown::Field { of: "log record", field: "number of entries" };
        let (raw, rest) = RawEntry::read_from_prefix(self.rest).map_err(|_| long)?;
        let (count, seq) = (raw.count.get() as usize, Seq(raw.seq.get()));
        let first = BlockIndex(raw.first.get());
        let tags = || <[Tag]>::ref_from_prefix_with_elems(rest, count).map_err(|_| long);
        let (entry, rest) = match (raw.kind.get(), self.block_size) {
            (KIND_TAGS, _) => {
                let (tags, rest) = tags()?;
                (Entry::Tags { seq, first, tags }, rest)
            }
            (KIND_PAYLOAD, Some(block_size)) => {
                let (tags, rest) = tags()?;
                let unknown = Unknown::Field { of: "log record", field: "number of blocks" };
                let blocks = count.checked_mul(block_size).and_then(|bytes| self.payload.split_at_checked(bytes));
                let (blocks, payload) = blocks.ok_or(unknown)?;
                self.payload = payload;
                (Entry::Payload { seq, first, tags, blocks }, rest)
            }
            (KIND_ZEROS, _) => (Entry::Zeros { seq, range: BlockRange::new(first, count as u64) }, rest),
            (KIND_FLUSH, _) => {
                let (except, rest) = <[U64]>::ref_from_prefix_with_elems(rest, count).map_err(|_| long)?;
                (Entry::Flush { highest: Seq(first.0), except }, rest)
            }
            (kind, _) => return Err(Unknown::EntryKind(kind)),
        };
        self.rest = rest;
        Ok(entry)
    }
}

impl<'a> Iterator for EntryReader<'a> {
    type Item = Result<Entry<'a>, Unknown>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let entry = self.read();
        if entry.is_err() {
            self.left = 0;
        }
        Some(entry)
    }
}

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
        let entries = self.used + ENTRY_BYTES + tags * TAG_BYTES + MAC_BYTES;
        entries <= PAYLOAD_AT && PAYLOAD_AT + self.payload + bytes <= self.buf.len()
    }
    /// Whether it would fit a record of `max_record` bytes that has nothing else.
    pub(crate) fn can_carry(max_record: usize, tags: usize, bytes: usize) -> bool {
        RECORD_OVERHEAD + ENTRY_BYTES + tags * TAG_BYTES <= PAYLOAD_AT && PAYLOAD_AT + bytes <= max_record
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
        self.push(
            RawEntry { kind: U32::new(KIND_FLUSH), count: U32::ZERO, first: U64::new(highest.0), seq: U64::ZERO },
            &[],
        );
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::keys::{Keys, MasterKey};

    const HEAD: RecordHead =
        RecordHead { epoch: Epoch(3), number: RecordNumber(9), position: 512, under_way: 2, link: [5; 32] };

    fn keys() -> Keys {
        Keys::derive(&MasterKey::new(&[7; 32]).unwrap(), &[1; 16])
    }

    fn shape(padding: usize) -> RecordShape {
        RecordShape { padding, block_size: 512, payload: true }
    }

    #[test]
    fn entries_come_back_and_damage_does_not() {
        let keys = keys();
        let mut b = RecordBuilder::new(Buf::new(4096));
        let tags = [[1; 32], [2; 32]];
        b.push_tags(Seq(1), BlockIndex(10), &tags);
        b.push_zeros(Seq(2), BlockRange::new(BlockIndex(5), 77));
        b.push_flush(Seq(2), [Seq(1)].into_iter());
        let (buf, part, mac) = b.seal(&HEAD, 512, keys.log());
        assert_eq!(part, 0..512);
        let record = RawRecord::verify(&buf, keys.log(), shape(512)).unwrap();
        assert_eq!((record.head, record.link, record.padded()), (HEAD, mac, Ok(512)));
        let entries: Vec<_> = record.entries().map(Result::unwrap).collect();
        assert_eq!(entries[0], Entry::Tags { seq: Seq(1), first: BlockIndex(10), tags: &tags });
        assert_eq!(entries[1], Entry::Zeros { seq: Seq(2), range: BlockRange::new(BlockIndex(5), 77) });
        assert_eq!(entries[2], Entry::Flush { highest: Seq(2), except: &[U64::new(1)] });
        assert_eq!(entries.len(), 3);
        let durable = |number| record.head.follows_durable(RecordNumber(number));
        assert!(durable(6) && !durable(7) && !durable(9) && !durable(10));
        let (_, end) = RawRecord::claim(&buf).unwrap();
        for bit in 0..end * 8 {
            let mut bad = buf[..].to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(RawRecord::verify(&bad, keys.log(), shape(512)).is_none(), "bit {bit}");
        }
    }

    /// Three blocks in two entries, with others between.
    fn with_payload() -> RecordBuilder {
        let mut b = RecordBuilder::new(Buf::new(16 << 10));
        b.buf.fill(0xee);
        assert!(!b.has_payload());
        b.push_flush(Seq(2), [Seq(1)].into_iter());
        let content = b.content();
        b.push_payload(Seq(3), BlockIndex(10), &[[1; 32], [2; 32]], &[[0x11; 512], [0x22; 512]].concat());
        assert_eq!((b.has_payload(), b.content()), (true, content + 24 + 64), "the blocks do not count");
        b.push_tags(Seq(4), BlockIndex(70), &[[4; 32]]);
        b.push_payload(Seq(5), BlockIndex(80), &[[3; 32]], &[0x33; 512]);
        b
    }

    #[test]
    fn payload_lies_behind_the_mac_in_the_order_of_its_entries() {
        let keys = keys();
        for (padding, front, padded) in [(512, 512, 512 + 1536), (4096, 4096, 8192)] {
            let b = with_payload();
            assert_eq!(b.padded(padding), padded);
            let alone = RecordBuilder::padded_alone_payload(3, 1536, padding);
            assert_eq!(alone, padded, "one entry with the same blocks");
            let (buf, part, mac) = b.seal(&HEAD, padding, keys.log());
            assert_eq!(part, 4096 - front..4096 - front + padded, "its payload has not moved");
            let sealed = &buf[part];
            let record = RawRecord::verify(sealed, keys.log(), shape(padding)).unwrap();
            assert_eq!((record.head, record.link, record.padded()), (HEAD, mac, Ok(padded)));
            let entries: Vec<_> = record.entries().map(Result::unwrap).collect();
            let two = [[0x11; 512], [0x22; 512]].concat();
            assert_eq!(
                entries,
                [
                    Entry::Flush { highest: Seq(2), except: &[U64::new(1)] },
                    Entry::Payload { seq: Seq(3), first: BlockIndex(10), tags: &[[1; 32], [2; 32]], blocks: &two },
                    Entry::Tags { seq: Seq(4), first: BlockIndex(70), tags: &[[4; 32]] },
                    Entry::Payload { seq: Seq(5), first: BlockIndex(80), tags: &[[3; 32]], blocks: &[0x33; 512] },
                ]
            );
            let (_, end) = RawRecord::claim(sealed).unwrap();
            let padding_bytes = sealed[end..front].iter().chain(&sealed[front + 1536..]);
            assert!(padding_bytes.copied().all(|byte| byte == 0), "what lay in the buffer stays there");
        }
    }

    #[test]
    fn what_fits_beside_payload_is_what_ends_before_it() {
        let keys = keys();
        let mut b = RecordBuilder::new(Buf::new(8192));
        let most = (4096 - RECORD_OVERHEAD - 3 * ENTRY_BYTES - 64) / TAG_BYTES;
        assert!(b.fits_payload(1, 4096) && !b.fits_payload(1, 4097) && !b.fits_payload(200, 512));
        b.push_payload(Seq(1), BlockIndex(0), &[[1; 32]], &[1; 512]);
        assert!(b.fits_payload(1, 3584) && !b.fits_payload(1, 4096));
        b.push_payload(Seq(2), BlockIndex(1), &[[2; 32]], &[2; 512]);
        let entry = ENTRY_BYTES + most * TAG_BYTES;
        assert!(b.fits(entry) && !b.fits(entry + TAG_BYTES));
        b.push_tags(Seq(3), BlockIndex(2), &vec![[3; 32]; most]);
        assert!(!b.fits_payload(1, 512));
        for padding in [512, 4096] {
            assert_eq!(b.padded(padding), 4096 + 1024_usize.next_multiple_of(padding));
        }
        let (buf, part, _) = b.seal(&HEAD, 512, keys.log());
        let record = RawRecord::verify(&buf[part.clone()], keys.log(), shape(512)).unwrap();
        assert_eq!((record.padded(), part.len()), (Ok(5120), 5120));
        // Entries that need more than what lies before the payload are a record without any.
        let mut b = RecordBuilder::new(Buf::new(8192));
        b.push_tags(Seq(1), BlockIndex(0), &[[1; 32]; 150]);
        assert!(b.fits(512) && !b.fits_payload(1, 512));
        assert!(!RecordBuilder::new(Buf::new(4096)).fits_payload(1, 512));
    }

    #[test]
    fn payload_that_the_log_does_not_have_or_hold_makes_no_sense() {
        let keys = keys();
        let (buf, part, _) = with_payload().seal(&HEAD, 512, keys.log());
        let sealed = &buf[part];
        let read = |bytes, shape| {
            let record = RawRecord::verify(bytes, keys.log(), shape).unwrap();
            (record.entries().last().unwrap().map(|_| ()), record.padded())
        };
        let kind = Unknown::EntryKind(KIND_PAYLOAD);
        assert_eq!(read(sealed, RecordShape { payload: false, ..shape(512) }), (Err(kind), Err(kind)));
        let short = Unknown::Field { of: "log record", field: "number of blocks" };
        for len in [512, 512 + 1024, 512 + 1535] {
            assert_eq!(read(&sealed[..len], shape(512)), (Err(short), Err(short)));
        }
        // The MAC says nothing of it.
        let mut bad = sealed.to_vec();
        bad[600] ^= 1;
        assert!(RawRecord::verify(&bad, keys.log(), shape(512)).is_some());
    }
}

//! Log records: a chain in which each link is the MAC of the record before.

use super::{Layout, TAG_BYTES, Tag, Unknown};
use crate::{
    BlockIndex, BlockRange, Buf, Epoch, RecordNumber, Seq,
    crypto::keys::{Mac, MacKey},
};
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

/// Header of a record: 8 magic + 8 epoch + 8 number + 8 position + 4 bytes + 2 entries + 2 under
/// way + 32 link = 72 bytes. Entries follow, then the MAC over all before it; the rest, up to the
/// physical block, is zeros.
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
    /// A run that reads as zeros.
    Zeros { seq: Seq, range: BlockRange },
    /// Everything up to `highest` is durable, but what is listed.
    Flush { highest: Seq, except: &'a [U64] },
}

impl Entry<'_> {
    /// The number of the change, for one that has its own.
    pub(crate) fn seq(&self) -> Option<Seq> {
        match self {
            Entry::Tags { seq, .. } | Entry::Zeros { seq, .. } => Some(*seq),
            Entry::Flush { .. } => None,
        }
    }

    /// Refuses blocks that a volume of this layout does not have.
    pub(crate) fn within(self, layout: &Layout) -> Result<Self, Unknown> {
        let range = match &self {
            Entry::Tags { first, tags, .. } => BlockRange::new(*first, tags.len() as u64),
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

    /// The record at the front of `bytes`, if its MAC holds: head, entries and its own
    /// MAC (the next link).
    pub(crate) fn verify<'a>(bytes: &'a [u8], key: &MacKey) -> Option<(RecordHead, EntryReader<'a>, Link)> {
        let (head, end) = Self::claim(bytes)?;
        let (raw, _) = Self::read_from_prefix(bytes).ok()?;
        let (body, mac) = bytes[..end].split_at(end - MAC_BYTES);
        let mac: Mac = mac.try_into().ok()?;
        if !key.verify(body, &mac) {
            return None;
        }
        Some((head, EntryReader { rest: &body[size_of::<Self>()..], left: raw.entries.get().into() }, mac))
    }
}

/// Reads the entries of a record whose MAC holds. An entry that makes no sense is the last:
/// it was written by a program that knows more, and what it and those behind it say must not
/// be taken for unsaid.
pub(crate) struct EntryReader<'a> {
    rest: &'a [u8],
    left: u32,
}

impl<'a> EntryReader<'a> {
    fn read(&mut self) -> Result<Entry<'a>, Unknown> {
        let long = Unknown::Field { of: "log record", field: "number of entries" };
        let (raw, rest) = RawEntry::read_from_prefix(self.rest).map_err(|_| long)?;
        let (count, seq) = (raw.count.get() as usize, Seq(raw.seq.get()));
        let first = BlockIndex(raw.first.get());
        let (entry, rest) = match raw.kind.get() {
            KIND_TAGS => {
                let (tags, rest) = <[Tag]>::ref_from_prefix_with_elems(rest, count).map_err(|_| long)?;
                (Entry::Tags { seq, first, tags }, rest)
            }
            KIND_ZEROS => (Entry::Zeros { seq, range: BlockRange::new(first, count as u64) }, rest),
            KIND_FLUSH => {
                let (except, rest) = <[U64]>::ref_from_prefix_with_elems(rest, count).map_err(|_| long)?;
                (Entry::Flush { highest: Seq(first.0), except }, rest)
            }
            kind => return Err(Unknown::EntryKind(kind)),
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
    used: usize,
    entries: u16,
}

impl RecordBuilder {
    pub(crate) fn new(buf: Buf) -> Self {
        Self { buf, used: size_of::<RawRecord>(), entries: 0 }
    }
    /// Whether nothing has been gathered.
    pub(crate) fn is_empty(&self) -> bool {
        self.entries == 0
    }
    /// Bytes of what has been gathered, header included.
    pub(crate) fn content(&self) -> usize {
        self.used
    }
    /// Whether an entry of this many bytes, [`ENTRY_BYTES`] included, still fits.
    pub(crate) fn fits(&self, entry: usize) -> bool {
        self.used + entry + MAC_BYTES <= self.buf.len()
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
        let raw = RawEntry {
            kind: U32::new(KIND_TAGS),
            count: U32::new(tags.len() as u32),
            first: U64::new(first.0),
            seq: U64::new(seq.0),
        };
        self.push(raw, tags.as_flattened());
    }
    /// The run's count must fit 32 bits.
    pub(crate) fn push_zeros(&mut self, seq: Seq, range: BlockRange) {
        let raw = RawEntry {
            kind: U32::new(KIND_ZEROS),
            count: U32::new(range.count as u32),
            first: U64::new(range.first.0),
            seq: U64::new(seq.0),
        };
        self.push(raw, &[]);
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
    /// Header, MAC and padding: the bytes to write, how many, and the record's MAC.
    pub(crate) fn seal(mut self, head: &RecordHead, physical_block: usize, key: &MacKey) -> (Buf, usize, Link) {
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
        self.buf[self.used..self.used + MAC_BYTES].copy_from_slice(&mac);
        let padded = self.padded(physical_block);
        self.buf[self.used + MAC_BYTES..padded].fill(0);
        (self.buf, padded, mac)
    }
    /// Bytes that the record takes in the ring as it stands.
    pub(crate) fn padded(&self, physical_block: usize) -> usize {
        (self.used + MAC_BYTES).next_multiple_of(physical_block)
    }
    /// Bytes that a record with this one entry takes in the ring.
    pub(crate) fn padded_alone(entry: usize, physical_block: usize) -> usize {
        (RECORD_OVERHEAD + entry).next_multiple_of(physical_block)
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

    #[test]
    fn entries_come_back_and_damage_does_not() {
        let keys = Keys::derive(&MasterKey::new(&[7; 32]).unwrap(), &[1; 16]);
        let head = RecordHead { epoch: Epoch(3), number: RecordNumber(9), position: 512, under_way: 2, link: [5; 32] };
        let mut b = RecordBuilder::new(Buf::new(4096));
        let tags = [[1; 32], [2; 32]];
        b.push_tags(Seq(1), BlockIndex(10), &tags);
        b.push_zeros(Seq(2), BlockRange::new(BlockIndex(5), 77));
        b.push_flush(Seq(2), [Seq(1)].into_iter());
        let (buf, padded, mac) = b.seal(&head, 512, keys.log());
        assert_eq!(padded, 512);
        let (got, entries, link) = RawRecord::verify(&buf, keys.log()).unwrap();
        assert_eq!((got, link), (head, mac));
        let entries: Vec<_> = entries.map(Result::unwrap).collect();
        assert_eq!(entries[0], Entry::Tags { seq: Seq(1), first: BlockIndex(10), tags: &tags });
        assert_eq!(entries[1], Entry::Zeros { seq: Seq(2), range: BlockRange::new(BlockIndex(5), 77) });
        assert_eq!(entries[2], Entry::Flush { highest: Seq(2), except: &[U64::new(1)] });
        assert_eq!(entries.len(), 3);
        let durable = |number| got.follows_durable(RecordNumber(number));
        assert!(durable(6) && !durable(7) && !durable(9) && !durable(10));
        let (_, end) = RawRecord::claim(&buf).unwrap();
        for bit in 0..end * 8 {
            let mut bad = buf[..].to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(RawRecord::verify(&bad, keys.log()).is_none(), "bit {bit}");
        }
    }
}

//! Log records: a chain in which each link is the MAC of the record before.

use super::{Layout, Tag, Unknown};
use crate::{
    BlockIndex, BlockRange, Epoch, RecordNumber, Seq,
    crypto::keys::{Mac, MacKey},
};
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout,
    little_endian::{U16, U32, U64},
};

pub(super) const MAGIC: [u8; 8] = *b"UBLKILOG";
/// What a record expects to come after: the MAC of the record before, or the link in the superblock.
pub(crate) type Link = Mac;

/// Bytes of an entry before its tags or numbers.
pub(crate) const ENTRY_BYTES: usize = size_of::<RawEntry>();
/// Bytes of a record besides its entries: header and MAC, 72 + 32.
pub(crate) const RECORD_OVERHEAD: usize = size_of::<RawRecord>() + MAC_BYTES;
pub(super) const MAC_BYTES: usize = 32;

pub(super) const KIND_TAGS: u32 = 1;
pub(super) const KIND_ZEROS: u32 = 2;
pub(super) const KIND_FLUSH: u32 = 3;
pub(super) const KIND_PAYLOAD: u32 = 4;

/// Header of a record: 8 magic + 8 epoch + 8 number + 8 position + 4 bytes + 2 entries + 2 under
/// way + 32 link = 72 bytes. Entries follow, then the MAC over all before it; the rest, up to the
/// record padding, is zeros. Then the blocks of the payload entries, in their order, padded too.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(crate) struct RawRecord {
    pub(super) magic: [u8; 8],
    pub(super) epoch: U64,
    pub(super) number: U64,
    /// Bytes ever written to the ring before this record: a record moved elsewhere does not verify.
    pub(super) position: U64,
    /// Header, entries and MAC.
    pub(super) bytes: U32,
    pub(super) entries: U16,
    pub(super) under_way: U16,
    pub(super) link: Link,
}
const _: () = assert!(size_of::<RawRecord>() == 72);

/// 4 kind + 4 count + 8 first block (flush: highest number) + 8 number = 24 bytes.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct RawEntry {
    kind: U32,
    /// Blocks, or for a flush the numbers that are listed.
    count: U32,
    first: U64,
    seq: U64,
}
const _: () = assert!(size_of::<RawEntry>() == 24);

impl RawEntry {
    /// Of a change to blocks.
    pub(super) fn of(kind: u32, count: u64, first: BlockIndex, seq: Seq) -> Self {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Buf,
        crypto::keys::{Keys, MasterKey},
        format::{RecordBuilder, TAG_BYTES},
    };

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
        let mut buf = Buf::new(16 << 10);
        buf.fill(0xee);
        let mut b = RecordBuilder::new(buf);
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

//! Following the chain of records.

use super::{Candidates, patience::Effort, ring::Ring};
use crate::{
    BlockIndex, ByteOffset, Device, DeviceError, Epoch, Errno, RecordNumber, Seq, Storage,
    crypto::{keys::Keys, tagger::Tagger},
    format::{
        Entry, Feature, Layout, Link, RawRecord, RecordHead, RecordShape, Superblock, Tag, Unknown, VerifiedRecord,
    },
    lifecycle::{open_error::OpenError, superblocks::Newest},
    log::{LogPoint, RECORDS_IN_FLIGHT, next_position},
    options::UnreadLog,
};

/// What looks like records of this log and proves to be none may be so many times the ring in all.
/// A crash leaves the last two torn, and a volume that was formatted over may have left a ring
/// full: records do not overlap. More than that was put there to be hashed.
const MOST_FALSE_RINGS: u64 = 4;

/// How often the place where the log ends may come otherwise than before.
const MOST_LOOKS: u32 = 3;

/// What the log says, and where it ends.
pub(crate) struct Chain {
    pub(crate) candidates: Candidates,
    pub(crate) records: u64,
    /// Where the next record goes, what its number is; the link is the one that a torn
    /// record there would need.
    pub(crate) end: LogPoint,
    /// The number after that of the last record of the chain: that of the next may be higher.
    pub(crate) followed_to: RecordNumber,
    /// The link that the chain has at the record asked for.
    pub(crate) link_at: Option<Link>,
    /// A place of the ring that can't be read and where the chain does not go on: a warning.
    pub(crate) unreadable: Option<DeviceError>,
    pub(crate) unread: Option<Unread>,
    pub(crate) torn: Torn,
}

/// Records whose MAC holds, and whose payload is not what its tags say: a crash has torn their write.
#[derive(Default)]
pub(crate) struct Torn {
    pub(crate) records: u64,
    /// Of the one where the chain ends. Where the medium proves one of them, that record was durable
    /// once: its data is sent afterwards.
    pub(crate) tags: Vec<(BlockIndex, Tag)>,
}

/// Records that could not be read, of a log that is followed all the same.
#[derive(Clone, Copy)]
pub(crate) struct Unread {
    pub(crate) why: DeviceError,
    /// The first change that is logged behind all of them: what it says can't be older than what
    /// they say.
    pub(crate) newer_from: Seq,
}

/// Follows the chain that the superblock begins. Refuses a log that goes on after the chain's end:
/// then the superblock is older than the log, or a record in the middle is damaged.
///
/// It is never the case that a log ends where it can't be read: what can't be read may be the
/// newest record, so the log is refused, or followed as `unread` says, with that told. What it says
/// is added to `candidates`. Of the record `asked_for` the link is noted, where the chain gets to it.
pub(crate) async fn follow<S: Storage>(
    io: &S,
    newest: &Newest,
    tagger: &Tagger,
    unread: UnreadLog,
    asked_for: Option<RecordNumber>,
    mut candidates: Candidates,
) -> Result<Chain, OpenError> {
    let effort = if unread == UnreadLog::Refuse { Effort::Bounded } else { Effort::Thorough };
    let Newest { superblock, keys, .. } = newest;
    let mut walk = Walk {
        ring: Ring::new(io, newest, effort),
        superblock,
        keys,
        tagger,
        epoch: superblock.epoch,
        end: LogPoint { position: superblock.log_begin, number: superblock.record_number, link: superblock.link },
        false_bytes: 0,
        torn: Torn::default(),
    };
    let (mut records, mut missed, mut looks, mut link_at) = (0, None, 0, None);
    loop {
        if asked_for == Some(walk.end.number) {
            link_at = Some(walk.end.link);
        }
        match walk.next().await? {
            Step::Record(record, bytes) => {
                let VerifiedRecord { head, link, .. } = record;
                let end = LogPoint { position: head.position + bytes, number: RecordNumber(head.number.0 + 1), link };
                take(&record, &superblock.layout, &mut candidates, &mut missed)?;
                (walk.epoch, walk.end) = (head.epoch, end);
                records += 1;
            }
            Step::Unreadable(why) if unread == UnreadLog::Refuse => return Err(OpenError::LogUnreadable(why)),
            Step::Unreadable(why) => {
                missed = Some(Unread { why, newer_from: Seq(u64::MAX) });
                if !walk.skip_unreadable().await? {
                    break;
                }
            }
            // A transfer that went wrong must not end the log: what hangs on the record that it hit
            // would be lost.
            Step::End => match walk.comes_otherwise().await? {
                None => break,
                Some(why) if looks == MOST_LOOKS && unread == UnreadLog::Refuse => {
                    return Err(OpenError::LogUnreadable(why));
                }
                Some(_) if looks == MOST_LOOKS => break,
                Some(_) => looks += 1,
            },
        }
    }
    let followed_to = walk.end.number;
    let number = walk.after_stranded().await?;
    let unreadable = walk.ring.first_unreadable().filter(|_| missed.is_none());
    let end = LogPoint { number, ..walk.end };
    Ok(Chain { candidates, records, end, followed_to, link_at, unreadable, unread: missed, torn: walk.torn })
}

/// Adds what a record says to the candidates; `missed` is told which changes come after what could not
/// be read.
fn take(
    record: &VerifiedRecord<'_>,
    layout: &Layout,
    candidates: &mut Candidates,
    missed: &mut Option<Unread>,
) -> Result<(), Unknown> {
    let place = record.head.position % layout.log_size + record.payload_at() as u64;
    let mut blocks_at = layout.log_offset().0 + place;
    for entry in record.entries() {
        let entry = entry?.within(layout)?;
        if let (Some(Unread { newer_from, .. }), Some(seq)) = (&mut *missed, entry.seq()) {
            *newer_from = seq.min(*newer_from);
        }
        candidates.add(&entry, ByteOffset(blocks_at));
        if let Entry::Payload { blocks, .. } = entry {
            blocks_at += blocks.len() as u64;
        }
    }
    Ok(())
}

/// What is found where the chain would go on.
enum Step<'a> {
    /// The next record, and the bytes that it takes.
    Record(VerifiedRecord<'a>, u64),
    /// Nothing that belongs to the chain.
    End,
    /// It can't be told.
    Unreadable(DeviceError),
}

struct Walk<'a, S: Storage> {
    ring: Ring<'a, S>,
    superblock: &'a Superblock,
    keys: &'a Keys,
    tagger: &'a Tagger,
    /// Of the last record.
    epoch: Epoch,
    end: LogPoint,
    /// Bytes of false records that were hashed.
    false_bytes: u64,
    torn: Torn,
}

/// A record somewhere in the ring.
struct Stranded {
    head: RecordHead,
    /// Whether its payload is what its tags say. What can't be read is not.
    is_whole: bool,
}

impl<S: Storage> Walk<'_, S> {
    fn shape(&self) -> RecordShape {
        RecordShape {
            padding: self.superblock.physical_block as usize,
            block_size: self.superblock.layout.block_size as usize,
            payload: self.superblock.features().has(Feature::SyncLog),
        }
    }

    /// Where the lap that began with the live log ends.
    fn lap_end(&self) -> u64 {
        self.superblock.log_begin + self.ring.size()
    }

    /// Reads the place where the chain ends once more: why it can't be believed, where other bytes
    /// come.
    async fn comes_otherwise(&mut self) -> Result<Option<DeviceError>, OpenError> {
        let (size, max_record) = (self.ring.size(), self.superblock.layout.max_record() as u64);
        let at = next_position(self.end.position, size, max_record) % size;
        let before = self.ring.from(at).await?.to_vec();
        self.ring.forget();
        let same = self.ring.from(at).await? == before;
        let offset = ByteOffset(self.superblock.layout.log_offset().0 + at);
        Ok((!same).then(|| DeviceError::new("read", Device::Meta, offset, before.len(), Errno::EIO)))
    }

    async fn next(&mut self) -> Result<Step<'_>, OpenError> {
        let (size, max_record) = (self.ring.size(), self.superblock.layout.max_record() as u64);
        let position = next_position(self.end.position, size, max_record);
        if self.end.position > self.lap_end() {
            return Ok(Step::End);
        }
        let at = position % size;
        self.ring.from(at).await?;
        if let Some(why) = self.ring.unreadable(at..at + RawRecord::HEAD_BYTES) {
            return Ok(Step::Unreadable(why));
        }
        let bytes = self.ring.read_before(at);
        let is_next = |head: &RecordHead| {
            head.number == self.end.number && head.link == self.end.link && head.position == position
        };
        let Some(len) = RawRecord::claim(bytes).filter(|(head, _)| is_next(head)).map(|(_, len)| len as u64) else {
            return Ok(Step::End);
        };
        if let Some(why) = self.ring.unreadable(at..at + len) {
            return Ok(Step::Unreadable(why));
        }
        let epochs = self.epoch..=self.superblock.epoch.next();
        let (key, shape) = (self.keys.log(), self.shape());
        let Some(record) = RawRecord::verify(self.ring.read_before(at), key, shape) else {
            return Ok(Step::End);
        };
        // A record of a later epoch than the one after the superblock's can't be: its predecessor's
        // log space is only free once both copies name it.
        if !epochs.contains(&record.head.epoch) {
            return Err(OpenError::Tampered { what: "tag log" });
        }
        let bytes = record.padded()? as u64;
        if let Some(why) = self.ring.unreadable(at..at + bytes) {
            return Ok(Step::Unreadable(why));
        }
        // A record is whole or nothing, and so is a change: no part of it is taken.
        match is_whole(&record, self.tagger, &self.superblock.layout)? {
            true => Ok(Step::Record(record, bytes)),
            false => Ok(Step::End),
        }
    }

    /// Goes on at the next record of this life that can be read; `false` where there is none. Only
    /// for rescue: what the records in between say is missed.
    async fn skip_unreadable(&mut self) -> Result<bool, OpenError> {
        let step = u64::from(self.superblock.physical_block);
        let from = self.end.position + step;
        for position in (from..self.lap_end()).step_by(step as usize) {
            let Some(Stranded { head, .. }) = self.record_at(position, self.end.number).await? else { continue };
            if head.position == position && (self.epoch..=self.superblock.epoch.next()).contains(&head.epoch) {
                self.end = LogPoint { position, number: head.number, link: head.link };
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Looks for records behind the end of the chain, where one is missing; returns the
    /// number to go on with.
    ///
    /// One that is torn is not missing, wherever it lies: its write never ended. What its header
    /// says of those before it is true all the same.
    ///
    /// A crash may lose a record and leave one that was sent before the lost one was durable.
    /// Nothing hangs on the one that it leaves, for the data that it speaks of was never sent. Any
    /// other refuses the log. The numbers go on after those left, so that they can't be mistaken
    /// for records of the next life; and after those that may lie where nothing can be read.
    async fn after_stranded(&mut self) -> Result<RecordNumber, OpenError> {
        let expected = self.end.number;
        let mut next = expected;
        let step = self.superblock.physical_block as usize;
        for position in (self.end.position..self.lap_end()).step_by(step) {
            // What is not looked at is like what can't be read.
            if self.ring.has_had_enough() {
                break;
            }
            let Some(Stranded { head, is_whole }) = self.record_at(position, expected).await? else { continue };
            if (head.number == expected && is_whole) || head.follows_durable(expected) {
                return Err(OpenError::Tampered {
                    what: "tag log (it holds a record newer than the superblock allows)",
                });
            }
            next = next.max(RecordNumber(head.number.0 + 1));
        }
        if self.ring.first_unreadable().is_some() {
            next = next.max(RecordNumber(expected.0 + RECORDS_IN_FLIGHT as u64));
        }
        Ok(next)
    }

    /// The record at the place of `position`, if there is one with a number of at least `from`.
    async fn record_at(&mut self, position: u64, from: RecordNumber) -> Result<Option<Stranded>, OpenError> {
        let (shape, at) = (self.shape(), position % self.ring.size());
        // No record is larger than these bytes, whatever its header claims: what is
        // hashed here is bounded. Payload may look like a header: it is none of this place, unless
        // whoever wrote it knew where it would come to lie.
        self.ring.from(at).await?;
        let bytes = self.ring.read_before(at);
        let is_of_place =
            |head: &RecordHead| head.number >= from && head.position % self.superblock.layout.log_size == at;
        let Some((_, len)) = RawRecord::claim(bytes).filter(|(head, _)| is_of_place(head)) else { return Ok(None) };
        let Some(record) = RawRecord::verify(bytes, self.keys.log(), shape) else {
            self.false_bytes += len as u64;
            if self.false_bytes > MOST_FALSE_RINGS * self.ring.size() {
                return Err(OpenError::Tampered { what: "tag log (it is full of false records)" });
            }
            return Ok(None);
        };
        // What makes no sense is not torn: somebody has written it.
        let is_whole = is_whole(&record, self.tagger, &self.superblock.layout).unwrap_or(true);
        let len = record.padded().unwrap_or(len);
        let is_torn = !is_whole && self.ring.unreadable(at..at + len as u64).is_none();
        self.torn.records += u64::from(is_torn);
        if is_torn && record.head.number == self.end.number && record.head.link == self.end.link {
            self.torn.tags = payload_tags(&record);
        }
        Ok(Some(Stranded { head: record.head, is_whole }))
    }
}

/// Whether each block of a record's payload is what its tag says.
fn is_whole(record: &VerifiedRecord<'_>, tagger: &Tagger, layout: &Layout) -> Result<bool, Unknown> {
    let mut whole = true;
    for entry in record.entries() {
        if let Entry::Payload { first, tags, blocks, .. } = entry?.within(layout)? {
            whole &= tagger.proves_all(tags, first, blocks);
        }
    }
    Ok(whole)
}

/// The blocks and tags of its payload.
fn payload_tags(record: &VerifiedRecord<'_>) -> Vec<(BlockIndex, Tag)> {
    let mut all = Vec::new();
    for entry in record.entries() {
        if let Ok(Entry::Payload { first, tags, .. }) = entry {
            all.extend((first.0..).map(BlockIndex).zip(tags.iter().copied()));
        }
    }
    all
}

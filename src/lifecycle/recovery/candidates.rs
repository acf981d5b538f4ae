//! Which tags each block may rightly carry.

use super::in_log::InLog;
use crate::{
    BlockIndex, BlockRange, ByteOffset, Seq,
    format::{Entry, Layout, Tag},
    lifecycle::open_error::OpenError,
    metadata::{pending::PendingSet, update_scratch::Scratch},
};
use std::{borrow::Cow, collections::HashSet};

/// A logged tag.
#[derive(Clone, Copy)]
pub(crate) struct Logged {
    pub(crate) block: BlockIndex,
    pub(crate) seq: Seq,
    pub(crate) tag: Tag,
}

/// Where the blocks of a payload entry lie on the metadata device.
struct Payload {
    seq: Seq,
    first: BlockIndex,
    at: ByteOffset,
}

/// Everything that the log says, as far as memory goes.
pub(crate) struct Candidates {
    /// Those of payload entries too.
    tags: Vec<Logged>,
    zeros: Vec<(BlockRange, Seq)>,
    payloads: Vec<Payload>,
    /// Blocks in all of these.
    payload_blocks: usize,
    /// The last flush entry. Earlier ones say nothing more: a number that the last one lists was in
    /// flight or failed at every earlier one that could have covered it.
    flushed: Option<(Seq, HashSet<u64>)>,
    /// Bytes that all of it may take.
    may_take: u64,
    /// Set when something has found no room: it, and what came after it, is missing.
    too_much: Option<TooMuch>,
}

/// The memory of an open: what is taken, and what can be had.
pub(crate) struct Budget {
    pub(crate) taken: u64,
    pub(crate) available: u64,
}

impl Budget {
    /// Takes so many bytes, or says what it would have come to.
    pub(crate) fn take(&mut self, bytes: u64) -> Result<(), OpenError> {
        self.taken = self.taken.saturating_add(bytes);
        match self.taken <= self.available {
            true => Ok(()),
            false => Err(OpenError::Memory { needed: self.taken, available: self.available }),
        }
    }
}

/// What the log says does not fit into this many bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct TooMuch {
    pub(crate) needed: u64,
}

fn bytes_of<T>(list: &Vec<T>) -> u64 {
    (list.capacity() * size_of::<T>()) as u64
}

/// Makes room for `more` in a list, a quarter at a time, where it and the others, `all` together,
/// take no more than `may_take` bytes. While a list moves it is there twice.
fn make_room<T>(list: &mut Vec<T>, more: usize, all: u64, may_take: u64) -> Result<(), TooMuch> {
    let (len, capacity) = (list.len(), list.capacity());
    if capacity - len >= more {
        return Ok(());
    }
    let takes = |wanted: usize| all + (wanted * size_of::<T>()) as u64;
    let ample = (len + more).max(capacity + capacity / 4 + 1024);
    let wanted = if takes(ample) <= may_take { ample } else { len + more };
    let needed = takes(wanted);
    let fits = needed <= may_take && list.try_reserve_exact(wanted - len).is_ok();
    if fits { Ok(()) } else { Err(TooMuch { needed }) }
}

/// The oldest candidate of a block, below its logged tags.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Oldest {
    /// A logged tag: the first of the list.
    Logged,
    /// The same, and the block itself lies here in the log.
    Payload(ByteOffset),
    Zeros,
    /// The tag in the tree.
    Checkpointed,
}

/// The candidates of one block, oldest first.
#[derive(Clone)]
pub(crate) struct BlockCandidates<'a> {
    pub(crate) block: BlockIndex,
    pub(crate) oldest: Oldest,
    /// Logged tags: first those that are candidates no more, and from `base` on, one at least, those
    /// that are.
    all: Cow<'a, [Logged]>,
    base: usize,
    /// Whether zeros are among what is no candidate any more.
    pub(crate) shadows_zeros: bool,
}

impl BlockCandidates<'_> {
    /// Its logged tags; never empty.
    pub(crate) fn logged(&self) -> &[Logged] {
        &self.all[self.base..]
    }
    /// Logged tags of what is older than the oldest candidate. They prove nothing to be
    /// current, and explain what lies on the medium where the newer never arrived.
    pub(crate) fn shadowed(&self) -> &[Logged] {
        &self.all[..self.base]
    }
    pub(crate) fn newest(&self) -> &Logged {
        self.all.last().expect("a block is here because it was logged")
    }
    /// Whether there is nothing to choose.
    pub(crate) fn is_single(&self) -> bool {
        matches!(self.oldest, Oldest::Logged | Oldest::Payload(_)) && self.logged().len() == 1
    }
    /// Bytes that it takes when it is kept.
    pub(crate) fn memory_bytes(&self) -> u64 {
        (size_of::<Self>() + size_of_val(self.kept())) as u64
    }
    /// The same, to be kept when the log is not.
    pub(crate) fn into_owned(self) -> BlockCandidates<'static> {
        let all = self.kept().to_vec();
        let base = all.len() - self.logged().len();
        BlockCandidates { all: Cow::Owned(all), base, ..self }
    }
    /// What is shadowed is only asked for where the log has something to put in its place.
    fn kept(&self) -> &[Logged] {
        if matches!(self.oldest, Oldest::Payload(_)) { &self.all } else { self.logged() }
    }
}

impl Candidates {
    /// None yet, of at most so many bytes.
    pub(crate) fn within(may_take: u64) -> Self {
        Self {
            tags: Vec::new(),
            zeros: Vec::new(),
            payloads: Vec::new(),
            payload_blocks: 0,
            flushed: None,
            may_take,
            too_much: None,
        }
    }

    fn memory_bytes(&self) -> u64 {
        bytes_of(&self.tags) + bytes_of(&self.zeros) + bytes_of(&self.payloads)
    }

    /// Once something has found no room, nothing more is taken. The blocks of a payload entry
    /// lie at `at` on the metadata device.
    pub(crate) fn add(&mut self, entry: &Entry<'_>, at: ByteOffset) {
        if self.too_much.is_some() {
            return;
        }
        if let Err(too_much) = self.make_room_for(entry) {
            self.too_much = Some(too_much);
            return;
        }
        match entry {
            Entry::Tags { seq, first, tags } => self.add_tags(*seq, *first, tags),
            Entry::Payload { seq, first, tags, .. } => {
                self.payloads.push(Payload { seq: *seq, first: *first, at });
                self.payload_blocks += tags.len();
                self.add_tags(*seq, *first, tags);
            }
            Entry::Zeros { seq, range } => self.zeros.push((*range, *seq)),
            Entry::Flush { highest, except } => {
                self.flushed = Some((*highest, except.iter().map(|n| n.get()).collect()));
            }
        }
    }

    fn make_room_for(&mut self, entry: &Entry<'_>) -> Result<(), TooMuch> {
        let (all, may_take) = (self.memory_bytes(), self.may_take);
        match entry {
            Entry::Tags { tags, .. } => make_room(&mut self.tags, tags.len(), all, may_take),
            Entry::Payload { tags, .. } => {
                make_room(&mut self.tags, tags.len(), all, may_take)?;
                let all = self.memory_bytes();
                make_room(&mut self.payloads, 1, all, may_take)
            }
            Entry::Zeros { .. } => make_room(&mut self.zeros, 1, all, may_take),
            // One list, of at most a record's size, in the place of the one before.
            Entry::Flush { .. } => Ok(()),
        }
    }

    fn add_tags(&mut self, seq: Seq, first: BlockIndex, tags: &[Tag]) {
        let logged = |(i, tag): (usize, &Tag)| Logged { block: BlockIndex(first.0 + i as u64), seq, tag: *tag };
        self.tags.extend(tags.iter().enumerate().map(logged));
    }

    fn covered(&self, seq: Seq) -> bool {
        self.flushed.as_ref().is_some_and(|(highest, except)| seq <= *highest && !except.contains(&seq.0))
    }

    /// An empty set large enough for what recovery will find, with the runs of zeros in it; the
    /// newest wins. `layout` tells what it takes to write that down. And the bytes of all that.
    pub(crate) fn into_set_and_blocks(mut self, layout: &Layout) -> Result<(PendingSet, Settling, u64), TooMuch> {
        if let Some(too_much) = self.too_much {
            return Err(too_much);
        }
        // In place: no number is on a block twice, and none is that of two changes.
        self.tags.sort_unstable_by_key(|t| (t.block, t.seq));
        self.payloads.sort_unstable_by_key(|p| p.seq);
        let blocks = self.tags.chunk_by(|a, b| a.block == b.block).count().max(1);
        let runs = 2 * self.zeros.len() + 1;
        let needed = self.memory_bytes()
            + InLog::memory_bytes_for(self.payload_blocks)
            + PendingSet::memory_bytes_for(blocks, runs)
            + (blocks * size_of::<BlockCandidates<'_>>()) as u64
            + Scratch::memory_bytes(layout, blocks, runs);
        if needed > self.may_take {
            return Err(TooMuch { needed });
        }
        let set = PendingSet::new(blocks, runs);
        for (range, seq) in &self.zeros {
            set.insert_run(*range, *seq);
        }
        Ok((set, Settling { log: self, block_size: layout.block_size.into() }, needed))
    }
}

/// The log's content, sorted by block.
pub(crate) struct Settling {
    log: Candidates,
    block_size: u64,
}

impl Settling {
    /// An empty list for all blocks that may lie in the log.
    pub(crate) fn in_log(&self) -> InLog {
        InLog::with_capacity(self.log.payload_blocks)
    }

    /// Each block that has logged tags newer than any zeros over it, in order.
    pub(crate) fn blocks<'a>(&'a self, set: &'a PendingSet) -> impl Iterator<Item = BlockCandidates<'a>> {
        let log = &self.log;
        log.tags.chunk_by(|a, b| a.block == b.block).filter_map(move |all| {
            let block = all[0].block;
            // Zeros are done once logged; before any tag is put in, the set knows zeros only.
            let zeros = set.zeros_at(block);
            // So is payload.
            let payload = all.iter().rev().find_map(|t| Some((t.seq, self.payload_at(t)?)));
            let covered = all.iter().rev().map(|t| t.seq).find(|seq| log.covered(*seq));
            // Everything older than `newest` is out.
            let newest = zeros.max(covered).max(payload.map(|(seq, _)| seq));
            let base = newest.map_or(0, |newest| all.partition_point(|t| t.seq < newest));
            let oldest = match (newest, payload) {
                (None, _) => Oldest::Checkpointed,
                _ if newest == zeros => Oldest::Zeros,
                (_, Some((seq, at))) if newest == Some(seq) => Oldest::Payload(at),
                _ => Oldest::Logged,
            };
            let shadows_zeros = zeros.is_some() && oldest != Oldest::Zeros;
            let all = Cow::Borrowed(all);
            (base < all.len()).then_some(BlockCandidates { block, oldest, all, base, shadows_zeros })
        })
    }

    /// Where the block of this tag lies in the log, if it was logged with it.
    fn payload_at(&self, t: &Logged) -> Option<ByteOffset> {
        let payloads = &self.log.payloads;
        let payload = payloads.get(payloads.partition_point(|p| p.seq < t.seq)).filter(|p| p.seq == t.seq)?;
        let before = t.block.0.checked_sub(payload.first.0)?;
        Some(ByteOffset(payload.at.0 + before * self.block_size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logged(seq: u64, tags: &[Tag]) -> Entry<'_> {
        Entry::Tags { seq: Seq(seq), first: BlockIndex(seq % 7), tags }
    }

    #[test]
    fn what_finds_no_room_is_told_and_nothing_is_taken_beyond() {
        let layout = Layout::new(512, 1 << 20, 64 << 10, false).unwrap();
        let tags = [[7; 32]; 100];
        let fill = |may_take: u64| {
            let mut candidates = Candidates::within(may_take);
            for seq in 1..=1000 {
                let payload =
                    Entry::Payload { seq: Seq(seq), first: BlockIndex(9), tags: &tags[..1], blocks: &[0; 512] };
                let zeros = Entry::Zeros { seq: Seq(seq), range: BlockRange::new(BlockIndex(0), 1) };
                [logged(seq, &tags), payload, zeros]
                    .iter()
                    .for_each(|entry| candidates.add(entry, ByteOffset(1 << 20)));
                assert!(candidates.memory_bytes() <= may_take);
            }
            candidates.into_set_and_blocks(&layout).map(|_| ())
        };
        assert!(fill(16 << 20).is_ok());
        for may_take in [0, 100, 4096, 1 << 20, 4 << 20] {
            let TooMuch { needed } = fill(may_take).unwrap_err();
            assert!(needed > may_take, "{needed} of {may_take}");
        }
    }
}

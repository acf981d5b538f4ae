//! Which tags each block may rightly carry.

use crate::{
    BlockIndex, BlockRange, Seq,
    format::{Entry, Layout, Tag},
    lifecycle::open_error::OpenError,
    metadata::{pending::PendingSet, tree_update::Scratch},
};
use std::{borrow::Cow, collections::HashSet};

/// A logged tag.
#[derive(Clone, Copy)]
pub(crate) struct Logged {
    pub(crate) block: BlockIndex,
    pub(crate) seq: Seq,
    pub(crate) tag: Tag,
}

/// Everything that the log says, as far as memory goes.
pub(crate) struct Candidates {
    tags: Vec<Logged>,
    zeros: Vec<(BlockRange, Seq)>,
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

/// Makes room for `more` in a list, a quarter at a time, where it and what is there `beside` it
/// take no more than `may_take` bytes. While a list moves it is there twice.
fn make_room<T>(list: &mut Vec<T>, more: usize, beside: u64, may_take: u64) -> Result<(), TooMuch> {
    let (len, capacity) = (list.len(), list.capacity());
    if capacity - len >= more {
        return Ok(());
    }
    let takes = |wanted: usize| beside + bytes_of(list) + (wanted * size_of::<T>()) as u64;
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
    Zeros,
    /// The tag in the tree.
    Checkpointed,
}

/// The candidates of one block, oldest first.
#[derive(Clone)]
pub(crate) struct BlockCandidates<'a> {
    pub(crate) block: BlockIndex,
    pub(crate) oldest: Oldest,
    /// Never empty.
    pub(crate) logged: Cow<'a, [Logged]>,
}

impl BlockCandidates<'_> {
    pub(crate) fn newest(&self) -> &Logged {
        self.logged.last().expect("a block is here because it was logged")
    }
    /// Whether there is nothing to choose.
    pub(crate) fn is_single(&self) -> bool {
        self.oldest == Oldest::Logged && self.logged.len() == 1
    }
    /// Bytes that it takes when it is kept.
    pub(crate) fn memory_bytes(&self) -> u64 {
        (size_of::<Self>() + self.logged.len() * size_of::<Logged>()) as u64
    }
    /// The same, to be kept when the log is not.
    pub(crate) fn into_owned(self) -> BlockCandidates<'static> {
        BlockCandidates { logged: Cow::Owned(self.logged.into_owned()), ..self }
    }
}

impl Candidates {
    /// None yet, of at most so many bytes.
    pub(crate) fn within(may_take: u64) -> Self {
        Self { tags: Vec::new(), zeros: Vec::new(), flushed: None, may_take, too_much: None }
    }

    /// Once something has found no room, nothing more is taken.
    pub(crate) fn add(&mut self, entry: Entry<'_>) {
        if self.too_much.is_some() {
            return;
        }
        let (tags, zeros, may_take) = (bytes_of(&self.tags), bytes_of(&self.zeros), self.may_take);
        let room = match &entry {
            Entry::Tags { tags: new, .. } | Entry::Payload { tags: new, .. } => {
                make_room(&mut self.tags, new.len(), zeros, may_take)
            }
            Entry::Zeros { .. } => make_room(&mut self.zeros, 1, tags, may_take),
            // One list, of at most a record's size, in the place of the one before.
            Entry::Flush { .. } => Ok(()),
        };
        if let Err(too_much) = room {
            self.too_much = Some(too_much);
            return;
        }
        match entry {
            Entry::Tags { seq, first, tags } | Entry::Payload { seq, first, tags, .. } => {
                let logged = |(i, tag): (usize, &Tag)| Logged { block: BlockIndex(first.0 + i as u64), seq, tag: *tag };
                self.tags.extend(tags.iter().enumerate().map(logged));
            }
            Entry::Zeros { seq, range } => self.zeros.push((range, seq)),
            Entry::Flush { highest, except } => {
                self.flushed = Some((highest, except.iter().map(|n| n.get()).collect()));
            }
        }
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
        // In place: no number is on a block twice.
        self.tags.sort_unstable_by_key(|t| (t.block, t.seq));
        let blocks = self.tags.chunk_by(|a, b| a.block == b.block).count().max(1);
        let runs = 2 * self.zeros.len() + 1;
        let needed = bytes_of(&self.tags)
            + bytes_of(&self.zeros)
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
        Ok((set, Settling(self), needed))
    }
}

/// The log's content, sorted by block.
pub(crate) struct Settling(Candidates);

impl Settling {
    /// Each block that has logged tags newer than any zeros over it.
    pub(crate) fn blocks<'a>(&'a self, set: &'a PendingSet) -> impl Iterator<Item = BlockCandidates<'a>> {
        let log = &self.0;
        log.tags.chunk_by(|a, b| a.block == b.block).filter_map(move |all| {
            let block = all[0].block;
            // Zeros are done once logged; before any tag is put in, the set knows zeros only.
            let zeros = set.zeros_at(block);
            let covered = all.iter().rev().map(|t| t.seq).find(|seq| log.covered(*seq));
            // Everything older than `base` is out.
            let base = zeros.max(covered);
            let from = base.map_or(0, |base| all.partition_point(|t| t.seq < base));
            let logged = &all[from..];
            let oldest = match base {
                None => Oldest::Checkpointed,
                Some(base) if zeros == Some(base) => Oldest::Zeros,
                Some(_) => Oldest::Logged,
            };
            (!logged.is_empty()).then_some(BlockCandidates { block, oldest, logged: Cow::Borrowed(logged) })
        })
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
                candidates.add(logged(seq, &tags));
                candidates.add(Entry::Zeros { seq: Seq(seq), range: BlockRange::new(BlockIndex(0), 1) });
                assert!(bytes_of(&candidates.tags) + bytes_of(&candidates.zeros) <= may_take);
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

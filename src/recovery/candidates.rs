//! Which tags each block may rightly carry.

use crate::{
    BlockIndex, BlockRange, Seq,
    format::{Entry, Tag},
    pending::PendingSet,
};
use std::{borrow::Cow, collections::HashSet};

/// A logged tag.
#[derive(Clone, Copy)]
pub(crate) struct Logged {
    pub(crate) block: BlockIndex,
    pub(crate) seq: Seq,
    pub(crate) tag: Tag,
}

/// Everything that the log says.
#[derive(Default)]
pub(crate) struct Candidates {
    tags: Vec<Logged>,
    zeros: Vec<(BlockRange, Seq)>,
    /// The last flush entry. Earlier ones say nothing more: a number that the last one lists was in
    /// flight or abandoned at every earlier one that could have covered it.
    flushed: Option<(Seq, HashSet<u64>)>,
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
    /// The same, to be kept when the log is not.
    pub(crate) fn into_owned(self) -> BlockCandidates<'static> {
        BlockCandidates { logged: Cow::Owned(self.logged.into_owned()), ..self }
    }
}

impl Candidates {
    pub(crate) fn add(&mut self, entry: Entry<'_>) {
        match entry {
            Entry::Tags { seq, first, tags } => {
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

    /// An empty set large enough for what recovery will find, with the runs of zeros in it; the newest wins.
    pub(crate) fn into_set_and_blocks(mut self) -> (PendingSet, Settling) {
        self.tags.sort_by_key(|t| (t.block, t.seq));
        let blocks = self.tags.chunk_by(|a, b| a.block == b.block).count();
        let set = PendingSet::new(blocks.max(1), 2 * self.zeros.len() + 1);
        for (range, seq) in &self.zeros {
            set.insert_run(*range, *seq);
        }
        (set, Settling(self))
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

//! The recovery table, row by row: which of its candidates a block's data proves.

use super::candidates::{BlockCandidates, Oldest};
use crate::{
    BlockIndex, ByteOffset, Seq, Storage,
    crypto::tagger::Tagger,
    format::{LOST_TAG, TAG_BYTES, Tag, ZERO_TAG},
    metadata::{
        load::{Missing, PageBufs},
        tree::{CacheUse, CacheWalk, Found, LoadError, Tree},
    },
};

/// A row of the recovery table, see `docs/crash-safety.md`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Row {
    /// One candidate only: settled without reading.
    A,
    /// The same, and it lies in the log: it goes to its place.
    P1,
    /// The data proves the newest candidate.
    B,
    /// The data proves an older candidate: the newer writes never arrived.
    C(Seq, Tag),
    /// The data proves none and the oldest candidate is zeros: the data never arrived.
    D,
    /// The data proves none, but what lies there is older than the oldest candidate, and that lies in
    /// the log: the newer data never arrived, and the oldest goes to its place.
    P2,
    /// The data proves none: corrupt, lost or rolled back. So is data that nothing explains where
    /// the oldest candidate lies in the log (row P3): an older version is not passed off as it.
    E,
}

impl Row {
    /// Whether the data has proved none of the candidates: that is evidence only if
    /// the same is read twice.
    pub(crate) fn proves_nothing(self) -> bool {
        matches!(self, Row::D | Row::P2 | Row::E)
    }

    /// The block's tag from now on, and the number of the change that it is of. [`Seq`]
    /// 0: of none in the log.
    pub(crate) fn choice(self, c: &BlockCandidates<'_>) -> (Seq, Tag) {
        match self {
            Row::A | Row::P1 | Row::B | Row::E => (c.newest().seq, c.newest().tag),
            Row::C(seq, tag) => (seq, tag),
            Row::D => (Seq(0), ZERO_TAG),
            Row::P2 => (c.logged()[0].seq, c.logged()[0].tag),
        }
    }

    /// Where the block lies in the log, if it is to be had from there.
    pub(crate) fn in_log(self, c: &BlockCandidates<'_>) -> Option<ByteOffset> {
        match (self, c.oldest) {
            (Row::P1 | Row::P2, Oldest::Payload(at)) => Some(at),
            _ => None,
        }
    }

    /// That of a block of which there is nothing to choose.
    pub(crate) fn of_single(c: &BlockCandidates<'_>) -> Option<Self> {
        c.is_single().then_some(if c.oldest == Oldest::Logged { Row::A } else { Row::P1 })
    }
}

/// Judges `data`, the block as it is on the medium, by what the log says alone. `None`: the tag in
/// the tree might decide.
pub(crate) fn judge_by_log(tagger: &Tagger, c: &BlockCandidates<'_>, data: &[u8]) -> Option<Row> {
    let proves = |tag: &Tag| tagger.proves(tag, c.block, data);
    let mut newest_first = c.logged().iter().rev();
    if newest_first.next().is_some_and(|newest| proves(&newest.tag)) {
        return Some(Row::B);
    }
    if let Some(older) = newest_first.find(|older| proves(&older.tag)) {
        return Some(Row::C(older.seq, older.tag));
    }
    match c.oldest {
        Oldest::Logged => Some(Row::E),
        Oldest::Zeros => Some(Row::D),
        Oldest::Payload(_) if c.shadows_zeros || c.shadowed().iter().any(|older| proves(&older.tag)) => Some(Row::P2),
        Oldest::Payload(_) | Oldest::Checkpointed => None,
    }
}

/// The same, by the tag in the tree where that might decide. An error means that the page which
/// holds it can't be had: what it might have proved is not decided without it.
pub(crate) async fn judge<S: Storage>(
    io: &S,
    tree: &Tree,
    tagger: &Tagger,
    pages: &mut PageBufs,
    c: &BlockCandidates<'_>,
    data: &[u8],
) -> Result<Row, LoadError> {
    if let Some(row) = judge_by_log(tagger, c, data) {
        return Ok(row);
    }
    let tag = checkpointed(io, tree, pages, c.block).await?;
    Ok(match c.oldest {
        Oldest::Payload(_) if tag == ZERO_TAG || tagger.proves(&tag, c.block, data) => Row::P2,
        Oldest::Payload(_) => Row::E,
        _ if tag == ZERO_TAG => Row::D,
        _ if tagger.proves(&tag, c.block, data) => Row::C(Seq(0), tag),
        _ => Row::E,
    })
}

/// The tag of a block in the tree.
pub(super) async fn checkpointed<S: Storage>(
    io: &S,
    tree: &Tree,
    pages: &mut PageBufs,
    block: BlockIndex,
) -> Result<Tag, LoadError> {
    let (leaf, place) = tree.layout.tag_page_of(block);
    let at = place * TAG_BYTES;
    let mut tag = LOST_TAG;
    let mut end = Found::Page;
    match tree.walk_cached(tree.root.load(), leaf.index, at, &mut tag, &mut CacheUse::default()) {
        CacheWalk::Found(found) => end = found,
        CacheWalk::Missing(page, entry) => {
            let mut missing = Missing::new(leaf.index);
            missing.add(leaf.index, page, entry);
            let take = |_, found, bytes: &[u8]| {
                end = found;
                if found == Found::Page {
                    tag.copy_from_slice(&bytes[at..at + TAG_BYTES]);
                }
            };
            tree.load_missing(io, pages, &missing, false, || {}, take).await?;
        }
    }
    Ok(match end {
        Found::Page => tag,
        Found::Absent(_) => ZERO_TAG,
        Found::Lost(_) => LOST_TAG,
    })
}

//! What a pass has found so far.

use crate::{
    BadReason, BlockIndex, ByteOffset, PageName,
    format::{Scrub, ScrubState},
    maintenance::check::{BadRun, take_out},
};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Most runs of bad blocks, and most pieces of bad metadata, that a report lists.
pub const MAX_LISTED: usize = 200;

/// How far a pass is, and what it has found.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ScrubReport {
    /// Number of the pass.
    pub pass: u64,
    /// Whether it runs.
    pub state: ScrubState,
    /// When it began, in seconds since 1970.
    pub begun_seconds: u64,
    /// When it ended, in seconds since 1970; 0 while it is under way.
    pub ended_seconds: u64,
    /// Bytes that are read in a second at most, where that was said.
    pub rate: Option<u64>,
    /// Blocks of the volume.
    pub blocks: u64,
    /// The block that it goes on with.
    pub cursor: u64,
    /// The first block before that to which it has to come back. A pass that goes on after the volume was opened anew
    /// begins there.
    pub held_at: Option<u64>,
    /// The block from which it went on when the volume was opened: all that follows but the counts of bad and
    /// unreadable blocks is of what came after.
    pub resumed_at: u64,
    /// Blocks that hold what was written last, as their tags prove. Those that read as zeros have nothing to
    /// prove.
    pub verified_blocks: u64,
    /// Blocks that do not match their tags or can't be verified. Of a pass that goes on, also what was found bad
    /// before: blocks, and metadata that was not mended.
    pub bad_blocks: u64,
    /// Blocks that the device could not read.
    pub unreadable_blocks: u64,
    /// Blocks of which nothing can be said: they were being written whenever they were looked at. Where
    /// nothing is written, those that are not in their places, and those that recovery has not decided about.
    pub unsettled_blocks: u64,
    /// The first runs of bad and of unreadable blocks, as they were found. A run is listed once it has ended.
    pub bad_runs: Vec<BadRun>,
    /// Runs that are not listed.
    pub unlisted_runs: u64,
    /// Blocks that were bad or unreadable, and have been healed from a replica since.
    #[serde(default)]
    pub healed_blocks: u64,
    /// Damaged metadata, as it is found first: it may still be good in memory.
    pub bad_metadata: Vec<BadMetadata>,
    /// Pieces of it that are not listed.
    pub unlisted_metadata: u64,
    /// Of all these, those that are not mended.
    pub unmended_metadata: u64,
    /// Those that the next checkpoint mends.
    pub waiting_metadata: u64,
    /// Those that are mended.
    pub mended_metadata: u64,
}

/// A piece of metadata that is damaged on the medium.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BadMetadata {
    /// Which.
    #[serde(flatten)]
    pub part: MetadataPart,
    /// What is wrong with it: it does not match, or can't be read.
    #[serde(flatten)]
    pub reason: BadReason,
    /// What is done about it.
    pub remedy: Remedy,
}

/// What is done about a damaged piece of metadata.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Remedy {
    /// Nothing: its content can't be known, or can't be written.
    None,
    /// Its content is known and proven, or not needed any more once the next checkpoint has been made.
    Waits,
    /// It has been written anew, or is not needed any more.
    Mended,
}

/// A piece of metadata.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "part", rename_all = "snake_case")]
pub enum MetadataPart {
    /// One of the two superblock copies.
    Superblock {
        /// Its place on the metadata device, in bytes.
        offset: ByteOffset,
    },
    /// The block by which the data device says whose it is.
    Identity,
    /// A tag page or a tree page.
    TreePage {
        /// Which.
        name: PageName,
    },
    /// A part of the live log.
    Log {
        /// Its place on the metadata device, in bytes.
        offset: ByteOffset,
        /// Its length in bytes.
        len: u64,
    },
}

/// Something that a pass has found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ScrubFinding {
    /// Blocks.
    Blocks(BadRun),
    /// Metadata.
    Metadata(BadMetadata),
}

impl fmt::Display for MetadataPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Superblock { offset } => write!(f, "superblock copy at {offset} on the metadata device"),
            Self::Identity => f.write_str("identity block of the data device"),
            Self::TreePage { name } => write!(f, "{name} on the metadata device"),
            Self::Log { offset, len } => write!(f, "{len} bytes of the tag log at {offset} on the metadata device"),
        }
    }
}

impl fmt::Display for ScrubFinding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blocks(BadRun { range, reason }) => write!(f, "bad: blocks {range}: {reason}"),
            Self::Metadata(BadMetadata { part, reason, remedy }) => {
                let state = match remedy {
                    Remedy::None => "bad",
                    Remedy::Waits => "to be mended",
                    Remedy::Mended => "mended",
                };
                write!(f, "{state}: {part}: {reason}")
            }
        }
    }
}

impl ScrubFinding {
    /// Whether it stays as it is: not so of metadata that is written anew.
    pub fn is_bad(&self) -> bool {
        !matches!(self, Self::Metadata(BadMetadata { remedy: Remedy::Waits | Remedy::Mended, .. }))
    }
}

impl ScrubReport {
    /// What a superblock says of a pass: as of one that goes on from there.
    pub fn of(said: Scrub) -> Self {
        let Scrub { pass, cursor, begun_seconds, ended_seconds, bad_blocks, state } = said;
        Self { pass, state, begun_seconds, ended_seconds, cursor, resumed_at: cursor, bad_blocks, ..Default::default() }
    }

    /// What a superblock says of it.
    pub(super) fn in_superblock(&self) -> Scrub {
        let Self { pass, state, begun_seconds, ended_seconds, cursor, held_at, .. } = *self;
        let cursor = held_at.map_or(cursor, |held| held.min(cursor));
        let bad_blocks = self.bad_blocks + self.unreadable_blocks + self.unmended_metadata;
        Scrub { pass, cursor, begun_seconds, ended_seconds, bad_blocks, state }
    }

    /// Whether nothing bad is left of what was found so far.
    pub fn is_clean(&self) -> bool {
        self.bad_blocks + self.unreadable_blocks + self.bad_pieces() == 0
    }

    /// Pieces of damaged metadata that are not mended, or not yet.
    pub fn bad_pieces(&self) -> u64 {
        self.unmended_metadata + self.waiting_metadata
    }

    fn pieces(&mut self, remedy: Remedy) -> &mut u64 {
        match remedy {
            Remedy::None => &mut self.unmended_metadata,
            Remedy::Waits => &mut self.waiting_metadata,
            Remedy::Mended => &mut self.mended_metadata,
        }
    }

    /// It is known what has become of a piece that waited.
    pub(super) fn settle_metadata(&mut self, bad: BadMetadata) {
        self.waiting_metadata -= 1;
        *self.pieces(bad.remedy) += 1;
        let waits = |known: &&mut BadMetadata| known.part == bad.part && known.remedy == Remedy::Waits;
        if let Some(known) = self.bad_metadata.iter_mut().find(waits) {
            known.remedy = bad.remedy;
        }
    }

    pub(super) fn count(&mut self, reason: BadReason) {
        *self.count_of(reason) += 1;
    }

    fn count_of(&mut self, reason: BadReason) -> &mut u64 {
        let unreadable = matches!(reason, BadReason::Unreadable { .. });
        if unreadable { &mut self.unreadable_blocks } else { &mut self.bad_blocks }
    }

    pub(super) fn add_run(&mut self, run: BadRun) {
        if self.bad_runs.len() < MAX_LISTED { self.bad_runs.push(run) } else { self.unlisted_runs += 1 }
    }

    /// A block of a run that is listed is bad no more, and listed no more. `was_bad`: until it was healed.
    /// `false`: it is in none.
    pub(super) fn heal(&mut self, block: BlockIndex, was_bad: bool) -> bool {
        let mut was = None;
        take_out(&mut self.bad_runs, &[block], |reason| was = Some(reason));
        let Some(reason) = was else { return false };
        // One may have become two.
        if self.bad_runs.len() > MAX_LISTED {
            self.bad_runs.pop();
            self.unlisted_runs += 1;
        }
        let count = self.count_of(reason);
        *count = count.saturating_sub(1);
        self.healed_blocks += u64::from(was_bad);
        true
    }

    pub(super) fn add_metadata(&mut self, bad: BadMetadata) {
        *self.pieces(bad.remedy) += 1;
        match self.bad_metadata.len() {
            MAX_LISTED => self.unlisted_metadata += 1,
            _ => self.bad_metadata.push(bad),
        }
    }
}

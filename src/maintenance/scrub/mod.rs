//! Scrub: one pass over a volume in use, which finds what has rotted before somebody needs it.
//!
//! It takes no range, waits for no request, and no request waits for it, however long it is paused. What it
//! says is true all the same:
//!
//! - A block that matches a tag is proven. Each tag that is found, pending ones first and the root after
//!   them, was the block's own at some moment of the look. But a pending tag that somebody is just writing
//!   may be seen half: those count only in a quiet window.
//! - A block that does not match is looked at again, alone, in a *quiet window*: from before its tag is
//!   looked up until after it is read nobody holds its range to change it, or waits to. Admitted, held and
//!   parked writes hold theirs. What does not match then is bad: nobody has touched it, whatever came and went.
//! - Where there is no such window, for all patience, the block is counted as unsettled. It is being
//!   rewritten.
//!
//! Metadata is read from the medium, not from the cache: see `way.rs`. Blocks that read as zeros are not read.
//! A pass counts as no read of the volume and offers no hints. It writes nothing but what mends metadata: `mend.rs`.

mod blocks;
mod control;
mod findings;
mod fixed;
mod judge;
mod lane;
mod mend;
mod metered;
mod report;
mod way;

pub use crate::format::{Scrub, ScrubState};
use crate::{
    BlockRange, CounterValues, Io, Storage,
    crypto::tagger::Tagger,
    lifecycle::recovery::{in_log::InLog, undecided::Undecided},
    log::Log,
    maintenance::checkpoint::Checkpoints,
    metadata::Metadata,
    request::{context::RequestContexts, range_lock::RangeLocks},
    write_back::AdmittedWrites,
};
use blocks::Pass;
pub use control::ScrubControl;
use metered::Metered;
pub use report::{BadMetadata, MAX_LISTED, MetadataPart, Remedy, ScrubFinding, ScrubReport};
use std::time::Duration;

/// How long it lets the devices rest after half a MiB, while requests come.
const REST: Duration = Duration::from_millis(60);
/// How long to wait before the next look at what may be being written.
const BETWEEN_LOOKS: Duration = Duration::from_millis(20);

/// The parts of a volume that a pass looks at, and that healing a block needs.
pub(crate) struct Scrubber<'v> {
    pub(crate) metadata: &'v Metadata,
    pub(crate) ranges: &'v RangeLocks,
    pub(crate) tagger: &'v Tagger,
    pub(crate) log: &'v Log,
    pub(crate) admitted: &'v AdmittedWrites,
    pub(crate) checkpoints: &'v Checkpoints,
    pub(crate) contexts: &'v RequestContexts,
    pub(crate) undecided: &'v Undecided,
    pub(crate) in_log: &'v InLog,
    /// Whether the volume is open to be written.
    pub(crate) writable: bool,
}

impl Scrubber<'_> {
    /// One pass. `tell` hears of what is found.
    pub(crate) async fn run<S: Io>(&self, io: &S, control: &ScrubControl, tell: impl FnMut(ScrubFinding)) {
        let blocks = self.metadata.layout().blocks;
        control.note(|report| report.blocks = blocks);
        let io = &Metered::new(io);
        let mut pass = Pass::new(self, control, tell);
        if pass.may_go_on().await {
            pass.superblocks(io).await;
        }
        if pass.may_go_on().await {
            pass.identity(io).await;
        }
        let mut seen = self.requests();
        while pass.is_left() && pass.has_room(io).await && pass.may_go_on().await {
            let now = self.requests();
            let busy = std::mem::replace(&mut seen, now) != now;
            // It runs while the next bytes are read.
            let time = control.time_for(io.take_read());
            let paced = (!time.is_zero()).then(|| io.sleep(time));
            pass.some(io, busy).await;
            if let Some(paced) = paced {
                control.unless_stopped(paced).await;
            }
            if busy {
                control.sleep(io, REST).await;
            }
        }
        pass.deferred(io).await;
        let mut log = self.log.live();
        while !log.is_empty() && pass.may_go_on().await {
            control.pace(io).await;
            pass.log(io, &mut log).await;
        }
        pass.findings.end_run();
        pass.until_mended(io).await;
        pass.note_held();
        control.ended();
        self.checkpoints.note_scrub(control.in_superblock());
    }

    /// Changes whenever a request has come.
    fn requests(&self) -> u64 {
        let CounterValues { reads, writes, zeroes, flushes, .. } = self.contexts.sum();
        reads + writes + zeroes + flushes
    }

    /// Whether blocks of the range are elsewhere than in their places, or it is not known what they should be.
    fn is_elsewhere(&self, range: BlockRange) -> bool {
        self.undecided.first_in(range).is_some() || self.in_log.within(range).next().is_some()
    }
}

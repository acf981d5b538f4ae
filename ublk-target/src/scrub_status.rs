//! How far a pass over a volume is, in figures and words: the same in the system log, in `status` and in `scrub`.

use serde::{Deserialize, Serialize};
use std::fmt;
use ublk_integrity::scrub::{ScrubReport, ScrubState};

/// A pass, as a daemon tells of it. Number 0: there was none.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ScrubStatus {
    /// Whether it goes on, or may.
    pub under_way: bool,
    /// Why it could not go on, where that is so.
    pub failure: Option<String>,
    #[serde(flatten)]
    pub report: ScrubReport,
}

/// Its figures alone.
#[derive(Clone, Copy, Debug)]
pub struct ScrubSummary {
    pass: u64,
    state: ScrubState,
    percent: u64,
    blocks: u64,
    verified: u64,
    resumed_at: u64,
    bad: u64,
    unreadable: u64,
    unsettled: u64,
    bad_pieces: u64,
    waiting_pieces: u64,
    mended_pieces: u64,
    healed: u64,
}

/// Whether a pass goes on, sooner or later.
pub fn goes_on(state: ScrubState) -> bool {
    matches!(state, ScrubState::Running | ScrubState::Paused)
}

impl ScrubStatus {
    /// Whether nothing more will become of it. One that has left is neither under way nor over: its daemon ends, and
    /// the next goes on with it, or this one does after all.
    pub fn is_over(&self) -> bool {
        !self.under_way && (self.failure.is_some() || !goes_on(self.report.state))
    }

    /// The figures.
    pub fn summary(&self) -> ScrubSummary {
        let ScrubReport { state, cursor, blocks, verified_blocks, bad_blocks, .. } = self.report;
        let ScrubReport { unreadable_blocks, unsettled_blocks, .. } = self.report;
        ScrubSummary {
            pass: self.report.pass,
            state,
            percent: (u128::from(cursor) * 100 / u128::from(blocks.max(1))) as u64,
            blocks,
            verified: verified_blocks,
            resumed_at: self.report.resumed_at,
            bad: bad_blocks,
            unreadable: unreadable_blocks,
            unsettled: unsettled_blocks,
            bad_pieces: self.report.unmended_metadata,
            waiting_pieces: self.report.waiting_metadata,
            mended_pieces: self.report.mended_metadata,
            healed: self.report.healed_blocks,
        }
    }
}

impl fmt::Display for ScrubSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pass, percent, blocks, verified, bad, unreadable, unsettled, .. } = self;
        match self.state {
            ScrubState::None => return f.write_str("no pass has begun"),
            ScrubState::Running => write!(f, "pass {pass} is at {percent} %")?,
            ScrubState::Paused => write!(f, "pass {pass} is paused at {percent} %")?,
            ScrubState::Ended => write!(f, "pass {pass} has ended")?,
            ScrubState::Stopped => write!(f, "pass {pass} was stopped at {percent} %")?,
        }
        write!(f, ": {blocks} blocks, {verified} verified")?;
        if self.resumed_at > 0 {
            write!(f, " since it went on at block {}", self.resumed_at)?;
        }
        write!(f, ", {bad} bad, {unreadable} unreadable, {unsettled} unsettled")?;
        if self.healed > 0 {
            write!(f, ", {} healed", self.healed)?;
        }
        for (count, what) in
            [(self.bad_pieces, "bad"), (self.waiting_pieces, "to be mended"), (self.mended_pieces, "mended")]
        {
            match count {
                0 => {}
                1 => write!(f, ", 1 piece of metadata {what}")?,
                n => write!(f, ", {n} pieces of metadata {what}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ublk_integrity::{
        BadReason, BlockIndex, BlockRange, ByteOffset, Device, Errno,
        check::BadRun,
        scrub::{BadMetadata, MetadataPart, Remedy},
    };

    #[test]
    fn what_a_daemon_tells_is_understood() {
        let unreadable = BadReason::Unreadable { device: Device::Meta, errno: Errno::EIO };
        let page = ublk_integrity::PageName { level: 1, index: 7 };
        let report = ScrubReport {
            pass: 2,
            state: ScrubState::Running,
            blocks: 200,
            cursor: 51,
            bad_blocks: 3,
            bad_runs: vec![
                BadRun { range: BlockRange::new(BlockIndex(5), 2), reason: BadReason::Mismatch },
                BadRun { range: BlockRange::new(BlockIndex(9), 1), reason: BadReason::BadPage { page } },
            ],
            bad_metadata: vec![
                BadMetadata { part: MetadataPart::TreePage { name: page }, reason: unreadable, remedy: Remedy::Mended },
                BadMetadata {
                    part: MetadataPart::Superblock { offset: ByteOffset(0) },
                    reason: BadReason::Mismatch,
                    remedy: Remedy::None,
                },
                BadMetadata {
                    part: MetadataPart::Log { offset: ByteOffset(4096), len: 512 },
                    reason: unreadable,
                    remedy: Remedy::Waits,
                },
                BadMetadata { part: MetadataPart::Identity, reason: BadReason::Mismatch, remedy: Remedy::None },
            ],
            unmended_metadata: 2,
            waiting_metadata: 1,
            mended_metadata: 1,
            ..Default::default()
        };
        let status = ScrubStatus { under_way: true, failure: None, report };
        let told: ScrubStatus = serde_json::from_value(serde_json::json!(status)).unwrap();
        assert_eq!(told.report.bad_runs, status.report.bad_runs);
        assert_eq!(told.report.bad_metadata, status.report.bad_metadata);
        assert!(told.under_way);
        assert_eq!(
            told.summary().to_string(),
            "pass 2 is at 25 %: 200 blocks, 0 verified, 3 bad, 0 unreadable, 0 unsettled, 2 pieces of metadata bad, 1 piece of metadata to be mended, 1 piece of metadata mended"
        );
    }
}

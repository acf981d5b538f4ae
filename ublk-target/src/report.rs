//! What recovery and verification found, in lines for people: the same words at `add`, in the system
//! log, in `status`, `check` and `scrub`. They name the devices as the library does:
//! [`with_paths`](crate::failure::with_paths) puts the paths there.

use ublk_integrity::{check::BadRun, open::RecoveryReport};

/// Blocks that a line names one by one.
const NAMED: usize = 20;

/// All there is to say; nothing where there was nothing to recover.
pub fn recovery(report: &RecoveryReport) -> Vec<String> {
    summary(report).into_iter().chain(findings(report)).collect()
}

/// The figures in one line, where there was something in the log.
pub fn summary(report: &RecoveryReport) -> Option<String> {
    (report.records > 0).then(|| {
        // What volumes without a sync log never have is not said of them.
        let placed = if report.placed > 0 { format!(", {} put in place", report.placed) } else { String::new() };
        format!(
            "recovery of the data device: {} log records, {} blocks: {} settled, {} with writes that never arrived, {} corrupt, {} unreadable{placed}",
            report.records, report.blocks, report.settled, report.older, report.corrupt, report.unreadable
        )
    })
}

/// What somebody should look at, one line each.
pub fn findings(report: &RecoveryReport) -> Vec<String> {
    let mut lines = Vec::new();
    if report.superblock_repaired {
        lines.push("one superblock copy on the metadata device was damaged; the other is good, and has replaced it unless the volume is read-only".into());
    }
    for (what, count, blocks) in [
        ("writes that never arrived, and were never flushed", report.older, &report.older_blocks),
        ("corrupt, lost or rolled back", report.corrupt, &report.corrupt_blocks),
        ("unreadable", report.unreadable, &report.unreadable_blocks),
    ] {
        if count > 0 {
            lines.push(format!("recovery of the data device: {what}: {}", named(count, blocks)));
        }
    }
    if report.torn_was_durable {
        lines.push("recovery: the last log record on the metadata device is damaged, and was durable once: what was acknowledged with it may read as an older version".into());
    }
    if report.pages_lost > 0 {
        lines.push(format!(
            "recovery: {} damaged pages on the metadata device were lost; what hangs on them reads as errors until it is written again",
            report.pages_lost
        ));
    }
    lines
}

/// A run of bad blocks.
pub fn bad_run(run: &BadRun, block_size: u64) -> String {
    let (first, end) = (run.range.first.0 * block_size, run.range.end() * block_size);
    format!("bad: blocks {} (bytes {first}..{end}): {}", run.range, run.reason)
}

fn named(count: u64, blocks: &[u64]) -> String {
    let shown = &blocks[..blocks.len().min(NAMED)];
    let names = shown.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
    match count - shown.len() as u64 {
        0 => format!("blocks {names}"),
        more => format!("blocks {names} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_named_up_to_a_limit() {
        assert!(recovery(&RecoveryReport::default()).is_empty());
        let corrupt_blocks: Vec<u64> = (100..150).collect();
        let report = RecoveryReport {
            records: 3,
            blocks: 52,
            settled: 1,
            older: 1,
            older_blocks: vec![7],
            corrupt: 50,
            corrupt_blocks,
            ..Default::default()
        };
        let lines = recovery(&report);
        assert_eq!(lines.len(), 3);
        assert!(lines[1].ends_with("never flushed: blocks 7"), "{}", lines[1]);
        assert!(lines[2].ends_with("118, 119 and 30 more"), "{}", lines[2]);
        let report = RecoveryReport { placed: 2, torn_was_durable: true, ..report };
        let lines = recovery(&report);
        assert!(lines[0].ends_with("unreadable, 2 put in place") && lines[3].contains("durable once"), "{lines:?}");
    }
}

//! `check`: verify every block of a volume that is not in use.

use super::{DeviceArgs, progress};
use crate::{
    device::Use,
    failure::{Exit, Failure, Outcome},
    key::KeyArgs,
    offline::Offline,
    output::{self, Output},
    report,
};
use serde::Serialize;
use ublk_integrity::{
    check::{self, CheckReport},
    open::{Access, RecoveryReport},
};

/// Verify every block of a volume that is not in use; writes nothing
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub devices: DeviceArgs,
    #[command(flatten)]
    key: KeyArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    check: &'a CheckReport,
    recovery: &'a RecoveryReport,
}

pub fn run(args: &Args) -> Outcome {
    let offline = Offline::open(&args.devices, Use::Shared)?;
    let key = args.key.load()?;
    let volume = offline.open_volume(&key, Access::ReadOnly)?;
    if let Some(line) = offline.left_in_memory(&key).unwrap_or_else(|failure| Some(failure.message)) {
        output::warn(format_args!("{line}; here the volume is as it was without them"));
    }
    let recovery = volume.recovery();
    let block_size = u64::from(volume.info().block_size);
    let bar = progress::bar(volume.info().size);
    let mut slot = volume.slot(0);
    let io = offline.io();
    let report = offline.run(check::check(&volume, &io, &mut slot, |blocks| bar.set_position(blocks * block_size)))?;
    bar.finish_and_clear();
    let out = if args.json {
        let report = Report { check: &report, recovery };
        Output::json(&report)
    } else {
        lines(&report, recovery, block_size)
    };
    if !report.is_clean() {
        let bad = report.bad_blocks + report.unreadable_blocks;
        let verdict = Failure::new(Exit::Integrity, format_args!("{bad} of {} blocks are bad", report.blocks));
        return out.print_with(Err(verdict));
    }
    out.print()
}

fn lines(report: &CheckReport, recovery: &RecoveryReport, block_size: u64) -> Output {
    let mut out = Output::new();
    report::recovery(recovery).iter().for_each(|line| out.line(line));
    for run in &report.bad_runs {
        let (first, count) = (run.range.first.0 * block_size, run.range.count * block_size);
        out.line(format_args!("bad: blocks {} (bytes {first}..{}): {}", run.range, first + count, run.reason));
    }
    if report.truncated {
        out.line("bad: more runs are not listed");
    }
    out.line(format_args!(
        "{} blocks, {} hold data, {} bad, {} unreadable",
        report.blocks, report.data_blocks, report.bad_blocks, report.unreadable_blocks
    ));
    out
}

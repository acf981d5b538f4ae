//! `check`: verify every block of a volume that is not in use.

use super::{DeviceArgs, ExpectedArgs, progress};
use crate::{
    device::Use,
    failure::{Exit, Failure, Outcome},
    key::KeyArgs,
    offline::{Offline, Opening},
    report,
};
use serde::Serialize;
use ublk_integrity::{
    Volume,
    check::{self, CheckReport},
    open::{Access, RecoveryReport},
};

/// Verify every block of a volume that is not in use; writes nothing
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    devices: DeviceArgs,
    #[command(flatten)]
    expected: ExpectedArgs,
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
    let how = Opening { without_kept: true, ..Opening::new(Access::ReadOnly, args.expected.uuid) };
    let volume = offline.open_volume(&key, how)?;
    let recovery = volume.recovery();
    let block_size = u64::from(volume.info().block_size);
    let bar = progress::bar(volume.info().size);
    let mut slot = volume.slot(0);
    let io = offline.io();
    let report = offline.run(check::check(&volume, &io, &mut slot, |blocks| bar.set_position(blocks * block_size)))?;
    bar.finish_and_clear();
    if args.json {
        let report = Report { check: &report, recovery };
        println!("{}", serde_json::to_string_pretty(&report).expect("plain data"));
    } else {
        print(&report, recovery, block_size);
    }
    if !report.is_clean() {
        let bad = report.bad_blocks + report.unreadable_blocks;
        return Err(Failure::new(Exit::Integrity, format_args!("{bad} of {} blocks are bad", report.blocks)));
    }
    refuse_latched(&volume)
}

/// No verdict is good that a volume gives which could not be opened as it should be.
pub fn refuse_latched(volume: &Volume) -> Outcome {
    volume.latched().map_or(Ok(()), |why| Err(Failure::from(why)))
}

fn print(report: &CheckReport, recovery: &RecoveryReport, block_size: u64) {
    report::recovery(recovery).iter().for_each(|line| println!("{line}"));
    for run in &report.bad_runs {
        let (first, count) = (run.range.first.0 * block_size, run.range.count * block_size);
        println!("bad: blocks {} (bytes {first}..{}): {}", run.range, first + count, run.reason);
    }
    if report.truncated {
        println!("bad: more runs are not listed");
    }
    println!(
        "{} blocks, {} hold data, {} bad, {} unreadable",
        report.blocks, report.data_blocks, report.bad_blocks, report.unreadable_blocks
    );
}

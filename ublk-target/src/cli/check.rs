//! `check`: verify every block of a volume that is not in use.

use super::{
    DeviceArgs, ExpectedArgs,
    anchored::{AnchorArgs, WithoutAnchor},
    progress,
    replica::{Places, ReplicaArgs, Replicas, Tally},
};
use crate::{
    device::Use,
    failure::{Exit, Failure, Outcome},
    interrupt,
    key::KeyArgs,
    offline::{Offline, Opening},
    output::Output,
    report,
};
use serde::Serialize;
use std::ops::ControlFlow;
use ublk_integrity::{
    Buf, RequestContext, Volume,
    check::{self, CheckReport},
    heal::Healed,
    open::{Access, RecoveryReport},
};

/// Verify every block of a volume that is not in use; writes nothing, unless it is to heal
///
/// With --repair-from the volume is opened as `add` opens it, so recovery writes, too.
///
/// Interrupted (SIGINT, SIGTERM) it tells what it has found so far; the exit code is 6 if that is
/// anything, else 7.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub devices: DeviceArgs,
    #[command(flatten)]
    expected: ExpectedArgs,
    #[command(flatten)]
    key: KeyArgs,
    #[command(flatten)]
    replicas: ReplicaArgs,
    #[command(flatten)]
    anchor: AnchorArgs,
    #[command(flatten)]
    without: WithoutAnchor,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    uuid: &'a str,
    /// In bytes: all else is in blocks.
    block_size: u64,
    /// Whether all blocks were looked at.
    finished: bool,
    #[serde(flatten)]
    check: &'a CheckReport,
    /// What has become of blocks that were bad: the other figures are of what is bad yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    healing: Option<&'a Tally>,
    recovery: &'a RecoveryReport,
}

pub fn run(args: &Args) -> Outcome {
    let replicas = Replicas::open(&args.replicas)?;
    replicas.refuse([Some(&args.devices.data), args.devices.meta.as_ref()].into_iter().flatten().cloned())?;
    let heals = !args.replicas.repair_from.is_empty();
    let offline = args.devices.open(if heals { Use::Exclusive } else { Use::Shared })?;
    let key = args.key.load()?;
    let access = if heals { Access::ReadWrite } else { Access::ReadOnly };
    let anchor = args.anchor.open(&args.devices)?;
    let without_anchor = args.without.without_anchor;
    // What is to be healed is to be all that was answered.
    let how = Opening { without_kept: !heals, without_anchor, ..Opening::new(access, args.expected.uuid) };
    let (volume, keeper) = offline.open_anchored(&key, how, anchor.as_ref())?;
    let recovery = volume.recovery();
    let block_size = u64::from(volume.info().block_size);
    let bar = progress::bar(volume.info().size);
    let mut context = volume.context(0);
    let io = offline.io();
    let progress = |blocks| {
        bar.set_position(blocks * block_size);
        if interrupt::has_come() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let mut report = offline.run_to_its_end(check::check(&volume, &io, &mut context, progress))?;
    bar.finish_and_clear();
    let (mut tally, mut closed) = (Tally::default(), Ok(()));
    if heals {
        if report.is_whole() {
            tally = heal(&offline, &volume, &mut context, &mut report, &replicas);
        }
        // What was found and healed is told in any case.
        closed = offline.run_to_its_end(volume.close(&io)).and_then(|closed| Ok(closed?));
        closed = closed.and_then(|()| Offline::finish(&volume, keeper, anchor.as_ref()));
    }
    if !report.is_whole() {
        // What has been found by then is told.
        interrupt::told();
    }
    let out = if args.json {
        let finished = report.is_whole();
        let healing = heals.then_some(&tally);
        Output::json(&Report { uuid: &volume.info().uuid, block_size, finished, check: &report, healing, recovery })
    } else {
        lines(&report, &tally, recovery, block_size, |text| args.devices.named(text))
    };
    out.print_with(verdict(&report, &tally).and(closed).and_then(|()| refuse_latched(&volume)))
}

/// Heals the blocks that were found bad, until the command is interrupted. The report is of what is left.
fn heal(
    offline: &Offline,
    volume: &Volume,
    context: &mut RequestContext,
    report: &mut CheckReport,
    replicas: &Replicas,
) -> Tally {
    let io = offline.io();
    let places = Places { block_size: volume.block_size() as u64, data_offset: volume.data_offset().0 };
    let mut buf = Some(Buf::new(volume.block_size()));
    let mut good = Vec::new();
    let tally = replicas.heal(&report.bad_runs, places, |block, bytes| {
        if interrupt::has_come() {
            interrupt::told();
            return Err(Failure::new(Exit::Interrupted, "interrupted"));
        }
        let mut replica = buf.take().unwrap_or_else(|| Buf::new(volume.block_size()));
        replica.copy_from_slice(bytes);
        let (healed, replica) = offline.run_to_its_end(volume.heal(&io, context, block, replica))?;
        buf = Some(replica);
        if matches!(healed, Ok(Healed::Healed | Healed::WasGood)) {
            good.push(block);
        }
        Ok(healed?)
    });
    report.are_good(&good);
    tally
}

/// No verdict is good that a volume gives which could not be opened as it should be.
pub fn refuse_latched(volume: &Volume) -> Outcome {
    volume.latched().map_or(Ok(()), |why| Err(Failure::from(why).context("nothing can be written to the volume")))
}

/// A bad block counts more than that not all were looked at.
fn verdict(report: &CheckReport, tally: &Tally) -> Outcome {
    let bad = report.bad_blocks + report.unreadable_blocks;
    let (checked, blocks) = (report.checked_blocks, report.blocks);
    let interrupted = format!("interrupted after {checked} of {blocks} blocks");
    match (report.is_clean(), report.is_whole()) {
        (true, true) => Ok(()),
        (false, true) => {
            let healed = if tally.healed > 0 { format!(", {} were healed", tally.healed) } else { String::new() };
            Err(Failure::new(Exit::Integrity, format_args!("{bad} of {blocks} blocks are bad{healed}")))
        }
        (false, false) => Err(Failure::new(Exit::Integrity, format_args!("{interrupted}, {bad} of them bad"))),
        (true, false) => Err(Failure::new(Exit::Interrupted, format_args!("{interrupted}, none of them bad"))),
    }
}

/// `named` puts paths into the words.
fn lines(
    report: &CheckReport,
    tally: &Tally,
    recovery: &RecoveryReport,
    block_size: u64,
    named: impl Fn(&str) -> String,
) -> Output {
    let mut out = Output::new();
    tally.tell(&mut out);
    report::recovery(recovery).iter().for_each(|line| out.line(named(line)));
    for run in &report.bad_runs {
        out.line(named(&report::bad_run(run, block_size)));
    }
    if report.truncated {
        out.line("bad: more runs are not listed");
    }
    let CheckReport { blocks, checked_blocks, data_blocks, in_log, bad_blocks, unreadable_blocks, .. } = report;
    let in_log = if *in_log > 0 { format!(" ({in_log} of them in the log)") } else { String::new() };
    let checked = if report.is_whole() { String::new() } else { format!(" ({checked_blocks} checked)") };
    out.line(format_args!(
        "{blocks} blocks{checked}, {data_blocks} hold data{in_log}, {bad_blocks} bad, {unreadable_blocks} unreadable"
    ));
    out
}

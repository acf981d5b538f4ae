//! `scrub`: verify all that lies on the medium of a device in use, in the background.

use super::{
    progress,
    replica::{Places, ReplicaArgs, Replicas, Tally},
};
use crate::{
    daemon::{
        client::{self, Conversation, Unanswered},
        followed::{self, ask},
        protocol::{Offer, Offered, Request},
        state::{Change, State, socket_path},
    },
    failure::{Context, Exit, Failure, Outcome},
    output::Output,
    report,
    scrub_status::ScrubStatus,
    size::Size,
    ublk,
};
use serde::Deserialize;
use serde_json::{Value, json};
use std::{
    num::NonZeroU64,
    path::Path,
    thread,
    time::{Duration, Instant},
};
use ublk_integrity::{
    BlockIndex,
    heal::Healed,
    hex,
    scrub::{ScrubFinding, ScrubState},
};

/// How often `--wait` looks.
const LOOK: Duration = Duration::from_millis(500);

/// How long it bears with a device that has no daemon, which one may be about to follow: systemd starts another, somebody
/// types `recover`, and to open the volume takes time. While an `upgrade` is under way that does not count.
const WITHOUT_DAEMON: Duration = Duration::from_secs(120);
/// The same where none can follow.
const WITHOUT_HOPE: Duration = Duration::from_secs(10);

/// Verify all that lies on the medium of a device in use
///
/// A pass runs in the daemon, beside requests, and is in nobody's way. With --wait the exit code is 6 if it has
/// found anything bad. With --repair-from it is waited for, too, and bad blocks are healed.
#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("verb").args(["status", "pause", "resume", "stop"]))]
#[command(mut_arg("repair_from", |arg| arg.conflicts_with("verb")))]
pub struct Args {
    #[command(flatten)]
    device: super::OneDevice,
    /// Read so many bytes a second at most [default: as fast as goes without harm to others]
    #[arg(long, value_name = "SIZE", value_parser = rate, conflicts_with = "verb")]
    rate: Option<NonZeroU64>,
    /// Wait until the pass has ended, and tell what it has found
    #[arg(long, conflicts_with = "verb")]
    wait: bool,
    #[command(flatten)]
    replicas: ReplicaArgs,
    /// Begin no pass: heal what the last one has found
    #[arg(long, requires = "repair_from", conflicts_with_all = ["verb", "rate", "wait"])]
    heal_only: bool,
    /// Tell how far the pass is, or the last one came, and what it has found
    #[arg(long)]
    status: bool,
    /// Let the pass wait
    #[arg(long)]
    pause: bool,
    /// Let it go on
    #[arg(long)]
    resume: bool,
    /// End it where it is
    #[arg(long)]
    stop: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A pass that reads nothing would never end.
fn rate(text: &str) -> Result<NonZeroU64, String> {
    NonZeroU64::new(text.parse::<Size>()?.0).ok_or_else(|| "a rate is at least one byte a second, like 20M".into())
}

pub fn run(args: &Args) -> Outcome {
    let state = followed::alive(args.device.number()?)?;
    let request = match args {
        Args { status: true, .. } => Request::ScrubStatus {},
        Args { pause: true, .. } => Request::ScrubPause {},
        Args { resume: true, .. } => Request::ScrubResume {},
        Args { stop: true, .. } => Request::ScrubStop {},
        Args { heal_only: true, .. } => Request::ScrubStatus {},
        Args { rate, .. } => Request::ScrubStart { rate: *rate },
    };
    let replicas = Replicas::open(&args.replicas)?;
    replicas.refuse(state.settings.paths().map(Path::to_owned).chain([ublk::block_path(state.id)]))?;
    let heals = !args.replicas.repair_from.is_empty();
    let mut answer = ask(&state, &request)?;
    let mut status = read(&answer)?;
    if args.heal_only {
        refuse_unknown(&status)?;
    }
    if args.wait || heals && !args.heal_only {
        (answer, status) = wait(&state, status.report.pass)?;
    }
    let (mut tally, mut done) = (Tally::default(), Ok(()));
    if heals && !status.report.bad_runs.is_empty() {
        tally = heal(&state, &status, &replicas);
        // What was found and healed is told whatever becomes of the daemon.
        match ask(&state, &Request::ScrubStatus {}).and_then(|answer| Ok((read(&answer)?, answer))) {
            Ok((now, said)) if now.report.pass == status.report.pass => (status, answer) = (now, said),
            Ok(_) => {}
            Err(failure) => done = Err(failure),
        }
    }
    let out = if args.json {
        if heals {
            answer["healing"] = json!(tally);
        }
        Output::json(&answer)
    } else {
        lines(&status, &tally, &state)
    };
    out.print_with(done.and_then(|()| if args.wait || heals { verdict(&status, &state) } else { Ok(()) }))
}

/// What was found before the daemon started has no list any more, and what is being found has none yet.
fn refuse_unknown(status: &ScrubStatus) -> Outcome {
    let (report, summary) = (&status.report, status.summary());
    if status.under_way {
        return Err(Failure::new(Exit::Busy, format_args!("{summary}: wait for its end, or end it with --stop")));
    }
    let is_listed = !report.bad_runs.is_empty() || report.bad_blocks + report.unreadable_blocks == 0;
    match is_listed && report.pass > 0 {
        true => Ok(()),
        false => {
            let why = "it is not known which blocks are bad: without --heal-only a pass finds them first";
            Err(Failure::new(Exit::Arguments, format_args!("{summary}: {why}")))
        }
    }
}

/// Heals the blocks that the pass has found.
fn heal(state: &State, status: &ScrubStatus, replicas: &Replicas) -> Tally {
    let mut healer = Healer { state, daemon: None };
    match followed::answered(state.id, || healer.daemon().map(|(_, places)| places)) {
        Ok(places) => replicas.heal(&status.report.bad_runs, places, |block, bytes| healer.heal(block, bytes)),
        Err(why) => Tally::none_of(&status.report.bad_runs, &healer.failure(why)),
    }
}

/// Has the daemon heal blocks. It hangs up where a copy takes long to read.
struct Healer<'s> {
    state: &'s State,
    daemon: Option<(Conversation, Places)>,
}

impl Healer<'_> {
    fn daemon(&mut self) -> Result<(&mut Conversation, Places), Unanswered> {
        if self.daemon.is_none() {
            let (daemon, answer) = Conversation::begin(&socket_path(self.state.id), &Request::Heal {})?;
            let number = |field: &str| answer[field].as_u64().ok_or_else(not_understood).map_err(Unanswered::Refused);
            let places = Places { block_size: number("block_size")?, data_offset: number("data_offset")? };
            self.daemon = Some((daemon, places));
        }
        let (daemon, places) = self.daemon.as_mut().expect("made");
        Ok((daemon, *places))
    }

    /// Once more on another connection, where the one that was there is broken.
    fn heal(&mut self, block: BlockIndex, bytes: &[u8]) -> Outcome<Healed> {
        let offer = Offer { block, replica: hex(bytes) };
        let answer = followed::answered(self.state.id, || {
            let was_there = self.daemon.is_some();
            match self.offer(&offer) {
                Err(_) if was_there && self.daemon.is_none() => self.offer(&offer),
                done => done,
            }
        });
        outcome_of(block, &answer.map_err(|why| self.failure(why))?)
    }

    fn failure(&self, why: Unanswered) -> Failure {
        client::not_conversed(&socket_path(self.state.id), why)
    }

    fn offer(&mut self, offer: &Offer) -> Result<Value, Unanswered> {
        let answer = self.daemon()?.0.ask(offer);
        // What is still to be said there would be taken for what is asked next.
        if answer.is_err() {
            self.daemon = None;
        }
        answer
    }
}

fn outcome_of(asked: BlockIndex, answer: &Value) -> Outcome<Healed> {
    match Offered::deserialize(answer) {
        Ok(Offered::Done { block, outcome }) if block == asked => Ok(outcome),
        Ok(Offered::Failed { block, failed, exit }) if block == asked => {
            Err(Failure::new(Exit::from_code(exit), failed))
        }
        _ => Err(not_understood()),
    }
}

fn not_understood() -> Failure {
    Failure::new(Exit::Device, "the daemon tells what this program does not understand")
}

fn read(answer: &Value) -> Outcome<ScrubStatus> {
    ScrubStatus::deserialize(answer)
        .map_err(|e| Failure::new(Exit::Device, e))
        .doing("the daemon tells what this program does not understand")
}

/// Waits until a pass has ended. One that has left goes on with the daemon, or with the next one.
fn wait(state: &State, pass: u64) -> Outcome<(Value, ScrubStatus)> {
    let bar = progress::bar(state.volume.size);
    let mut patience = Patience::default();
    loop {
        match followed::answer(state, &Request::ScrubStatus {}) {
            // It may be slow for a while.
            Err(Unanswered::Late) => {}
            Err(Unanswered::Refused(failure)) => return Err(failure),
            Err(Unanswered::Absent(failure)) => match goes_on(state, pass) {
                Ok(is_changing) if patience.bears(is_changing, most_without_daemon(state), Instant::now()) => {}
                Ok(_) => return Err(State::load_alive(state.id).err().unwrap_or(failure)),
                Err(gone) => return Err(gone),
            },
            Ok(answer) => {
                patience = Patience::default();
                goes_on(state, pass)?;
                let status = read(&answer)?;
                if status.report.pass != pass {
                    return Err(is_gone(state, pass));
                }
                if status.is_over() {
                    bar.finish_and_clear();
                    return Ok((answer, status));
                }
                bar.set_position(status.report.cursor * u64::from(state.volume.block_size));
            }
        }
        thread::sleep(LOOK);
    }
}

/// Whether a command is about to give the device another daemon. Another volume may have its number by now.
fn goes_on(state: &State, pass: u64) -> Outcome<bool> {
    let now = State::load(state.id)?;
    match state.volume.may_become(&now.volume) && now.ended.is_none() {
        true => Ok(Change::is_under_way(state.id)),
        false => Err(is_gone(state, pass)),
    }
}

fn most_without_daemon(state: &State) -> Duration {
    if state.settings.recovery && ublk::exists(state.id) { WITHOUT_DAEMON } else { WITHOUT_HOPE }
}

fn is_gone(state: &State, pass: u64) -> Failure {
    Failure::new(
        Exit::Device,
        format_args!("pass {pass} over device {} is gone with its daemon: begin another", state.id),
    )
}

/// How long nobody has answered.
#[derive(Default)]
struct Patience(Option<Instant>);

impl Patience {
    /// Whether to look again, though nobody answers `now`, if that may be so for `most`.
    fn bears(&mut self, is_changing: bool, most: Duration, now: Instant) -> bool {
        if is_changing {
            self.0 = None;
        }
        now.duration_since(*self.0.get_or_insert(now)) < most
    }
}

/// What is bad counts more than that not all was looked at.
fn verdict(status: &ScrubStatus, state: &State) -> Outcome {
    let summary = status.summary();
    match (&status.failure, status.report.is_clean(), status.report.state) {
        (Some(why), ..) => Err(Failure::new(Exit::Device, format_args!("{summary}: {why}"))),
        (None, false, _) => {
            Err(Failure::new(Exit::Integrity, format_args!("device {} has rotted: {summary}", state.id)))
        }
        (None, true, ScrubState::Ended) => Ok(()),
        (None, true, ScrubState::Stopped) => Err(Failure::new(Exit::Interrupted, summary)),
        (None, true, _) => {
            Err(Failure::new(Exit::Device, format_args!("{summary}: not all of device {} was looked at", state.id)))
        }
    }
}

fn lines(status: &ScrubStatus, tally: &Tally, state: &State) -> Output {
    let mut out = Output::new();
    tally.tell(&mut out);
    if status.report.resumed_at > 0 && status.report.bad_blocks > 0 {
        out.line("bad: what was found before the daemon started is in the system log");
    }
    let block_size = u64::from(state.volume.block_size);
    for run in &status.report.bad_runs {
        out.line(state.settings.named(&report::bad_run(run, block_size)));
    }
    for bad in &status.report.bad_metadata {
        out.line(state.settings.named(&ScrubFinding::Metadata(*bad).to_string()));
    }
    let unlisted = status.report.unlisted_runs + status.report.unlisted_metadata;
    if unlisted > 0 {
        out.line(format_args!("bad: {unlisted} more are not listed"));
    }
    out.line(status.summary());
    if let Some(why) = &status.failure {
        out.line(format_args!("the pass can't go on: {why}"));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use ublk_integrity::scrub::ScrubReport;

    fn exit(report: ScrubReport, failure: Option<String>) -> Option<Exit> {
        let status = ScrubStatus { under_way: false, failure, report };
        verdict(&status, &State::of_test(0)).err().map(|failure| failure.exit)
    }

    #[test]
    fn what_is_bad_counts_more_than_that_not_all_was_looked_at() {
        let ended = ScrubReport { state: ScrubState::Ended, unsettled_blocks: 3, ..Default::default() };
        assert_eq!(exit(ended.clone(), None), None, "nothing bad is known of what is being rewritten");
        let stopped = ScrubReport { state: ScrubState::Stopped, ..Default::default() };
        assert_eq!(exit(stopped.clone(), None), Some(Exit::Interrupted));
        for report in [
            ScrubReport { bad_blocks: 1, ..stopped },
            ScrubReport { unreadable_blocks: 1, ..ended.clone() },
            ScrubReport { unmended_metadata: 1, ..ended.clone() },
            ScrubReport { waiting_metadata: 1, ..ended.clone() },
        ] {
            assert_eq!(exit(report, None), Some(Exit::Integrity));
        }
        assert_eq!(exit(ended, Some("no ring".into())), Some(Exit::Device));
    }

    #[test]
    fn a_pass_that_has_left_is_neither_over_nor_a_success() {
        for state in [ScrubState::Running, ScrubState::Paused] {
            let report = ScrubReport { state, ..Default::default() };
            let left = |failure| ScrubStatus { under_way: false, failure, report: report.clone() };
            assert!(!left(None).is_over() && left(Some("no ring".into())).is_over());
            assert_eq!(exit(report.clone(), None), Some(Exit::Device));
        }
        for state in [ScrubState::None, ScrubState::Ended, ScrubState::Stopped] {
            let over = ScrubStatus { report: ScrubReport { state, ..Default::default() }, ..Default::default() };
            assert!(over.is_over() && !ScrubStatus { under_way: true, ..over }.is_over());
        }
    }

    #[test]
    fn a_device_that_is_about_to_have_another_daemon_is_waited_for() {
        let begin = Instant::now();
        let mut patience = Patience::default();
        let mut bears =
            |is_changing, seconds| patience.bears(is_changing, WITHOUT_DAEMON, begin + Duration::from_secs(seconds));
        // However long an upgrade takes; and then the next daemon may need a moment.
        assert!(bears(false, 0) && bears(true, 60) && bears(true, 3600) && bears(false, 3601));
        assert!(bears(false, 3719) && !bears(false, 3720), "it is dead, and nobody does anything about it");
        let mut bears = |seconds| patience.bears(false, WITHOUT_HOPE, begin + Duration::from_secs(seconds));
        assert!(bears(3609) && !bears(3610), "none can follow");
        // This machine has no such device, or not this one.
        assert_eq!(most_without_daemon(&State::of_test(u32::MAX)), WITHOUT_HOPE);
    }

    #[test]
    fn only_what_is_listed_can_be_healed() {
        let refused =
            |report| refuse_unknown(&ScrubStatus { report, ..Default::default() }).err().map(|failure| failure.exit);
        let clean = ScrubReport { pass: 1, ..Default::default() };
        assert_eq!(refused(clean.clone()), None, "there is nothing to heal");
        assert_eq!(refused(ScrubReport::default()), Some(Exit::Arguments), "there was no pass");
        assert_eq!(refused(ScrubReport { bad_blocks: 3, ..clean.clone() }), Some(Exit::Arguments));
        let under_way = ScrubStatus { under_way: true, report: clean, failure: None };
        assert_eq!(refuse_unknown(&under_way).unwrap_err().exit, Exit::Busy);
    }

    #[test]
    fn an_answer_is_of_the_block_that_was_asked_for() {
        let of = |answer: Value| outcome_of(BlockIndex(7), &answer).map_err(|failure| failure.exit);
        assert_eq!(of(json!({ "block": 7, "outcome": "healed" })), Ok(Healed::Healed));
        assert_eq!(of(json!({ "block": 7, "failed": "its tag is lost", "exit": 6 })), Err(Exit::Integrity));
        for other in [json!({ "block": 6, "outcome": "healed" }), json!({ "outcome": "healed" }), json!({ "block": 7 })]
        {
            assert_eq!(of(other.clone()), Err(Exit::Device), "{other}");
        }
    }

    #[test]
    fn a_rate_is_more_than_nothing() {
        assert_eq!(rate("20M").map(NonZeroU64::get), Ok(20 << 20));
        assert!(rate("0").is_err() && rate("x").is_err());
    }
}

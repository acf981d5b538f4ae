//! The process behind a device.
//!
//! ```text
//!   launch (fork, report) ─> memory locked ─> name taken, refusals ─> devices opened and locked ─> harden ─> signals
//!     ─> opening: hash threads, volume opened (recovery), what the daemon before had answered put in place
//!     ─> threads: log, checkpoint, prefetch ─> serving: ublk device added and started, control socket
//!     ─> queues serve … signal, `stop` or another tool's del ─> queues down
//!     ─> last checkpoint ─> device deleted ─> state removed ─> locks released by exit
//!     or: … `upgrade` ─> hand_over: requests wait ─> last checkpoint ─> exit; the device stays for the next daemon
//! ```

mod birth;
mod burst;
mod cleared;
pub mod client;
mod closing;
mod control;
mod counts;
mod endings;
pub mod followed;
mod hand_over;
mod harden;
mod heal;
pub mod launch;
pub mod life;
mod links;
pub mod log;
pub mod memory_budget;
mod names;
pub mod notify;
mod opening;
pub mod peek;
pub mod protocol;
mod refusals;
mod scrub;
mod serving;
pub mod settings;
mod signals;
mod sink;
pub mod state;
mod watchdog;
pub mod workers;

use crate::{
    anchor::{AnchorReport, Keeping},
    checkpoints::Stop,
    device::{Backings, Use},
    event::{About, Class},
    failure::{Context, Exit, Failure, Outcome, with_paths},
    interrupt, report,
    ublk::{BlockShift, Device, Gate, Latencies, Shared},
    wait,
    write_back_file::{self, writes},
};
pub use birth::clear_stillborn;
use closing::Closing;
pub use endings::abort_on_panic;
pub use hand_over::RESTS_WITHIN;
pub use harden::lock_memory;
use launch::Reporter;
use log::{Event, Log, Outlet, Sink};
use memory_budget::{Promise, Purpose};
use nix::sys::signal::Signal;
use opening::Opened;
pub use refusals::refuse_own_stack;
use scrub::Scrubs;
use serving::{Served, serve_device};
use settings::Settings;
use signals::{Signals, block_heedless};
use state::{Identity, OwnState};
use std::{process, sync::Arc};
use ublk_integrity::{Credential, Volume, create::VolumeInfo, open::RecoveryReport};

/// A new device, or one whose daemon has died.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// A new one, with this number where given.
    New(Option<u32>),
    /// This one, which waits for a daemon.
    Recovered(u32),
}

impl Origin {
    /// What is there of the device where its daemon has ended before it was live, in words: of a
    /// new one `none`.
    fn without_daemon(self, none: &str) -> String {
        match self {
            Self::New(_) => none.to_owned(),
            Self::Recovered(number) => {
                format!("/dev/ublkb{number} waits for a daemon as before: `recover -n {number}`")
            }
        }
    }
}

/// All that a daemon needs to start.
pub struct Start {
    /// What the device shall be.
    pub settings: Settings,
    /// Whether its cache may be smaller than that where memory is short.
    pub may_shrink: bool,
    /// Where it comes from.
    pub origin: Origin,
    /// What the volume seems to be.
    pub volume: Option<VolumeInfo>,
    /// The volume's key.
    pub key: Credential,
    /// The UUID that the volume must have, where one is known.
    pub uuid: Option<[u8; 16]>,
}

/// Runs a device until it is stopped. What goes wrong before it is live has been
/// reported when this returns.
pub fn run(start: Start, reporter: Reporter, sink: Sink) -> Outcome {
    let reporter = Arc::new(reporter);
    let listener = Arc::clone(&reporter);
    wait::tell_by(move |line| listener.info(line));
    let listener = Arc::clone(&reporter);
    let origin = start.origin;
    wait::ended_by(move |signal, what| listener.failed(&ended_waiting(signal, what, origin)));
    let (data, meta) = (start.settings.data.clone(), start.settings.meta.clone());
    serve(start, &reporter, sink)
        .map_err(|failure| match interrupt::signal() {
            Some(signal) => ended_early(signal, origin),
            None => Failure { message: with_paths(&failure.message, &data, meta.as_deref()), ..failure },
        })
        .inspect_err(|failure| reporter.failed(failure))
}

/// A signal has come before the device was live.
fn ended_early(signal: Signal, origin: Origin) -> Failure {
    let left = origin.without_daemon("there is none, and the volume is as a crash would have left it");
    Failure::new(Exit::Interrupted, format_args!("{signal} came before the device was live: {left}"))
}

/// The same before anything was done: nothing but a wait was under way.
fn ended_waiting(signal: Signal, what: &str, origin: Origin) -> Failure {
    let left = origin.without_daemon("there is none, and nothing was done");
    let message = format!("{signal} came before the device was live, while waiting for {what}: {left}");
    Failure::new(Exit::Interrupted, message)
}

fn serve(start: Start, reporter: &Arc<Reporter>, sink: Sink) -> Outcome {
    let Start { mut settings, may_shrink, origin, volume, key, uuid } = start;
    abort_on_panic();
    harden::lock_memory(|warning| reporter.warn(&warning));
    block_heedless()?;
    let _name = names::claim(&settings, origin)?;
    refusals::unfit(&settings, origin)?;
    let backings = open_devices(&settings, origin, reporter)?;
    // By its path, which this process may leave.
    let anchor = settings.anchor.as_ref().map(|anchor| anchor.open(settings.paths(), volume.as_ref())).transpose()?;
    let write_back = write_back(&settings, reporter);
    // Until the end of the process.
    let (_promise, for_volume) = promise_memory(&mut settings, may_shrink, origin, volume.as_ref())?;
    harden::before_threads(|warning| reporter.warn(&warning));
    let signals = Signals::watch(reporter, move |signal| ended_early(signal, origin))?;
    Reporter::extend_start(reporter);

    let accept = |found: &VolumeInfo| refusals::other_volume(&settings, origin, &Identity::of(found));
    let with = (write_back.into(), anchor);
    let opened = Opened::volume(&settings, (&key, uuid), backings, with, for_volume, accept)?;
    // The volume has derived its own.
    drop(key);
    let volume = opened.volume.info().clone();
    let warnings = warnings(&opened, &settings);
    tell_of(&opened, &warnings, &settings, reporter);
    let (open_id, latched) = (opened.open_id, opened.volume.latched().is_some());
    let running = Running::start(opened, warnings, &settings, sink)?;
    let what = Served { read_only: settings.read_only || latched, settings, volume, open_id, origin, write_back };
    let served = serve_device(what, &running, reporter, &signals);
    reporter.stopping();
    running.close(served)
}

/// Opens and locks the devices, for as long as this process lives.
fn open_devices(settings: &Settings, origin: Origin, reporter: &Reporter) -> Outcome<Backings> {
    let purpose = if settings.read_only { Use::Shared } else { Use::Exclusive };
    let patience = refusals::patience(settings, origin)?;
    let backings = Backings::open(&settings.data, settings.meta.as_deref(), purpose, patience)?;
    for path in backings.buffered() {
        let path = path.display();
        reporter.warn(&format!(
            "the file system of {path} has no O_DIRECT: each byte is copied once more and kept twice in memory, and memory pressure can stall the device"
        ));
    }
    Ok(backings)
}

/// Makes the memory ours that `settings` ask for; returns how much of it, and of what is there
/// beside it, the volume may take while it opens.
fn promise_memory(
    settings: &mut Settings,
    may_shrink: bool,
    origin: Origin,
    volume: Option<&VolumeInfo>,
) -> Outcome<(Promise, u64)> {
    let purpose = if matches!(origin, Origin::New(_)) { Purpose::New } else { Purpose::Needed };
    let rest = memory_budget::rest(settings.counts());
    Promise::make(purpose, |available| {
        let most = settings.fit(available, volume, may_shrink)?;
        // The buffers of requests come after; others may open a volume at the same time.
        Ok((most, most + (available.bytes - most) / 2 - rest))
    })
}

/// Slots of each thread in the write-back file: none where there can be no such file.
fn write_back(settings: &Settings, reporter: &Reporter) -> u16 {
    if settings.write_back == 0 {
        return 0;
    }
    match write_back_file::mount_memory() {
        Ok(()) => settings.write_back,
        Err(failure) => {
            reporter.warn(&format!("{failure}: small writes, too, are answered only when they are in place"));
            0
        }
    }
}

/// What is not as it should be with an open volume.
fn warnings(opened: &Opened, settings: &Settings) -> Vec<String> {
    let read_only = opened.volume.latched().map(|why| format!("the device is read-only: {}", Failure::from(why)));
    let all = opened.volume.warnings().iter().cloned().chain(read_only);
    all.map(|line| settings.named(&line)).collect()
}

/// What whoever started us should know of the volume.
fn tell_of(opened: &Opened, warnings: &[String], settings: &Settings, reporter: &Reporter) {
    let (_, memory) = settings.memory_line(opened.volume.memory_bytes());
    reporter.info(&memory);
    let recovery = opened.volume.recovery();
    report::summary(recovery).iter().for_each(|line| reporter.info(&settings.named(line)));
    for finding in report::findings(recovery).iter().chain(warnings) {
        reporter.warn(&settings.named(finding));
    }
    placed(opened.put_in_place).iter().for_each(|line| reporter.info(line));
}

/// Writes that the daemon before had answered, if there were any.
fn placed(count: usize) -> Option<String> {
    (count > 0).then(|| format!("{} that the daemon before had answered, put in place", writes(count)))
}

/// The first events of a daemon. That a volume was recovered is no reason to look after it; what was found may be.
fn first_events(recovery: &RecoveryReport, put_in_place: usize, warnings: Vec<String>) -> Vec<(Class, String)> {
    let good = report::summary(recovery).map(|line| (Class::Recovered, line));
    let good = good.into_iter().chain(placed(put_in_place).map(|line| (Class::WritesPlaced, line)));
    let found = report::findings(recovery).into_iter().chain(warnings).map(|line| (Class::Opening, line));
    good.chain(found).collect()
}

/// An open volume with its threads.
struct Running {
    backings: Backings,
    shared: Arc<Shared<Volume>>,
    scrubs: Arc<Scrubs>,
    closing: Arc<Closing>,
    /// Of a volume that has an anchor and is written.
    anchor: Option<Arc<AnchorReport>>,
    log: Log,
}

impl Running {
    fn start(opened: Opened, warnings: Vec<String>, settings: &Settings, sink: Sink) -> Outcome<Self> {
        let first = first_events(opened.volume.recovery(), opened.put_in_place, warnings);
        let (data, for_log) = (settings.data.display().to_string(), settings.clone());
        let words = move |text: &str| format!("{data}: {}", for_log.named(text));
        let about = About {
            volume: opened.volume.info().uuid.clone(),
            name: settings.name.as_ref().map(|name| name.as_str().to_owned()),
            data: settings.data.display().to_string(),
            pid: process::id(),
        };
        let log = Log::start(Outlet::of(sink, about), first, words).doing("can't start the log thread")?;
        let stop = Arc::new(Stop::default());
        let checkpoints = workers::start_checkpoints(&opened.volume, &opened.backings, &stop, &log, settings.verbose)
            .doing("can't start the checkpoint thread")?;
        if let Some(hints) = opened.hints {
            workers::start_prefetch(&opened.volume, &opened.backings, hints, 0)
                .doing("can't start the prefetch thread")?;
        }
        let counts = settings.counts();
        let shared = Arc::new(Shared {
            shift: BlockShift::of(opened.volume.info().block_size),
            target: opened.volume,
            files: opened.backings.files(1),
            discard: settings.discard,
            write_back_file: opened.write_back_file,
            hashing: opened.hashing,
            gate: Gate::new(counts.io_threads() as usize, counts.requests() as usize),
            latencies: Latencies::new(counts.io_threads() as usize),
            log: log.clone(),
        });
        let scrubs = Scrubs::new(&shared.target, &opened.backings, &log).doing("can't open the devices once more")?;
        let scrubs = Arc::new(scrubs);
        let is_written = !settings.read_only && shared.target.latched().is_none();
        let kept = opened.anchored.filter(|_| is_written);
        let keeping = kept.map(|kept| Keeping::start(&shared.target, &opened.backings, &log, kept)).transpose();
        let keeping = keeping.doing("can't start the anchor thread")?;
        let anchor = keeping.as_ref().map(Keeping::report);
        let closing = Arc::new(Closing::of(Arc::clone(&scrubs), (stop, checkpoints), keeping));
        Ok(Self { backings: opened.backings, shared, scrubs, closing, anchor, log })
    }

    /// The last checkpoint, and with it the end of all that is left of the device.
    fn close(self, served: Outcome<(Device, OwnState)>) -> Outcome {
        let last = self.closing.close();
        let (device, state) = served?;
        let kept = self.shared.retire_kept();
        // The node goes only now: whoever waits for it finds a clean superblock.
        drop(device);
        match last {
            Ok(()) => state.retire(),
            Err(latched) => {
                let latched_in_words = state.named(&latched.to_string());
                if let Ok(count @ 1..) = kept {
                    self.log.tell(Event::WritesKept(count));
                }
                state.ended(&match kept {
                    Ok(0) => latched_in_words,
                    Ok(kept) => {
                        format!("{latched_in_words}. In memory for the next `add` to put in place: {}", writes(kept))
                    }
                    Err(unreadable) => format!("{latched_in_words}. {unreadable}"),
                });
                self.log.tell(Event::Latched(latched));
                self.log.drain();
            }
        }
        Ok(last?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Severity;

    #[test]
    fn a_recovery_warns_of_what_it_has_found_alone() {
        let classes = |recovery: &RecoveryReport, placed, warnings| {
            let events = first_events(recovery, placed, warnings);
            events.iter().map(|(class, _)| (*class, class.severity())).collect::<Vec<_>>()
        };
        assert!(classes(&RecoveryReport::default(), 0, Vec::new()).is_empty());
        let clean = RecoveryReport { records: 3, blocks: 5, settled: 5, ..Default::default() };
        let notices = [(Class::Recovered, Severity::Notice), (Class::WritesPlaced, Severity::Notice)];
        assert_eq!(classes(&clean, 2, Vec::new()), notices);
        let found = RecoveryReport { corrupt: 1, corrupt_blocks: vec![7], ..clean };
        let warning = (Class::Opening, Severity::Warning);
        assert_eq!(classes(&found, 0, vec!["the device is read-only".into()]), [notices[0], warning, warning]);
    }
}

//! The process behind a device.
//!
//! ```text
//!   launch (fork, report) ─> devices opened and locked ─> harden ─> hash threads ─> volume opened
//!     (recovery), what the daemon before had answered put in place ─> threads: log, checkpoint, prefetch ─> ublk device added and started ─> control socket
//!     ─> queues serve … signal, `stop` or another tool's del ─> queues down
//!     ─> last checkpoint ─> device deleted ─> state removed ─> locks released by exit
//! ```

pub mod control;
mod endings;
mod harden;
pub mod launch;
pub mod log;
pub mod memory_budget;
mod opening;
pub mod settings;
pub mod state;
pub mod workers;

use crate::{
    checkpoints::Stop,
    cli::stop,
    device::{Backings, DYING, Use, stack},
    failure::{Context, Exit, Failure, Outcome, with_paths},
    kept::{self, writes},
    report,
    ublk::{self, BlockShift, Device, Shape, Shared},
};
pub use endings::abort_on_panic;
use endings::{Watchdog, block_stop_signals, stop_on_signals};
use launch::Reporter;
use log::{Event, Log, Sink};
use memory_budget::{Promise, Purpose, memory_line};
use nix::sys::signal::SigSet;
use opening::Opened;
use serde_json::{Value, json};
use settings::Settings;
use state::{Identity, OwnState, State};
use std::{process, sync::Arc, time::Duration};
use ublk_integrity::{MasterKey, create::VolumeInfo};

/// A new device, or one whose daemon has died.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// A new one, with this number where given.
    New(Option<u32>),
    /// This one, which waits for a daemon.
    Recovered(u32),
}

/// All that a daemon needs to start.
pub struct Start {
    /// What the device shall be.
    pub settings: Settings,
    /// Whether its cache may be smaller than that where memory is short.
    pub may_shrink: bool,
    /// Where it comes from.
    pub origin: Origin,
    /// The volume's key.
    pub key: MasterKey,
    /// The UUID that the volume must have, where one is known.
    pub uuid: Option<[u8; 16]>,
}

/// Runs a device until it is stopped. What goes wrong before it is live has been reported when this returns.
pub fn run(start: Start, reporter: Reporter, sink: Sink) -> Outcome {
    let reporter = Arc::new(reporter);
    let (data, meta) = (start.settings.data.clone(), start.settings.meta.clone());
    serve(start, &reporter, sink)
        .map_err(|failure| Failure { message: with_paths(&failure.message, &data, meta.as_deref()), ..failure })
        .inspect_err(|failure| reporter.failed(failure))
}

fn serve(start: Start, reporter: &Arc<Reporter>, sink: Sink) -> Outcome {
    let Start { mut settings, may_shrink, origin, key, uuid } = start;
    abort_on_panic();
    let signals = block_stop_signals()?;
    let purpose = if settings.read_only { Use::Shared } else { Use::Exclusive };
    refuse_foreign_device(origin)?;
    refuse_own_stack(&settings, origin)?;
    let patience = patience(&settings, origin)?;
    let backings = Backings::open(&settings.data, settings.meta.as_deref(), purpose, patience)?;
    for path in backings.buffered() {
        let path = path.display();
        reporter.warn(&format!(
            "the file system of {path} has no O_DIRECT: each byte is copied once more and kept twice in memory, and memory pressure can stall the device"
        ));
    }
    let write_back = write_back(&settings, reporter);
    // Until the end of the process.
    let (_promise, for_volume) = promise_memory(&mut settings, may_shrink, origin)?;
    harden::before_threads(|warning| reporter.warn(&warning));

    let accept = |found: &VolumeInfo| refuse_other_volume(&settings, origin, &Identity::of(found));
    let opened = Opened::volume(&settings, (&key, uuid), backings, write_back.into(), for_volume, accept)?;
    // The volume has derived its own.
    drop(key);
    let identity = Identity::of(opened.volume.info());
    let (_, memory) = memory_line(&settings, opened.volume.memory_bytes());
    reporter.info(&memory);
    let recovery = opened.volume.recovery();
    report::summary(recovery).iter().for_each(|line| reporter.info(line));
    let read_only = opened.volume.latched().map(|why| format!("the device is read-only: {why}"));
    let warnings: Vec<_> = opened.volume.warnings().iter().cloned().chain(read_only).collect();
    for finding in report::findings(recovery).iter().chain(&warnings) {
        reporter.warn(&with_paths(finding, &settings.data, settings.meta.as_deref()));
    }
    if opened.put_in_place > 0 {
        let count = writes(opened.put_in_place);
        reporter.info(&format!("{count} that the daemon before had answered, put in place"));
    }
    let first_lines = report::recovery(recovery).into_iter().chain(warnings).collect();
    let log = Log::start(sink, first_lines).doing("can't start the log thread")?;
    let stop = Arc::new(Stop::default());
    let checkpoints = workers::start_checkpoints(&opened.volume, &opened.backings, &stop, &log, settings.verbose)
        .doing("can't start the checkpoint thread")?;
    if let Some(hints) = opened.hints {
        workers::start_prefetch(&opened.volume, &opened.backings, hints, 0).doing("can't start the prefetch thread")?;
    }

    let info = opened.volume.info();
    let shared = Arc::new(Shared {
        volume: Arc::clone(&opened.volume),
        files: opened.backings.files(1),
        shift: BlockShift::of(info.block_size),
        discard: settings.discard,
        kept: opened.kept,
        hashing: opened.hashing,
        log: log.clone(),
    });
    let shape = Shape {
        read_only: settings.read_only || opened.volume.latched().is_some(),
        ..shape(&settings, write_back, origin, info.size)
    };
    let what = Served { settings, volume: identity, origin };
    let served = serve_device(what, shape, &opened.backings, &shared, reporter, signals);

    stop.set();
    let last = checkpoints.join().unwrap_or_else(|_| process::abort());
    let (device, state) = served?;
    let kept = shared.kept.as_ref().map_or(Ok(0), |kept| kept.file.retire());
    // The node goes only now: whoever waits for it finds a clean superblock.
    drop(device);
    match last {
        Ok(()) => state.retire(),
        Err(latched) => {
            state.ended(&match kept {
                Ok(0) => latched.to_string(),
                Ok(kept) => format!("{latched}. In memory for the next `add` to put in place: {}", writes(kept)),
                Err(unreadable) => format!("{latched}. {unreadable}"),
            });
            log.tell(Event::Latched(latched));
            log.drain();
        }
    }
    Ok(last?)
}

/// Makes the memory ours that `settings` ask for; returns how much of it, and of what is there beside it, the volume may take
/// while it opens.
fn promise_memory(settings: &mut Settings, may_shrink: bool, origin: Origin) -> Outcome<(Promise, u64)> {
    let purpose = if matches!(origin, Origin::New(_)) { Purpose::New } else { Purpose::Needed };
    let rest = memory_budget::rest(settings.counts());
    Promise::make(purpose, |available| {
        let most = settings.fit(available, may_shrink)?;
        // The buffers of requests come after; others may open a volume at the same time.
        Ok((most, most + (available.bytes - most) / 2 - rest))
    })
}

/// How many small writes each thread may answer early: none where they can't be kept.
fn write_back(settings: &Settings, reporter: &Reporter) -> u16 {
    if settings.write_back == 0 {
        return 0;
    }
    match kept::mount_memory() {
        Ok(()) => settings.write_back,
        Err(failure) => {
            reporter.warn(&format!("{failure}: small writes, too, are answered only when they are in place"));
            0
        }
    }
}

/// A device that waits for a daemon holds requests for one volume. The paths that led to it may lead to another by now.
fn refuse_other_volume(settings: &Settings, origin: Origin, found: &Identity) -> Outcome {
    let Origin::Recovered(number) = origin else { return Ok(()) };
    let expected = State::load(number)?.volume;
    if expected == *found {
        return Ok(());
    }
    let message = format!(
        "/dev/ublkb{number} is of volume {}, {} now holds {} ({} bytes in blocks of {}): nothing done",
        expected.uuid,
        settings.data.display(),
        found.uuid,
        found.size,
        found.block_size
    );
    Err(Failure::new(Exit::Device, message))
}

/// The number may have gone to another program's device since. (Asked here, not in the command that forked us: libublk's
/// ring must not be shared by two processes.)
fn refuse_foreign_device(origin: Origin) -> Outcome {
    let Origin::Recovered(number) = origin else { return Ok(()) };
    let state = State::load(number)?;
    match ublk::daemon_of(number).filter(|pid| *pid != state.pid) {
        Some(pid) => {
            let message =
                format!("device {number} is served by another program (pid {pid}) by now: `add` makes a new one");
            Err(Failure::new(Exit::Device, message))
        }
        None => Ok(()),
    }
}

/// A recovered device exists already: its devices may lie on it by now.
fn refuse_own_stack(settings: &Settings, origin: Origin) -> Outcome {
    let Origin::Recovered(number) = origin else { return Ok(()) };
    for path in std::iter::once(&settings.data).chain(&settings.meta) {
        if stack::lies_on_ublk(path, number) {
            let message =
                format!("{} lies on /dev/ublkb{number} itself: every request would wait for itself", path.display());
            return Err(Failure::new(Exit::Device, message));
        }
    }
    Ok(())
}

/// How long to wait for the devices: only a daemon that is dead already can be about to let go of them.
fn patience(settings: &Settings, origin: Origin) -> Outcome<Duration> {
    if matches!(origin, Origin::Recovered(_)) {
        return Ok(DYING);
    }
    let mut patience = Duration::ZERO;
    for state in State::all().into_iter().filter(|state| state.settings.shares_devices(settings)) {
        let (path, id) = (settings.data.display(), state.id);
        if state.is_alive() {
            return Err(Failure::new(Exit::Busy, format_args!("{path} is in use by /dev/ublkb{id}")));
        }
        if ublk::block_path(id).exists() {
            // Requests wait in it that would land on what others have written since.
            let message =
                format!("{path} belongs to /dev/ublkb{id}, whose daemon is dead: `recover -n {id}` or `del -n {id}`");
            return Err(Failure::new(Exit::Busy, message));
        }
        patience = DYING;
    }
    Ok(patience)
}

fn shape(settings: &Settings, write_back: u16, origin: Origin, size: u64) -> Shape {
    Shape {
        number: match origin {
            Origin::New(number) => number,
            Origin::Recovered(number) => Some(number),
        },
        queues: settings.queues,
        threads: settings.threads,
        depth: settings.depth,
        write_back,
        max_io: settings.max_io,
        size,
        read_only: settings.read_only,
        discard: settings.discard,
        recovery: settings.recovery,
    }
}

/// What is served, and where it comes from.
struct Served {
    settings: Settings,
    volume: Identity,
    origin: Origin,
}

/// Adds and starts the device, and serves it until it is stopped.
///
/// A new device that can't be started goes again. One that waits for a daemon stays as it is: all that may fail
/// is done before it is touched.
fn serve_device(
    what: Served,
    shape: Shape,
    backings: &Backings,
    shared: &Arc<Shared>,
    reporter: &Arc<Reporter>,
    signals: SigSet,
) -> Outcome<(Device, OwnState)> {
    ublk::secure_run_folder().doing("can't make libublk's folder safe")?;
    let origin = what.origin;
    let adding = Watchdog::start("ADD_DEV", reporter, || {});
    let device = match origin {
        Origin::New(_) => Device::add(shape)?,
        Origin::Recovered(number) => Device::recover(number, shape)?,
    };
    adding.disarm();
    if device.answers_late() {
        reporter.warn(
            "the device can't copy on request (Linux 6.5): small writes, too, are answered only when they are in place",
        );
    }
    let state =
        State { id: device.number(), pid: process::id(), volume: what.volume, ended: None, settings: what.settings };
    let own_state = state.clone().publish()?;
    match start_and_serve(&device, origin, state, backings, shared, reporter, signals) {
        Ok(()) => Ok((device, own_state)),
        Err(failure) => {
            if matches!(origin, Origin::New(_)) {
                own_state.retire();
            }
            Err(failure)
        }
    }
}

fn start_and_serve(
    device: &Device,
    origin: Origin,
    state: State,
    backings: &Backings,
    shared: &Arc<Shared>,
    reporter: &Arc<Reporter>,
    signals: SigSet,
) -> Outcome {
    let number = state.id;
    let answers = Answers { state, shared: Arc::clone(shared) };
    control::serve(number, move || answers.status()).doing("can't open the control socket")?;
    stop_on_signals(number, signals).doing("can't start the signal thread")?;
    let starting = Watchdog::start("START_DEV", reporter, move || {
        if matches!(origin, Origin::New(_)) {
            // From outside: this process is about to end.
            let _ = stop::start_forced_del(number);
        }
    });
    let reporter = Arc::clone(reporter);
    device.run(&backings.fds(), shared, move || {
        starting.disarm();
        reporter.live(number);
    })
}

/// What the control socket answers.
struct Answers {
    state: State,
    shared: Arc<Shared>,
}

impl Answers {
    fn status(&self) -> Value {
        let mut all = json!(self.state);
        let (memory, _) = memory_line(&self.state.settings, self.shared.volume.memory_bytes());
        let more = json!({
            "device": ublk::block_path(self.state.id),
            "daemon_memory_bytes": memory,
            "log_lines_dropped": self.shared.log.dropped(),
        });
        for part in [more, json!(self.shared.volume.status())] {
            if let (Value::Object(all), Value::Object(part)) = (&mut all, part) {
                all.extend(part);
            }
        }
        all
    }
}

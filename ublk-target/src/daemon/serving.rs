//! From an open volume to a device that is served until it is stopped.

use super::{
    Origin, Running,
    birth::{Birth, clear_stillborn},
    cleared::Cleared,
    control,
    endings::Watchdog,
    hand_over::HandOver,
    launch::Reporter,
    links,
    log::Event,
    protocol::{Request, error},
    scrub::Scrubs,
    settings::Settings,
    signals::Signals,
    state::{Identity, OwnState, State},
};
use crate::{
    anchor::AnchorReport,
    cli::stop,
    failure::{Context, Outcome},
    ublk::{self, Device, Mark, Shape, Shared},
};
use serde_json::{Value, json};
use std::{collections::BTreeMap, os::unix::net::UnixStream, process, sync::Arc};
use ublk_integrity::{Volume, create::VolumeInfo, hex};

/// What is served, and where it comes from.
pub(super) struct Served {
    pub(super) settings: Settings,
    pub(super) volume: VolumeInfo,
    pub(super) open_id: [u8; 32],
    pub(super) origin: Origin,
    /// Whether writes are refused: wanted so, or all that the volume can do.
    pub(super) read_only: bool,
    /// Slots of each thread in the write-back file.
    pub(super) write_back: u16,
}

impl Served {
    /// What the kernel remembers the device by: of one that exists already, what it was given when
    /// it was made.
    fn mark(&self) -> Outcome<Option<Mark>> {
        match self.origin {
            Origin::New(_) => Mark::new().map(Some),
            Origin::Recovered(number) => Ok(State::load(number)?.mark),
        }
    }

    fn shape(&self, mark: Option<Mark>) -> Shape {
        let settings = &self.settings;
        Shape {
            number: match self.origin {
                Origin::New(number) => number,
                Origin::Recovered(number) => Some(number),
            },
            queues: settings.queues,
            threads: settings.threads,
            depth: settings.depth,
            write_back: self.write_back,
            max_io: settings.max_io,
            size: self.volume.size,
            read_only: self.read_only,
            discard: settings.discard,
            // A flush is what the anchor holds back.
            fua: !settings.anchor.as_ref().is_some_and(|anchor| anchor.holds_flushes),
            recovery: settings.recovery,
            mark,
        }
    }

    fn state(self, id: u32, mark: Option<Mark>) -> State {
        let Self { settings, volume, open_id, .. } = self;
        State {
            id,
            pid: process::id(),
            life: None,
            version: Some(env!("CARGO_PKG_VERSION").into()),
            mark,
            open_id: hex(&open_id),
            volume: Identity::of(&volume),
            label: volume.label.to_string(),
            assumed_atomic_bytes: volume.assumed_atomic_bytes,
            ended: None,
            settings,
        }
    }
}

/// Adds and starts the device, and serves it until it is stopped.
///
/// A new device that can't be started goes again. One that waits for a daemon stays as it is: all
/// that may fail is done before it is touched.
pub(super) fn serve_device(
    what: Served,
    running: &Running,
    reporter: &Arc<Reporter>,
    signals: &Arc<Signals>,
) -> Outcome<(Device, OwnState)> {
    ublk::secure_run_folder()?;
    signals.begin_start()?;
    let origin = what.origin;
    let mark = what.mark()?;
    let shape = what.shape(mark);
    clear_stillborn();
    let birth = mark.filter(|_| matches!(origin, Origin::New(_))).map(Birth::announce).transpose()?;
    let adding = Watchdog::start("ADD_DEV", reporter, || {});
    let device = match origin {
        Origin::New(_) => Device::add(shape)?,
        Origin::Recovered(number) => Device::recover(number, shape)?,
    };
    adding.disarm();
    if device.lacks_write_back() {
        reporter.warn(
            "the device can't copy on request (Linux 6.5): small writes, too, are answered only when they are in place",
        );
    }
    let state = what.state(device.number(), mark);
    let own_state = state.clone().publish()?;
    birth.into_iter().for_each(Birth::registered);
    match start_and_serve(&device, origin, state, running, reporter, signals) {
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
    running: &Running,
    reporter: &Arc<Reporter>,
    signals: &Arc<Signals>,
) -> Outcome {
    let (number, shared) = (state.id, &running.shared);
    let live = state.clone();
    let name = state.settings.name.clone();
    let scrubs = Arc::clone(&running.scrubs);
    scrubs.go_on();
    let hand_over = Arc::new(HandOver::of(running, &state.settings, signals));
    let (anchor, cleared) = (running.anchor.clone(), Cleared::default());
    let answers = Answers { state, shared: Arc::clone(shared), hand_over, scrubs, anchor, cleared };
    control::serve(number, move |request, client| answers.to(request, client))
        .doing("can't open the control socket")?;
    let starting = Watchdog::start("START_DEV", reporter, move || {
        if matches!(origin, Origin::New(_)) {
            // From outside: this process is about to end.
            let _ = stop::start_forced_del(number);
        }
    });
    let (reporter, signals, log) = (Arc::clone(reporter), Arc::clone(signals), shared.log.clone());
    device.run(&running.backings.fds(), shared, move |as_large_as_the_volume| {
        starting.disarm();
        if let Err(failure) = as_large_as_the_volume {
            reporter.warn(&failure.message);
        }
        signals.live(live, log);
        links::announce(number, name.as_ref());
        reporter.live(number);
    })
}

/// What the control socket answers.
struct Answers {
    state: State,
    shared: Arc<Shared<Volume>>,
    hand_over: Arc<HandOver>,
    cleared: Cleared,
    scrubs: Arc<Scrubs>,
    anchor: Option<Arc<AnchorReport>>,
}

impl Answers {
    /// `None` where somebody else answers.
    fn to(&self, request: &Request, client: &UnixStream) -> Option<Value> {
        Some(match request {
            Request::Status {} => self.status(),
            Request::HandOver {} => match client.try_clone() {
                Ok(client) => {
                    self.hand_over.begin(client);
                    return None;
                }
                Err(e) => error(format!("can't pass the connection on: {e}")),
            },
            Request::Clear { findings } => self.clear(findings).unwrap_or_else(error),
            Request::ScrubStart { rate } => self.scrubs.start(*rate),
            Request::ScrubPause {} => self.scrubs.pause(),
            Request::ScrubResume {} => self.scrubs.resume(),
            Request::ScrubStop {} => self.scrubs.stop(),
            Request::ScrubStatus {} => self.scrubs.status(),
            Request::Heal {} => match client.try_clone() {
                Ok(client) => return self.scrubs.heal(client),
                Err(e) => error(format!("can't pass the connection on: {e}")),
            },
        })
    }

    /// Why it can't, in words, if it can't.
    fn clear(&self, findings: &BTreeMap<String, u64>) -> Result<Value, String> {
        let mut status = self.status();
        if let Some(what) = self.cleared.clear(findings, &status)? {
            self.shared.log.tell(Event::Cleared(what));
        }
        status["cleared"] = self.cleared.json();
        Ok(status)
    }

    fn status(&self) -> Value {
        let mut all = json!(self.state);
        let (memory, _) = self.state.settings.memory_line(self.shared.target.memory_bytes());
        let more = json!({
            "device": ublk::block_path(self.state.id),
            "daemon_memory_bytes": memory,
            "log_lines_dropped": self.shared.log.dropped(),
            "latency": self.shared.latencies.json(),
            "cleared": self.cleared.json(),
            "handing_over": self.hand_over.is_under_way(),
            "scrub": self.scrubs.summary(),
            "anchor": self.anchor.as_ref().map(|anchor| anchor.shown(&self.shared.target)),
        });
        for part in [more, json!(self.shared.target.status())] {
            if let (Value::Object(all), Value::Object(part)) = (&mut all, part) {
                all.extend(part);
            }
        }
        if let Some(why) = all["latched"].as_str() {
            all["latched"] = self.state.settings.named(why).into();
        }
        all
    }
}

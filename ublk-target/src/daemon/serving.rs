//! From an open volume to a device that is served until it is stopped.

use super::{
    Origin, Running,
    birth::{Birth, clear_stillborn},
    cleared::Cleared,
    control,
    hand_over::HandOver,
    launch::Reporter,
    links,
    log::Event,
    protocol::{KeyArea, Request, error, failed, line},
    scrub::Scrubs,
    settings::Settings,
    signals::Signals,
    state::{Identity, OwnState, State},
    watchdog::Watchdog,
};
use crate::{
    anchor::{AnchorReport, Ask},
    cli::stop,
    failure::{Context, Exit, Failure, Outcome},
    ublk::{self, Device, Mark, Shape, Shared},
};
use serde::Serialize;
use serde_json::{Value, json};
use std::{
    collections::BTreeMap, io::Write, os::unix::net::UnixStream, path::PathBuf, process, sync::Arc, time::Instant,
};
use ublk_integrity::{
    Volume,
    anchor::{KeyAreaMark, KeyAreaStep},
    create::VolumeInfo,
    hex,
};

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
    let begun = Instant::now();
    let answers = Answers { state, begun, shared: Arc::clone(shared), hand_over, scrubs, anchor, cleared };
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
    begun: Instant,
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
            Request::KeyArea { found, next, judge } => {
                let step = KeyArea::step((found.as_ref(), next.as_ref()), *judge);
                match step.and_then(|step| self.keep_key_area(step, client)) {
                    Ok(()) => return None,
                    Err(failure) => failed(&failure),
                }
            }
        })
    }

    /// Has the anchor thread answer: the anchor may take its time.
    fn keep_key_area(&self, (found, step): (KeyAreaMark, KeyAreaStep), client: &UnixStream) -> Outcome {
        let Some(anchor) = &self.anchor else {
            let message = "nobody tells an anchor of this device: it has none, or is read-only; `del` it first";
            return Err(Failure::new(Exit::Arguments, message));
        };
        let mut client = client.try_clone().doing("can't pass the connection on")?;
        let answer = move |done: Result<u64, Failure>| {
            let said = done.map_or_else(|failure| failed(&failure), |generation| json!({ "generation": generation }));
            // Whoever has gone hears nothing.
            let _ = client.write_all(&line(&said));
        };
        anchor.ask(Ask { found, step, answer: Box::new(answer) });
        Ok(())
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
        let (memory, _) = self.state.settings.memory_line(self.shared.target.memory_bytes());
        let now = Now {
            device: ublk::block_path(self.state.id),
            running_seconds: self.begun.elapsed().as_secs(),
            daemon_memory_bytes: memory,
            log_lines_dropped: self.shared.log.dropped(),
            latency: self.shared.latencies.json(),
            cleared: self.cleared.json(),
            handing_over: self.hand_over.is_under_way(),
            scrub: self.scrubs.summary(),
            anchor: self.anchor.as_ref().map(|anchor| json!(anchor.shown(&self.shared.target))),
        };
        status(&self.state, &now, json!(self.shared.target.status()))
    }
}

/// What a daemon has to say beside its state file and its volume: docs/json.md has all fields, by a test.
#[derive(Serialize)]
struct Now {
    device: PathBuf,
    running_seconds: u64,
    daemon_memory_bytes: u64,
    log_lines_dropped: u64,
    latency: Value,
    cleared: Value,
    handing_over: bool,
    scrub: Value,
    anchor: Option<Value>,
}

/// All of it in one object.
fn status(state: &State, now: &Now, volume: Value) -> Value {
    let mut all = json!(state);
    for part in [json!(now), volume] {
        if let (Value::Object(all), Value::Object(part)) = (&mut all, part) {
            all.extend(part);
        }
    }
    if let Some(why) = all["latched"].as_str() {
        all["latched"] = state.settings.named(why).into();
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cli::{list, status::known},
        latency::Distribution,
        offline::{Opening, scratch},
        scrub_status::ScrubStatus,
        watch::survey::{Daemon, Seen},
    };
    use ublk_integrity::Access;

    /// The names of all fields, at any depth.
    fn fields(value: &Value, into: &mut Vec<String>) {
        match value {
            Value::Object(object) => object.iter().for_each(|(name, value)| {
                into.push(name.clone());
                fields(value, into);
            }),
            Value::Array(all) => all.iter().for_each(|value| fields(value, into)),
            _ => {}
        }
    }

    #[test]
    fn the_page_has_each_field_of_status_and_list() {
        let (_file, offline, key) = scratch();
        let volume = offline.open_volume(&key, Opening::new(Access::ReadOnly, None)).unwrap();
        let mut state = State::of_test(7);
        state.life = Some("/run/x".into());
        state.version = Some("1".into());
        state.mark = Some(Mark::new().unwrap());
        state.ended = Some("why".into());
        state.settings.name = Some("home".parse().unwrap());
        state.settings.without_anchor = true;
        let now = Now {
            device: "/dev/ublkb7".into(),
            running_seconds: 1,
            daemon_memory_bytes: 2,
            log_lines_dropped: 3,
            latency: json!({ "read": Distribution::default().json() }),
            cleared: json!({}),
            handing_over: false,
            scrub: json!(ScrubStatus::default()),
            anchor: None,
        };
        let seen = Seen { daemon: Daemon::Dead, state: state.clone() };
        let mut all = Vec::new();
        for value in [
            status(&State { life: None, ..state.clone() }, &now, json!(volume.status())),
            known(&seen),
            list::json(&state, true),
        ] {
            fields(&value, &mut all);
        }
        assert!(all.len() > 100 && !all.contains(&"life".into()), "where a lock is, is nobody's: {all:?}");
        let page = include_str!("../../../docs/json.md");
        let missing: Vec<_> = all.iter().filter(|name| !page.contains(&format!("`{name}`"))).collect();
        assert!(missing.is_empty(), "docs/json.md has not {missing:?}");
        // And nothing that is not there.
        let section = page.split_once("`status` and `list` have").unwrap().1;
        let section = section.split_once("`status` also has `anchor`").unwrap().0;
        let words = section.split('`').skip(1).step_by(2).filter(|word| word.contains('_') && !word.contains('-'));
        for word in words.filter(|word| !["\"passphrase_stdin\"", "passphrase_file"].contains(word)) {
            assert!(all.iter().any(|name| name == word), "docs/json.md has `{word}`, which nothing prints");
        }
    }
}

//! Handing the device over: this daemon comes to rest, closes the volume and ends. The device stays,
//! with the requests that wait in it, for the next daemon to `recover`.
//!
//! ```text
//!   a pass leaves ─> gate closed ─> requests and early writes under way end ─> "closing" ─> volume closed, write-back file gone ─> answer ─> exit
//!        └─ too busy, nobody takes over, a signal, a failure: gate open, the pass goes on, as if nothing had been
//! ```
//!
//! Whether "closing" could be said decides. Whoever asked can give up until then, by closing its end,
//! and nobody after that: it knows which of both came first, and so do we.
//!
//! Wherever it is cut short, disk and /run are as SIGKILL may leave them at that moment.

use super::{
    Running,
    closing::Closing,
    log::Event,
    protocol::{error, line},
    scrub::Scrubs,
    settings::Settings,
    signals::Signals,
};
use crate::{threads::named, ublk::Shared};
use serde_json::{Value, json};
use std::{
    io::Write,
    os::unix::net::UnixStream,
    process,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use ublk_integrity::Volume;

/// How long requests under way may take to end.
pub const RESTS_WITHIN: Duration = Duration::from_secs(5);
/// How long whoever asked may take for the answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a pass over the volume may take to leave, while requests are served: it has a read under way at most.
const PASS_LEAVES_WITHIN: Duration = Duration::from_secs(2);

/// What can be handed over.
pub(super) struct HandOver {
    settings: Settings,
    shared: Arc<Shared<Volume>>,
    scrubs: Arc<Scrubs>,
    closing: Arc<Closing>,
    signals: Arc<Signals>,
    asked: AtomicBool,
}

impl HandOver {
    pub(super) fn of(running: &Running, settings: &Settings, signals: &Arc<Signals>) -> Self {
        Self {
            settings: settings.clone(),
            shared: Arc::clone(&running.shared),
            scrubs: Arc::clone(&running.scrubs),
            closing: Arc::clone(&running.closing),
            signals: Arc::clone(signals),
            asked: AtomicBool::new(false),
        }
    }

    /// Whether somebody has asked, and it is not refused yet.
    pub(super) fn is_under_way(&self) -> bool {
        self.asked.load(Ordering::SeqCst)
    }

    /// Hands the device over to the next daemon, which `client` will start, in a thread of its own.
    /// `client` is answered when it is over.
    pub(super) fn begin(self: &Arc<Self>, client: UnixStream) {
        let this = Arc::clone(self);
        // Without a thread for it the connection closes without an answer.
        let _ = named("hand over").spawn(move || this.run(&client));
    }

    fn run(&self, client: &UnixStream) {
        let _ = client.set_nonblocking(false).and_then(|()| client.set_write_timeout(Some(PATIENCE)));
        if self.asked.swap(true, Ordering::SeqCst) {
            say(client, &error("it is being handed over already"));
            return;
        }
        let why = match self.close(client, RESTS_WITHIN) {
            Ok(answer) => {
                say(client, &answer);
                process::exit(0);
            }
            Err(why) => why,
        };
        self.asked.store(false, Ordering::SeqCst);
        say(client, &error(why));
    }

    /// Comes to rest and closes the volume: from then on nothing is served. Or says why not, and the
    /// device goes on.
    fn close(&self, client: &UnixStream, limit: Duration) -> Result<Value, String> {
        let log = &self.shared.log;
        self.refuse()?;
        let resting = self.scrubs.rest(PASS_LEAVES_WITHIN);
        log.tell(Event::HandOver);
        let gate = self.shared.gate.close(limit).map_err(|under_way| {
            log.tell(Event::TooBusy(under_way));
            let requests = if under_way == 1 { "request" } else { "requests" };
            format!("it was busy for {} s ({under_way} {requests} under way): try again", limit.as_secs())
        })?;
        let why = |why: String| {
            log.tell(Event::NotHandedOver);
            why
        };
        // What was under way may have failed.
        self.refuse().map_err(why)?;
        self.signals.leave(|| say(client, &json!({ "closing": true }))).map_err(str::to_owned).map_err(why)?;
        log.tell(Event::Left);
        // Nobody comes by it any more, and no pass goes on.
        std::mem::forget(gate);
        std::mem::forget(resting);
        Ok(self.end_volume())
    }

    /// What no daemon can follow, or should.
    fn refuse(&self) -> Result<(), String> {
        self.signals.may_leave()?;
        if !self.settings.recovery {
            return Err("it was added with --no-recovery, and ends with its daemon".into());
        }
        self.shared.target.latched().map_or(Ok(()), |why| {
            let why = self.settings.named(&why.to_string());
            Err(format!("its volume is read-only since a failure ({why}): `del` and `add` open it anew"))
        })
    }

    /// What a failure leaves is what SIGKILL would: the next daemon recovers it.
    fn end_volume(&self) -> Value {
        let closed = self.closing.close();
        let kept = self.shared.retire_kept();
        json!({ "closed": closed.is_ok(), "kept_writes": kept.ok() })
    }
}

/// Whether that could be said: not to one that is gone, or listens no more.
fn say(mut client: &UnixStream, answer: &Value) -> bool {
    client.write_all(&line(answer)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        checkpoints::Stop,
        daemon::{scrub::Scrubs, settings, state::State, workers},
        offline::{Offline, Opening, scratch},
    };
    use std::{
        io::{BufRead, BufReader},
        net::Shutdown,
        num::NonZeroU64,
    };
    use ublk_integrity::{Access, BlockIndex, BlockRange, Buf, Credential, Durability};

    const SOON: Duration = Duration::from_millis(20);

    fn served(offline: &Offline, key: &Credential) -> HandOver {
        let volume = Arc::new(offline.open_volume(key, Opening::new(Access::ReadWrite, None)).unwrap());
        let (stop, (backings, files)) = (Arc::new(Stop::default()), offline.handles());
        let shared = Arc::new(Shared::of_test(volume, files));
        let checkpoints = workers::start_checkpoints(&shared.target, backings, &stop, &shared.log, false).unwrap();
        let scrubs = Arc::new(Scrubs::new(&shared.target, backings, &shared.log).unwrap());
        let closing = Arc::new(Closing::of(Arc::clone(&scrubs), (stop, checkpoints), None));
        let signals = Signals::of_test();
        signals.live(State::of_test(0), shared.log.clone());
        let settings = Settings { recovery: true, ..settings::tests::settings() };
        HandOver { settings, shared, scrubs, closing, signals, asked: AtomicBool::new(false) }
    }

    fn first_line(client: UnixStream) -> String {
        let mut line = String::new();
        BufReader::new(client).read_line(&mut line).unwrap();
        line
    }

    fn write(offline: &Offline, hand_over: &HandOver) {
        let volume = &hand_over.shared.target;
        let (range, mut context) = (BlockRange::new(BlockIndex(3), 1), volume.context(0));
        let io = offline.io();
        let write = volume.write(&io, &mut context, range, Buf::new(4096), Durability::MayBeLost);
        offline.run(write).unwrap().0.unwrap();
    }

    #[test]
    fn a_busy_device_goes_on_and_so_does_one_that_nobody_takes_over() {
        let (_file, offline, key) = scratch();
        let hand_over = served(&offline, &key);
        let (client, other) = UnixStream::pair().unwrap();
        // It takes hours.
        hand_over.scrubs.start(NonZeroU64::new(1));
        hand_over.shared.gate.of_test(true);
        let why = hand_over.close(&client, SOON).unwrap_err();
        assert!(why.contains("busy") && why.contains("1 request under way"), "{why}");
        hand_over.shared.gate.of_test(false);
        // It listens no more: what was not said by then is said never.
        other.shutdown(Shutdown::Read).unwrap();
        assert!(hand_over.close(&client, SOON).unwrap_err().contains("nobody"));
        drop(other);
        assert!(hand_over.close(&client, SOON).unwrap_err().contains("nobody"));
        write(&offline, &hand_over);
        assert!(hand_over.shared.gate.close(SOON).is_ok(), "it was open again");
        let pass = hand_over.scrubs.status();
        assert!(pass["under_way"] == true && pass["pass"] == 1 && pass["rate"] == 1, "{pass}");
        hand_over.closing.close().unwrap();
        assert_eq!(hand_over.scrubs.status()["under_way"], false);
    }

    #[test]
    fn what_is_handed_over_is_closed_and_takes_nothing_more() {
        let (_file, offline, key) = scratch();
        let hand_over = served(&offline, &key);
        write(&offline, &hand_over);
        hand_over.scrubs.start(NonZeroU64::new(1));
        let (client, other) = UnixStream::pair().unwrap();
        assert_eq!(hand_over.close(&client, SOON), Ok(json!({ "closed": true, "kept_writes": 0 })));
        assert_eq!(first_line(other), "{\"closing\":true}\n", "from then on it can't be given up");
        assert_eq!(hand_over.shared.gate.close(Duration::ZERO).err(), None, "nothing is under way");
        assert!(hand_over.signals.may_leave().is_err(), "no signal stops the next daemon's device");
        assert_eq!(hand_over.scrubs.status()["under_way"], false, "it would read what the next daemon writes");
        drop(hand_over);
        let volume = offline.open_volume(&key, Opening::new(Access::ReadWrite, None)).unwrap();
        assert_eq!(volume.recovery().records, 0, "there is nothing to recover");
    }

    #[test]
    fn whoever_asked_may_go_once_it_has_heard_that_the_volume_is_closed() {
        let (_file, offline, key) = scratch();
        let hand_over = served(&offline, &key);
        let (client, other) = UnixStream::pair().unwrap();
        let going = std::thread::spawn(move || drop(first_line(other)));
        assert!(hand_over.close(&client, SOON).is_ok());
        going.join().unwrap();
        assert!(!say(&client, &json!({})), "and nobody minds");
    }

    #[test]
    fn what_none_can_follow_is_refused_and_so_is_what_a_signal_stops() {
        let (_file, offline, key) = scratch();
        let (client, other) = UnixStream::pair().unwrap();
        let mut hand_over = served(&offline, &key);
        hand_over.settings.recovery = false;
        assert!(hand_over.close(&client, SOON).unwrap_err().contains("--no-recovery"));
        hand_over.settings.recovery = true;
        // While it comes to rest.
        hand_over.shared.gate.of_test(true);
        let why = std::thread::scope(|scope| {
            let asked = scope.spawn(|| hand_over.close(&client, Duration::from_secs(60)));
            std::thread::sleep(SOON);
            hand_over.signals.come_in_test();
            hand_over.shared.gate.of_test(false);
            asked.join().unwrap().unwrap_err()
        });
        assert!(why.contains("a signal"), "{why}");
        write(&offline, &hand_over);
        assert!(hand_over.close(&client, SOON).unwrap_err().contains("a signal"));
        drop(client);
        assert_eq!(first_line(other), "", "it was never closing");
        hand_over.closing.close().unwrap();
    }
}

//! The daemon's anchor thread: it tells the anchor how far the volume has got, in each period, and when a flush waits for that.
//! No other request ever waits for it.

use super::{
    AnchorSettings, AnyAnchor, Ask, Lost, Pace, asked, note,
    report::{AnchorReport, Now, State},
};
use crate::{
    checkpoints::Stop,
    daemon::log::{Event, Log},
    device::Backings,
    event_loop::{OwnRing, ring::DeviceFiles},
    failure::{Exit, Failure},
    os,
    threads::named,
};
use futures_util::{FutureExt, future::FusedFuture};
use std::{
    io,
    os::fd::OwnedFd,
    pin::pin,
    sync::{Arc, mpsc},
    thread::JoinHandle,
    time::{Duration, Instant},
};
use ublk_integrity::{
    AnchorLoss, Storage, Volume,
    anchor::{Anchor, AnchorError, AnchorKeeper, KeepError, Ticked},
};

/// How long nobody asks at most whether the volume is still this host's, where nothing is written to it.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// How long an anchor that is away is left alone at most.
const ASK_AGAIN: Duration = Duration::from_secs(5);

/// The anchor of a volume that has been opened, and who tells it.
pub struct Kept {
    pub anchor: AnyAnchor,
    pub keeper: AnchorKeeper,
    pub settings: AnchorSettings,
    pub pace: Pace,
}

/// The thread, until somebody ends it.
pub struct Keeping {
    volume: Arc<Volume>,
    stop: Arc<Stop>,
    thread: JoinHandle<(AnyAnchor, AnchorKeeper)>,
    report: Arc<AnchorReport>,
    log: Log,
}

/// What the thread works with.
struct Thread {
    volume: Arc<Volume>,
    stop: Arc<Stop>,
    report: Arc<AnchorReport>,
    log: Log,
    kept: (AnyAnchor, AnchorKeeper),
    /// When it has last answered.
    answered: Instant,
    /// When it was first found to be away.
    away_since: Option<Instant>,
    is_warned: bool,
}

/// What the thread has waited for.
enum Came {
    Stop,
    Ask(Ask),
    /// The next tick, or a flush that waits for one.
    Time,
}

impl Keeping {
    /// Starts the thread.
    pub fn start(volume: &Arc<Volume>, backings: &Backings, log: &Log, kept: Kept) -> io::Result<Self> {
        let Kept { anchor, keeper, settings, pace } = kept;
        let (volume, stop, log) = (Arc::clone(volume), Arc::new(Stop::default()), log.clone());
        if settings.holds_flushes {
            keeper.hold_flushes(&volume);
        }
        let report = Arc::new(AnchorReport::new((settings, pace), anchor.is_counter(), keeper.status()));
        let (fds, files) = (backings.descriptors()?, backings.files(0));
        let (ready, started) = mpsc::channel();
        let thread = Thread {
            volume: Arc::clone(&volume),
            stop: Arc::clone(&stop),
            report: Arc::clone(&report),
            log: log.clone(),
            kept: (anchor, keeper),
            answered: Instant::now(),
            away_since: None,
            is_warned: false,
        };
        let thread = named("anchor").spawn(move || thread.run(fds, files, &ready))?;
        started.recv().unwrap_or_else(|_| Err(io::Error::other("the anchor thread died")))?;
        Ok(Self { volume, stop, thread, report, log })
    }

    /// What is known of it.
    pub fn report(&self) -> Arc<AnchorReport> {
        Arc::clone(&self.report)
    }

    /// Ends the thread. Before the volume is closed: it may wait for a checkpoint.
    pub fn end(self) -> Last {
        self.stop.set();
        let kept = self.thread.join().unwrap_or_else(|_| std::process::abort());
        Last { volume: self.volume, kept, report: self.report, log: self.log }
    }
}

/// What is left to tell once the volume is closed.
pub struct Last {
    volume: Arc<Volume>,
    kept: (AnyAnchor, AnchorKeeper),
    report: Arc<AnchorReport>,
    log: Log,
}

impl Last {
    /// Not one record may be missing later. Where that can't be told the state is one that the anchor accepts all the same.
    pub fn tell(mut self) {
        let (anchor, keeper) = &mut self.kept;
        match asked(keeper.finish(&self.volume, (anchor, &note()))) {
            Ok(()) => self.report.now().held = keeper.status(),
            // It was told before.
            Err(KeepError::Latched(_)) => {}
            Err(e) => self.log.tell(Event::Anchor(format!("the last point could not be told: {e}"))),
        }
    }
}

impl Thread {
    fn run(
        mut self,
        fds: Vec<OwnedFd>,
        files: DeviceFiles,
        ready: &mpsc::Sender<io::Result<()>>,
    ) -> (AnyAnchor, AnchorKeeper) {
        // A ring belongs to the thread that made it.
        let ring = match OwnRing::new(fds) {
            Ok(ring) => ring,
            Err(e) => {
                let _ = ready.send(Err(e));
                return self.kept;
            }
        };
        let _ = ready.send(Ok(()));
        let io = ring.storage(files);
        ring.block_on(self.ticks(&io)).expect("a ring that worked goes on working");
        self.report.asks.close(&Failure::new(Exit::Busy, "the device is about to end"));
        self.kept
    }

    async fn ticks<S: Storage>(&mut self, io: &S) {
        let mut context = self.volume.context(0);
        // A timer that is given up stays in the ring until its time has come.
        let mut period = pin!(io.sleep(self.pause()).fuse());
        loop {
            let came = {
                let mut stopped = pin!(self.stop.wait().fuse());
                // One that is away is asked again in time, whoever waits for it.
                let hears = self.away_since.is_none();
                let held = async {
                    if !hears {
                        std::future::pending::<()>().await;
                    }
                    self.kept.1.flush_waits(&self.volume, &context).await;
                };
                let mut held = pin!(held.fuse());
                let mut asked = pin!(self.report.asks.next().fuse());
                futures_util::select_biased! {
                    () = stopped => Came::Stop,
                    ask = asked => Came::Ask(ask),
                    () = held => Came::Time,
                    _ = period => Came::Time,
                }
            };
            match came {
                Came::Stop => return self.end().await,
                Came::Ask(ask) => {
                    if self.answer(ask).await {
                        continue;
                    }
                    self.stop.wait().await;
                    return;
                }
                Came::Time => {}
            }
            let began = os::since_1970().as_secs();
            let (anchor, keeper) = &mut self.kept;
            let mut ticked = keeper.tick((&self.volume, io), &mut context, (anchor, &note())).await;
            if matches!(ticked, Ok(Ticked::Idle)) && self.answered.elapsed() >= LOOK_AGAIN {
                ticked = self.look().await.map(|()| Ticked::Idle);
            } else if matches!(ticked, Ok(Ticked::Anchored | Ticked::Partly)) {
                self.answered = Instant::now();
            }
            let was_away = self.away_since.is_some();
            if !self.took(ticked, began) {
                self.stop.wait().await;
                return;
            }
            if period.is_terminated() || was_away != self.away_since.is_some() {
                period.set(io.sleep(self.pause()).fuse());
            }
        }
    }

    /// Whoever lost the volume to another host must not write the superblocks at its orderly end.
    async fn end(&mut self) {
        match self.look().await {
            Ok(()) => {}
            Err(KeepError::Anchor(AnchorError::Away(why))) => self.end_unasked(why),
            Err(e) => self.lose(&e),
        }
    }

    /// `false` where there will be no other tick.
    async fn answer(&mut self, Ask { found, step, answer }: Ask) -> bool {
        let (anchor, keeper) = &mut self.kept;
        let done = keeper.keep_key_area(&self.volume, (anchor, &note()), (found, step)).await;
        let goes_on = match &done {
            Ok(()) => {
                self.report.now().held = self.kept.1.status();
                self.answered = Instant::now();
                true
            }
            // The next tick says whether it is away.
            Err(KeepError::Anchor(AnchorError::Away(_) | AnchorError::KeyArea { .. })) => true,
            Err(e) => {
                self.lose(e);
                false
            }
        };
        answer(done.map(|()| self.kept.1.status().generation).map_err(Failure::from));
        goes_on
    }

    /// Until the next tick. One that is away is asked again soon, and once more when its time is over.
    fn pause(&self) -> Duration {
        let every = self.report.pace.every;
        let Some(since) = self.away_since else { return every };
        let left = self.report.pace.grace.saturating_sub(since.elapsed());
        let soon = every.min(if self.report.settings.holds_flushes { Duration::from_secs(1) } else { ASK_AGAIN });
        if left.is_zero() { soon } else { soon.min(left) }
    }

    /// Asks whether the volume is still this host's.
    async fn look(&mut self) -> Result<(), KeepError> {
        let (anchor, keeper) = &mut self.kept;
        keeper.look(&self.volume, anchor).await?;
        self.answered = Instant::now();
        Ok(())
    }

    /// Notes what has come of a tick; `false` where there will be no other.
    fn took(&mut self, ticked: Result<Ticked, KeepError>, began: u64) -> bool {
        match ticked {
            Ok(ticked) => {
                let held = self.kept.1.status();
                let mut now = self.report.now();
                let fresh_seconds = if ticked == Ticked::Partly { now.fresh_seconds } else { began };
                // What came without a change says again what was said before.
                let covered_to = if ticked == Ticked::Idle { self.volume.next_record().0 } else { held.record };
                *now = Now { held, fresh_seconds, covered_to, state: State::Ok, why: None };
                drop(now);
                if std::mem::take(&mut self.is_warned) {
                    self.log.tell(Event::Anchor("it can be asked again: the volume is fresh".into()));
                }
                self.away_since = None;
                true
            }
            Err(KeepError::Anchor(AnchorError::Away(why))) => self.is_away(why),
            Err(e) => {
                self.lose(&e);
                false
            }
        }
    }

    /// Nobody can say at the end whether the volume is still this host's: a host that is cut off may have lost it. So it ends as
    /// by a crash, which costs the next open a recovery.
    fn end_unasked(&self, why: String) {
        let place = &self.report.settings.place;
        self.volume.latch_for_anchor(AnchorLoss::Away);
        self.log.tell(Event::Anchor(format!(
            "{place} can't be asked at the end: {why}; there is no last checkpoint, and the next open recovers"
        )));
        self.lost(why);
    }

    /// The volume is read-only from now on, or was before.
    fn lose(&self, e: &KeepError) {
        match e {
            KeepError::Anchor(_) => self.tell_latched(),
            // Whoever has latched it has told.
            KeepError::Latched(_) => {}
        }
        self.lost(e.to_string());
    }

    fn tell_latched(&self) {
        self.volume.latched().into_iter().for_each(|why| self.log.tell(Event::Latched(why)));
    }

    fn lost(&self, why: String) {
        self.report.asks.close(&Failure::new(Exit::Device, format_args!("the device is read-only: {why}")));
        let mut now = self.report.now();
        (now.state, now.why) = (State::Lost, Some(why));
    }

    /// It goes on for a while; then comes what was asked for.
    fn is_away(&mut self, why: String) -> bool {
        let settings = &self.report.settings;
        let since = *self.away_since.get_or_insert_with(Instant::now);
        let (passed, Pace { every, grace }) = (since.elapsed(), self.report.pace);
        let (place, mut lost) = (settings.place.clone(), settings.lost);
        let mut is_over = passed >= grace;
        if passed.as_secs() >= settings.timeout_seconds && self.kept.1.holds_a_flush(&self.volume) {
            // It must not be answered, and may not wait for ever.
            (is_over, lost) = (true, Lost::Readonly);
        }
        {
            let mut now = self.report.now();
            let stale = is_over && lost == Lost::Continue;
            (now.state, now.why) = (if stale { State::Stale } else { State::Away }, Some(why.clone()));
        }
        if is_over && lost == Lost::Readonly {
            self.volume.latch_for_anchor(AnchorLoss::Away);
            self.lost(why);
            self.tell_latched();
            return false;
        }
        if (is_over || passed >= every * 3) && !std::mem::replace(&mut self.is_warned, true) {
            let then = match lost {
                Lost::Readonly => format!("read-only after {} s", grace.as_secs()),
                Lost::Continue => "what is written from now on can be rolled back".into(),
            };
            self.log.tell(Event::Anchor(format!("{place} can't be asked: {why}; {then}")));
        }
        true
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use crate::{
        anchor::FileAnchor,
        offline::{Offline, Opening, scratch},
        ublk::Shared,
    };
    use std::{path::Path, thread, time::Duration};
    use ublk_integrity::{
        Access, BlockIndex, BlockRange, Buf, Credential, Durability, Latched, WriteError,
        anchor::{AnchorPurpose, KeyAreaMark, KeyAreaStep},
    };

    /// A volume that is served with an anchor, and a tick each 20 ms.
    struct Served {
        _file: tempfile::NamedTempFile,
        folder: tempfile::TempDir,
        offline: Offline,
        key: Credential,
        volume: Arc<Volume>,
        keeping: Keeping,
    }

    impl Served {
        fn new(grace_seconds: u64, lost: Lost) -> Self {
            Self::with(grace_seconds, lost, false)
        }

        fn with(grace_seconds: u64, lost: Lost, holds_flushes: bool) -> Self {
            let (file, offline, key) = scratch();
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("anchor");
            let chosen = AnyAnchor::File(FileAnchor::make(&path, Duration::from_secs(20)).unwrap().0);
            let how = Opening { purpose: AnchorPurpose::Begin, ..Opening::new(Access::ReadWrite, None) };
            let (volume, keeper) = offline.open_anchored(&key, how, Some(&chosen)).unwrap();
            let (volume, keeper) = (Arc::new(volume), keeper.unwrap());
            let settings = AnchorSettings {
                place: format!("file:{}", path.display()).parse().unwrap(),
                wait_seconds: 0,
                timeout_seconds: 1,
                every_milliseconds: Some(20),
                grace_seconds: Some(grace_seconds),
                lost,
                holds_flushes,
                same_disk: true,
                wear_ok: false,
            };
            let (backings, files) = offline.handles();
            let log = Shared::of_test(Arc::clone(&volume), files).log;
            let pace = settings.pace(false).unwrap();
            let kept = Kept { anchor: chosen, keeper, settings, pace };
            let keeping = Keeping::start(&volume, backings, &log, kept).unwrap();
            Self { _file: file, folder, offline, key, volume, keeping }
        }

        fn path(&self) -> std::path::PathBuf {
            self.folder.path().join("anchor")
        }

        fn write(&self) {
            let (one, mut context) = (BlockRange::new(BlockIndex(3), 1), self.volume.context(0));
            let io = self.offline.io();
            let write = self.volume.write(&io, &mut context, one, Buf::new(4096), Durability::MayBeLost);
            self.offline.run(write).unwrap().0.unwrap();
        }

        fn flush(&self) -> Result<(), WriteError> {
            let (io, mut context) = (self.offline.io(), self.volume.context(0));
            self.offline.run(self.volume.flush(&io, &mut context)).unwrap()
        }

        fn shown(&self) -> serde_json::Value {
            serde_json::to_value(self.keeping.report().shown(&self.volume)).unwrap()
        }

        /// Waits until `status` says so.
        fn until(&self, is_so: impl Fn(&serde_json::Value) -> bool) -> serde_json::Value {
            for _ in 0..3000 {
                let shown = self.shown();
                if is_so(&shown) {
                    return shown;
                }
                thread::sleep(Duration::from_millis(10));
            }
            panic!("in vain waited for: {}", self.shown());
        }
    }

    fn with_size(path: &Path, bytes: u64) {
        std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(bytes).unwrap();
    }

    #[test]
    fn what_is_written_is_covered_and_an_orderly_end_to_the_last_record() {
        let served = Served::new(60, Lost::Readonly);
        let before = served.until(|shown| shown["state"] == "ok")["generation"].as_u64().unwrap();
        served.write();
        served.until(|shown| shown["generation"].as_u64() > Some(before) && shown["lag_records"] == 0);
        served.write();
        let Served { keeping, volume, offline, key, folder, _file } = served;
        let last = keeping.end();
        offline.run(volume.close(&offline.io())).unwrap().unwrap();
        let end = volume.next_record().0;
        last.tell();
        drop(volume);
        let chosen = AnyAnchor::File(FileAnchor::open(&folder.path().join("anchor"), Duration::from_secs(20)).unwrap());
        let how = Opening::new(Access::ReadOnly, None);
        let (_, keeper) = offline.open_anchored(&key, how, Some(&chosen)).unwrap();
        assert_eq!(keeper.unwrap().status().record, end);
    }

    #[test]
    fn an_anchor_that_is_away_for_too_long_makes_the_volume_read_only() {
        let served = Served::new(1, Lost::Readonly);
        with_size(&served.path(), 0);
        served.write();
        let away = served.until(|shown| shown["state"] == "away");
        assert!(away["why"].as_str().unwrap().contains("anchor"), "{away}");
        assert_eq!(served.volume.latched(), None, "there is time");
        served.until(|shown| shown["state"] == "lost");
        assert!(served.volume.latched().is_some());
    }

    #[test]
    fn or_it_goes_on_and_says_that_it_is_stale_until_it_is_back() {
        let served = Served::new(0, Lost::Continue);
        let whole = std::fs::read(served.path()).unwrap();
        with_size(&served.path(), 0);
        served.write();
        served.until(|shown| shown["state"] == "stale");
        assert_eq!(served.volume.latched(), None);
        std::fs::write(served.path(), whole).unwrap();
        served.until(|shown| shown["state"] == "ok");
    }

    #[test]
    fn a_flush_waits_for_the_anchor_and_fails_where_that_does_not_answer() {
        let served = Served::with(3600, Lost::Continue, true);
        served.write();
        served.flush().unwrap();
        served.until(|shown| shown["lag_records"] == 0 && shown["mode"] == "flush" && shown["generation"] != 1);
        served.flush().unwrap();
        with_size(&served.path(), 0);
        served.write();
        assert!(matches!(served.flush(), Err(WriteError::Latched(Latched::Anchor(AnchorLoss::Away)))));
        served.until(|shown| shown["state"] == "lost");
    }

    fn mark(byte: u8) -> KeyAreaMark {
        KeyAreaMark { generation: byte.into(), digest: [byte; 32] }
    }

    /// What the thread answers.
    fn asks(served: &Served, found: u8, step: KeyAreaStep) -> Result<u64, Failure> {
        let (answer, answered) = mpsc::channel();
        let answer = Box::new(move |done| answer.send(done).unwrap());
        served.keeping.report().ask(Ask { found: mark(found), step, answer });
        answered.recv_timeout(Duration::from_secs(60)).unwrap()
    }

    #[test]
    fn key_areas_are_told_between_two_ticks_and_old_ones_are_not() {
        let served = Served::new(60, Lost::Readonly);
        served.write();
        let before = asks(&served, 3, KeyAreaStep::Begin(mark(4))).unwrap();
        served.write();
        assert_eq!(asks(&served, 3, KeyAreaStep::Judge).unwrap(), asks(&served, 4, KeyAreaStep::Judge).unwrap());
        assert!(asks(&served, 4, KeyAreaStep::End).unwrap() > before);
        let old = asks(&served, 3, KeyAreaStep::Judge).unwrap_err();
        assert!(old.exit == Exit::Integrity && old.message.contains("key area"), "{}", old.message);
        assert_eq!(served.volume.latched(), None, "it goes on");
        let now = served.shown()["generation"].as_u64().unwrap();
        served.write();
        served.until(|shown| shown["generation"].as_u64() > Some(now) && shown["lag_records"] == 0);
        // What the anchor holds says so.
        let Served { keeping, volume, offline, key, folder, _file } = served;
        let (last, report) = (keeping.report(), keeping.end());
        offline.run(volume.close(&offline.io())).unwrap().unwrap();
        report.tell();
        let (answer, answered) = mpsc::channel();
        let answer = Box::new(move |done| answer.send(done).unwrap());
        last.ask(Ask { found: mark(4), step: KeyAreaStep::End, answer });
        assert!(answered.recv().unwrap().is_err_and(|why: Failure| why.exit == Exit::Busy), "nobody answers any more");
        drop(volume);
        let path = folder.path().join("anchor");
        let chosen = AnyAnchor::File(FileAnchor::open(&path, Duration::from_secs(20)).unwrap());
        let refused = offline.open_anchored(&key, Opening::new(Access::ReadOnly, None), Some(&chosen));
        assert!(refused.is_err_and(|why| why.message.contains("of generation 4 when")), "its key is from no key area");
    }

    #[test]
    fn where_the_anchor_is_away_no_key_area_is_told_and_where_it_is_lost_nobody_answers() {
        let served = Served::new(3600, Lost::Readonly);
        let whole = std::fs::read(served.path()).unwrap();
        with_size(&served.path(), 0);
        assert_eq!(asks(&served, 3, KeyAreaStep::Begin(mark(4))).unwrap_err().exit, Exit::Device);
        std::fs::write(served.path(), whole).unwrap();
        asks(&served, 3, KeyAreaStep::Begin(mark(4))).unwrap();
        std::fs::write(served.path(), [0; 8192]).unwrap();
        served.write();
        served.until(|shown| shown["state"] == "lost");
        let lost = asks(&served, 4, KeyAreaStep::End).unwrap_err();
        assert!(lost.message.contains("read-only"), "{}", lost.message);
    }

    /// It has nothing to tell, and its orderly end would write the superblocks.
    #[test]
    fn who_has_lost_the_volume_and_is_idle_notices_before_it_ends() {
        let served = Served::new(60, Lost::Readonly);
        served.until(|shown| shown["state"] == "ok");
        std::fs::write(served.path(), [0; 8192]).unwrap();
        let Served { keeping, volume, offline, _file, folder: _folder, .. } = served;
        let before = std::fs::read(_file.path()).unwrap();
        let last = keeping.end();
        assert!(volume.latched().is_some_and(|why| why.to_string().contains("somebody else")));
        assert!(offline.run(volume.close(&offline.io())).unwrap().is_err());
        last.tell();
        assert!(std::fs::read(_file.path()).unwrap() == before, "something was written");
    }

    /// It may have been lost to another host, whose superblocks would be written over.
    #[test]
    fn who_can_ask_nobody_at_the_end_leaves_the_superblocks_alone() {
        let served = Served::new(3600, Lost::Continue);
        served.until(|shown| shown["state"] == "ok");
        let whole = std::fs::read(served.path()).unwrap();
        with_size(&served.path(), 0);
        served.write();
        served.until(|shown| shown["state"] == "away");
        let Served { keeping, volume, offline, key, folder, _file } = served;
        let before = std::fs::read(_file.path()).unwrap();
        let last = keeping.end();
        assert_eq!(volume.latched(), Some(Latched::Anchor(AnchorLoss::Away)));
        assert!(offline.run(volume.close(&offline.io())).unwrap().is_err());
        last.tell();
        assert!(std::fs::read(_file.path()).unwrap() == before, "something was written");
        drop(volume);
        // Once it is there again nothing is missing.
        let path = folder.path().join("anchor");
        std::fs::write(&path, whole).unwrap();
        let chosen = AnyAnchor::File(FileAnchor::open(&path, Duration::from_secs(20)).unwrap());
        let (volume, _) = offline.open_anchored(&key, Opening::new(Access::ReadWrite, None), Some(&chosen)).unwrap();
        assert!(volume.recovery().records > 0, "{:?}", volume.recovery());
    }

    #[test]
    fn who_has_taken_the_anchor_ends_it_here() {
        let served = Served::new(60, Lost::Readonly);
        let mut bytes = std::fs::read(served.path()).unwrap();
        bytes[..4096].fill(0);
        bytes[4096..].fill(0);
        std::fs::write(served.path(), bytes).unwrap();
        served.write();
        served.until(|shown| shown["state"] == "lost");
        assert!(served.volume.latched().is_some_and(|why| why.to_string().contains("somebody else")));
    }
}

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
mod tests;

//! Passes over the volume while it is served: one at a time, each on a thread with a ring of its own, which come
//! with it and go with it, as its memory does.

use super::{
    heal::Healing,
    log::{Event, Log},
    memory_budget::{Available, Purpose},
    protocol::Refusal,
};
use crate::{
    device::Backings,
    event_loop::{OwnRing, ring::DeviceFiles},
    failure::{Context, Exit, Failure, Outcome, plain},
    os,
    scrub_status::{ScrubStatus, goes_on},
    threads::named,
};
use serde_json::{Value, json};
use std::{
    convert::Infallible,
    io,
    num::NonZeroU64,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    time::{Duration, Instant},
};
use ublk_integrity::{
    BlockIndex, Volume,
    scrub::{Scrub, ScrubControl, ScrubReport, ScrubState},
};

/// What a pass takes at most: buffers, the blocks that are pending when it begins, its ring, and its stack.
const MEMORY: u64 = 6 << 20;
/// How long the end of the daemon waits for the pass to leave: it has a read under way at most.
const LEAVES_WITHIN: Duration = Duration::from_secs(10);

/// The passes over one volume.
pub(super) struct Scrubs {
    volume: Arc<Volume>,
    /// The devices, for the ring of each pass.
    descriptors: Vec<OwnedFd>,
    files: DeviceFiles,
    log: Log,
    passes: Mutex<Passes>,
    healing: Arc<Healing>,
}

#[derive(Default)]
struct Passes {
    last: Option<Pass>,
    stage: Stage,
}

/// How far the end of the daemon is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
enum Stage {
    #[default]
    Serving,
    /// It may come: no pass is under way, and none begins.
    Resting,
    /// It comes.
    Ending,
}

#[derive(Clone)]
struct Pass {
    control: Arc<ScrubControl>,
    ended: Arc<OnceLock<Ended>>,
    /// When it was asked to leave.
    leaves_since: Option<Instant>,
    /// Hears of the end of the thread, however that comes: whoever waits for it, one after the other.
    gone: Arc<Mutex<Receiver<Infallible>>>,
}

/// Until this is dropped no pass is under way, and none begins.
pub(super) struct Resting<'s>(&'s Scrubs);

impl Drop for Resting<'_> {
    fn drop(&mut self) {
        let mut passes = self.0.passes();
        if passes.stage > Stage::Resting {
            return;
        }
        passes.stage = Stage::Serving;
        self.0.healing.resume();
        let Some(pass) = &mut passes.last else { return };
        pass.leaves_since = None;
        // One that has a read under way reads on; one that has heeded it has but to say so.
        if pass.control.stay() || !pass.is_gone_within(LEAVES_WITHIN) {
            return;
        }
        if pass.ended.get().is_some_and(|ended| ended.failure.is_none()) {
            let control = Arc::clone(&pass.control);
            let rate = control.report().rate.and_then(NonZeroU64::new);
            self.0.go_on_from(&mut passes, control.in_superblock(), rate);
        }
    }
}

/// The thread of a pass has ended.
struct Ended {
    failure: Option<String>,
}

/// Dropped by the thread of a pass, with nothing said before: it has not come to its end.
struct SaysItsEnd(Pass, Log);

impl Drop for SaysItsEnd {
    fn drop(&mut self) {
        let Self(pass, log) = self;
        if pass.ended.set(Ended { failure: Some("its thread has died".into()) }).is_ok() {
            log.tell(Event::ScrubFailed(pass.status().summary()));
        }
    }
}

impl Scrubs {
    pub(super) fn new(volume: &Arc<Volume>, backings: &Backings, log: &Log) -> io::Result<Self> {
        Ok(Self {
            volume: Arc::clone(volume),
            descriptors: backings.descriptors()?,
            files: backings.files(0),
            log: log.clone(),
            passes: Mutex::default(),
            healing: Arc::new(Healing::of(volume, log)),
        })
    }

    fn passes(&self) -> MutexGuard<'_, Passes> {
        self.passes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a pass, if none is under way.
    pub(super) fn start(&self, rate: Option<NonZeroU64>) -> Value {
        self.try_start(rate).map_or_else(|refusal| refusal.answer(), |()| self.status())
    }

    fn try_start(&self, rate: Option<NonZeroU64>) -> Result<(), Refusal> {
        let mut passes = self.passes();
        refuse_leaving(&passes)?;
        refuse_under_way(&passes)?;
        self.healing.refuse_under_way()?;
        has_memory(Purpose::New)?;
        // Its number runs on as far as the volume can tell.
        let before = passes.last.as_ref().map(|pass| pass.control.in_superblock()).or_else(|| self.volume.last_scrub());
        let number = before.map_or(0, |scrub| scrub.pass) + 1;
        let begins = Scrub { pass: number, begun_seconds: os::since_1970().as_secs(), ..Scrub::default() };
        passes.last = Some(self.spawn(begins, rate)?);
        Ok(())
    }

    /// Goes on with a pass that was under way when the volume was last open.
    pub(super) fn go_on(&self) {
        if let Some(from) = self.volume.last_scrub() {
            self.go_on_from(&mut self.passes(), from, None);
        }
    }

    fn go_on_from(&self, passes: &mut Passes, from: Scrub, rate: Option<NonZeroU64>) {
        if goes_on(from.state) {
            // Somebody can begin another, if that fails.
            let pass = has_memory(Purpose::Needed).and_then(|()| self.spawn(from, rate)).unwrap_or_else(|failure| {
                let (pass, _) = Pass::new(from, rate);
                let _ = pass.ended.set(Ended { failure: Some(failure.message) });
                self.log.tell(Event::ScrubFailed(pass.status().summary()));
                pass
            });
            passes.last = Some(pass);
        }
    }

    /// Has the pass leave while requests are still served, so that none of them waits for it at the end of the
    /// daemon. Where that does not come it goes on, from where it was.
    pub(super) fn rest(&self, within: Duration) -> Resting<'_> {
        self.leave(Stage::Resting, within);
        Resting(self)
    }

    /// Ends the pass where it is, and waits for that: then the last checkpoint writes what it has to mend, and where
    /// it goes on. None begins any more.
    pub(super) fn close(&self) {
        self.leave(Stage::Ending, LEAVES_WITHIN);
    }

    fn leave(&self, stage: Stage, within: Duration) {
        let begun = Instant::now();
        let leaves = {
            let mut passes = self.passes();
            passes.stage = passes.stage.max(stage);
            passes.last.as_mut().map(|pass| {
                pass.control.leave();
                let since = *pass.leaves_since.get_or_insert_with(Instant::now);
                (pass.clone(), within.saturating_sub(since.elapsed()))
            })
        };
        let heals = !self.healing.rest(within);
        let stays = leaves.is_some_and(|(pass, left)| !pass.is_gone_within(left.saturating_sub(begun.elapsed())));
        // One that has a read under way that does not come back only reads: it goes with the process. So does
        // one that heals: what it writes is what is there, or was.
        if (heals || stays) && stage == Stage::Ending {
            self.log.tell(Event::ScrubStays);
        }
    }

    /// Does not wait for the thread: what fails there the status says.
    fn spawn(&self, from: Scrub, rate: Option<NonZeroU64>) -> Outcome<Pass> {
        let doing = "can't start the thread of the pass";
        let descriptors = self.cloned_descriptors()?;
        let (volume, files, log) = (Arc::clone(&self.volume), self.files, self.log.clone());
        let (pass, says_gone) = Pass::new(from, rate);
        let its = pass.clone();
        let thread = move || {
            // In this order: it has said how it has ended before it is gone.
            let _gone = says_gone;
            let _ended = SaysItsEnd(its.clone(), log.clone());
            os::yield_disk();
            let tell = |finding| log.tell(Event::Scrub(finding));
            // A ring belongs to the thread that made it.
            let done = OwnRing::new(descriptors)
                .and_then(|ring| ring.block_on(volume.scrub(&ring.storage(files), &its.control, tell)));
            if !goes_on(its.control.state()) {
                its.control.ended_at(os::since_1970().as_secs());
                volume.note_scrub(its.control.in_superblock());
            }
            if done.is_err() {
                log.tell(Event::ScrubFailed(its.status().summary()));
            }
            let _ = its.ended.set(Ended { failure: done.err().map(|e| plain(&e)) });
            log.tell(Event::ScrubEnded(its.status().summary()));
        };
        named("scrub").spawn(thread).doing(doing)?;
        Ok(pass)
    }

    pub(super) fn pause(&self) -> Value {
        self.turn("running", ScrubControl::pause)
    }

    pub(super) fn resume(&self) -> Value {
        self.turn("paused", ScrubControl::resume)
    }

    pub(super) fn stop(&self) -> Value {
        self.turn("under way", ScrubControl::stop)
    }

    fn turn(&self, wanted: &str, turn: impl FnOnce(&ScrubControl) -> bool) -> Value {
        let passes = self.passes();
        let turned = passes.last.as_ref().is_some_and(|pass| pass.ended.get().is_none() && turn(&pass.control));
        // One that has left goes on with the next daemon, and is for that to turn.
        let may_turn = refuse_leaving(&passes);
        drop(passes);
        if turned {
            return self.status();
        }
        let none = || {
            let summary = self.known().summary();
            Failure::new(Exit::Arguments, format_args!("no pass over this device is {wanted}: {summary}")).into()
        };
        may_turn.err().unwrap_or_else(none).answer()
    }

    /// Blocks are healed from what a client sends, who is answered there. `None`, but where that can't
    /// begin: a pass would find what is healed just then.
    pub(super) fn heal(self: &Arc<Self>, client: UnixStream) -> Option<Value> {
        self.try_heal(client).err().map(|refusal| refusal.answer())
    }

    fn try_heal(self: &Arc<Self>, client: UnixStream) -> Result<(), Refusal> {
        let passes = self.passes();
        refuse_leaving(&passes)?;
        refuse_under_way(&passes)?;
        let devices = (self.cloned_descriptors()?, self.files);
        let scrubs = Arc::clone(self);
        let good = move |block, was_bad| scrubs.is_good(block, was_bad);
        Ok(Arc::clone(&self.healing).begin(client, devices, good)?)
    }

    /// What the last pass has found is bad no more.
    fn is_good(&self, block: BlockIndex, was_bad: bool) {
        if let Some(pass) = &self.passes().last {
            if pass.control.is_good(block, was_bad) {
                self.volume.note_scrub(pass.control.in_superblock());
            }
        }
    }

    fn cloned_descriptors(&self) -> Outcome<Vec<OwnedFd>> {
        self.descriptors
            .iter()
            .map(OwnedFd::try_clone)
            .collect::<io::Result<_>>()
            .doing("can't open the devices once more")
    }

    fn known(&self) -> ScrubStatus {
        let passes = self.passes();
        match (&passes.last, self.volume.last_scrub()) {
            (Some(pass), _) => {
                let mut status = pass.status();
                // It may not have come to say so yet.
                status.report.blocks = self.volume.blocks();
                status
            }
            // Of one that had ended before the volume was opened.
            (None, Some(before)) => {
                let report = ScrubReport { blocks: self.volume.blocks(), ..ScrubReport::of(before) };
                ScrubStatus { under_way: false, failure: None, report }
            }
            (None, None) => ScrubStatus::default(),
        }
    }

    /// All that is known of the last pass.
    pub(super) fn status(&self) -> Value {
        json!(self.known())
    }

    /// The same without lists.
    pub(super) fn summary(&self) -> Value {
        let mut known = self.known();
        known.report.unlisted_runs += known.report.bad_runs.len() as u64;
        known.report.unlisted_metadata += known.report.bad_metadata.len() as u64;
        known.report.bad_runs.clear();
        known.report.bad_metadata.clear();
        json!(known)
    }
}

impl Pass {
    /// One that is under way, and what its thread drops when it is gone.
    fn new(from: Scrub, rate: Option<NonZeroU64>) -> (Self, Sender<Infallible>) {
        let (says_gone, gone) = mpsc::channel();
        let (control, gone) = (Arc::new(ScrubControl::new(from, rate)), Arc::new(Mutex::new(gone)));
        (Self { control, ended: Arc::default(), leaves_since: None, gone }, says_gone)
    }

    /// Whether its thread is gone, or is so soon.
    fn is_gone_within(&self, time: Duration) -> bool {
        let gone = self.gone.lock().unwrap_or_else(PoisonError::into_inner);
        gone.recv_timeout(time) != Err(RecvTimeoutError::Timeout)
    }

    fn status(&self) -> ScrubStatus {
        let ended = self.ended.get();
        ScrubStatus {
            under_way: ended.is_none(),
            failure: ended.and_then(|ended| ended.failure.clone()),
            report: self.control.report(),
        }
    }
}

fn refuse_leaving(passes: &Passes) -> Result<(), Refusal> {
    if passes.stage == Stage::Serving { Ok(()) } else { Err(Refusal::Leaving) }
}

fn refuse_under_way(passes: &Passes) -> Outcome {
    let Some(pass) = passes.last.as_ref().filter(|pass| pass.ended.get().is_none()) else { return Ok(()) };
    let remedy = match pass.control.state() {
        ScrubState::Stopped => "it ends once what it has found is mended, in 15 s or so",
        _ => "`--status` shows it, `--stop` ends it",
    };
    Err(Failure::new(Exit::Busy, format_args!("{}: {remedy}", pass.status().summary())))
}

/// One that goes on has had its memory before, or is awaited.
fn has_memory(purpose: Purpose) -> Outcome {
    Available::here(purpose).refuse_less_than(MEMORY, "begin the pass when there is more")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::offline::{Opening, scratch};
    use ublk_integrity::Access;

    fn scrubs() -> (tempfile::NamedTempFile, Scrubs) {
        let (file, offline, key) = scratch();
        let volume = Arc::new(offline.open_volume(&key, Opening::new(Access::ReadWrite, None)).unwrap());
        (file, Scrubs::new(&volume, &offline.into_backings(), &Log::of_test()).unwrap())
    }

    #[test]
    fn a_pass_leaves_when_the_daemon_ends_and_none_begins_then() {
        let (_file, scrubs) = scrubs();
        let begun = Scrub { pass: 3, state: ScrubState::Paused, ..Scrub::default() };
        scrubs.passes().last = Some(scrubs.spawn(begun, None).unwrap());
        let since = Instant::now();
        scrubs.close();
        assert!(since.elapsed() < LEAVES_WITHIN);
        let status = scrubs.known();
        assert!(!status.under_way && status.failure.is_none(), "{status:?}");
        assert_eq!((status.report.pass, status.report.state), (3, ScrubState::Paused), "it goes on another time");
        assert_eq!(scrubs.start(None)["exit"], Exit::Busy as u8);
        scrubs.close();
    }

    #[test]
    fn a_pass_that_leaves_for_another_daemon_goes_on_where_none_comes() {
        let (_file, scrubs) = scrubs();
        drop(scrubs.rest(LEAVES_WITHIN));
        assert_eq!(scrubs.known().report.pass, 0, "there was none");
        let begun = Scrub { pass: 3, cursor: 5, bad_blocks: 2, state: ScrubState::Paused, ..Scrub::default() };
        scrubs.passes().last = Some(scrubs.spawn(begun, NonZeroU64::new(7)).unwrap());
        let resting = scrubs.rest(LEAVES_WITHIN);
        assert!(!scrubs.known().under_way);
        // It is for the next daemon to say what becomes of it.
        for refused in [scrubs.start(None), scrubs.pause(), scrubs.resume(), scrubs.stop()] {
            assert!(refused["exit"] == Exit::Busy as u8 && Refusal::is_of_leaving(&refused), "{refused}");
        }
        drop(resting);
        let again = scrubs.start(None);
        assert!(again["error"].is_string() && !Refusal::is_of_leaving(&again), "one is under way: {again}");
        let ScrubStatus { under_way, report, .. } = scrubs.known();
        assert!(under_way, "{report:?}");
        assert_eq!((report.pass, report.state, report.rate), (3, ScrubState::Paused, Some(7)));
        assert_eq!((report.cursor, report.bad_blocks), (5, 2));
        assert!(scrubs.stop()["error"].is_null());
        drop(scrubs.rest(LEAVES_WITHIN));
        assert!(!scrubs.known().under_way, "it was stopped");
        let begun = Scrub { pass: 4, state: ScrubState::Paused, ..Scrub::default() };
        scrubs.passes().last = Some(scrubs.spawn(begun, None).unwrap());
        let resting = scrubs.rest(LEAVES_WITHIN);
        scrubs.close();
        drop(resting);
        assert!(!scrubs.known().under_way, "the end has come meanwhile");
    }

    /// A pass whose first read comes back when `passed` is called.
    fn slow_to_read(scrubs: &Scrubs) -> (Pass, Sender<Infallible>) {
        let (pass, says_gone) = Pass::new(Scrub { pass: 3, ..Scrub::default() }, None);
        scrubs.passes().last = Some(pass.clone());
        (pass, says_gone)
    }

    /// Its thread comes to its end in a moment.
    fn ends_soon(pass: Pass, says_gone: Sender<Infallible>) -> std::thread::JoinHandle<()> {
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            let _ = pass.ended.set(Ended { failure: None });
            drop(says_gone);
        })
    }

    fn passed(scrubs: &Scrubs, control: &ScrubControl) {
        let descriptors = scrubs.descriptors.iter().map(|one| one.try_clone().unwrap()).collect();
        let ring = OwnRing::new(descriptors).unwrap();
        ring.block_on(scrubs.volume.scrub(&ring.storage(scrubs.files), control, |_| {})).unwrap();
    }

    #[test]
    fn a_pass_that_is_slow_to_leave_is_not_lost_where_no_daemon_comes() {
        let (_file, scrubs) = scrubs();
        let (pass, says_gone) = slow_to_read(&scrubs);
        drop(scrubs.rest(Duration::from_millis(10)));
        passed(&scrubs, &pass.control);
        assert_eq!(pass.control.state(), ScrubState::Ended, "its read has come back, and it was to go on");
        drop(says_gone);
        // Where it has just heeded that, and not come to say so, it begins anew.
        let (pass, says_gone) = slow_to_read(&scrubs);
        let resting = scrubs.rest(Duration::from_millis(10));
        passed(&scrubs, &pass.control);
        assert_eq!(pass.control.state(), ScrubState::Running);
        let ends = ends_soon(pass, says_gone);
        drop(resting);
        ends.join().unwrap();
        let again = scrubs.passes().last.as_ref().unwrap().clone();
        assert!(again.is_gone_within(LEAVES_WITHIN));
        assert_eq!((again.control.report().pass, again.control.state()), (3, ScrubState::Ended));
    }

    #[test]
    fn the_end_waits_for_a_pass_that_a_hand_over_has_not_waited_for() {
        let (_file, scrubs) = scrubs();
        let (pass, says_gone) = slow_to_read(&scrubs);
        drop(scrubs.rest(Duration::from_millis(10)));
        let ends = ends_soon(pass, says_gone);
        scrubs.close();
        assert!(!scrubs.known().under_way);
        ends.join().unwrap();
    }

    #[test]
    fn a_thread_that_dies_is_not_under_way_for_ever() {
        let (_file, scrubs) = scrubs();
        let (pass, _says_gone) = slow_to_read(&scrubs);
        drop(SaysItsEnd(pass.clone(), scrubs.log.clone()));
        assert!(pass.ended.get().is_some_and(|ended| ended.failure.is_some()));
    }
}

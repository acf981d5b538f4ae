//! Passes over the volume while it is served: one at a time, each on a thread with a ring of its own, which come
//! with it and go with it, as its memory does.

use super::{
    log::{Event, Log},
    memory_budget::{Available, Purpose},
    protocol::failed,
};
use crate::{
    device::Backings,
    event_loop::{OwnRing, ring::DeviceFiles},
    failure::{Context, Exit, Failure, Outcome, plain},
    os::yield_disk,
    scrub_status::ScrubStatus,
    threads::named,
    ublk::Shared,
};
use serde_json::{Value, json};
use std::{
    io,
    num::NonZeroU64,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, mpsc},
    time::{SystemTime, UNIX_EPOCH},
};
use ublk_integrity::{
    Volume,
    scrub::{Scrub, ScrubControl, ScrubReport, ScrubState},
};

/// What a pass takes at most: buffers, the blocks that are pending when it begins, its ring, and its stack.
const MEMORY: u64 = 6 << 20;
/// Findings of a pass that are told one by one.
const TOLD: u64 = 100;

/// The passes over one volume.
pub(super) struct Scrubs {
    volume: Arc<Volume>,
    /// The devices, for the ring of each pass.
    descriptors: Vec<OwnedFd>,
    files: DeviceFiles,
    log: Log,
    last: Mutex<Option<Pass>>,
}

struct Pass {
    control: Arc<ScrubControl>,
    ended: Arc<OnceLock<Ended>>,
}

/// The thread of a pass has ended.
struct Ended {
    failure: Option<String>,
}

impl Scrubs {
    pub(super) fn new(shared: &Shared<Volume>, backings: &Backings) -> io::Result<Self> {
        Ok(Self {
            volume: Arc::clone(&shared.target),
            descriptors: backings.descriptors()?,
            files: backings.files(0),
            log: shared.log.clone(),
            last: Mutex::new(None),
        })
    }

    fn last(&self) -> MutexGuard<'_, Option<Pass>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a pass, if none is under way.
    pub(super) fn start(&self, rate: Option<NonZeroU64>) -> Value {
        self.try_start(rate).map_or_else(|failure| failed(&failure), |()| self.status())
    }

    fn try_start(&self, rate: Option<NonZeroU64>) -> Outcome {
        let mut last = self.last();
        if let Some(pass) = last.as_ref().filter(|pass| pass.ended.get().is_none()) {
            let message = format_args!("{}: `--status` shows it, `--stop` ends it", pass.status().summary());
            return Err(Failure::new(Exit::Busy, message));
        }
        Available::here(Purpose::New).refuse_less_than(MEMORY, "begin the pass when there is more")?;
        // Its number runs on as far as the volume can tell.
        let before = last.as_ref().map(|pass| pass.control.in_superblock()).or_else(|| self.volume.last_scrub());
        let number = before.map_or(0, |scrub| scrub.pass) + 1;
        let begins = Scrub { pass: number, begun_seconds: now(), ..Scrub::default() };
        *last = Some(self.spawn(begins, rate).doing("can't start the thread of the pass")?);
        Ok(())
    }

    /// Goes on with a pass that was under way when the volume was last open.
    pub(super) fn go_on(&self) {
        let from = self.volume.last_scrub();
        if let Some(from) = from.filter(|from| matches!(from.state, ScrubState::Running | ScrubState::Paused)) {
            // Somebody can begin another, if that fails.
            *self.last() = self.spawn(from, None).ok();
        }
    }

    fn spawn(&self, from: Scrub, rate: Option<NonZeroU64>) -> io::Result<Pass> {
        let descriptors: Vec<_> = self.descriptors.iter().map(OwnedFd::try_clone).collect::<io::Result<_>>()?;
        let (volume, files, log) = (Arc::clone(&self.volume), self.files, self.log.clone());
        let pass = Pass { control: Arc::new(ScrubControl::new(from, rate)), ended: Arc::default() };
        let its = Pass { control: Arc::clone(&pass.control), ended: Arc::clone(&pass.ended) };
        let (ready, started) = mpsc::channel();
        named("scrub").spawn(move || {
            yield_disk();
            // A ring belongs to the thread that made it.
            let ring = match OwnRing::new(descriptors) {
                Ok(ring) => ring,
                Err(e) => return drop(ready.send(Err(e))),
            };
            let _ = ready.send(Ok(()));
            let mut findings = 0;
            let tell = |finding| {
                findings += 1;
                if findings <= TOLD {
                    log.tell(Event::Scrub(finding));
                }
            };
            let done = ring.block_on(volume.scrub(&ring.storage(files), &its.control, tell));
            drop(ring);
            its.control.ended_at(now());
            volume.note_scrub(its.control.in_superblock());
            let _ = its.ended.set(Ended { failure: done.err().map(|e| plain(&e)) });
            log.tell(Event::ScrubEnded(its.status().summary(), findings.saturating_sub(TOLD)));
        })?;
        started.recv().unwrap_or_else(|_| Err(io::Error::other("the thread died")))?;
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
        let turned = self.last().as_ref().is_some_and(|pass| turn(&pass.control));
        if turned {
            return self.status();
        }
        let summary = self.known().summary();
        failed(&Failure::new(Exit::Arguments, format_args!("no pass over this device is {wanted}: {summary}")))
    }

    fn known(&self) -> ScrubStatus {
        let last = self.last();
        match (&*last, self.volume.last_scrub()) {
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
    fn status(&self) -> ScrubStatus {
        let ended = self.ended.get();
        ScrubStatus {
            under_way: ended.is_none(),
            failure: ended.and_then(|ended| ended.failure.clone()),
            report: self.control.report(),
        }
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

//! Telling the anchor how far the log has got, while a volume is served.

use super::{
    Anchor, AnchorError, AnchorNote, KeyAreaStep,
    exchange::{self, Change},
};
use crate::{
    AnchorLoss, Latched, RequestContext, Seq, Storage, Volume,
    crypto::keys::AnchorKey,
    format::{AnchorBody, AnchorState, KeyAreaMark},
};
use serde::Serialize;

/// Tells the anchor of an open volume how far its log has got. One thread has it.
pub struct AnchorKeeper {
    key: AnchorKey,
    /// What the anchor holds.
    held: AnchorBody,
    /// What was sent to it, and may be there or may come yet: until that is known nothing else is.
    under_way: Option<AnchorBody>,
    /// All numbers up to this one are covered, and none is left out.
    covered: Option<Seq>,
}

/// What a tick has done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ticked {
    /// The anchor holds all that was answered before the tick began.
    Anchored,
    /// The same, and it did before: nothing was written.
    Idle,
    /// The log had no room to say all that was durable: some of that is not covered yet. A later tick will.
    Partly,
}

/// Why the anchor could not be told.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// The anchor's doing. [`Away`](AnchorError::Away) may pass, and a [`KeyArea`](AnchorError::KeyArea) concerns who has asked; all else
    /// has made the volume read-only.
    #[error(transparent)]
    Anchor(AnchorError),
    /// The volume is read-only.
    #[error("{0}")]
    Latched(Latched),
}

/// What an anchor holds, for people.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct AnchorStatus {
    /// "serving", "moving" or "moved_away".
    pub state: &'static str,
    /// One more with every write.
    pub generation: u64,
    /// Number of the next log record: all before it are covered.
    pub record: u64,
    /// When it was written, in seconds since 1970.
    pub written_seconds: u64,
    /// By which host.
    pub host: String,
    /// How often an older state was accepted, on purpose.
    pub resets: u64,
    /// When that was last, in seconds since 1970; 0: never.
    pub reset_seconds: u64,
    /// The key area's generation, where the volume has one and the anchor asks for it.
    pub key_area_generation: Option<u64>,
    /// That of the area which a change of the slots has begun to write, and has not ended.
    pub next_key_area_generation: Option<u64>,
}

impl AnchorStatus {
    pub(super) fn of(body: &AnchorBody) -> Self {
        Self {
            state: match body.state {
                AnchorState::Serving => "serving",
                AnchorState::Moving => "moving",
                AnchorState::MovedAway => "moved_away",
            },
            generation: body.generation,
            record: body.point.number.0,
            written_seconds: body.written_seconds,
            host: body.host.to_string(),
            resets: body.resets,
            reset_seconds: body.reset_seconds,
            key_area_generation: body.key_area.map(|area| area.generation),
            next_key_area_generation: body.next_key_area.map(|area| area.generation),
        }
    }
}

impl AnchorKeeper {
    pub(super) fn new(key: AnchorKey, held: AnchorBody) -> Self {
        // Nothing has been written since the commit.
        Self { key, held, under_way: None, covered: Some(Seq(0)) }
    }

    /// What the anchor holds, as far as is known.
    pub fn status(&self) -> AnchorStatus {
        AnchorStatus::of(&self.held)
    }

    /// Has the anchor cover all that was answered before: a flush, its entry in a durable record, then the point behind that. Like a
    /// flush it may wait for writes and for the checkpoint; no request waits for it. An anchor that was taken over makes the
    /// volume read-only. Where one can't be told and a [held flush](Self::holds_a_flush) waits for that, whoever calls this tries again,
    /// and gives up in the end ([`Volume::latch_for_anchor`]): it must not be answered, nor wait on. `context` is for this alone.
    pub async fn tick<S: Storage, A: Anchor>(
        &mut self,
        (volume, io): (&Volume, &S),
        context: &mut RequestContext,
        (anchor, note): (&A, &AnchorNote),
    ) -> Result<Ticked, KeepError> {
        if let Some(why) = volume.latched() {
            return Err(KeepError::Latched(why));
        }
        let round = volume.log().begin_round();
        let ticked = self.cover((volume, io), context, (anchor, note)).await;
        if matches!(ticked, Ok(Ticked::Anchored | Ticked::Idle)) {
            volume.log().end_round(round);
        }
        ticked
    }

    async fn cover<S: Storage, A: Anchor>(
        &mut self,
        (volume, io): (&Volume, &S),
        context: &mut RequestContext,
        (anchor, note): (&A, &AnchorNote),
    ) -> Result<Ticked, KeepError> {
        self.settle(volume, anchor).await?;
        let recorded = volume.record_flush(io, context, self.covered).await.map_err(KeepError::Latched)?;
        let Some(recorded) = recorded else { return Ok(Ticked::Idle) };
        let body = self.held.at(recorded.point, volume.epoch(), note);
        self.send(volume, anchor, body).await?;
        self.covered = recorded.all_up_to;
        Ok(if recorded.is_cut { Ticked::Partly } else { Ticked::Anchored })
    }

    /// From now on no flush of this volume is answered that the anchor does not cover. Whoever calls this goes on to
    /// [tick](Self::tick) whenever a [flush waits](Self::flush_waits).
    pub fn hold_flushes(&self, volume: &Volume) {
        volume.log().hold_flushes();
    }

    /// Waits until a held flush waits for a tick, or the volume is latched. `context` is that of the ticks.
    pub async fn flush_waits(&self, volume: &Volume, context: &RequestContext) {
        volume.log().flush_held(context.id).await;
    }

    /// Whether one does.
    pub fn holds_a_flush(&self, volume: &Volume) -> bool {
        volume.log().holds_a_flush()
    }

    /// Asks whether the volume is still this host's: while nothing is written, no tick finds out. One that was taken over becomes
    /// read-only, so that its orderly end leaves the superblocks alone.
    pub async fn look<A: Anchor>(&mut self, volume: &Volume, anchor: &A) -> Result<(), KeepError> {
        self.settle(volume, anchor).await?;
        let held = exchange::confirm(anchor, &self.key, &self.held).await;
        Self::heard(volume, &held);
        held.map_err(KeepError::Anchor)
    }

    /// A step of a change of the key area: the anchor must permit the one that lies there. Nothing is written to the volume.
    pub async fn keep_key_area<A: Anchor>(
        &mut self,
        volume: &Volume,
        (anchor, note): (&A, &AnchorNote),
        step: (KeyAreaMark, KeyAreaStep),
    ) -> Result<(), KeepError> {
        if let Some(why) = volume.latched() {
            return Err(KeepError::Latched(why));
        }
        self.settle(volume, anchor).await?;
        match self.held.with_key_area(step, note).map_err(KeepError::Anchor)? {
            Some(body) => self.send(volume, anchor, body).await,
            None => Ok(()),
        }
    }

    /// The last point of a volume that has been [closed](Volume::close): not one record of it may be missing later.
    pub async fn finish<A: Anchor>(
        &mut self,
        volume: &Volume,
        (anchor, note): (&A, &AnchorNote),
    ) -> Result<(), KeepError> {
        match volume.latched() {
            None | Some(Latched::Closed) => {}
            Some(why) => return Err(KeepError::Latched(why)),
        }
        self.settle(volume, anchor).await?;
        let end = volume.log().durable_point();
        if (end.number, end.link) == (self.held.point.number, self.held.point.link) {
            return Ok(());
        }
        let body = self.held.at(end, volume.epoch(), note);
        self.send(volume, anchor, body).await
    }

    /// What was sent and not answered is sent again, the same: another body of the same generation could not be told from
    /// somebody else's when the first arrives after all.
    async fn settle<A: Anchor>(&mut self, volume: &Volume, anchor: &A) -> Result<(), KeepError> {
        match self.under_way {
            Some(body) => self.send(volume, anchor, body).await,
            None => Ok(()),
        }
    }

    async fn send<A: Anchor>(&mut self, volume: &Volume, anchor: &A, body: AnchorBody) -> Result<(), KeepError> {
        let is_again = self.under_way.replace(body).is_some();
        let (bytes, expected) = (body.seal(&self.key), self.held.generation);
        let change = Change { volume: &body.uuid, expected, bytes, is_again };
        let sent = exchange::replace(anchor, &self.key, change).await;
        if sent.is_ok() {
            (self.held, self.under_way) = (body, None);
        }
        Self::heard(volume, &sent);
        sent.map_err(KeepError::Anchor)
    }

    /// Only an anchor that does not answer may be as it was.
    fn heard(volume: &Volume, answer: &Result<(), AnchorError>) {
        match answer {
            Ok(()) | Err(AnchorError::Away(_)) => {}
            // That may be all that is ever said of what the volume has lost there.
            Err(AnchorError::Device(e)) => volume.log().latch(Latched::Device(*e)),
            Err(_) => volume.latch_for_anchor(AnchorLoss::Taken),
        }
    }
}

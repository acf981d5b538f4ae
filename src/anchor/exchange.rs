//! Asking an anchor, and telling it: what becomes of an answer that does not come.

use super::{Anchor, AnchorBytes, AnchorError, Beginning, Held, Replaced, era, generation};
use crate::{crypto::keys::AnchorKey, format::AnchorBody};

/// How often a change is asked for whose fate is not known, in one go.
const TRIES: usize = 3;

/// What the anchor holds of this volume, as bytes.
pub(super) async fn load<A: Anchor>(anchor: &A, volume: &[u8; 16]) -> Result<Held, AnchorError> {
    anchor.load(volume).await.map_err(AnchorError::Away)
}

/// The body that an anchor speaks of a volume with, which must be there.
pub(super) fn whole(held: &Held, key: &AnchorKey, volume: &[u8; 16]) -> Result<AnchorBody, AnchorError> {
    match held {
        Held::Nothing => Err(AnchorError::Absent),
        Held::Body(bytes) | Held::Prepared(bytes) => Ok(AnchorBody::verify(bytes, key, volume)?),
        Held::Bare { value, .. } => Err(AnchorError::bare(*value, older(held, key, volume).as_ref())),
    }
}

/// The newest body that is there in the place of the one that a counter asks for.
pub(super) fn older(held: &Held, key: &AnchorKey, volume: &[u8; 16]) -> Option<AnchorBody> {
    let Held::Bare { older, .. } = held else { return None };
    AnchorBody::verify(older.as_ref()?, key, volume).ok()
}

/// A change of what the anchor holds.
pub(super) struct Change<'a> {
    pub(super) volume: &'a [u8; 16],
    /// The generation that counts before it.
    pub(super) expected: u64,
    pub(super) bytes: AnchorBytes,
    /// Whether this was asked for before, and no answer came.
    pub(super) is_again: bool,
}

/// Has the anchor hold `body` in the place of the one with generation `expected`.
///
/// An answer that does not come says nothing. Then the anchor is asked: where it has this very body all is well, and where it
/// has the one of before this one is sent again, the same. Another body is somebody else's. A request that arrives late
/// finds another generation, and does nothing.
///
/// A conflict is not of our making where nothing of it can be under way. A counter's value would not tell.
pub(super) async fn replace<A: Anchor>(anchor: &A, key: &AnchorKey, change: Change<'_>) -> Result<(), AnchorError> {
    let Change { volume, expected, bytes, mut is_again } = change;
    let mut last = String::new();
    for _ in 0..TRIES {
        match anchor.replace(volume, expected, &bytes).await {
            Replaced::Done => return Ok(()),
            Replaced::Conflict => {}
            Replaced::Unknown(why) => (last, is_again) = (why, true),
            Replaced::Failed(e) => return Err(AnchorError::Device(e)),
        }
        let there = load(anchor, volume).await?;
        if is_again && there == Held::Body(bytes) {
            return Ok(());
        }
        if there.counted() != expected || is_other_counter(anchor, volume, era(&bytes)).await? {
            return Err(somebody_else(&there, key, volume));
        }
    }
    // No agent should do that: one that has been downgraded, whose counters have eras, does.
    let refused = || "it does not take the next body".to_owned();
    Err(AnchorError::Away(if last.is_empty() { refused() } else { last }))
}

/// Whether the anchor still holds `body`. Of a counter only its value says so: where the body has gone from the disk, the next one
/// takes its place.
pub(super) async fn confirm<A: Anchor>(anchor: &A, key: &AnchorKey, body: &AnchorBody) -> Result<(), AnchorError> {
    let there = load(anchor, &body.uuid).await?;
    let is_ours = match anchor.is_counter() {
        true => there.counted() == body.generation && !is_other_counter(anchor, &body.uuid, body.era).await?,
        false => there == Held::Body(body.seal(key)),
    };
    if is_ours { Ok(()) } else { Err(somebody_else(&there, key, &body.uuid)) }
}

/// Whether another counter has taken the place of the one that this era is of. It may have come to the same value. Where the agent is
/// one of before there were eras nothing tells.
async fn is_other_counter<A: Anchor>(anchor: &A, volume: &[u8; 16], era: u64) -> Result<bool, AnchorError> {
    if !anchor.is_counter() {
        return Ok(false);
    }
    let now = anchor.era(volume).await.map_err(AnchorError::Away)?;
    Ok(now != 0 && now != era)
}

/// Who has changed what the anchor holds, as far as it can be told.
fn somebody_else(there: &Held, key: &AnchorKey, volume: &[u8; 16]) -> AnchorError {
    match whole(there, key, volume) {
        Ok(other) => AnchorError::taken(&other),
        // A host that has another disk, or a copy of this one, writes its bodies there.
        Err(AnchorError::Bare { .. }) => AnchorError::Taken { host: String::new(), seconds: 0 },
        Err(e) => e,
    }
}

/// Has the anchor count the body with this generation, which is prepared.
pub(super) async fn forward<A: Anchor>(anchor: &A, volume: &[u8; 16], prepared: u64) -> Result<(), AnchorError> {
    let mut last = String::new();
    for _ in 0..TRIES {
        match anchor.forward(volume, prepared).await {
            Replaced::Done => return Ok(()),
            Replaced::Conflict => {}
            Replaced::Unknown(why) => last = why,
            Replaced::Failed(e) => return Err(AnchorError::Device(e)),
        }
        match load(anchor, volume).await? {
            // Whoever has counted it: it counts.
            Held::Body(body) if generation(Some(&body)) == prepared => return Ok(()),
            held if held.counted().saturating_add(1) == prepared => {}
            _ => return Err(AnchorError::Taken { host: String::new(), seconds: 0 }),
        }
    }
    Err(AnchorError::Away(last))
}

/// Where the first body goes, or the first after all that there were.
pub(super) async fn begin<A: Anchor>(
    anchor: &A,
    volume: &[u8; 16],
    held: &Held,
    above: u64,
) -> Result<Beginning, AnchorError> {
    anchor.begin(volume, held, above).await.map_err(AnchorError::Away)
}

//! Asking an anchor, and telling it: what becomes of an answer that does not come.

use super::{Anchor, AnchorBytes, AnchorError, Replaced, generation};
use crate::{crypto::keys::AnchorKey, format::AnchorBody};

/// How often a body is sent whose fate is not known, in one go.
const TRIES: usize = 3;

/// What the anchor holds of this volume, as bytes.
pub(super) async fn load<A: Anchor>(anchor: &A, volume: &[u8; 16]) -> Result<Option<AnchorBytes>, AnchorError> {
    anchor.load(volume).await.map_err(AnchorError::Away)
}

/// Has the anchor hold `body` in the place of the one with generation `expected`.
///
/// An answer that does not come says nothing. Then the anchor is asked: where it has this very body all is well, and where it
/// has the one of before this one is sent again, the same. Another body is somebody else's. A request that arrives late
/// finds another generation, and does nothing.
pub(super) async fn replace<A: Anchor>(
    anchor: &A,
    key: &AnchorKey,
    expected: u64,
    body: &AnchorBody,
) -> Result<(), AnchorError> {
    let bytes = body.seal(key);
    let mut last = String::new();
    for _ in 0..TRIES {
        match anchor.replace(&body.uuid, expected, &bytes).await {
            Replaced::Done => return Ok(()),
            Replaced::Conflict => {}
            Replaced::Unknown(why) => last = why,
        }
        let there = load(anchor, &body.uuid).await?;
        if there == Some(bytes) {
            return Ok(());
        }
        if generation(there.as_ref()) != expected {
            return Err(other(there, key, &body.uuid));
        }
    }
    Err(AnchorError::Away(last))
}

/// Whether the anchor still holds `body`.
pub(super) async fn confirm<A: Anchor>(anchor: &A, key: &AnchorKey, body: &AnchorBody) -> Result<(), AnchorError> {
    let there = load(anchor, &body.uuid).await?;
    if there == Some(body.seal(key)) { Ok(()) } else { Err(other(there, key, &body.uuid)) }
}

/// What the anchor holds in the place of our body.
fn other(there: Option<AnchorBytes>, key: &AnchorKey, uuid: &[u8; 16]) -> AnchorError {
    match there.map(|bytes| AnchorBody::verify(&bytes, key, uuid)) {
        None => AnchorError::Absent,
        Some(Err(e)) => e.into(),
        Some(Ok(other)) => AnchorError::taken(&other),
    }
}

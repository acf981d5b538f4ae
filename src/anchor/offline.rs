//! What is done with the anchor of a volume that nobody serves.

use super::{
    Anchor, AnchorError, AnchorNote, AnchorStatus, Held, KeyAreaStep,
    exchange::{self, Change},
    opening::in_use,
};
use crate::{
    crypto::keys::AnchorKey,
    format::{AnchorBody, KeyAreaMark},
};

/// Why a move could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MoveError {
    /// The anchor of before. Nothing was done.
    #[error("{0}")]
    From(AnchorError),
    /// The new one. Nothing was done, unless [`Away`](AnchorError::Away): then it may come to hold the state.
    #[error("the new anchor: {0}")]
    To(AnchorError),
    /// The anchor of before could not be told that it is left: both hold the state now.
    #[error("the new anchor holds the state, and the one of before was not told: {0}")]
    Both(AnchorError),
    /// Nothing was done.
    #[error(
        "both anchors are counters, whose bodies would lie in the same place of the disk: move to a file first, and from there"
    )]
    Counters,
}

/// What an anchor holds of the volume with this UUID.
pub(crate) async fn show<A: Anchor>(anchor: &A, key: &AnchorKey, uuid: &[u8; 16]) -> Result<AnchorStatus, AnchorError> {
    let there = exchange::load(anchor, uuid).await?;
    Ok(AnchorStatus::of(&exchange::whole(&there, key, uuid)?))
}

/// A step of a change of the key area of a volume that nobody serves: the anchor must permit the one that lies there. An open that was
/// cut short stays where it was.
pub(crate) async fn keep_key_area<A: Anchor>(
    (anchor, note): (&A, &AnchorNote),
    (key, uuid): (&AnchorKey, &[u8; 16]),
    step: (KeyAreaMark, KeyAreaStep),
) -> Result<(), AnchorError> {
    let there = exchange::load(anchor, uuid).await?;
    let held = exchange::whole(&there, key, uuid).and_then(in_use)?;
    let body = held.with_key_area(step, note)?;
    let Some(body) = body else { return Ok(()) };
    if let Held::Prepared(_) = there {
        // What was begun is ended first: else two bodies would have one generation.
        exchange::forward(anchor, uuid, held.generation).await?;
    }
    put(anchor, key, held.generation, &body).await
}

/// Moves what an anchor holds to another place. The new one first, then the old one says that it was moved away: cut short in
/// between both are there, and the volume's configuration says which counts. Nobody may have the volume open.
pub(crate) async fn move_to<A: Anchor, B: Anchor>(
    (from, to): (&A, &B),
    key: &AnchorKey,
    uuid: &[u8; 16],
    note: &AnchorNote,
) -> Result<AnchorStatus, MoveError> {
    let there = exchange::load(from, uuid).await.map_err(MoveError::From)?;
    let held = exchange::whole(&there, key, uuid).and_then(in_use).map_err(MoveError::From)?;
    if from.is_counter() && to.is_counter() {
        return Err(MoveError::Counters);
    }
    let room = room_in(to, key, uuid).await.map_err(MoveError::To)?;
    let beginning = exchange::begin(to, uuid, &room, held.generation).await.map_err(MoveError::To)?;
    let moved = AnchorBody { generation: beginning.generation, era: beginning.era, ..held };
    put(to, key, beginning.expected, &moved).await.map_err(MoveError::To)?;
    let end = exchange::begin(from, uuid, &there, 0).await.map_err(MoveError::Both)?;
    let gone = AnchorBody { generation: end.generation, era: end.era, ..held.moved_away(note) };
    put(from, key, end.expected, &gone).await.map_err(MoveError::Both)?;
    Ok(AnchorStatus::of(&moved))
}

/// What a place holds that nobody goes by.
async fn room_in<A: Anchor>(to: &A, key: &AnchorKey, uuid: &[u8; 16]) -> Result<Held, AnchorError> {
    let there = exchange::load(to, uuid).await?;
    match exchange::whole(&there, key, uuid) {
        Err(AnchorError::Absent) => Ok(there),
        Err(e) => Err(e),
        Ok(other) => match in_use(other) {
            // Left by an earlier move.
            Err(_) => Ok(there),
            Ok(_) => {
                let (generation, host) = (other.generation, other.host.to_string());
                Err(AnchorError::Present { generation, host, seconds: other.written_seconds })
            }
        },
    }
}

/// In the place of what has this generation.
async fn put<A: Anchor>(anchor: &A, key: &AnchorKey, expected: u64, body: &AnchorBody) -> Result<(), AnchorError> {
    let bytes = body.seal(key);
    exchange::replace(anchor, key, Change { volume: &body.uuid, expected, bytes, is_again: false }).await
}

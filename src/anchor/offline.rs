//! What is done with the anchor of a volume that nobody serves.

use super::{Anchor, AnchorError, AnchorNote, AnchorStatus, exchange, opening::in_use};
use crate::{crypto::keys::AnchorKey, format::AnchorBody};

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
}

/// What an anchor holds of the volume with this UUID.
pub(crate) async fn show<A: Anchor>(anchor: &A, key: &AnchorKey, uuid: &[u8; 16]) -> Result<AnchorStatus, AnchorError> {
    let there = exchange::load(anchor, uuid).await?.ok_or(AnchorError::Absent)?;
    Ok(AnchorStatus::of(&AnchorBody::verify(&there, key, uuid)?))
}

/// Moves what an anchor holds to another place. The new one first, then the old one says that it was moved away: cut short in
/// between both are there, and the volume's configuration says which counts. Nobody may have the volume open.
pub(crate) async fn move_to<A: Anchor, B: Anchor>(
    (from, to): (&A, &B),
    key: &AnchorKey,
    uuid: &[u8; 16],
    note: &AnchorNote,
) -> Result<AnchorStatus, MoveError> {
    let there =
        exchange::load(from, uuid).await.map_err(MoveError::From)?.ok_or(MoveError::From(AnchorError::Absent))?;
    let verified = AnchorBody::verify(&there, key, uuid).map_err(AnchorError::from);
    let held = verified.and_then(in_use).map_err(MoveError::From)?;
    let room = exchange::load(to, uuid).await.map_err(MoveError::To)?;
    let expected = match room.map(|bytes| AnchorBody::verify(&bytes, key, uuid)) {
        None => 0,
        Some(Err(e)) => return Err(MoveError::To(e.into())),
        Some(Ok(other)) => match in_use(other) {
            // Left by an earlier move.
            Err(_) => other.generation,
            Ok(_) => {
                let (generation, host) = (other.generation, other.host.to_string());
                let present = AnchorError::Present { generation, host, seconds: other.written_seconds };
                return Err(MoveError::To(present));
            }
        },
    };
    let generation = held.generation.max(expected) + 1;
    let moved = AnchorBody { generation, ..held };
    exchange::replace(to, key, expected, &moved).await.map_err(MoveError::To)?;
    let gone = held.moved_away(note);
    exchange::replace(from, key, held.generation, &gone).await.map_err(MoveError::Both)?;
    Ok(AnchorStatus::of(&moved))
}

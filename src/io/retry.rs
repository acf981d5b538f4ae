//! Reading again what a device has failed to read.

use crate::Storage;
use std::time::Duration;

/// How often something is read, and how long to wait before it is read again.
#[derive(Clone, Copy)]
pub(crate) struct Tries {
    pub(crate) most: u32,
    pub(crate) pause: Duration,
}

/// For what can be had elsewhere, or be asked for again: a path that fails over within a moment is
/// not noticed.
pub(crate) const READ: Tries = Tries { most: 3, pause: Duration::from_millis(100) };

/// For a block whose write has failed: what lies there decides whether the volume latches.
pub(crate) const READ_BACK: Tries = Tries { most: 5, pause: Duration::from_millis(200) };

/// Does `attempt` until it succeeds, or fails for the last time.
pub(crate) async fn retry<S: Storage, T, E>(
    io: &S,
    tries: Tries,
    mut attempt: impl AsyncFnMut() -> Result<T, E>,
) -> Result<T, E> {
    for _ in 1..tries.most {
        match attempt().await {
            Err(_) => {
                let _ = io.sleep(tries.pause).await;
            }
            done => return done,
        }
    }
    attempt().await
}

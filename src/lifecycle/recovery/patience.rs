//! How long an open bears with devices that fail: bounded for the whole of it, not for each block.

use crate::{
    DeviceError, Errno, Storage,
    lifecycle::open_error::OpenError,
    metadata::lookup::{READ_PAUSE, READ_TRIES},
};
use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    task::Poll,
    time::Duration,
};

/// Pauses before something is read again, in all of an open: 40 × 100 ms. A path that fails over is worth waiting for; a
/// device with many bad sectors is not worth waiting for at each of them.
const PAUSES: u32 = 40;
/// How long an open goes on after a first error when not one read of that device succeeds.
const AWAY_AFTER: Duration = Duration::from_secs(10);
/// So many blocks in a row that can't be read mean the same at once.
const AWAY_FAILURES: u32 = 64;

/// What is left of it, for one device.
pub(crate) struct Patience<S: Storage> {
    pauses: u32,
    /// Reads that have failed, each after its last try, since one succeeded.
    failures: u32,
    first: Option<DeviceError>,
    /// Ends [`AWAY_AFTER`] the first error since a read succeeded.
    deadline: Option<Pin<Box<S::Command>>>,
}

impl<S: Storage> Patience<S> {
    pub(crate) fn new() -> Self {
        Self { pauses: PAUSES, failures: 0, first: None, deadline: None }
    }

    /// Does `attempt` until it succeeds, a few times with pauses in between, while there is patience left.
    pub(crate) async fn tries<B>(
        &mut self,
        io: &S,
        error: impl Fn(Errno) -> DeviceError,
        mut buf: B,
        attempt: impl AsyncFn(B) -> (Result<(), Errno>, B),
    ) -> Result<(Result<(), DeviceError>, B), OpenError> {
        let mut tries = 1;
        loop {
            let result;
            (result, buf) = self.within(attempt(buf)).await?;
            let Err(errno) = result else {
                self.succeeded();
                return Ok((Ok(()), buf));
            };
            let why = error(errno);
            self.failed(io, why);
            if tries == READ_TRIES || !self.pause(io).await? {
                return self.give_up().map(|()| (Err(why), buf));
            }
            tries += 1;
        }
    }

    /// Waits for `operation`, but not beyond the deadline.
    pub(crate) async fn within<T>(&mut self, operation: impl Future<Output = T>) -> Result<T, OpenError> {
        let mut operation = pin!(operation);
        poll_fn(|cx| match (operation.as_mut().poll(cx), &mut self.deadline) {
            (Poll::Ready(done), _) => Poll::Ready(Ok(done)),
            (Poll::Pending, None) => Poll::Pending,
            (Poll::Pending, Some(deadline)) => deadline.as_mut().poll(cx).map(|_| Err(away(self.first))),
        })
        .await
    }

    pub(crate) fn succeeded(&mut self) {
        (self.failures, self.first, self.deadline) = (0, None, None);
    }

    /// One try has failed.
    pub(crate) fn failed(&mut self, io: &S, why: DeviceError) {
        self.first.get_or_insert(why);
        self.deadline.get_or_insert_with(|| Box::pin(io.sleep(AWAY_AFTER)));
    }

    /// The last try of one read has failed.
    pub(crate) fn give_up(&mut self) -> Result<(), OpenError> {
        self.failures += 1;
        if self.failures > AWAY_FAILURES { Err(away(self.first)) } else { Ok(()) }
    }

    /// Waits a moment; `false` once there is no patience left.
    pub(crate) async fn pause(&mut self, io: &S) -> Result<bool, OpenError> {
        let Some(left) = self.pauses.checked_sub(1) else { return Ok(false) };
        self.pauses = left;
        let _ = self.within(io.sleep(READ_PAUSE)).await?;
        Ok(true)
    }
}

fn away(first: Option<DeviceError>) -> OpenError {
    OpenError::Away(first.expect("the deadline begins with an error"))
}

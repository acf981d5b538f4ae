//! How long an open bears with devices that fail: bounded for the whole of it, not for each block.
//!
//! A device is *away* when no read of it succeeds any more. From reads that fail alone that can't be told: all of them may
//! lie on one bad part of a device that is there. So before a device is said to be away, places of it are read that could be
//! read before (a *probe*). Where one answers, the open goes on, without pauses for what can't be read.

use crate::{
    Buf, ByteOffset, Device, DeviceError, Errno, Storage,
    format::{Layout, PAGE_BYTES},
    lifecycle::open_error::OpenError,
    metadata::lookup::{READ_PAUSE, READ_TRIES},
};
use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    task::{Context, Poll, Waker},
    time::Duration,
};

/// Pauses before something is read again, in all of an open: 40 × 100 ms. A path that fails over is worth waiting for; a
/// device with many bad sectors is not worth waiting for at each of them.
const PAUSES: u32 = 40;
/// How long after a first error, with no read of that device that succeeds, it is probed.
const PROBE_AFTER: Duration = Duration::from_secs(8);
/// So many reads in a row that fail have it probed at once.
const PROBE_AFTER_FAILURES: u32 = 64;
/// How long an open goes on to try what may fail, from the first failure on: each may cost seconds.
const ENOUGH: Duration = Duration::from_secs(60);

/// What an open does with places that can't be read, when those before have taken long.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effort {
    /// The rest counts as unreadable and is not read: nothing is decided by that.
    Bounded,
    /// All are tried, however long it takes: what can't be read is given up for good, or left out of a rescue.
    Thorough,
}

impl Effort {
    /// How long a probe may take. An open says within 10 s of the first error that a device is away. A disk that is busy with
    /// a bad sector may be silent for longer: who wants all that can be had waits until Linux gives that sector up (30 s).
    fn probe_time(self) -> Duration {
        Duration::from_secs(if self == Self::Bounded { 2 } else { 40 })
    }
}

/// What is left of it, for one device.
pub(crate) struct Patience<S: Storage> {
    device: Device,
    effort: Effort,
    /// Pages of the device that could be read earlier in the open, and the last place that could.
    known: Vec<ByteOffset>,
    last: Option<(ByteOffset, usize)>,
    pauses: u32,
    /// Reads that have failed, each after its last try, since one succeeded.
    failures: u32,
    /// Since the first error after the last read that succeeded.
    failing: Option<Failing<S>>,
    bad_time: BadTime<S>,
}

/// A device that has given nothing but errors for a while.
struct Failing<S: Storage> {
    first: DeviceError,
    /// Ends [`PROBE_AFTER`] that.
    deadline: Pin<Box<S::Command>>,
}

/// The time in which what fails is tried: [`ENOUGH`] from the first failure of all.
enum BadTime<S: Storage> {
    NotBegun,
    Passing(Pin<Box<S::Command>>),
    Over,
}

impl<S: Storage> Patience<S> {
    pub(crate) fn new(device: Device, layout: &Layout, effort: Effort) -> Self {
        let known = match device {
            Device::Data if layout.separate_meta => vec![Layout::identity_offset()],
            _ => Layout::superblock_offsets().to_vec(),
        };
        Self {
            device,
            effort,
            known,
            last: None,
            pauses: PAUSES,
            failures: 0,
            failing: None,
            bad_time: BadTime::NotBegun,
        }
    }

    /// Does `attempt`, which reads `len` bytes at `at`, until it succeeds, a few times with pauses in between, while there is
    /// patience left.
    pub(crate) async fn tries<B>(
        &mut self,
        io: &S,
        (at, len): (ByteOffset, usize),
        mut buf: B,
        attempt: impl AsyncFn(B) -> (Result<(), Errno>, B),
    ) -> Result<(Result<(), DeviceError>, B), OpenError> {
        let mut tries = 1;
        loop {
            let result;
            (result, buf) = self.within(io, attempt(buf)).await?;
            let Err(errno) = result else {
                self.succeeded(Some((at, len)));
                return Ok((Ok(()), buf));
            };
            let why = DeviceError::new("read", self.device, at, len, errno);
            self.failed(io, why);
            if tries == READ_TRIES || !self.pause(io).await? {
                return self.give_up(io).await.map(|()| (Err(why), buf));
            }
            tries += 1;
        }
    }

    /// Waits for `operation`, as long as the device answers.
    pub(crate) async fn within<T>(&mut self, io: &S, operation: impl Future<Output = T>) -> Result<T, OpenError> {
        let mut operation = pin!(operation);
        loop {
            let failing = &mut self.failing;
            let ended = poll_fn(|cx| match (operation.as_mut().poll(cx), &mut *failing) {
                (Poll::Ready(done), _) => Poll::Ready(Some(done)),
                (Poll::Pending, None) => Poll::Pending,
                (Poll::Pending, Some(failing)) => failing.deadline.as_mut().poll(cx).map(|_| None),
            });
            match ended.await {
                Some(done) => return Ok(done),
                // The time may have passed with reads of the other device.
                None => self.probe(io).await?,
            }
        }
    }

    /// A read has succeeded, of these bytes where they are known.
    pub(crate) fn succeeded(&mut self, place: Option<(ByteOffset, usize)>) {
        self.last = place.or(self.last);
        (self.failures, self.failing) = (0, None);
    }

    /// One try has failed.
    pub(crate) fn failed(&mut self, io: &S, why: DeviceError) {
        self.failing.get_or_insert_with(|| Failing { first: why, deadline: Box::pin(io.sleep(PROBE_AFTER)) });
        if let BadTime::NotBegun = self.bad_time {
            self.bad_time = BadTime::Passing(Box::pin(io.sleep(ENOUGH)));
        }
    }

    /// The last try of one read has failed.
    pub(crate) async fn give_up(&mut self, io: &S) -> Result<(), OpenError> {
        self.failures += 1;
        if self.failures > PROBE_AFTER_FAILURES { self.probe(io).await } else { Ok(()) }
    }

    /// Whether failures have taken so long that the rest is not tried.
    pub(crate) fn has_had_enough(&mut self) -> bool {
        if let BadTime::Passing(time) = &mut self.bad_time {
            if time.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready() {
                self.bad_time = BadTime::Over;
            }
        }
        self.effort == Effort::Bounded && matches!(self.bad_time, BadTime::Over)
    }

    /// Waits a moment; `false` once there is no patience left.
    pub(crate) async fn pause(&mut self, io: &S) -> Result<bool, OpenError> {
        // What is given up for good gets all its tries, without a pause.
        let Some(left) = self.pauses.checked_sub(1) else { return Ok(self.effort == Effort::Thorough) };
        self.pauses = left;
        let _ = self.within(io, io.sleep(READ_PAUSE)).await?;
        Ok(true)
    }

    /// Before something is given up for good: unless a read has succeeded since one failed, asks whether the device is there.
    pub(crate) async fn must_be_there(&mut self, io: &S) -> Result<(), OpenError> {
        if self.failing.is_some() { self.probe(io).await } else { Ok(()) }
    }

    /// Asks whether the device is there at all.
    async fn probe(&mut self, io: &S) -> Result<(), OpenError> {
        let first = self.failing.as_ref().expect("there was an error, or no question").first;
        let pages = self.known.iter().map(|at| (*at, PAGE_BYTES));
        let mut time = Box::pin(io.sleep(self.effort.probe_time()));
        for (at, len) in self.last.into_iter().chain(pages) {
            let mut read = pin!(io.read(self.device, at, Buf::new(len), 0..len));
            let answer = poll_fn(|cx| match read.as_mut().poll(cx) {
                Poll::Ready((result, _)) => Poll::Ready(Some(result)),
                Poll::Pending => time.as_mut().poll(cx).map(|_| None),
            });
            match answer.await {
                Some(Ok(())) => {
                    // What fails now fails for its own sake, and is not worth waiting for.
                    self.succeeded(None);
                    self.pauses = 0;
                    self.failed(io, first);
                    return Ok(());
                }
                Some(Err(_)) => {}
                None => break,
            }
        }
        Err(OpenError::Away(first))
    }
}

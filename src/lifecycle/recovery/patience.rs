//! How long an open bears with devices that fail: bounded for the whole of it, not for each block.
//!
//! A device is *away* when no read of it succeeds any more. From reads that fail alone that can't
//! be told: all of them may lie on one bad part of a device that is there. So after each failure
//! the device is *probed*: a place of it is read that could be read before. The open goes on when
//! one of these reads succeeds, and is refused when none does for a while.
//!
//! A probe is sent only while no other read of the open is under way on that device. A disk that
//! tries for long to read a bad sector answers nothing else meanwhile, and is not away for that.

use crate::{
    Buf, ByteOffset, Device, DeviceError, Errno, Storage,
    format::{Layout, PAGE_BYTES},
    io::retry::READ,
    lifecycle::open_error::OpenError,
};
use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    task::{Context, Poll, Waker},
    time::Duration,
};

/// Pauses before something is read again, in all of an open: 40 × 100 ms. A part that fails over is
/// worth waiting for; a device with many bad sectors is not worth waiting for at each of them.
const PAUSES: u32 = 40;
/// How long an open goes on to try what may fail, from the first failure on: each may cost seconds.
const ENOUGH: Duration = Duration::from_secs(60);

/// What an open does with places that can't be read, when those before have taken long.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effort {
    /// The rest counts as unreadable and is not read: nothing is decided by that.
    Bounded,
    /// All are tried, however long it takes: what can't be read is given up for good, or left out
    /// of a rescue.
    Thorough,
}

impl Effort {
    /// How long a device may answer no probe. An open says within 10 s of the first error that a
    /// device is away. One that is busy with somebody else's bad sector may be silent for longer:
    /// who wants all that can be had waits until Linux gives that sector up (30 s).
    fn away_after(self) -> Duration {
        Duration::from_secs(if self == Self::Bounded { 9 } else { 40 })
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
    bad_time: BadTime<S>,
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
        Self { device, effort, known, last: None, pauses: PAUSES, bad_time: BadTime::NotBegun }
    }

    /// Does `attempt`, which reads `len` bytes at `at`, until it succeeds, a few times with pauses
    /// in between, while there is patience left.
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
            (result, buf) = attempt(buf).await;
            let Err(errno) = result else {
                self.succeeded(at, len);
                return Ok((Ok(()), buf));
            };
            let why = DeviceError::new("read", self.device, at, len, errno);
            self.failed(io, why).await?;
            if tries == READ.most || !self.pause(io).await {
                return Ok((Err(why), buf));
            }
            tries += 1;
        }
    }

    /// A read of these bytes has succeeded.
    pub(crate) fn succeeded(&mut self, at: ByteOffset, len: usize) {
        self.last = Some((at, len));
    }

    /// A read has failed, and none is under way on the device. Returns once the device answers;
    /// fails where it is away.
    pub(crate) async fn failed(&mut self, io: &S, why: DeviceError) -> Result<(), OpenError> {
        if let BadTime::NotBegun = self.bad_time {
            self.bad_time = BadTime::Passing(Box::pin(io.sleep(ENOUGH)));
        }
        let mut answers = pin!(self.answers(io));
        let mut time = pin!(io.sleep(self.effort.away_after()));
        let mut timed = true;
        let answered = poll_fn(|cx| {
            if let Poll::Ready(answered) = answers.as_mut().poll(cx) {
                return Poll::Ready(answered);
            }
            match if timed { time.as_mut().poll(cx) } else { Poll::Pending } {
                Poll::Ready(Ok(())) => return Poll::Ready(false),
                // A clock that fails says nothing: the number of probes is bounded, too.
                Poll::Ready(Err(_)) => timed = false,
                Poll::Pending => {}
            }
            Poll::Pending
        });
        if answered.await { Ok(()) } else { Err(OpenError::Away(why)) }
    }

    /// Probes the device until it answers; not without end.
    async fn answers(&self, io: &S) -> bool {
        let pages = self.known.iter().map(|at| (*at, PAGE_BYTES));
        let last = self.last.map(|(at, len)| (at, len.min(PAGE_BYTES)));
        let places: Vec<_> = last.into_iter().chain(pages).collect();
        for _ in 0..self.effort.away_after().div_duration_f32(READ.pause) as u32 {
            for (at, len) in &places {
                if io.read(self.device, *at, Buf::new(*len), 0..*len).await.0.is_ok() {
                    return true;
                }
            }
            let _ = io.sleep(READ.pause).await;
        }
        false
    }

    /// Whether failures have taken so long that the rest is not tried.
    pub(crate) fn has_had_enough(&mut self) -> bool {
        if let BadTime::Passing(time) = &mut self.bad_time {
            match time.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(Ok(())) => self.bad_time = BadTime::Over,
                Poll::Ready(Err(_)) => self.bad_time = BadTime::NotBegun,
                Poll::Pending => {}
            }
        }
        self.effort == Effort::Bounded && matches!(self.bad_time, BadTime::Over)
    }

    /// Waits a moment; `false` once there is no patience left.
    pub(crate) async fn pause(&mut self, io: &S) -> bool {
        // What is given up for good gets all its tries, without a pause.
        let Some(left) = self.pauses.checked_sub(1) else { return self.effort == Effort::Thorough };
        self.pauses = left;
        let _ = io.sleep(READ.pause).await;
        true
    }
}

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
    lifecycle::{open_error::OpenError, superblocks::Newest},
};
use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    task::{Context, Poll, Waker},
    time::Duration,
};

/// Pauses before something is read again: 40 × 100 ms in all. A part that fails over is
/// worth waiting for; a device with many bad sectors is not worth waiting for at each of them.
const PAUSES: u32 = 40;
/// How long an open spends on reads that fail, by this clock: 90 s. Each may cost many.
const ENOUGH: u32 = 18;
const TICK: Duration = Duration::from_secs(5);

/// How often something is read whose read has taken long to fail: the device has tried for itself.
const SLOW_TRIES: u32 = 2;

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
    /// Pages of the device that this open has read, and the last place that could be read.
    known: Vec<ByteOffset>,
    last: Option<(ByteOffset, usize)>,
    pauses: u32,
    /// Ticks that the last reads have taken, and that those have which failed.
    took: u32,
    failing: u32,
    /// Whether those that failed last have taken long.
    is_slow: bool,
    /// The clock: it goes on from one read to the next, so that short ones count, too.
    tick: Option<Pin<Box<S::Command>>>,
}

impl<S: Storage> Patience<S> {
    pub(crate) fn new(device: Device, newest: &Newest, effort: Effort) -> Self {
        let known = match device {
            Device::Data if newest.superblock.layout.separate_meta => vec![Layout::identity_offset()],
            _ => newest.readable.clone(),
        };
        Self { device, effort, known, last: None, pauses: PAUSES, took: 0, failing: 0, is_slow: false, tick: None }
    }

    /// Waits for reads of the device, and counts the ticks.
    pub(crate) async fn reads<T>(&mut self, io: &S, reads: impl Future<Output = T>) -> T {
        let mut reads = pin!(reads);
        self.took = 0;
        // A tick that has passed meanwhile is not theirs.
        self.tick.take_if(|tick| tick.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready());
        poll_fn(|cx| {
            loop {
                if let Poll::Ready(done) = reads.as_mut().poll(cx) {
                    return Poll::Ready(done);
                }
                let tick = self.tick.get_or_insert_with(|| Box::pin(io.sleep(TICK)));
                let Poll::Ready(passed) = tick.as_mut().poll(cx) else { return Poll::Pending };
                self.tick = None;
                // A clock that fails counts nothing.
                if passed.is_err() {
                    return Poll::Pending;
                }
                self.took += 1;
            }
        })
        .await
    }

    /// Does `attempt`, which reads `len` bytes at `at`, until it succeeds, `most` times at most, with
    /// pauses in between, while there is patience left.
    pub(crate) async fn tries<B>(
        &mut self,
        io: &S,
        (at, len): (ByteOffset, usize),
        most: u32,
        mut buf: B,
        attempt: impl AsyncFn(B) -> (Result<(), Errno>, B),
    ) -> Result<(Result<(), DeviceError>, B), OpenError> {
        let mut tries = 1;
        loop {
            let result;
            (result, buf) = self.reads(io, attempt(buf)).await;
            let Err(errno) = result else {
                self.succeeded(at, len);
                return Ok((Ok(()), buf));
            };
            let why = DeviceError::new("read", self.device, at, len, errno);
            self.failed(io, why).await?;
            if tries == most || !self.may_try_again(io, tries).await {
                return Ok((Err(why), buf));
            }
            tries += 1;
        }
    }

    /// A read of these bytes has succeeded.
    pub(crate) fn succeeded(&mut self, at: ByteOffset, len: usize) {
        self.last = Some((at, len));
    }

    /// Of the reads that were waited for last one has failed, and none is under way on the device.
    /// Returns once the device answers; fails where it is away.
    pub(crate) async fn failed(&mut self, io: &S, why: DeviceError) -> Result<(), OpenError> {
        self.failing += self.took;
        self.is_slow = self.took > 0;
        let pages = self.known.iter().map(|at| (*at, PAGE_BYTES));
        let last = self.last.map(|(at, len)| (at, len.min(PAGE_BYTES)));
        let places = last.into_iter().chain(pages).collect();
        let answered = self.reads(io, answers(io, self.device, places, self.effort.away_after())).await;
        self.failing += self.took;
        if answered { Ok(()) } else { Err(OpenError::Away(why)) }
    }

    /// Whether reads have failed that took long.
    pub(crate) fn fails_slowly(&self) -> bool {
        self.failing > 0
    }

    /// Whether failures have taken so long that the rest is not tried.
    pub(crate) fn has_had_enough(&self) -> bool {
        self.effort == Effort::Bounded && self.failing >= ENOUGH
    }

    /// After so many tries that failed: waits a moment, or `false` where there is no patience left.
    pub(crate) async fn may_try_again(&mut self, io: &S, tries: u32) -> bool {
        let slow = self.is_slow && self.effort == Effort::Bounded;
        if tries >= if slow { SLOW_TRIES } else { READ.most } || self.has_had_enough() {
            return false;
        }
        // What is given up for good gets all its tries, without a pause.
        let Some(left) = self.pauses.checked_sub(1) else { return self.effort == Effort::Thorough };
        self.pauses = left;
        let _ = io.sleep(READ.pause).await;
        true
    }
}

/// Probes a device until one of these places of it can be read; `false` where none can for so long.
async fn answers<S: Storage>(io: &S, device: Device, places: Vec<(ByteOffset, usize)>, time: Duration) -> bool {
    let probes = async {
        // A clock that fails says nothing: the number of probes is bounded, too.
        for _ in 0..time.div_duration_f32(READ.pause) as u32 {
            for (at, len) in &places {
                if io.read(device, *at, Buf::new(*len), 0..*len).await.0.is_ok() {
                    return true;
                }
            }
            let _ = io.sleep(READ.pause).await;
        }
        false
    };
    let (mut probes, over) = (pin!(probes), pin!(io.sleep(time)));
    let mut over = Some(over);
    poll_fn(|cx| {
        if let Poll::Ready(answered) = probes.as_mut().poll(cx) {
            return Poll::Ready(answered);
        }
        match over.as_mut().map_or(Poll::Pending, |over| over.as_mut().poll(cx)) {
            Poll::Ready(Ok(())) => return Poll::Ready(false),
            Poll::Ready(Err(_)) => over = None,
            Poll::Pending => {}
        }
        Poll::Pending
    })
    .await
}

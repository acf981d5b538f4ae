//! What is said to a pass, and what it says of itself: shared by the thread that runs it, by those who
//! steer it, and by those who look.

use super::{metered::Metered, report::ScrubReport};
use crate::{
    BlockIndex, Storage,
    format::{Scrub, ScrubState},
    sync::Mutex,
};
use std::{
    future::{Future, poll_fn},
    num::NonZeroU64,
    pin::pin,
    task::{Poll, Waker},
    time::Duration,
};

/// Steers one pass.
pub struct ScrubControl(Mutex<Inner>);

struct Inner {
    report: ScrubReport,
    leave: Leave,
    /// Of the pass, while it waits.
    waker: Option<Waker>,
}

/// Whether a pass is to end, and to go on another time.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Leave {
    No,
    Asked,
    /// It does nothing more but come to its end.
    Heeded,
}

impl ScrubControl {
    /// Of a pass that reads so many bytes a second at most, and begins or goes on where `from` says: one that
    /// is not paused runs at once.
    pub fn new(from: Scrub, rate: Option<NonZeroU64>) -> Self {
        let mut report = ScrubReport::of(from);
        report.rate = rate.map(NonZeroU64::get);
        if report.state != ScrubState::Paused {
            report.state = ScrubState::Running;
        }
        Self(Mutex::new(Inner { report, leave: Leave::No, waker: None }))
    }

    /// Notes when it has ended, in seconds since 1970.
    pub fn ended_at(&self, seconds: u64) {
        self.0.lock().report.ended_seconds = seconds;
    }

    /// A block that was found bad is good now. `was_bad`: until it was healed. `false`: it is not listed.
    pub fn is_good(&self, block: BlockIndex, was_bad: bool) -> bool {
        self.0.lock().report.heal(block, was_bad)
    }

    /// What has been found so far.
    pub fn report(&self) -> ScrubReport {
        self.0.lock().report.clone()
    }

    /// What a superblock says of it.
    pub fn in_superblock(&self) -> Scrub {
        self.0.lock().report.in_superblock()
    }

    /// Whether the pass is still under way.
    pub fn state(&self) -> ScrubState {
        self.0.lock().report.state
    }

    /// It waits until it may go on, and holds nothing meanwhile. `false`: it does not run.
    pub fn pause(&self) -> bool {
        self.turn(&[ScrubState::Running], ScrubState::Paused)
    }

    /// It goes on. `false`: it was not paused.
    pub fn resume(&self) -> bool {
        self.turn(&[ScrubState::Paused], ScrubState::Running)
    }

    /// It ends where it is. `false`: it has ended.
    pub fn stop(&self) -> bool {
        self.turn(&[ScrubState::Running, ScrubState::Paused], ScrubState::Stopped)
    }

    /// It ends where it is as soon as it can, but not for good: the superblock says that it is under way, and where it goes
    /// on.
    pub fn leave(&self) {
        let waker = {
            let mut inner = self.0.lock();
            if inner.leave == Leave::No {
                inner.leave = Leave::Asked;
            }
            inner.waker.take()
        };
        waker.into_iter().for_each(Waker::wake);
    }

    /// It need not leave. `false`: it has begun to, and reads nothing more.
    pub fn stay(&self) -> bool {
        let mut inner = self.0.lock();
        let stays = inner.leave != Leave::Heeded;
        if stays {
            inner.leave = Leave::No;
        }
        stays
    }

    fn turn(&self, from: &[ScrubState], to: ScrubState) -> bool {
        let (turned, waker) = {
            let mut inner = self.0.lock();
            let turned = from.contains(&inner.report.state);
            if turned {
                inner.report.state = to;
            }
            (turned, if turned { inner.waker.take() } else { None })
        };
        waker.into_iter().for_each(Waker::wake);
        turned
    }

    /// It has gone through, been stopped, or left.
    pub(super) fn ended(&self) {
        if !self.has_left() {
            self.turn(&[ScrubState::Running, ScrubState::Paused], ScrubState::Ended);
        }
    }

    /// Whether it does nothing more but come to its end, to go on another time.
    pub(super) fn has_left(&self) -> bool {
        self.0.lock().leave == Leave::Heeded
    }

    /// Notes what has been found.
    pub(super) fn note(&self, what: impl FnOnce(&mut ScrubReport)) {
        what(&mut self.0.lock().report);
    }

    /// Waits while it is paused. `false`: it is to end. `note` hears what a superblock is to say meanwhile.
    pub(super) async fn may_go_on(&self, note: impl Fn(Scrub)) -> bool {
        poll_fn(|cx| {
            let mut inner = self.0.lock();
            note(inner.report.in_superblock());
            match inner.report.state {
                _ if inner.leave != Leave::No => {
                    inner.leave = Leave::Heeded;
                    Poll::Ready(false)
                }
                ScrubState::Paused => {
                    inner.waker = Some(cx.waker().clone());
                    Poll::Pending
                }
                state => Poll::Ready(state == ScrubState::Running),
            }
        })
        .await
    }

    /// How long it is to take for so many bytes, at least.
    pub(super) fn time_for(&self, bytes: u64) -> Duration {
        let rate = self.0.lock().report.rate;
        rate.map_or(Duration::ZERO, |rate| Duration::from_secs_f64(bytes as f64 / rate as f64))
    }

    /// Waits for as long as what has been read since the last time is to take.
    pub(super) async fn pace<S: Storage>(&self, io: &Metered<'_, S>) {
        self.sleep(io, self.time_for(io.take_read())).await;
    }

    /// Waits so long, or until it is stopped.
    pub(super) async fn sleep<S: Storage>(&self, io: &S, time: Duration) {
        if !time.is_zero() {
            self.unless_stopped(io.sleep(time)).await;
        }
    }

    /// Waits until a sleep has ended, or until it is stopped.
    pub(super) async fn unless_stopped<T>(&self, sleep: impl Future<Output = T>) {
        let mut sleep = pin!(sleep);
        poll_fn(|cx| {
            let mut inner = self.0.lock();
            if inner.leave != Leave::No || inner.report.state == ScrubState::Stopped {
                return Poll::Ready(());
            }
            inner.waker = Some(cx.waker().clone());
            drop(inner);
            sleep.as_mut().poll(cx).map(|_| ())
        })
        .await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Context;

    #[test]
    fn only_what_is_under_way_can_be_turned() {
        let control = ScrubControl::new(Scrub::default(), None);
        assert!(!control.resume() && control.pause() && !control.pause());
        assert_eq!(control.state(), ScrubState::Paused);
        assert!(control.resume() && control.stop());
        assert!(!control.stop() && !control.pause() && !control.resume());
        control.ended();
        assert_eq!(control.state(), ScrubState::Stopped, "it did not go through");
        let control = ScrubControl::new(Scrub::default(), NonZeroU64::new(7));
        control.ended();
        assert_eq!((control.state(), control.report().rate), (ScrubState::Ended, Some(7)));
    }

    #[test]
    fn a_leave_that_is_heeded_is_not_taken_back() {
        let go_on = |control: &ScrubControl| {
            let asked = pin!(control.may_go_on(|_| {})).poll(&mut Context::from_waker(Waker::noop()));
            asked == Poll::Ready(true)
        };
        let control = ScrubControl::new(Scrub::default(), None);
        control.leave();
        assert!(control.stay() && go_on(&control));
        control.leave();
        assert!(!go_on(&control) && !control.stay());
        control.leave();
        assert!(!control.stay() && !go_on(&control));
        control.ended();
        assert_eq!(control.state(), ScrubState::Running, "it goes on another time");
        let control = ScrubControl::new(Scrub::default(), None);
        control.leave();
        control.ended();
        assert_eq!(control.state(), ScrubState::Ended, "it had come through before it was asked");
    }
}

//! The loop that moves written tags from memory and log into pages, for as long as a volume is open.

use crate::ring::RingStorage;
use futures_util::{FutureExt, task::AtomicWaker};
use std::{
    future::{Future, poll_fn},
    pin::pin,
    sync::atomic::{AtomicBool, Ordering},
    task::Poll,
    time::Duration,
};
use ublk_integrity::{Latched, Storage, Volume, Work};

/// How long written tags stay in memory and log at most before they move into pages.
const PERIOD: Duration = Duration::from_secs(5);

/// A request to end, which a future can wait for.
#[derive(Default)]
pub struct Stop {
    set: AtomicBool,
    waker: AtomicWaker,
}

impl Stop {
    /// Asks.
    pub fn set(&self) {
        self.set.store(true, Ordering::SeqCst);
        self.waker.wake();
    }

    /// Ready once it was asked. One waiter only.
    pub fn wait(&self) -> impl Future<Output = ()> + '_ {
        poll_fn(|cx| {
            self.waker.register(cx.waker());
            if self.set.load(Ordering::SeqCst) { Poll::Ready(()) } else { Poll::Pending }
        })
    }
}

/// Makes checkpoints when they are wanted and every few seconds; a last one when `stop` is set. `tell` hears of each
/// and of the failure that ends them.
///
/// A checkpoint that has begun is never dropped: this ends only between two.
pub async fn run(
    volume: &Volume,
    io: &RingStorage,
    stop: &Stop,
    tell: impl Fn(Result<Work, Latched>),
) -> Result<(), Latched> {
    let mut period = io.sleep(PERIOD).fuse();
    loop {
        let due = {
            let mut wanted = pin!(volume.work_wanted().fuse());
            let mut stopped = pin!(stop.wait().fuse());
            futures_util::select_biased! {
                () = stopped => return volume.close(io).await,
                work = wanted => work,
                _ = period => {
                    period = io.sleep(PERIOD).fuse();
                    Work::Checkpoint
                }
            }
        };
        if let Err(latched) = volume.work(io, due).await {
            // Verified reads go on; nothing will ever be written again.
            tell(Err(latched));
            stop.wait().await;
            return Err(latched);
        }
        tell(Ok(due));
    }
}

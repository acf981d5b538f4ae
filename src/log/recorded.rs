//! Waiting until the log says what is durable: for an anchor, which holds how far the log has got.

use super::{
    Log, LogPoint,
    state::{CheckpointerWaits, State, Waiting},
    sync_state::Unsynced,
};
use crate::{Latched, Seq, Storage};
use std::{
    future::poll_fn,
    task::{Poll, Waker},
};

/// How far the log has got once a flush is recorded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Recorded {
    /// Behind a record that says what is durable.
    pub(crate) point: LogPoint,
    /// All numbers up to this one are durable, if none had to be left out.
    pub(crate) all_up_to: Option<Seq>,
    /// The record had no room for all that was durable: some of what had a number when this began is not recorded.
    pub(crate) is_cut: bool,
}

impl Log {
    /// Behind the last record that is durable with all before it.
    pub(crate) fn durable_point(&self) -> LogPoint {
        self.state.lock().durable_end
    }

    /// The last number that was given.
    pub(crate) fn newest_number(&self) -> Seq {
        Seq(self.state.lock().next_seq.0 - 1)
    }

    /// Syncs the data device, and waits until a durable record says what that has made durable. `None` where all up to the
    /// newest number was `covered` before.
    pub(crate) async fn record_flush<S: Storage>(
        &self,
        io: &S,
        request: usize,
        covered: Option<Seq>,
    ) -> Result<Option<Recorded>, Latched> {
        let newest = self.newest_number();
        if covered == Some(newest) {
            return self.latched().map_or(Ok(None), Err);
        }
        self.sync_data(io, request, Unsynced::NotCarried).await?;
        self.recorded(io, request, newest).await.map(Some)
    }

    /// Waits until a durable record says what the last sync has made durable. The record is written
    /// here where no other is about to carry it. Where the ring is full this waits for the
    /// checkpoint, which does not wait for it.
    async fn recorded<S: Storage>(&self, io: &S, request: usize, newest: Seq) -> Result<Recorded, Latched> {
        let (snapshot, highest) = self.demand_record();
        let is_cut = highest < newest;
        loop {
            let recorded = poll_fn(|cx| self.poll_recorded(request, snapshot, cx.waker())).await?;
            match recorded {
                Some(recorded) => return Ok(Recorded { is_cut, ..recorded }),
                None => self.write_flush_record(io).await?,
            }
        }
    }

    /// Has the newest snapshot logged, unless it is or is about to be. Which one that is, and the highest number in it.
    fn demand_record(&self) -> (u64, Seq) {
        let (snapshot, wake) = {
            let mut s = self.state.lock();
            let newest = s.sync.durable.taken;
            let on_its_way = s.sealed.iter().map(|record| record.says).chain([s.gather.says, s.sync.recorded]);
            if on_its_way.max() < Some(newest) {
                s.sync.unlogged = true;
            }
            let wake = self.wants_flush_record(&s).then(|| s.checkpointer_waker(CheckpointerWaits::Work));
            ((newest, s.sync.durable.highest), wake.flatten())
        };
        wake.into_iter().for_each(Waker::wake);
        snapshot
    }

    /// `None`: no other record is about to be written, and one with the entry alone may be.
    fn poll_recorded(&self, request: usize, snapshot: u64, waker: &Waker) -> Poll<Result<Option<Recorded>, Latched>> {
        let mut s = self.state.lock();
        let done = match s.latched {
            Some(why) => Err(why),
            None if s.sync.recorded >= snapshot => Ok(Some(Self::as_recorded(&s))),
            None if self.wants_flush_record(&s) => Ok(None),
            None => {
                s.waiters.wait(request, Waiting::Recorded(snapshot), waker);
                return Poll::Pending;
            }
        };
        s.waiters.remove(request);
        Poll::Ready(done)
    }

    fn as_recorded(s: &State) -> Recorded {
        let durable = &s.sync.durable;
        // A newer snapshot may have come meanwhile, which is not recorded yet.
        let same = durable.taken <= s.sync.recorded;
        let all_up_to = (same && durable.except.is_empty()).then_some(durable.highest);
        Recorded { point: s.durable_end, all_up_to, is_cut: false }
    }
}

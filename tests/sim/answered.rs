//! What the devices do between a request and its answer: what its caller waits for.

use super::{SimStorage, block_on, disk::Trace};
use std::{
    collections::HashMap,
    future::{Future, poll_fn},
    pin::{Pin, pin},
    task::Poll,
};

/// Operations that ended before the answer.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct BeforeAnswer {
    /// The longest chain of writes and syncs, each of which began when the one before had ended.
    pub in_series: usize,
    pub durable_writes: usize,
    pub other_writes: usize,
    pub syncs: usize,
    /// Reads that began.
    pub reads: usize,
}

impl BeforeAnswer {
    /// Of operations by number, as they start and end.
    pub fn of(trace: &[(u64, Trace)]) -> Self {
        let (mut found, mut links) = (Self::default(), HashMap::new());
        for (op, event) in trace {
            match event {
                Trace::Read { .. } => found.reads += 1,
                Trace::WriteStart { .. } | Trace::SyncStart(_) => _ = links.insert(*op, found.in_series + 1),
                Trace::WriteEnd { durable: true, .. } => found.durable_writes += 1,
                Trace::WriteEnd { durable: false, .. } => found.other_writes += 1,
                Trace::SyncEnd(_) => found.syncs += 1,
                Trace::WriteFailed { .. } | Trace::Discard { .. } => {}
            }
            if matches!(event, Trace::WriteEnd { .. } | Trace::SyncEnd(_)) {
                // One that had begun before the request is no part of a chain.
                found.in_series = found.in_series.max(links.get(op).copied().unwrap_or(0));
            }
        }
        found
    }
}

/// What goes on beside a request, as the other tasks of its thread do.
#[derive(Default)]
pub struct Beside<'a>(Vec<Pin<Box<dyn Future<Output = ()> + 'a>>>);

impl<'a> Beside<'a> {
    pub fn spawn(&mut self, task: impl Future<Output = ()> + 'a) {
        self.0.push(Box::pin(task));
    }

    /// Runs a request to its answer.
    pub fn answer<T>(&mut self, io: &SimStorage, request: impl Future<Output = T>) -> (T, BeforeAnswer) {
        io.disk().trace = Some(Vec::new());
        let mut request = pin!(request);
        let answer = poll_fn(|cx| {
            let answer = request.as_mut().poll(cx);
            if answer.is_pending() {
                self.0.retain_mut(|task| task.as_mut().poll(cx).is_pending());
            }
            answer
        });
        let answer = block_on(io, answer);
        let trace = io.disk().trace.take().expect("begun above");
        (answer, BeforeAnswer::of(&trace))
    }

    /// Runs all of it to its end.
    pub fn end(mut self, io: &SimStorage) {
        let all = poll_fn(|cx| {
            self.0.retain_mut(|task| task.as_mut().poll(cx).is_pending());
            if self.0.is_empty() { Poll::Ready(()) } else { Poll::Pending }
        });
        block_on(io, all);
    }
}

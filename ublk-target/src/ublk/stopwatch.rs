//! How long the requests of a thread take, from when it has seen them to when their answers go out.
//!
//! A request costs no look at the clock where one is near that the event loop takes anyway: that with
//! which a batch begins, and those after tasks that hash. Only answers that none has followed by the
//! time that they go out need one of their own, all together.

use crate::{
    event_loop::Batch,
    latency::{Distribution, Histogram, Op},
};
use serde_json::{Map, Value};
use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    time::Instant,
};

/// How long the requests of a device have taken, by the thread that served them.
pub struct Latencies(Vec<OfThread>);

/// For each of [`Op::ALL`]. No two threads share a cache line.
#[derive(Default)]
#[repr(align(128))]
pub(super) struct OfThread([Histogram; Op::ALL.len()]);

impl Latencies {
    /// Of so many threads.
    pub fn new(threads: usize) -> Self {
        Self((0..threads).map(|_| OfThread::default()).collect())
    }

    pub(super) fn of_thread(&self, thread: usize) -> &OfThread {
        &self.0[thread]
    }

    /// For a status.
    pub fn json(&self) -> Value {
        let of = |op: Op| Distribution::of(self.0.iter().map(|thread| &thread.0[op as usize]));
        Op::ALL.map(|op| (op.word().to_owned(), of(op).json())).into_iter().collect::<Map<_, _>>().into()
    }
}

/// Measures the requests of one thread.
pub(super) struct Stopwatch<'l> {
    batch: Rc<Batch>,
    latencies: &'l OfThread,
    /// Answered, and on their way out: what, and when it was seen. One for each request tag at most.
    answered: RefCell<Vec<(Op, Instant)>>,
    /// The last look at the clock before the last of them.
    last: Cell<Instant>,
}

impl<'l> Stopwatch<'l> {
    /// For a thread with so many request tags. Memory is taken here.
    pub(super) fn new(batch: &Rc<Batch>, latencies: &'l OfThread, tags: usize) -> Self {
        let (answered, last) = (RefCell::new(Vec::with_capacity(tags)), Cell::new(batch.looked()));
        Self { batch: Rc::clone(batch), latencies, answered, last }
    }

    /// When a request was seen whose task has just been woken for it.
    pub(super) fn seen(&self) -> Instant {
        self.batch.looked()
    }

    /// A request that was seen then is answered. `None`: one that is not measured.
    pub(super) fn answered(&self, op: Option<Op>, seen: Instant) {
        let Some(op) = op else { return };
        self.answered.borrow_mut().push((op, seen));
        self.last.set(self.batch.looked());
    }

    /// The answers go out now.
    pub(super) fn sending(&self) {
        let mut answered = self.answered.borrow_mut();
        if answered.is_empty() {
            return;
        }
        let now = match self.batch.looked() {
            looked if looked > self.last.get() => looked,
            _ => self.batch.look(),
        };
        answered.drain(..).for_each(|(op, seen)| self.latencies.0[op as usize].add(now.duration_since(seen)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{hint::black_box, thread, time::Duration};

    const A_WHILE: Duration = Duration::from_millis(2);

    fn count(latencies: &Latencies, op: Op) -> u64 {
        latencies.json()[op.word()]["count"].as_u64().unwrap()
    }

    #[test]
    fn answers_that_go_out_together_take_a_look_at_the_clock_at_most() {
        let (batch, latencies) = (Batch::new(4), Latencies::new(2));
        let stopwatch = Stopwatch::new(&batch, latencies.of_thread(1), 4);
        let seen = stopwatch.seen();
        thread::sleep(A_WHILE);
        [Some(Op::Read), Some(Op::Read), None, Some(Op::Flush)].iter().for_each(|op| stopwatch.answered(*op, seen));
        assert_eq!(batch.looked(), seen, "nobody has looked");
        stopwatch.sending();
        let now = batch.looked();
        assert!(now - seen >= A_WHILE && [Op::Read, Op::Write, Op::Flush].map(|op| count(&latencies, op)) == [2, 0, 1]);
        let took = &latencies.json()["read"];
        assert!(took["p50_seconds"].as_f64().unwrap() >= 0.0015 && took["sum_seconds"].as_f64().unwrap() >= 0.004);
        stopwatch.sending();
        assert_eq!((batch.looked(), count(&latencies, Op::Read)), (now, 2), "nothing went out");
        // After a task that has hashed the event loop looks.
        stopwatch.answered(Some(Op::Write), stopwatch.seen());
        thread::sleep(A_WHILE);
        let looked = batch.look();
        stopwatch.sending();
        assert_eq!((batch.looked(), count(&latencies, Op::Write)), (looked, 1));
        assert!(latencies.json()["write"]["sum_seconds"].as_f64().unwrap() >= 0.002, "until that look");
        // Not the look before the answer.
        stopwatch.answered(Some(Op::Write), stopwatch.seen());
        stopwatch.sending();
        assert!(batch.looked() > looked);
    }

    /// What valgrind counts: `--toggle-collect='*counted*'`.
    #[inline(never)]
    fn counted(batch: &Batch, stopwatch: &Stopwatch<'_>, together: usize) {
        batch.look();
        for _ in 0..together {
            stopwatch.answered(Some(black_box(Op::Read)), black_box(stopwatch.seen()));
        }
        stopwatch.sending();
        black_box(());
    }

    #[test]
    fn so_many_are_counted_as_there_were() {
        let (batch, latencies) = (Batch::new(32), Latencies::new(1));
        let stopwatch = Stopwatch::new(&batch, latencies.of_thread(0), 32);
        let together = std::env::var("TOGETHER").map_or(32, |together| together.parse().unwrap());
        (0..1000).for_each(|_| counted(&batch, &stopwatch, together));
        assert_eq!(count(&latencies, Op::Read), 1000 * together as u64);
    }
}

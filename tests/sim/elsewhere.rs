//! Other threads that hash, in a world with one thread: what they were handed waits until the seed
//! says that it is done.

use std::cell::{Cell, RefCell};
use ublk_integrity::{HashJob, HashThreads};

/// How many of them there are.
const THREADS: usize = 2;

thread_local! {
    static JOBS: RefCell<Vec<HashJob>> = const { RefCell::new(Vec::new()) };
    static DONE: Cell<u64> = const { Cell::new(0) };
}

/// They take a job each, and no more before it is done.
pub fn hash_threads() -> HashThreads {
    HashThreads::new(|job| {
        JOBS.with_borrow_mut(|jobs| {
            if jobs.len() == THREADS {
                return Some(job);
            }
            jobs.push(job);
            None
        })
    })
}

/// How many jobs they have.
pub fn at_work() -> usize {
    JOBS.with_borrow(Vec::len)
}

/// Ends the `nth` job.
pub fn end(nth: usize) {
    let job = JOBS.with_borrow_mut(|jobs| jobs.swap_remove(nth));
    job.run();
    DONE.set(DONE.get() + 1);
}

/// Forgets all jobs, as a crash does.
pub fn crash() {
    JOBS.with_borrow_mut(Vec::clear);
}

/// How many jobs were ended on this thread.
pub fn done() -> u64 {
    DONE.get()
}

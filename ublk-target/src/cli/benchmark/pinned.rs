//! A thread that stays on one processor: what is compared runs on the same.
//!
//! To wake a processor that sleeps takes longer than all that a thread does for a synchronous
//! write, in a virtual machine above all. Where a disk's interrupts go to one processor, the
//! scheduler's choice of another for the thread would be most of what is measured.

use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};

/// This thread, on one processor until this is dropped.
pub struct Pinned {
    /// Where it was allowed to run before.
    allowed: CpuSet,
}

const THIS_THREAD: Pid = Pid::from_raw(0);

impl Pinned {
    /// To the next processor at each turn, of those that the thread may run on. `None` where the
    /// kernel does not let it choose.
    pub fn at(turn: usize) -> Option<Self> {
        let allowed = sched_getaffinity(THIS_THREAD).ok()?;
        let processors = (0..CpuSet::count()).filter(|processor| allowed.is_set(*processor) == Ok(true));
        let mut one = CpuSet::new();
        one.set(processors.clone().nth(turn % processors.count().max(1))?).ok()?;
        sched_setaffinity(THIS_THREAD, &one).ok()?;
        Some(Self { allowed })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // It was allowed before.
        let _ = sched_setaffinity(THIS_THREAD, &self.allowed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_takes_turns_on_its_processors_and_may_use_all_afterwards() {
        let allowed = || sched_getaffinity(THIS_THREAD).unwrap();
        let count = |set: CpuSet| (0..CpuSet::count()).filter(|i| set.is_set(*i) == Ok(true)).count();
        let (before, mut seen) = (allowed(), Vec::new());
        for turn in 0..2 * count(before) {
            let pinned = Pinned::at(turn).unwrap();
            assert_eq!(count(allowed()), 1);
            seen.push(allowed());
            drop(pinned);
            assert_eq!(allowed(), before);
        }
        let (first, again) = seen.split_at(count(before));
        assert_eq!(first, again);
        assert!(count(before) == 1 || first[0] != first[1]);
    }
}

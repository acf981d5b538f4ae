//! The threads beside the queues: hashing, checkpoints and prefetch. The last two have a ring of
//! their own each, so that no queue ever waits for them but where the library says so (log space).

use super::log::{Event, Log};
use crate::{
    checkpoints::{self, AtStop, Stop},
    device::Backings,
    event_loop::{HashPool, OwnRing, ring::DeviceFiles},
    threads::named,
};
use crossbeam_channel::never;
use futures_util::future::join_all;
use std::{
    io,
    os::fd::OwnedFd,
    sync::{Arc, mpsc},
    thread::JoinHandle,
};
use ublk_integrity::{CheckpointerWork, Hint, HintReceiver, Latched, RequestContext, Volume};

/// Hints followed at a time.
pub const PREFETCH_LANES: usize = 8;

/// Starts the checkpoint thread. It makes a last checkpoint when it is stopped.
pub fn start_checkpoints(
    volume: &Arc<Volume>,
    backings: &Backings,
    stop: &Arc<Stop>,
    log: &Log,
    verbose: bool,
) -> io::Result<JoinHandle<Result<(), Latched>>> {
    let (volume, stop, log) = (Arc::clone(volume), Arc::clone(stop), log.clone());
    let (fds, files) = (backings.descriptors()?, backings.files(0));
    let (ready, started) = mpsc::channel();
    let thread = named("checkpoint").spawn(move || {
        // A ring belongs to the thread that made it.
        let ring = match OwnRing::new(fds) {
            Ok(ring) => ring,
            Err(e) => {
                let _ = ready.send(Err(e));
                return Ok(());
            }
        };
        let _ = ready.send(Ok(()));
        let io = ring.storage(files);
        let tell = |done| match done {
            Ok(CheckpointerWork::Checkpoint) if verbose => log.tell(Event::Checkpoint),
            Ok(_) => {}
            Err(latched) => log.tell(Event::Latched(latched)),
        };
        let done = ring.block_on(checkpoints::run(&volume, &io, (&stop, AtStop::Close), tell));
        done.expect("a ring that worked goes on working")
    })?;
    started.recv().unwrap_or_else(|_| Err(io::Error::other("the checkpoint thread died")))?;
    Ok(thread)
}

/// Starts threads that hash for those that serve requests. They end with the process.
pub fn start_hashing(pool: &HashPool, threads: u16) -> io::Result<()> {
    for i in 0..threads {
        let worker = pool.worker();
        named(&format!("hash {i}")).spawn(move || worker.hash_until(&never()))?;
    }
    Ok(())
}

/// Starts the prefetch thread, which ends with the last sender of hints. Whatever becomes of it,
/// reads do without.
pub fn start_prefetch(
    volume: &Arc<Volume>,
    backings: &Backings,
    hints: HintReceiver,
    counters_of: usize,
) -> io::Result<()> {
    let volume = Arc::clone(volume);
    let (fds, files) = (backings.descriptors()?, backings.files(0));
    named("prefetch").spawn(move || prefetch(&volume, fds, files, &hints, counters_of))?;
    Ok(())
}

fn prefetch(
    volume: &Volume,
    fds: Vec<OwnedFd>,
    files: DeviceFiles,
    hints: &HintReceiver,
    counters_of: usize,
) -> io::Result<()> {
    let ring = OwnRing::new(fds)?;
    let io = ring.storage(files);
    let mut slots: Vec<RequestContext> = (0..PREFETCH_LANES).map(|_| volume.context(counters_of)).collect();
    while let Ok(first) = hints.recv() {
        let batch = std::iter::once(first).chain(hints.try_iter()).take(PREFETCH_LANES);
        let loads = slots.iter_mut().zip(batch).map(|(slot, hint): (_, Hint)| volume.prefetch(&io, slot, hint));
        ring.block_on(join_all(loads))?;
    }
    Ok(())
}

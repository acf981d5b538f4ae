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
    cell::Cell,
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
        let told = Cell::new(0);
        let tell_lost = || {
            let lost = volume.status().counters.pages_lost;
            let more = lost - told.replace(lost);
            if more > 0 {
                log.tell(Event::PagesLost(more));
            }
        };
        let tell = |done| match done {
            Ok(CheckpointerWork::Checkpoint) => {
                tell_lost();
                if verbose {
                    log.tell(Event::Checkpoint);
                }
            }
            Ok(_) => {}
            Err(latched) => log.tell(Event::Latched(latched)),
        };
        let done = ring.block_on(checkpoints::run(&volume, &io, (&stop, AtStop::Close), tell));
        // By the last one.
        tell_lost();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        event::Feed,
        offline::{Opening, scratch},
    };
    use std::{
        fs,
        os::unix::fs::FileExt,
        time::{Duration, Instant},
    };
    use ublk_integrity::{Access, BlockIndex, BlockRange, Buf, Durability};

    #[test]
    fn pages_that_a_checkpoint_loses_are_told() {
        let ((file, offline, key), folder) = (scratch(), tempfile::tempdir().unwrap());
        let opened = || Arc::new(offline.open_volume(&key, Opening::new(Access::ReadWrite, None)).unwrap());
        let write = |volume: &Volume, block| {
            let (io, mut context, range) = (offline.io(), volume.context(0), BlockRange::new(BlockIndex(block), 1));
            let write = volume.write(&io, &mut context, range, Buf::new(4096), Durability::MayBeLost);
            offline.run(write).unwrap().0.unwrap();
        };
        let before = fs::read(file.path()).unwrap();
        let volume = opened();
        write(&volume, 0);
        offline.run(volume.close(&offline.io())).unwrap().unwrap();
        drop(volume);
        // All that was written rots, but the superblocks: the log, which is closed, the pages, and the block.
        let after = fs::read(file.path()).unwrap();
        for at in (0..after.len()).step_by(4096).filter(|at| ![0, 512 << 10].contains(at)) {
            if after[at..at + 4096] != before[at..at + 4096] {
                file.as_file().write_all_at(&[after[at + 100] ^ 1], at as u64 + 100).unwrap();
            }
        }
        let log = Log::of_test_in(folder.path());
        let (volume, stop) = (opened(), Arc::new(Stop::default()));
        let checkpoints = start_checkpoints(&volume, offline.backings(), &stop, &log, false).unwrap();
        // Another block of the same page.
        write(&volume, 1);
        stop.set();
        checkpoints.join().unwrap().unwrap();
        assert!(volume.status().counters.pages_lost > 0, "the test shows nothing");
        let begun = Instant::now();
        let told = || Feed::of(folder.path()).take().into_iter().find(|event| event.class == "pages-lost");
        while told().is_none() {
            assert!(begun.elapsed() < Duration::from_secs(60), "it is not told");
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(told().unwrap().message.contains("damaged pages lost"));
    }
}

//! Requests of one pattern on one thread, plain or through a volume; others may hash for it.

use super::{
    lane::Lane,
    pattern::{Act, Pattern, Places},
    traffic::{Counted, Traffic},
    write_back::WriteBack,
};
use crate::{
    device::Backings,
    event_loop::{HashPool, OwnRing, ring::DeviceFiles},
    failure::{Context, Exit, Failure, Outcome, no_ring},
};
use futures_util::future::Either;
use nix::sys::{
    resource::{UsageWho, getrusage},
    time::TimeValLike,
};
use std::{
    cell::{Cell, OnceCell, RefCell},
    future::Future,
    thread,
    time::{Duration, Instant},
};
use ublk_integrity::{
    BlockIndex, BlockRange, ByteOffset, Device, Durability, Errno, RequestContext, Storage, Volume, WriteBackId,
};

/// When a run ends.
#[derive(Clone, Copy)]
pub enum Until {
    Elapsed(Duration),
    /// So many bytes have been moved.
    Moved(u64),
}

/// Where requests go.
#[derive(Clone, Copy)]
pub enum Target<'a> {
    Volume(&'a Volume),
    /// The data device itself, from this offset on.
    Plain(u64),
}

/// A run of one pattern.
pub struct Run<'a> {
    pub pattern: &'a Pattern,
    pub target: Target<'a>,
    /// Bytes that are read and written: whole requests.
    pub size: u64,
    pub until: Until,
    /// Whether writes count only once a sync has ended that comes after them: what a cache has
    /// taken is not written.
    pub synced: bool,
    /// One for requests; the others hash for it.
    pub threads: usize,
    /// The way to those.
    pub hashing: &'a HashPool,
    /// For the ring of each.
    pub backings: &'a Backings,
    pub files: DeviceFiles,
    pub traffic: &'a Traffic,
}

/// What a run has found.
pub struct Found {
    /// Of requests, either way.
    pub bytes: u64,
    pub seconds: f64,
    /// What all threads of the process have used of the processors.
    pub processor_seconds: f64,
}

/// What the lanes of a run share.
#[derive(Default)]
struct Progress {
    begin: OnceCell<(Instant, f64)>,
    next: Cell<u64>,
    moved: Cell<u64>,
    /// When the last request was answered, and what had been used of the processors by then.
    ended: Cell<(f64, f64)>,
    failed: RefCell<Option<Failure>>,
}

impl Progress {
    /// Keeps the first failure.
    async fn keep(&self, work: impl Future<Output = Outcome>) {
        if let Err(failure) = work.await {
            self.failed.borrow_mut().get_or_insert(failure);
        }
    }

    /// Time counts from the first call.
    fn begin(&self) -> (Instant, f64) {
        *self.begin.get_or_init(|| (Instant::now(), processor_seconds()))
    }

    fn elapsed(&self) -> Duration {
        self.begin().0.elapsed()
    }

    fn end(&self) {
        let (begin, used) = self.begin();
        self.ended.set((begin.elapsed().as_secs_f64(), processor_seconds() - used));
    }
}

impl Run<'_> {
    /// Runs the pattern, with as many requests under way as there are lanes. `slots` is the memory
    /// for writes that are answered early.
    pub fn measure(&self, lanes: &mut [Lane], slots: &mut [Lane]) -> Outcome<Found> {
        let progress = Progress::default();
        self.requests(lanes, slots, &progress)?;
        // Otherwise the last answer is the end, whatever is left to do.
        if self.synced && self.pattern.act.writes() && !self.pattern.act.is_durable() {
            self.sync(&mut lanes[0])?;
            progress.end();
        }
        let (seconds, processor_seconds) = progress.ended.get();
        let found = Found { bytes: progress.moved.get(), seconds, processor_seconds };
        progress.failed.into_inner().map_or(Ok(found), Err)
    }

    /// All requests, with threads beside this one that hash for them.
    fn requests(&self, lanes: &mut [Lane], slots: &mut [Lane], progress: &Progress) -> Outcome {
        let (running, end) = crossbeam_channel::bounded(0);
        thread::scope(|scope| {
            for _ in 1..self.threads {
                let (worker, end) = (self.hashing.worker(), &end);
                scope.spawn(move || worker.hash_until(end));
            }
            let done = self.on_this_thread(lanes, slots, progress);
            drop(running);
            done
        })
    }

    fn ring(&self) -> Outcome<OwnRing> {
        self.backings.descriptors().and_then(OwnRing::new).map_err(|e| no_ring(&e))
    }

    fn counted(&self, ring: &OwnRing) -> Counted<'_> {
        Counted { io: ring.storage(self.files), traffic: self.traffic }
    }

    fn sync(&self, lane: &mut Lane) -> Outcome {
        let ring = self.ring()?;
        ring.block_on(self.flush(&self.counted(&ring), lane)).doing("io_uring failed")?
    }

    fn on_this_thread(&self, lanes: &mut [Lane], slots: &mut [Lane], progress: &Progress) -> Outcome {
        let ring = self.ring()?;
        // Refused, it only costs time.
        let _ = ring.register(lanes.iter_mut().chain(&mut *slots).map(|lane| &mut lane.buf));
        RequestContext::work_together(lanes.iter_mut().chain(&mut *slots).filter_map(|lane| lane.context.as_mut()));
        progress.begin();
        let io = self.counted(&ring);
        let write_back = WriteBack::new(slots, lanes.len());
        let requests = lanes.iter_mut().map(|lane| Either::Left(self.lane(&io, lane, &write_back, progress)));
        let slots = write_back.slots().filter_map(|slot| match self.target {
            Target::Volume(volume) => Some(Either::Right(write_back.write(slot, volume, &io))),
            Target::Plain(_) => None,
        });
        let tasks = requests.chain(slots).map(|task| progress.keep(task));
        ring.run_together(tasks, Some(self.hashing)).doing("io_uring failed")
    }

    async fn lane<'s>(
        &'s self,
        io: &Counted<'_>,
        lane: &mut Lane,
        write_back: &WriteBack<'s>,
        progress: &Progress,
    ) -> Outcome {
        let done = self.turns(io, lane, write_back, progress).await;
        progress.end();
        write_back.lane_ends();
        done
    }

    async fn turns<'s>(
        &'s self,
        io: &Counted<'_>,
        lane: &mut Lane,
        write_back: &WriteBack<'s>,
        progress: &Progress,
    ) -> Outcome {
        let Pattern { act, places, request, .. } = *self.pattern;
        let request = request as u64;
        let (reads, writes) = act.requests();
        let bytes = (reads + writes) * request;
        loop {
            let turn = progress.next.replace(progress.next.get() + 1);
            let done = match self.until {
                Until::Elapsed(time) => progress.elapsed() >= time,
                Until::Moved(all) => turn * bytes >= all,
            };
            if done {
                return Ok(());
            }
            let at = places.at(turn, request, self.size);
            match act {
                Act::Read => self.read(io, lane, at).await?,
                Act::Write => self.write(io, lane, at, Durability::MayBeLost).await?,
                Act::WriteFua => self.write_fua(io, lane, at, write_back).await?,
                Act::WriteFlush => self.write_flush(io, lane, at, write_back).await?,
                Act::ReadWriteFlush => {
                    self.read(io, lane, Places::Scattered.at(!turn, request, self.size)).await?;
                    self.write_flush(io, lane, at, write_back).await?;
                }
            }
            progress.moved.set(progress.moved.get() + bytes);
        }
    }

    /// An fsync of one write, as the daemon sees it: a small write is answered early, and the flush
    /// comes once the answer has gone out.
    async fn write_flush<'s>(
        &'s self,
        io: &Counted<'_>,
        lane: &mut Lane,
        at: u64,
        write_back: &WriteBack<'s>,
    ) -> Outcome {
        match self.admit(lane, at, write_back, Durability::MayBeLost) {
            // The thread goes on to its ring and back, as with the answer to a request.
            Some(_) => _ = io.sleep(Duration::ZERO).await,
            None => self.write(io, lane, at, Durability::MayBeLost).await?,
        }
        self.flush(io, lane).await
    }

    /// A durable write, as the daemon does it: a small one is answered once it is safe.
    async fn write_fua<'s>(
        &'s self,
        io: &Counted<'_>,
        lane: &mut Lane,
        at: u64,
        write_back: &WriteBack<'s>,
    ) -> Outcome {
        match (self.target, self.admit(lane, at, write_back, Durability::Durable)) {
            (Target::Volume(volume), Some(id)) => Ok(volume.wait_safe(lane.context(), id).await?),
            _ => self.write(io, lane, at, Durability::Durable).await,
        }
    }

    /// Has a write answered early, where there is a volume, and its range and a slot are free.
    fn admit<'s>(
        &'s self,
        lane: &Lane,
        at: u64,
        write_back: &WriteBack<'s>,
        durability: Durability,
    ) -> Option<WriteBackId> {
        let Target::Volume(volume) = self.target else { return None };
        write_back.admit(volume, self.blocks(volume, at), &lane.buf[..self.pattern.request], durability)
    }

    async fn write(&self, io: &Counted<'_>, lane: &mut Lane, at: u64, durability: Durability) -> Outcome {
        let buf = lane.take_buf();
        match self.target {
            Target::Volume(volume) => {
                let result;
                (result, lane.buf) = volume.write(io, lane.context(), self.blocks(volume, at), buf, durability).await;
                Ok(result?)
            }
            Target::Plain(from) => {
                let (at, part) = (ByteOffset(from + at), 0..self.pattern.request);
                let result;
                (result, lane.buf) = io.write(Device::Data, at, buf, part, durability).await;
                result.map_err(|e| plain_failed("write", at, e))
            }
        }
    }

    async fn read(&self, io: &Counted<'_>, lane: &mut Lane, at: u64) -> Outcome {
        let buf = lane.take_buf();
        match self.target {
            Target::Volume(volume) => {
                let result;
                (result, lane.buf) = volume.read(io, lane.context(), self.blocks(volume, at), buf).await;
                Ok(result?)
            }
            Target::Plain(from) => {
                let at = ByteOffset(from + at);
                let result;
                (result, lane.buf) = io.read(Device::Data, at, buf, 0..self.pattern.request).await;
                result.map_err(|e| plain_failed("read", at, e))
            }
        }
    }

    async fn flush(&self, io: &Counted<'_>, lane: &mut Lane) -> Outcome {
        match self.target {
            Target::Volume(volume) => Ok(volume.flush(io, lane.context()).await?),
            Target::Plain(from) => io.sync(Device::Data).await.map_err(|e| plain_failed("sync", ByteOffset(from), e)),
        }
    }

    fn blocks(&self, volume: &Volume, at: u64) -> BlockRange {
        let block = volume.block_size() as u64;
        BlockRange::new(BlockIndex(at / block), self.pattern.request as u64 / block)
    }
}

fn plain_failed(what: &str, at: ByteOffset, e: Errno) -> Failure {
    Failure::new(Exit::Device, format_args!("plain {what} at {}: {e}", at.0))
}

fn processor_seconds() -> f64 {
    // Can't fail for this process.
    let used = getrusage(UsageWho::RUSAGE_SELF).map(|usage| usage.user_time() + usage.system_time());
    used.map_or(0.0, |time| time.num_microseconds() as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::{super::lane::lanes, *};
    use crate::offline::{Opening, scratch};
    use ublk_integrity::open::Access;

    #[test]
    fn a_synced_write_takes_the_daemons_way_and_each_byte_written_for_it_is_counted() {
        const WRITES: u64 = 60;
        let (_file, offline, key) = scratch();
        let volume = offline.open_volume(&key, Opening::new(Access::ReadWrite, None)).unwrap();
        let (backings, files) = offline.handles();
        let (traffic, hashing) = (Traffic::default(), HashPool::new(0));
        let pattern = Pattern { name: "", act: Act::ReadWriteFlush, places: Places::InOrder, request: 4096, depth: 2 };
        let run = Run {
            pattern: &pattern,
            target: Target::Volume(&volume),
            size: 4 << 20,
            until: Until::Moved(WRITES * 2 * 4096),
            synced: true,
            threads: 1,
            hashing: &hashing,
            backings,
            files,
            traffic: &traffic,
        };
        let found = run.measure(&mut lanes(Some(&volume), 2, 4096), &mut lanes(Some(&volume), 3, 4096)).unwrap();
        assert_eq!(found.bytes, WRITES * 2 * 4096);
        assert!(found.seconds > 0.0 && found.processor_seconds > 0.0);
        let (asked, counters) = (traffic.so_far(), volume.status().counters);
        assert_eq!((counters.reads, counters.writes, counters.flushes), (WRITES, WRITES, WRITES));
        assert_eq!(counters.write_back_writes, WRITES, "no place is written twice, and there are slots enough");
        assert_eq!(asked.written, counters.log_bytes + WRITES * 4096, "nobody made a checkpoint");
        assert!((1..=WRITES).contains(&asked.syncs));
    }
}

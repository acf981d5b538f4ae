//! Requests of one pattern on one thread, plain or through a volume; others may hash for it.

use crate::{
    checkpoints::{self, Stop},
    device::Backings,
    event_loop::{
        HashPool, OwnRing,
        ring::{DeviceFiles, RingStorage},
    },
    failure::{Context, Exit, Failure, Outcome, no_ring},
};
use std::{
    cell::{Cell, OnceCell, RefCell},
    future::Future,
    thread,
    time::{Duration, Instant},
};
use ublk_integrity::{BlockIndex, BlockRange, Buf, ByteOffset, Device, Durability, RequestContext, Storage, Volume};

/// One way to use a disk.
pub struct Pattern {
    pub name: &'static str,
    /// Bytes of a request.
    pub request: usize,
    /// Requests under way.
    pub depth: usize,
    pub random: bool,
    pub write: bool,
}

/// When a run ends.
#[derive(Clone, Copy)]
pub enum Until {
    Elapsed(Duration),
    /// So many bytes have been moved.
    Moved(u64),
}

/// What one of the requests under way owns.
pub struct Lane {
    context: Option<RequestContext>,
    buf: Buf,
}

impl Lane {
    /// # Panics
    /// Where it was not made for a volume.
    fn context(&mut self) -> &mut RequestContext {
        self.context.as_mut().expect("this lane was made for the volume")
    }
}

/// So many lanes, of requests of up to `largest` bytes.
pub fn lanes(volume: Option<&Volume>, count: usize, largest: usize) -> Vec<Lane> {
    let lane = |mut buf: Buf| {
        buf.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i % 251) as u8 + 1);
        Lane { context: volume.map(|v| v.context(0)), buf }
    };
    Buf::several(count, largest).into_iter().map(lane).collect()
}

/// Where requests go.
#[derive(Clone, Copy)]
pub enum Target<'a> {
    Volume(&'a Volume),
    /// A volume for which nobody makes checkpoints meanwhile.
    Unattended(&'a Volume),
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
    /// One for requests; the others hash for it.
    pub threads: usize,
    /// The way to those.
    pub hashing: &'a HashPool,
    /// For the ring of each.
    pub backings: &'a Backings,
    pub files: DeviceFiles,
}

/// What the lanes of a run share.
#[derive(Default)]
struct Progress {
    begin: OnceCell<Instant>,
    next: Cell<u64>,
    moved: Cell<u64>,
    failed: RefCell<Option<Failure>>,
}

impl Progress {
    /// Keeps the first failure.
    async fn keep(&self, work: impl Future<Output = Outcome>) {
        if let Err(failure) = work.await {
            self.failed.borrow_mut().get_or_insert(failure);
        }
    }

    fn elapsed(&self) -> Duration {
        self.begin.get_or_init(Instant::now).elapsed()
    }
}

impl Run<'_> {
    /// Bytes per second, with as many requests under way as there are lanes. Writes count once a
    /// sync has ended that comes after them: what a cache has taken is not written.
    pub fn measure(&self, lanes: &mut [Lane]) -> Outcome<f64> {
        let progress = Progress::default();
        let stop = Stop::default();
        let seconds = thread::scope(|scope| {
            // As in the daemon, on a thread and a ring of their own.
            let checkpoints = match self.target {
                Target::Volume(volume) => Some(scope.spawn(|| self.make_checkpoints(volume, &stop))),
                Target::Unattended(_) | Target::Plain(_) => None,
            };
            let requests = self.requests(lanes, &progress);
            let synced = self.sync(&mut lanes[0]);
            let seconds = progress.elapsed().as_secs_f64();
            stop.set();
            let ended = checkpoints.map_or(Ok(()), |thread| thread.join().unwrap_or_else(|_| std::process::abort()));
            requests.and(synced).and(ended).map(|()| seconds)
        })?;
        progress.failed.into_inner().map_or(Ok(progress.moved.into_inner() as f64 / seconds), Err)
    }

    /// All requests, with threads beside this one that hash for them.
    fn requests(&self, lanes: &mut [Lane], progress: &Progress) -> Outcome {
        let (running, end) = crossbeam_channel::bounded(0);
        thread::scope(|scope| {
            for _ in 1..self.threads {
                let (worker, end) = (self.hashing.worker(), &end);
                scope.spawn(move || worker.hash_until(end));
            }
            let done = self.on_this_thread(lanes, progress);
            drop(running);
            done
        })
    }

    fn ring(&self) -> Outcome<OwnRing> {
        self.backings.descriptors().and_then(OwnRing::new).map_err(|e| no_ring(&e))
    }

    fn sync(&self, lane: &mut Lane) -> Outcome {
        if !self.pattern.write {
            return Ok(());
        }
        let ring = self.ring()?;
        let io = ring.storage(self.files);
        let synced = ring.block_on(async {
            match self.target {
                Target::Volume(volume) => Ok(volume.flush(&io, lane.context()).await?),
                Target::Plain(_) => {
                    io.sync(Device::Data).await.map_err(|e| Failure::new(Exit::Device, format_args!("plain sync: {e}")))
                }
                // Left as by a power cut.
                Target::Unattended(_) => Ok(()),
            }
        });
        synced.doing("io_uring failed")?
    }

    fn on_this_thread(&self, lanes: &mut [Lane], progress: &Progress) -> Outcome {
        let ring = self.ring()?;
        // Refused, it only costs time.
        let _ = ring.register(lanes.iter_mut().map(|lane| &mut lane.buf));
        RequestContext::work_together(lanes.iter_mut().filter_map(|lane| lane.context.as_mut()));
        // Time counts from here.
        progress.elapsed();
        let io = ring.storage(self.files);
        let requests = lanes.iter_mut().map(|lane| progress.keep(self.lane(&io, lane, progress)));
        ring.run_together(requests, Some(self.hashing)).doing("io_uring failed")
    }

    fn make_checkpoints(&self, volume: &Volume, stop: &Stop) -> Outcome {
        let ring = self.ring()?;
        let io = ring.storage(self.files);
        let done = ring.block_on(checkpoints::run(volume, &io, stop, |_| {})).doing("io_uring failed")?;
        Ok(done?)
    }

    async fn lane(&self, io: &RingStorage, lane: &mut Lane, progress: &Progress) -> Outcome {
        let request = self.pattern.request as u64;
        let places = self.size / request;
        loop {
            let turn = progress.next.replace(progress.next.get() + 1);
            let done = match self.until {
                Until::Elapsed(time) => progress.elapsed() >= time,
                Until::Moved(bytes) => turn * request >= bytes,
            };
            if done {
                return Ok(());
            }
            let place = if self.pattern.random { scatter(turn) } else { turn } % places;
            match self.target {
                Target::Volume(volume) | Target::Unattended(volume) => {
                    verified(self.pattern, volume, io, lane, place * request).await?
                }
                Target::Plain(from) => plain(self.pattern, io, lane, from + place * request).await?,
            }
            progress.moved.set(progress.moved.get() + request);
        }
    }
}

async fn verified(pattern: &Pattern, volume: &Volume, io: &RingStorage, lane: &mut Lane, at: u64) -> Outcome {
    let buf = std::mem::replace(&mut lane.buf, Buf::none());
    let context = lane.context();
    let block = volume.block_size() as u64;
    let range = BlockRange::new(BlockIndex(at / block), pattern.request as u64 / block);
    let result: Outcome;
    (result, lane.buf) = match pattern.write {
        true => {
            let (result, buf) = volume.write(io, context, range, buf, Durability::MayBeLost).await;
            (result.map_err(Failure::from), buf)
        }
        false => {
            let (result, buf) = volume.read(io, context, range, buf).await;
            (result.map_err(Failure::from), buf)
        }
    };
    result
}

async fn plain(pattern: &Pattern, io: &RingStorage, lane: &mut Lane, at: u64) -> Outcome {
    let buf = std::mem::replace(&mut lane.buf, Buf::none());
    let part = 0..pattern.request;
    let transfer = match pattern.write {
        true => io.write(Device::Data, ByteOffset(at), buf, part, Durability::MayBeLost),
        false => io.read(Device::Data, ByteOffset(at), buf, part),
    };
    let result;
    (result, lane.buf) = transfer.await;
    result.map_err(|e| Failure::new(Exit::Device, format_args!("plain I/O at {at}: {e}")))
}

/// Spreads consecutive numbers over all of u64 (the finalizer of a 64-bit hash; no two collide).
fn scatter(n: u64) -> u64 {
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

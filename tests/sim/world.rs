//! The workload: random requests on several queues, each answer held against the oracle.

use super::{
    Disk, Rng, SimStorage, block_on,
    exec::{block_on_steps, join},
    lab::with_checkpoints,
    oracle::{Oracle, VersionId, fill_all},
    rot::Rot,
};
use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    rc::Rc,
};
use ublk_integrity::{
    BlockIndex, BlockRange, Buf, Device, Durability, OpenOptions, ReadError, RequestContext, Volume, WriteError,
    open::{OpenError, open},
};

pub const QUEUES: usize = 6;
/// Largest request in bytes.
pub const MAX_REQUEST: usize = 64 << 10;
const BLOCKS_IN_PLAY: u64 = 300;
/// Each of them is compared after each crash.
const MOST_ZEROED: u64 = 2048;

/// Where the bytes of a version are kept: below are those of its blocks.
const KEPT_SHIFT: u32 = 20;

/// Writes that were answered and are not in place, by their number: memory that outlives the
/// daemon, not the machine.
pub type Kept = Rc<RefCell<BTreeMap<u64, (BlockRange, VersionId)>>>;

/// By block: the oldest version, by its place in the history, that an anchor covers.
pub type Covered = Rc<RefCell<BTreeMap<u64, usize>>>;

/// From now on it covers what had been answered.
pub fn cover(covered: &Covered, answered: BTreeMap<u64, usize>) {
    let mut covered = covered.borrow_mut();
    for (block, place) in answered {
        let before = covered.entry(block).or_default();
        *before = place.max(*before);
    }
}

/// What all tasks of one life share.
pub struct World {
    pub io: SimStorage,
    pub volume: Volume,
    pub oracle: Rc<RefCell<Oracle>>,
    pub rng: RefCell<Rng>,
    pub next_version: Rc<RefCell<VersionId>>,
    pub kept: Kept,
    /// What was written last.
    pub tail: Cell<BlockRange>,
    /// Whether the checkpoint thread does something.
    pub at_checkpoint: Cell<bool>,
    /// By block: the oldest version, by its place in the history, that the anchor covers since a flush was answered. Where
    /// flushes wait for the anchor.
    pub covered: Option<Covered>,
    /// What rots meanwhile. Such blocks may be errors until they are written or healed.
    pub rot: Option<Rot>,
    /// The devices misbehave: any request may fail, but what is read must still be right.
    pub distrust: bool,
}

/// Nothing was written.
pub fn no_tail() -> Cell<BlockRange> {
    Cell::new(BlockRange::new(BlockIndex(0), 0))
}

/// One queue's memory.
pub struct Queue {
    context: RequestContext,
    /// Of the request that waits until an admitted write is durable.
    waiter: RequestContext,
    buf: Option<Buf>,
}

impl Queue {
    /// All queues, the first four as those of one thread, the others as those of another: what a
    /// thread has to hash or to log goes together.
    pub fn all(volume: &Volume) -> Vec<Self> {
        const OF_ONE: usize = 4;
        let context = |n| volume.context(usize::from(n >= OF_ONE));
        let mut all: Vec<_> = (0..QUEUES)
            .map(|n| Self { context: context(n), waiter: context(n), buf: Some(Buf::new(MAX_REQUEST)) })
            .collect();
        let (one, other) = all.split_at_mut(OF_ONE);
        for thread in [one, other] {
            RequestContext::work_together(thread.iter_mut().map(|queue| &mut queue.context));
        }
        all
    }
}

impl World {
    fn range(&self) -> BlockRange {
        let mut rng = self.rng.borrow_mut();
        let blocks = self.volume.blocks();
        // Few blocks, so that requests meet; now and then a large range, and what was the last block
        // before the volume has grown.
        let (first, count) = match rng.below(20) {
            0 => (rng.below(BLOCKS_IN_PLAY), 1 + rng.below(100)),
            1 => (blocks - 1 - rng.below(3), 1 + rng.below(3)),
            2..8 => (rng.below(4), 1 + rng.below(3)),
            _ => (126 + rng.below(5), 1 + rng.below(4)),
        };
        let first = first.min(blocks - 1);
        let most = (MAX_REQUEST / self.volume.block_size()) as u64;
        BlockRange::new(BlockIndex(first), count.min(blocks - first).min(most))
    }

    pub async fn request(&self, q: &mut Queue) {
        if let Some(rot) = self.rot.as_ref().filter(|rot| rot.chance(10)) {
            self.heal(rot, &mut q.context, &mut q.buf, rot.block(self)).await;
            return;
        }
        let kind = self.rng.borrow_mut().below(100);
        match kind {
            0..45 => self.write(q).await,
            45..55 => self.zero(q).await,
            55..70 => self.flush(q).await,
            _ => self.read(q).await,
        }
    }

    /// Often the tail of a log: what was written last, or that and the block behind it.
    fn range_to_write(&self) -> BlockRange {
        let mut tail = self.tail.get();
        tail.count += u64::from(self.rng.borrow_mut().chance(20));
        let again = tail.count > 0 && tail.end() <= self.volume.blocks() && tail.count < 8;
        let range = if again && self.rng.borrow_mut().chance(30) { tail } else { self.range() };
        self.tail.set(range);
        range
    }

    async fn write(&self, q: &mut Queue) {
        let range = self.range_to_write();
        let durable = self.rng.borrow_mut().chance(20);
        let version = {
            let mut next = self.next_version.borrow_mut();
            *next += 1;
            *next
        };
        let mut buf = q.buf.take().unwrap();
        fill_all(range, version, self.volume.block_size(), &mut buf);
        // One that is answered and fails latches the volume: not where failures are expected to pass.
        let may_admit = self.distrust || self.io.disk().faults.data_writes == 0;
        let durability = if durable { Durability::Durable } else { Durability::MayBeLost };
        let admitted = match may_admit && self.rng.borrow_mut().chance(60) {
            true => self.volume.admit(&q.context, range, durability),
            false => None,
        };
        // The history's order is the order in which ranges are taken: at the first poll, which is
        // now.
        let places = self.oracle.borrow_mut().issue(range, version);
        if let Some(mut admitted) = admitted {
            if !durable {
                self.oracle.borrow_mut().ack(range, &places, false);
            }
            let id = admitted.id();
            self.kept.borrow_mut().insert(id.number, (range, version));
            admitted.kept_at(version << KEPT_SHIFT);
            let clear = || _ = self.kept.borrow_mut().remove(&id.number);
            let safe = async {
                if durable && self.volume.wait_safe(&mut q.waiter, id).await.is_ok() {
                    self.oracle.borrow_mut().ack(range, &places, true);
                }
            };
            let write = self.volume.write_back(&self.io, &mut q.context, admitted, buf, clear);
            let ((result, buf), ()) = join(write, safe).await;
            q.buf = Some(buf);
            self.oracle.borrow_mut().ended(range);
            match result {
                Ok(()) => {}
                Err(_) if self.distrust => self.oracle.borrow_mut().fail(range),
                Err(e) => panic!("write of {range}, which was answered: {e}"),
            }
            return;
        }
        let (result, buf) = self.volume.write(&self.io, &mut q.context, range, buf, durability).await;
        q.buf = Some(buf);
        let mut oracle = self.oracle.borrow_mut();
        oracle.ended(range);
        match result {
            Ok(()) => oracle.ack(range, &places, durable),
            Err(WriteError::Device(_)) if self.io.disk().faults.data_writes > 0 => oracle.fail(range),
            Err(_) if self.distrust => oracle.fail(range),
            Err(e) => panic!("write of {range}: {e}"),
        }
    }

    async fn zero(&self, q: &mut Queue) {
        let (large, discard) = {
            let mut rng = self.rng.borrow_mut();
            (rng.chance(10), rng.chance(50))
        };
        let most = if self.rng.borrow_mut().chance(30) { u64::MAX } else { MOST_ZEROED };
        let all = BlockRange::new(BlockIndex(0), self.volume.blocks().min(most));
        let range = if large { all } else { self.range() };
        let places = self.oracle.borrow_mut().issue(range, 0);
        let result = self.volume.zero(&self.io, &mut q.context, range, discard).await;
        self.oracle.borrow_mut().ended(range);
        match result {
            Ok(()) => self.oracle.borrow_mut().ack(range, &places, false),
            Err(_) if self.distrust => {}
            Err(e) => panic!("zeroing of {range}: {e}"),
        }
    }

    async fn flush(&self, q: &mut Queue) {
        let snapshot = self.oracle.borrow().snapshot();
        let answered = self.covered.as_ref().map(|_| self.oracle.borrow().acknowledged());
        match self.volume.flush(&self.io, &mut q.context).await {
            Ok(()) => {
                self.oracle.borrow_mut().flushed(snapshot);
                self.covered.iter().zip(answered).for_each(|(covered, answered)| cover(covered, answered));
            }
            Err(_) if self.distrust => {}
            Err(e) => panic!("flush: {e}"),
        }
    }

    async fn read(&self, q: &mut Queue) {
        let range = self.range();
        let start: Vec<_> = range.blocks().map(|b| self.oracle.borrow_mut().before(b)).collect();
        let mut buf = q.buf.take().unwrap();
        let bs = self.volume.block_size();
        // Those that were kept are not yet in place, and their bytes what the version says.
        let mut copy = |at: u64| {
            fill_all(range, at >> KEPT_SHIFT, bs, &mut buf);
            true
        };
        let kept = self.rng.borrow_mut().chance(70) && self.volume.read_kept(&q.context, range, &mut copy);
        let (result, buf) = match kept {
            true => (Ok(()), buf),
            false => self.volume.read(&self.io, &mut q.context, range, buf).await,
        };
        match result {
            Ok(()) => {
                let blocks = buf.chunks_exact(self.volume.block_size());
                for ((block, at_start), data) in range.blocks().zip(&start).zip(blocks) {
                    self.oracle.borrow_mut().check_running(block, at_start, data, !kept);
                }
            }
            Err(_) if self.distrust => {}
            Err(e @ (ReadError::Mismatch { block } | ReadError::BadPage { block, .. })) => {
                let (before, oracle) = (&start[(block.0 - range.first.0) as usize], self.oracle.borrow());
                assert!(oracle.broken_since(block, before) && oracle.explains(&e), "false alarm while running: {e}");
            }
            Err(e) => panic!("read of {range}: {e}"),
        }
        q.buf = Some(buf);
    }

    pub async fn checkpoints(&self) {
        loop {
            let work = match &self.rot {
                Some(rot) => rot.work(self).await,
                None => Some(self.volume.work_wanted().await),
            };
            self.at_checkpoint.set(true);
            let result = match work {
                Some(work) => self.volume.work(&self.io, work).await,
                None => self.volume.checkpoint(&self.io).await,
            };
            self.at_checkpoint.set(false);
            assert!(result.is_ok() || self.distrust, "{result:?}");
        }
    }
}

/// Crashes during recovery, as often as the seed says and in the way that the caller does, until
/// one open runs to its end.
pub fn recover(
    io: &SimStorage,
    options: &OpenOptions,
    rng: &mut Rng,
    crash: fn(&mut Disk),
) -> Result<Volume, OpenError> {
    loop {
        let steps = if rng.chance(50) { rng.below(40) } else { u64::MAX };
        let mut options = options.clone();
        options.open_id = rng.bytes();
        let opened = block_on_steps(io, open(io, &super::key(), &options), steps);
        match opened {
            Some(opened) => return opened,
            None => crash(&mut io.disk()),
        }
    }
}

/// Writes what was kept, as a new daemon does; `false`: that took more steps, and it dies, too.
pub fn replay(volume: &Volume, io: &SimStorage, kept: &Kept, steps: u64) -> bool {
    let mut context = volume.context(0);
    let all = async {
        let first = || kept.borrow().first_key_value().map(|(number, write)| (*number, *write));
        while let Some((number, (range, version))) = first() {
            let mut buf = Buf::new(MAX_REQUEST);
            fill_all(range, version, volume.block_size(), &mut buf);
            let write = volume.write(io, &mut context, range, buf, Durability::MayBeLost);
            with_checkpoints(volume, io, write).await.0.expect("the devices are in order");
            kept.borrow_mut().remove(&number);
        }
    };
    block_on_steps(io, all, steps).is_some()
}

/// Reads every block that was ever touched, and compares.
pub fn compare(volume: &Volume, io: &SimStorage, oracle: &mut Oracle) {
    compare_but(volume, io, oracle, |_| false);
}

/// The same where some errors are right, too: they say nothing of the block.
pub fn compare_but(volume: &Volume, io: &SimStorage, oracle: &mut Oracle, passes: impl Fn(&ReadError) -> bool) {
    let mut context = volume.context(0);
    let bs = volume.block_size();
    let mut buf = Buf::new(bs);
    let data_from = volume.info().data_device_bytes - volume.info().size;
    for block in oracle.touched() {
        let torn = io.disk().is_torn(Device::Data, data_from + block.0 * bs as u64);
        let (result, b) = block_on(io, volume.read(io, &mut context, BlockRange::new(block, 1), buf));
        buf = b;
        match result {
            Ok(()) => oracle.settle(block, Some(&buf[..bs]), torn),
            Err(e) if passes(&e) => {}
            Err(e @ (ReadError::Mismatch { .. } | ReadError::BadPage { .. })) => {
                assert!(oracle.explains(&e), "false alarm after a crash: {e}");
                oracle.settle(block, None, torn);
            }
            Err(e) => panic!("block {block} after a crash: {e}"),
        }
    }
}

//! Volumes with an anchor: somebody puts older disks back, at each crash and in the middle of a life. See docs/testing.md.

mod branches;
mod cut_short;
mod directed;
mod key_area;

use crate::{
    crash::volume_of,
    sim::{
        Disk, Rng, SimStorage,
        anchor::{BODIES, SimAnchor, any_shape, note, open_anchored},
        block_on,
        exec::{Executor, Step, block_on_steps, yield_now},
        format_options, formatted,
        image::{LOG_OFFSET, Superblock},
        key,
        lab::with_checkpoints,
        life::live_beside,
        open_options,
        oracle::Oracle,
        reopen,
        seeds::{each, range, setting},
        world::{Covered, Kept, World, compare, cover, no_tail},
    },
};
use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::atomic::{AtomicU64, Ordering},
};
use ublk_integrity::{
    Access, AnchorLoss, BlockIndex, BlockRange, Buf, Device, Durability, Latched, OpenOptions, ReadError,
    RequestContext, Volume,
    anchor::{AnchorError, AnchorKeeper, AnchorPurpose, KeepError, Ticked},
    create::FormatOptions,
    open::OpenError,
};

/// Disks that were put back and refused, that were accepted, ticks that moved the anchor, requests to it that arrived late,
/// hosts that were fenced, lives whose flushes waited for the anchor.
static SEEN: [AtomicU64; 6] = [const { AtomicU64::new(0) }; 6];

fn saw(what: usize, times: u64) {
    SEEN[what].fetch_add(times, Ordering::Relaxed);
}

/// A volume, its anchor, and who looks at both.
struct Anchored {
    io: SimStorage,
    anchor: SimAnchor,
    options: OpenOptions,
    rng: Rng,
    oracle: Rc<RefCell<Oracle>>,
    covered: Covered,
    /// The disk as it was.
    snapshots: Vec<Disk>,
}

impl Anchored {
    fn new(seed: u64) -> (Self, Volume, AnchorKeeper) {
        let mut rng = Rng::new(seed);
        let (io, mut options) = volume_of(&mut rng, seed);
        options.max_requests += 1;
        let anchor = SimAnchor::of(any_shape(&mut rng), &io, seed);
        anchor.held().unreliable = [0, 10, 30][rng.index(3)];
        let (oracle, covered) = Default::default();
        let mut all = Self { io, anchor, options, rng, oracle, covered, snapshots: Vec::new() };
        let (volume, keeper) = all.begin();
        (all, volume, keeper)
    }

    /// An open cut short leaves no anchor, or one with which the volume opens.
    fn begin(&mut self) -> (Volume, AnchorKeeper) {
        loop {
            match self.try_open(AnchorPurpose::Begin, Disk::power_cut) {
                Ok(Some(opened)) => return opened,
                Ok(None) | Err(OpenError::Anchor(AnchorError::Away(_))) => {}
                Err(OpenError::Anchor(AnchorError::Present { .. })) => return self.open(Disk::power_cut),
                // It was cut short before the anchor had anything, or before the counter had a body.
                Err(OpenError::Anchor(AnchorError::Begun | AnchorError::Bare { .. })) => {
                    match self.try_open(AnchorPurpose::Reset, Disk::power_cut) {
                        Ok(Some(opened)) => return opened,
                        Ok(None) | Err(OpenError::Anchor(AnchorError::Away(_))) => {}
                        Err(e) => panic!("reset: {e}"),
                    }
                }
                Err(e) => panic!("begin: {e}"),
            }
        }
    }

    /// What a crash leaves is never refused.
    fn open(&mut self, crash: fn(&mut Disk)) -> (Volume, AnchorKeeper) {
        loop {
            match self.try_open(AnchorPurpose::Keep, crash) {
                Ok(Some(opened)) => return opened,
                Ok(None) | Err(OpenError::Anchor(AnchorError::Away(_))) => {}
                Err(e) => panic!("a false alarm: {e}"),
            }
        }
    }

    fn try_open(
        &mut self,
        purpose: AnchorPurpose,
        crash: fn(&mut Disk),
    ) -> Result<Option<(Volume, AnchorKeeper)>, OpenError> {
        let steps = if self.rng.chance(50) { self.rng.below(60) } else { u64::MAX };
        self.anchor.held().land();
        self.options.open_id = self.rng.bytes();
        let key = key();
        let open = open_anchored(&self.io, &key, &self.options, (&self.anchor, purpose));
        let opened = block_on_steps(&self.io, open, steps);
        if opened.is_none() {
            self.take_snapshot();
            crash(&mut self.io.disk());
        }
        opened.transpose()
    }

    fn take_snapshot(&mut self) {
        let seed = self.rng.next();
        let taken = self.io.disk().fork(seed);
        match self.snapshots.len() {
            0..8 => self.snapshots.push(taken),
            all => self.snapshots[1 + self.rng.index(all - 1)] = taken,
        }
    }

    /// Requests, checkpoints and ticks, until the power fails.
    fn live(&mut self, volume: Volume, mut keeper: AnchorKeeper, steps: u64) {
        let mut rng = Rng::new(self.rng.next());
        let (oracle, rng_of_world) = (self.oracle.clone(), RefCell::new(Rng::new(self.rng.next())));
        let world = World {
            io: self.io.clone(),
            volume,
            oracle,
            rng: rng_of_world,
            next_version: Rc::new(RefCell::new(self.rng.next() >> 32 << 10)),
            kept: Kept::default(),
            tail: no_tail(),
            at_checkpoint: Default::default(),
            // Of what flushes say to cover nothing is known but what was answered by then.
            covered: rng.chance(40).then(|| self.covered.clone()),
            rot: None,
            distrust: false,
        };
        let anchor = self.anchor.clone();
        let holds = world.covered.is_some();
        if holds {
            keeper.hold_flushes(&world.volume);
            saw(5, 1);
        }
        let ticks = async {
            let mut context = world.volume.context(1);
            let most = if holds { u64::MAX } else { rng.below(12) };
            for _ in 0..most {
                for _ in 0..rng.below(60) {
                    yield_now().await;
                }
                if holds && !anchor.held().away && rng.chance(80) {
                    keeper.flush_waits(&world.volume, &context).await;
                }
                anchor.held().land();
                anchor.held().away = rng.chance(5);
                let answered = world.oracle.borrow().acknowledged();
                let ticked = keeper.tick((&world.volume, &self.io), &mut context, (&anchor, &note())).await;
                match ticked {
                    Ok(Ticked::Anchored | Ticked::Idle) => {
                        saw(2, 1);
                        cover(&self.covered, answered);
                    }
                    Ok(Ticked::Partly) | Err(KeepError::Anchor(AnchorError::Away(_))) => {}
                    Err(e) => panic!("nobody else has opened it: {e}"),
                }
            }
        };
        let (io, covered) = (self.io.clone(), self.covered.clone());
        let mut watcher = Rng::new(rng_of(&world));
        let mut taken = Vec::new();
        live_beside(&world, watcher.next(), steps, ticks, || {
            if watcher.chance(2) && taken.len() < 6 {
                taken.push(io.disk().fork(watcher.next()));
            }
        });
        drop((world, covered));
        self.anchor.held().away = false;
        for disk in taken {
            self.take_snapshot();
            let last = self.snapshots.len() - 1;
            self.snapshots[last] = disk;
        }
    }

    /// What is read back is the only version, and the anchor covers it.
    fn settle(&mut self, volume: &Volume) {
        compare(volume, &self.io, &mut self.oracle.borrow_mut());
        self.covered.borrow_mut().clear();
    }

    /// In a copy of the world somebody puts back the disk as it was, a mixture, or a log cut short. It must be refused, or hold all
    /// that the anchor covers.
    fn tamper(&mut self) {
        let disk = self.mixture();
        let io = SimStorage::new(disk);
        let anchor = self.anchor.fork(&io);
        anchor.held().unreliable = 0;
        // Only an open moves it here.
        anchor.held().lose_late();
        let options = OpenOptions {
            open_id: self.rng.bytes(),
            access: if self.rng.chance(30) { Access::ReadOnly } else { Access::ReadWrite },
            ..self.options.clone()
        };
        let before = anchor.held().told();
        match block_on(&io, open_anchored(&io, &key(), &options, (&anchor, AnchorPurpose::Keep))) {
            Err(OpenError::Anchor(AnchorError::Older { .. } | AnchorError::Bare { .. })) => {
                assert!(anchor.held().told() == before, "a refused open leaves the anchor alone");
                saw(0, 1);
            }
            Ok((volume, _)) => {
                self.judge(&volume, &io);
                saw(1, 1);
            }
            // A mixture may contradict itself.
            Err(OpenError::Tampered { .. } | OpenError::Damaged) => {}
            Err(e) => panic!("{e}"),
        }
    }

    fn mixture(&mut self) -> Disk {
        let seed = self.rng.next();
        let any = |rng: &mut Rng, all: &[Disk]| rng.index(all.len());
        self.snapshots.push(self.io.disk().fork(seed));
        let all = &self.snapshots;
        let mut disk = all[any(&mut self.rng, all)].fork(seed ^ 1);
        let superblock = Superblock::newest(&disk);
        let log = LOG_OFFSET..LOG_OFFSET + superblock.log_size;
        let data = superblock.data_offset()..u64::MAX;
        if self.rng.chance(25) {
            disk.put_back(&all[any(&mut self.rng, all)], Device::Data, data);
        }
        if self.rng.chance(10) {
            disk.put_back(&all[any(&mut self.rng, all)], Device::Meta, 0..1 << 20);
        }
        if self.rng.chance(10) {
            disk.put_back(&all[any(&mut self.rng, all)], Device::Meta, log.clone());
        }
        for slot in BODIES {
            match self.rng.below(100) {
                0..25 => disk.put_back(&all[any(&mut self.rng, all)], Device::Meta, slot),
                25..28 => disk.poke(Device::Meta, slot.start, &[0; 4096]),
                _ => {}
            }
        }
        disk.power_cut();
        if self.rng.chance(30) {
            // The log ends here.
            let from = log.start + self.rng.below(superblock.log_size / 512) * 512;
            let zeros = vec![0; (log.end - from) as usize];
            disk.poke(Device::Meta, from, &zeros);
        }
        self.snapshots.pop();
        disk
    }

    fn judge(&self, volume: &Volume, io: &SimStorage) {
        let mut context = volume.context(0);
        let (bs, oracle) = (volume.block_size(), self.oracle.borrow());
        let mut buf = Buf::new(bs);
        for block in oracle.touched() {
            let one = BlockRange::new(block, 1);
            let covered = self.covered.borrow().get(&block.0).copied().unwrap_or(0);
            let (result, b) = block_on(io, volume.read(io, &mut context, one, buf));
            buf = b;
            match result {
                Ok(()) => oracle.check_exchanged(block, covered, &buf[..bs]),
                Err(ReadError::Mismatch { .. } | ReadError::BadPage { .. }) => {}
                Err(e) => panic!("block {block}: {e}"),
            }
        }
    }

    /// Another host opens a copy of the disk: it has the volume from then on, and the first one notices at its next tick.
    fn fence(&mut self, volume: &Volume, mut keeper: AnchorKeeper) {
        let seed = self.rng.next();
        let copy = SimStorage::new(self.io.disk().fork(seed));
        copy.disk().power_cut();
        let theirs = self.anchor.fork(&copy);
        theirs.held().unreliable = 0;
        let ours = theirs.at_host(&self.io);
        let options = OpenOptions { open_id: self.rng.bytes(), ..self.options.clone() };
        let opened = block_on(&copy, open_anchored(&copy, &key(), &options, (&theirs, AnchorPurpose::Keep)));
        let (second, _) = opened.expect("a copy of the newest state");
        drop(second);
        let mut context = volume.context(1);
        let (mut queue, buf) = (volume.context(0), Buf::new(volume.block_size()));
        let first = BlockRange::new(BlockIndex(0), 1);
        let write = volume.write(&self.io, &mut queue, first, buf, Durability::MayBeLost);
        block_on(&self.io, write).0.expect("the first host does not know yet");
        let ticked = block_on(&self.io, keeper.tick((volume, &self.io), &mut context, (&ours, &note())));
        assert!(matches!(ticked, Err(KeepError::Anchor(AnchorError::Taken { .. }))), "{ticked:?}");
        assert_eq!(volume.latched(), Some(Latched::Anchor(AnchorLoss::Taken)));
        saw(4, 1);
    }
}

fn rng_of(world: &World) -> u64 {
    world.rng.borrow_mut().next()
}

/// One seed: a volume through several lives, with older disks put back at each crash.
fn several_lives(seed: u64) {
    let (mut all, mut volume, mut keeper) = Anchored::new(seed);
    for _ in 0..1 + all.rng.below(4) {
        let most = if all.rng.chance(20) { 2000 } else { 300 };
        let steps = all.rng.below(most);
        all.live(volume, keeper, steps);
        let crash = if all.rng.chance(70) { Disk::power_cut } else { Disk::kill };
        crash(&mut all.io.disk());
        for _ in 0..all.rng.below(5) {
            all.tamper();
        }
        (volume, keeper) = all.open(crash);
        all.settle(&volume);
        for _ in 0..all.rng.below(3) {
            all.tamper();
        }
        if all.rng.chance(20) {
            all.fence(&volume, keeper);
            drop(volume);
            // Those writes were not covered: that disk is as good as the one before them.
            all.io.disk().power_cut();
            (volume, keeper) = all.open(Disk::power_cut);
            compare_after_fence(&mut all, &volume);
        }
    }
    saw(3, all.anchor.held().landed);
    stop(&mut all, volume, keeper);
}

/// The write of the first host that was fenced is of zeros, of block 0.
fn compare_after_fence(all: &mut Anchored, volume: &Volume) {
    let first = BlockRange::new(BlockIndex(0), 1);
    let _ = all.oracle.borrow_mut().issue(first, 0);
    all.settle(volume);
}

/// After an orderly end not one record may be missing.
fn stop(all: &mut Anchored, volume: Volume, mut keeper: AnchorKeeper) {
    all.take_snapshot();
    let mut context = volume.context(0);
    let mut buf = Buf::new(volume.block_size());
    for block in 0..all.rng.below(3) {
        let range = BlockRange::new(BlockIndex(block), 1);
        let version = all.rng.next() >> 32;
        crate::sim::oracle::fill_all(range, version, volume.block_size(), &mut buf);
        let places = all.oracle.borrow_mut().issue(range, version);
        let write = volume.write(&all.io, &mut context, range, buf, Durability::MayBeLost);
        let (result, b) = block_on(&all.io, write);
        buf = b;
        result.expect("the devices are in order");
        all.oracle.borrow_mut().ack(range, &places, false);
        all.take_snapshot();
    }
    block_on(&all.io, volume.close(&all.io)).expect("the devices are in order");
    all.anchor.held().unreliable = 0;
    let finished = block_on(&all.io, keeper.finish(&volume, (&all.anchor, &note())));
    finished.expect("the anchor is there");
    let answered = all.oracle.borrow().acknowledged();
    cover(&all.covered, answered);
    drop(volume);
    for _ in 0..4 {
        all.tamper();
    }
    let (volume, _) = all.open(Disk::power_cut);
    all.settle(&volume);
}

#[test]
fn an_older_disk_is_refused_and_what_a_crash_leaves_is_not() {
    if let Some(seed) = setting("ANCHOR_SEED") {
        several_lives(seed);
        return;
    }
    let seeds = range("ANCHOR_SEEDS").unwrap_or(0..if cfg!(debug_assertions) { 100 } else { 400 });
    each(&seeds, "ANCHOR_SEED", several_lives);
    let [refused, accepted, ticks, landed, fenced, held] = SEEN.each_ref().map(|n| n.load(Ordering::Relaxed));
    println!(
        "{} seeds: {refused} disks refused, {accepted} accepted; {ticks} ticks, {landed} late requests that landed, {fenced} hosts fenced, {held} lives with held flushes",
        seeds.end - seeds.start
    );
    assert!(seeds.end - seeds.start < 100 || [refused, accepted, ticks, landed, fenced, held].iter().all(|n| *n > 0));
}

//! The simulator: random requests on several queues, a power cut at random moments or after every
//! single device write, recovery (itself cut short now and then), and every block compared with
//! what it may rightly hold. See docs/testing.md.
//!
//! `CRASH_SEED=n` replays one seed, `CRASH_SEEDS=a..b` has other seeds, as scripts/soak does; `CRASH_POINTS=n` sets how many
//! crashes a run makes.

use crate::sim::{
    Disk, Rng, SimStorage, block_on, elsewhere,
    exec::block_on_steps,
    format_options, formatted,
    life::Life,
    open_options,
    oracle::Oracle,
    reopen,
    rot::{Rot, recover_rotten, see_tags_of_bad_blocks, see_what_is_whole},
    scrubs::{DONE, scrub_after},
    seeds::{range, setting},
    sick::open_sick,
    tag_algorithm,
    told::Told,
    world::{Kept, MAX_REQUEST, QUEUES, World, compare, no_tail, recover, replay},
};
use std::{
    cell::RefCell,
    future::ready,
    ops::ControlFlow,
    rc::Rc,
    sync::atomic::{AtomicU64, Ordering},
};
use ublk_integrity::{OpenOptions, Volume, VolumeInfo, check::check, create::Capacity, open::Grow};

/// Blocks that were exchanged while the power was off.
static EXCHANGED: AtomicU64 = AtomicU64::new(0);

/// Opens after which a volume was larger.
static GROWN: AtomicU64 = AtomicU64::new(0);

/// Lives that ended in good order.
static HANDED_OVER: AtomicU64 = AtomicU64::new(0);

/// What the sync log has had to do.
static SEEN: Seen = Seen([const { AtomicU64::new(0) }; 5]);

/// Writes that were carried, superseded and inherited, blocks that recovery has placed, and torn records.
struct Seen([AtomicU64; 5]);

impl Seen {
    /// A life has ended, or a recovery.
    fn add(&self, volume: &Volume) {
        let (counters, recovery) = (volume.status().counters, volume.recovery());
        let writes = [counters.carried_writes, counters.superseded_writes, counters.inherited_writes];
        let now = writes.into_iter().chain([recovery.placed, recovery.torn_records]);
        self.0.iter().zip(now).for_each(|(all, more)| _ = all.fetch_add(more, Ordering::Relaxed));
    }
    fn all(&self) -> [u64; 5] {
        self.0.each_ref().map(|n| n.load(Ordering::Relaxed))
    }
}

/// An empty volume of the seed's choice, and how to open it.
pub(crate) fn volume_of(rng: &mut Rng, seed: u64) -> (SimStorage, OpenOptions) {
    let mut format = format_options(512 << rng.below(4));
    format.tag = tag_algorithm(seed);
    format.separate_meta = rng.chance(30);
    if rng.chance(40) {
        format.capacity = Capacity::Bytes(5 << 20);
    }
    // Records are large enough to carry blocks from 320 KiB on.
    let sync_log = rng.chance(60);
    if sync_log {
        format.log_size = Some([320, 512, 1024][rng.index(3)] << 10);
    }
    let io = formatted(&format, seed);
    let info = ublk_integrity::create::plan(&format).unwrap();
    io.disk().set_data_from(info.data_device_bytes - info.size);
    let mut options = open_options(rng);
    options.separate_meta = format.separate_meta;
    options.max_request_bytes = MAX_REQUEST;
    options.max_requests = 2 * QUEUES + 2;
    options.cache_bytes = [0, 4096, 1 << 20][rng.index(3)];
    options.sync_log = sync_log && rng.chance(90);
    options.write_back_slots = [0, 2, 4, 8][rng.index(4)];
    (io, options)
}

/// Has the next open make the volume larger, or not: by a block, to as much as a tree of as many or
/// of more levels holds, to all there is room for.
fn grow(options: &mut OpenOptions, info: &VolumeInfo, rng: &mut Rng) {
    let block = u64::from(info.block_size);
    let pages_of_two_levels = block * 128 * 64;
    let sizes =
        [info.size + block, pages_of_two_levels, pages_of_two_levels + block, rng.below(info.max_size), info.max_size];
    let size = sizes[rng.index(sizes.len())] / block * block;
    options.grow = (rng.chance(30) && (info.size..=info.max_size).contains(&size)).then_some(Grow::To(size));
}

/// What is opened is as large as it was, or as was asked for; and that it stays.
fn has_grown(options: &mut OpenOptions, volume: &Volume, before: u64) {
    let asked = options.grow.take();
    assert_eq!(volume.info().size, if let Some(Grow::To(size)) = asked { size } else { before });
    GROWN.fetch_add((volume.info().size > before).into(), Ordering::Relaxed);
}

/// One seed: the power fails after each device write of a life, in a copy of the
/// world. Returns how often.
fn crash_after_every_write(seed: u64) -> u64 {
    let mut rng = Rng::new(!seed);
    let (io, mut options) = volume_of(&mut rng, seed);
    let info = reopen(&io, &options).unwrap().info().clone();
    grow(&mut options, &info, &mut rng);
    let volume = recover(&io, &options, &mut rng, Disk::power_cut).expect("recovery does not refuse");
    has_grown(&mut options, &volume, info.size);
    let world = World {
        io: io.clone(),
        volume,
        oracle: Rc::default(),
        rng: RefCell::new(Rng::new(rng.next())),
        next_version: Rc::default(),
        kept: Rc::default(),
        tail: no_tail(),
        at_checkpoint: Default::default(),
        covered: None,
        rot: Rot::draw(seed),
        distrust: false,
    };
    let (mut writes, mut crashes, steps) = (io.disk().writes, 0, rng.below(600));
    let mut told = Told::new(&io);
    let mut life = Life::new(&world, rng.next(), ready(()));
    let mut watch = || {
        told.look(&world);
        if io.disk().writes == writes {
            return;
        }
        writes = io.disk().writes;
        let copy = SimStorage::new(io.disk().fork(seed ^ writes));
        copy.disk().power_cut();
        let oracle = RefCell::new(world.oracle.borrow().clone());
        oracle.borrow_mut().crashed(told.recorded());
        if rng.chance(10) {
            open_sick(&copy, &options, &mut rng, &mut oracle.borrow_mut());
            copy.disk().power_cut();
        }
        let volume = recover_rotten(&copy, &options, &mut rng, Disk::power_cut, &mut oracle.borrow_mut());
        SEEN.add(&volume);
        if rng.chance(10) {
            scrub_after(&volume, &copy, &oracle);
        }
        compare(&volume, &copy, &mut oracle.borrow_mut());
        if rng.chance(20) {
            let exchanged = told.exchange(&io, &world.oracle.borrow(), &options, &mut rng);
            EXCHANGED.fetch_add(exchanged, Ordering::Relaxed);
        }
        crashes += 1;
    };
    life.requests(steps, &mut watch);
    life.quiet(quiet_steps(&world), &mut watch);
    drop(life);
    SEEN.add(&world.volume);
    crashes
}

/// After some lives in which something rots no more requests come for a while: what has rotted is mended and healed.
fn quiet_steps(world: &World) -> u64 {
    world.rot.as_ref().filter(|rot| rot.chance(50)).map_or(0, |rot| rot.below(600))
}

/// A volume that is at rest is closed, for another daemon to open it. `false`: this one dies meanwhile.
fn closed(world: &World, rng: &mut Rng) -> bool {
    let World { io, volume, oracle, .. } = world;
    assert!(world.kept.borrow().is_empty(), "what was admitted is in place");
    let answered = oracle.borrow().snapshot();
    let steps = if rng.chance(50) { rng.below(80) } else { u64::MAX };
    let Some(ended) = block_on_steps(io, volume.close(io), steps) else { return false };
    ended.expect("the devices are in order");
    oracle.borrow_mut().flushed(answered);
    HANDED_OVER.fetch_add(1, Ordering::Relaxed);
    true
}

/// One seed: a volume through several lives and crashes. Returns how many.
fn several_lives(seed: u64) -> u64 {
    let mut rng = Rng::new(seed);
    let (io, mut options) = volume_of(&mut rng, seed);
    let oracle = Rc::new(RefCell::new(Oracle::default()));
    let next_version = Rc::new(RefCell::new(0));
    let kept = Kept::default();
    let mut crashes = 0;
    let mut volume = recover(&io, &options, &mut rng, Disk::power_cut).expect("recovery does not refuse");
    for _ in 0..1 + rng.below(6) {
        let info = volume.info().clone();
        io.disk().faults.data_writes = if rng.chance(20) { 5 } else { 0 };
        let world = World {
            io: io.clone(),
            volume,
            oracle: oracle.clone(),
            rng: RefCell::new(Rng::new(rng.next())),
            next_version: next_version.clone(),
            kept: kept.clone(),
            tail: no_tail(),
            at_checkpoint: Default::default(),
            covered: None,
            rot: Rot::draw(rng.clone().next()),
            distrust: false,
        };
        let steps = if rng.chance(20) { rng.below(3000) } else { rng.below(300) };
        let mut told = Told::new(&io);
        let hands_over = io.disk().faults.data_writes == 0 && rng.chance(20);
        let mut life = Life::new(&world, rng.next(), ready(()));
        life.requests(steps, || told.look(&world));
        life.quiet(quiet_steps(&world), || told.look(&world));
        match hands_over {
            true => life.rest(|| told.look(&world)),
            false => drop(life),
        }
        io.disk().trace = None;
        SEEN.add(&world.volume);
        let handed_over = hands_over && closed(&world, &mut rng);
        drop(world);
        let faults = std::mem::take(&mut io.disk().faults);
        let crash = if rng.chance(70) {
            kept.borrow_mut().clear();
            Disk::power_cut
        } else {
            oracle.borrow_mut().killed();
            Disk::kill
        };
        crash(&mut io.disk());
        oracle.borrow_mut().crashed(told.recorded());
        crashes += 1;
        if rng.chance(50) {
            let exchanged = told.exchange(&io, &oracle.borrow(), &options, &mut rng);
            EXCHANGED.fetch_add(exchanged, Ordering::Relaxed);
        }
        // What is kept of a daemon that was killed is put in place when the volume opens for good:
        // it is missed before.
        if kept.borrow().is_empty() && rng.chance(30) {
            open_sick(&io, &options, &mut rng, &mut oracle.borrow_mut());
            crash(&mut io.disk());
        }
        grow(&mut options, &info, &mut rng);
        volume = recover_rotten(&io, &options, &mut rng, crash, &mut oracle.borrow_mut());
        has_grown(&mut options, &volume, info.size);
        SEEN.add(&volume);
        if handed_over {
            let found = volume.recovery();
            assert_eq!((found.records, found.placed, found.older), (0, 0, 0), "it was closed: {found:?}");
        }
        if setting("CRASH_SEED").is_some() {
            println!("{faults:?}, {steps} steps: {:?}", volume.recovery());
        }
        if !replay(&volume, &io, &kept, rng.below(40)) {
            drop(volume);
            io.disk().kill();
            volume = recover_rotten(&io, &options, &mut rng, Disk::kill, &mut oracle.borrow_mut());
            replay(&volume, &io, &kept, u64::MAX);
        }
        if rng.chance(20) {
            scrub_after(&volume, &io, &oracle);
        }
        compare(&volume, &io, &mut oracle.borrow_mut());
        if rng.chance(5) {
            let mut context = volume.context(0);
            let report = block_on(&io, check(&volume, &io, &mut context, |_| ControlFlow::Continue(())));
            let bad = report.bad_runs.iter().flat_map(|r| r.range.blocks());
            for block in bad {
                assert!(oracle.borrow().broken(block), "check reports block {block}");
            }
        }
        see_what_is_whole(&io, &mut oracle.borrow_mut());
        see_tags_of_bad_blocks(&io, &mut oracle.borrow_mut());
        // RequestContexts are counted: the next life takes its own.
        drop(volume);
        options.open_id = rng.bytes();
        volume = reopen(&io, &options).unwrap();
    }
    crashes
}

/// Runs seeds until there were enough crashes, or those that are asked for, on all processors. By then the runs of this process have
/// mended at least so many pages, healed as many blocks and refused as many replicas.
fn crash_points(default: u64, mended_at_least: u64, run: fn(u64) -> u64) {
    if let Some(seed) = setting("CRASH_SEED") {
        run(seed);
        return;
    }
    // A fifth where nothing is optimized and arithmetic is checked.
    let default = if cfg!(debug_assertions) { default / 5 } else { default };
    let points = setting("CRASH_POINTS").unwrap_or(default);
    let asked = range("CRASH_SEEDS");
    let start = std::time::Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let until_enough = |first: u64| {
        let (mut done, mut seed) = (0, asked.as_ref().map_or(0, |seeds| seeds.start) + first);
        while asked.as_ref().map_or(done < points / threads, |seeds| seeds.contains(&seed)) {
            match std::panic::catch_unwind(|| run(seed)) {
                Ok(crashes) => done += crashes,
                Err(_) => panic!("seed {seed}: run again with CRASH_SEED={seed}"),
            }
            seed += threads;
        }
        assert!(done < 500 || elsewhere::done() > 0, "no other thread was ever handed blocks to hash");
        assert!(
            done < 500 || EXCHANGED.load(Ordering::Relaxed) > 0,
            "no block of which something is recorded was exchanged"
        );
        done
    };
    let total: u64 = std::thread::scope(|s| {
        let until_enough = &until_enough;
        let workers: Vec<_> = (0..threads).map(|first| s.spawn(move || until_enough(first))).collect();
        workers.into_iter().map(|w| w.join().expect("a seed failed, see above")).sum()
    });
    let minutes = start.elapsed().as_secs_f64() / 60.0;
    println!("{total} crash points, {:.0} a minute", total as f64 / minutes);
    let [carried, superseded, inherited, placed, torn] = SEEN.all();
    let all = [&DONE.passes, &DONE.bad_blocks, &DONE.mended_pages, &DONE.healed, &DONE.refused];
    let [passes, bad, mended, healed, refused] = all.map(|n| n.load(Ordering::Relaxed));
    println!("{passes} passes of a scrub, {bad} bad blocks, {mended} pages mended");
    println!("{healed} blocks healed, {refused} replicas refused");
    assert!(total < 3000 || passes > 100, "the scrub had nothing to do");
    assert!(
        total < 3000 || [mended, healed, refused].iter().all(|n| *n >= mended_at_least),
        "nothing was mended or healed"
    );
    println!("{carried} writes carried, {superseded} superseded, {inherited} inherited");
    println!("recovery placed {placed} blocks, {torn} torn records");
    assert!(
        total < 3000 || [carried, superseded, inherited, placed, torn].iter().all(|n| *n > 0),
        "the sync log had nothing to do"
    );
    assert!(total < 3000 || GROWN.load(Ordering::Relaxed) > 0, "no volume has grown");
    println!("{} hand-overs", HANDED_OVER.load(Ordering::Relaxed));
}

#[test]
fn every_block_survives_every_crash() {
    crash_points(5000, 100, several_lives);
}

#[test]
fn every_block_survives_a_crash_after_any_write() {
    crash_points(15_000, 5, crash_after_every_write);
}

//! Devices that lie while the volume runs, and somebody who changes the medium while it is off: never
//! a wrong version. EILSEQ and a refused open are right answers here, and so is an allowed version.
//!
//! `ADVERSARY_SEED=n` replays one seed; `ADVERSARY_SEEDS=a..b` has others.

use crate::sim::{
    Disk, Rng, SimStorage,
    faults::Faults,
    floors::{Floors, Since},
    format_options, formatted,
    image::{self, PAGE, SUPERBLOCK_BYTES, SUPERBLOCKS, Superblock},
    life::live,
    open_options,
    oracle::Oracle,
    reopen,
    seeds::{range, setting},
    tag_algorithm,
    world::{MAX_REQUEST, QUEUES, World, compare, no_tail, recover},
};
use std::{cell::RefCell, rc::Rc};
use ublk_integrity::{Device, OpenOptions, Volume};

/// Forks of one crash state, each changed in one way.
const TRIALS: u64 = 12;

struct Scene {
    io: SimStorage,
    options: OpenOptions,
    oracle: Rc<RefCell<Oracle>>,
    next_version: Rc<RefCell<u64>>,
    rng: Rng,
}

impl Scene {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0xad7e);
        let mut format = format_options(512 << rng.below(4));
        format.tag = tag_algorithm(seed);
        format.separate_meta = rng.chance(50);
        let io = formatted(&format, seed);
        let data_from = Superblock::newest(&io.disk()).data_offset();
        io.disk().set_data_from(data_from);
        let mut options = open_options(&mut rng);
        options.separate_meta = format.separate_meta;
        options.max_request_bytes = MAX_REQUEST;
        options.max_requests = 2 * QUEUES + 2;
        options.cache_bytes = [0, 1 << 20][rng.index(2)];
        Self { io, options, oracle: Rc::default(), next_version: Rc::default(), rng }
    }

    fn world(&mut self, volume: Volume, distrust: bool) -> World {
        World {
            io: self.io.clone(),
            volume,
            oracle: self.oracle.clone(),
            rng: RefCell::new(Rng::new(self.rng.next())),
            next_version: self.next_version.clone(),
            kept: Rc::default(),
            tail: no_tail(),
            at_checkpoint: Default::default(),
            covered: None,
            rot: None,
            distrust,
        }
    }

    /// A life that ends in a power cut. Returns the medium as it was at some moments before.
    fn live(&mut self, volume: Volume, distrust: bool) -> Vec<Disk> {
        let world = self.world(volume, distrust);
        let (io, mut when) = (self.io.clone(), Rng::new(self.rng.next()));
        let mut past = vec![io.disk().fork(1)];
        live(&world, self.rng.next(), 400 + self.rng.below(2000), || {
            if when.below(400) == 0 {
                past.push(io.disk().fork(1));
            }
        });
        drop(world);
        self.io.disk().faults = Faults::default();
        self.io.disk().power_cut();
        past
    }
}

/// One change to the medium; says what it was and how far back it may set a block.
fn tamper(disk: &mut Disk, past: &Disk, oracle: &Oracle, rng: &mut Rng) -> (String, Since) {
    let superblock = Superblock::newest(disk);
    let touched = oracle.touched();
    let block = touched[rng.index(touched.len())].0;
    let data = (Device::Data, superblock.block_offset(block), superblock.block_size as usize);
    let pages = superblock.pages(disk);
    let page = pages.get(rng.index(pages.len().max(1)));
    let records = image::records(disk);
    let record = records.get(rng.index(records.len().max(1)));
    let mut back = |(device, offset, len): (Device, u64, usize)| {
        let old = past.peek(device, offset, len);
        disk.poke(device, offset, &old);
    };
    let copy = |i: usize| (Device::Meta, SUPERBLOCKS[i], SUPERBLOCK_BYTES);
    match (rng.below(9), page, record) {
        (0, ..) => back(data),
        (1, ..) => back(copy(rng.index(2))),
        (2, ..) => [0, 1].into_iter().for_each(|i| back(copy(i))),
        (3, Some(page), _) => {
            back((Device::Meta, page.offset, PAGE as usize));
            return (format!("old bytes of {page:?}"), Since::Flush);
        }
        (4, Some(page), _) if page.level == 0 => {
            let block = page.index * 128 + rng.below(128).min(superblock.blocks - 1);
            back((Device::Meta, page.offset + block % 128 * 32, 32));
            back((Device::Data, superblock.block_offset(block), data.2));
            return (format!("old tag and data of block {block}"), Since::Flush);
        }
        (5, _, Some(record)) => {
            back((Device::Meta, record.offset, record.bytes as usize));
            return (format!("old bytes in place of record {}", record.number), Since::Checkpoint);
        }
        (6, _, Some(record)) => {
            flip(disk, Device::Meta, record.offset + rng.below(record.bytes), rng);
            return (format!("rot in record {}", record.number), Since::Checkpoint);
        }
        (7, Some(page), _) => flip(disk, Device::Meta, page.offset + rng.below(PAGE), rng),
        _ => flip(disk, Device::Data, data.1 + rng.below(data.2 as u64), rng),
    }
    (format!("block {block}, a superblock or a page, old or rotten"), Since::Flush)
}

fn flip(disk: &mut Disk, device: Device, at: u64, rng: &mut Rng) {
    let byte = disk.peek(device, at, 1)[0];
    disk.poke(device, at, &[byte ^ (1 << rng.below(8))]);
}

/// What the tests have seen, so that they can't pass for want of anything to see.
#[derive(Default, Debug)]
struct Seen {
    trials: u64,
    refused: u64,
    eilseq: u64,
    /// Blocks that a power cut must not take back.
    flushed: u64,
}

impl Seen {
    /// Opens the medium and reads all; then once more, since the first has written its findings down.
    fn open_and_judge(&mut self, io: &SimStorage, options: &OpenOptions, floors: &Floors, what: &str) {
        self.trials += 1;
        for open in 0..2 {
            let options = OpenOptions { open_id: [open; 32], ..options.clone() };
            match reopen(io, &options) {
                Ok(volume) => self.eilseq += u64::from(floors.judge(&volume, io, what) > 0),
                Err(_) if open == 0 => {
                    self.refused += 1;
                    return;
                }
                Err(e) => panic!("{what}: what was opened once opens again: {e}"),
            }
        }
    }
}

fn old_and_rotten(seed: u64, seen: &mut Seen) {
    let mut scene = Scene::new(seed);
    let volume = reopen(&scene.io, &scene.options).unwrap();
    let past = scene.live(volume, false);
    for trial in 0..TRIALS {
        let io = SimStorage::new(scene.io.disk().fork(seed ^ trial));
        let when = scene.rng.index(past.len());
        let oracle = scene.oracle.borrow();
        let before = [Since::Checkpoint, Since::Flush].map(|since| Floors::of(&io.disk(), &oracle, since));
        let (what, since) = tamper(&mut io.disk(), &past[when], &oracle, &mut scene.rng);
        let [checkpoint, flush] = &before;
        let floors = if matches!(since, Since::Flush) { flush } else { checkpoint };
        seen.open_and_judge(&io, &scene.options, floors, &what);
    }
}

fn lying_devices(seed: u64, seen: &mut Seen) {
    let mut scene = Scene::new(seed);
    let volume = reopen(&scene.io, &scene.options).unwrap();
    let device = [Device::Data, Device::Meta][scene.rng.index(2)];
    let mut faults = Faults::default();
    match scene.rng.below(4) {
        0 => faults.lost = Some((device, 3)),
        1 => faults.misdirected = Some((device, 3)),
        2 => faults.lying = Some(device),
        _ => faults.meta_reads = 10,
    }
    scene.io.disk().faults = faults;
    scene.live(volume, true);
    // Whatever the metadata device forgot may have been the end of the log.
    let since = if device == Device::Meta { Since::Checkpoint } else { Since::Flush };
    let floors = Floors::of(&scene.io.disk(), &scene.oracle.borrow(), since);
    seen.open_and_judge(&scene.io, &scene.options, &floors, &format!("{faults:?}"));
}

/// Devices that fail now and then and say so, in whatever they are asked for. While they do,
/// an answer is an error or right; on a healthy disk nothing is missing that was
/// acknowledged and flushed.
fn failing_devices(seed: u64, seen: &mut Seen) {
    let mut scene = Scene::new(seed);
    let volume = reopen(&scene.io, &scene.options).unwrap();
    let rng = &mut scene.rng;
    // The first that fails is the last; often, so that it is not made good by the next.
    let syncs = [0, 1, 30][rng.index(3)];
    let mut some = |percent| if rng.chance(50) { percent } else { 0 };
    let faults = Faults {
        data_reads: some(5),
        data_writes: some(5),
        meta_reads: some(5),
        meta_writes: some(1),
        syncs,
        ..Faults::default()
    };
    scene.io.disk().faults = faults;
    scene.live(volume, true);
    let options = OpenOptions { open_id: scene.rng.bytes(), ..scene.options.clone() };
    let volume = recover(&scene.io, &options, &mut scene.rng, Disk::power_cut).expect("a healthy disk opens");
    let mut oracle = scene.oracle.borrow_mut();
    seen.trials += 1;
    seen.flushed += oracle.flushed_blocks();
    compare(&volume, &scene.io, &mut oracle);
    seen.eilseq += oracle.touched().into_iter().filter(|block| oracle.broken(*block)).count() as u64;
}

fn run_seeds(default: u64, test: fn(u64, &mut Seen)) -> Seen {
    let mut seen = Seen::default();
    let seeds = match setting("ADVERSARY_SEED") {
        Some(seed) => seed..seed + 1,
        None => range("ADVERSARY_SEEDS").unwrap_or(0..default),
    };
    for seed in seeds {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| test(seed, &mut seen)));
        assert!(result.is_ok(), "seed {seed}: run again with ADVERSARY_SEED={seed}");
    }
    println!("{seen:?}");
    seen
}

#[test]
fn old_and_rotten_things_are_never_read() {
    let seen = run_seeds(60, old_and_rotten);
    assert!(setting("ADVERSARY_SEED").is_some() || (seen.refused > 20 && seen.eilseq > 100), "{seen:?}");
}

#[test]
fn lying_devices_are_never_believed() {
    let seen = run_seeds(150, lying_devices);
    assert!(setting("ADVERSARY_SEED").is_some() || (seen.refused > 3 && seen.eilseq > 20), "{seen:?}");
}

#[test]
fn failing_devices_lose_nothing_that_was_flushed() {
    let seen = run_seeds(150, failing_devices);
    assert!(setting("ADVERSARY_SEED").is_some() || (seen.flushed > 1000 && seen.eilseq > 0), "{seen:?}");
}

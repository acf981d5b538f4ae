//! Mutated bytes for every parser of what lies on the devices: superblock, identity block, log record, page, and the
//! ring that recovery follows. Whatever lies there: an error or an open volume, never a panic, never a hang.
//!
//! Half of the time the checksums and MACs are made good again, or nothing behind them would be reached.
//! The seeds are the golden images. `FUZZ_SECONDS=60` for longer runs, `FUZZ_SEED` for another start.

use crate::{
    golden::{VERSION_1, image_of},
    sim::{
        Lab, Rng, SimStorage, block_on, format_options,
        image::{self, PAGE, SUPERBLOCK_BYTES, SUPERBLOCKS},
        open_options,
    },
};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::{Duration, Instant},
};
use ublk_integrity::{Device, OpenOptions, create::FormatOptions, open};

/// Numbers at which fields turn from one meaning to another.
const EDGES: [u64; 12] = [0, 1, 2, 3, 4, 5, 127, 128, 0xffff, u32::MAX as u64, 1 << 63, u64::MAX];

/// One to four changes.
fn mutate(rng: &mut Rng, bytes: &mut [u8]) {
    for _ in 0..=rng.below(3) {
        let at = rng.below(bytes.len() as u64) as usize;
        let width = [1, 2, 4, 8][rng.below(4) as usize];
        let place = at / width * width;
        match rng.below(4) {
            0 => bytes[at] ^= 1 << rng.below(8),
            1 => bytes[at] = rng.below(256) as u8,
            2 => {
                let edge = EDGES[rng.below(EDGES.len() as u64) as usize].to_le_bytes();
                bytes[place..place + width].copy_from_slice(&edge[..width]);
            }
            _ => {
                let from = rng.below(bytes.len() as u64) as usize / width * width;
                bytes.copy_within(from..from + width, place);
            }
        }
    }
}

/// Runs `once` on a fresh copy of each seed in turn until the time is up; a panic names the seed of its round.
fn fuzz(seeds: &[(SimStorage, OpenOptions)], mut once: impl FnMut(&mut Rng, &SimStorage)) {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let end = Instant::now() + Duration::from_secs(number("FUZZ_SECONDS").unwrap_or(2));
    let first = number("FUZZ_SEED").unwrap_or(1);
    for seed in first.. {
        let (io, options) = &seeds[seed as usize % seeds.len()];
        let fork = SimStorage::new(io.disk().fork(seed));
        let mut rng = Rng::new(seed);
        let round = catch_unwind(AssertUnwindSafe(|| {
            once(&mut rng, &fork);
            look_at(&fork, options);
        }));
        assert!(round.is_ok(), "FUZZ_SEED={seed}");
        if Instant::now() > end {
            break;
        }
    }
}

/// All that is done with a device whose content is not known.
fn look_at(io: &SimStorage, options: &OpenOptions) {
    let _ = block_on(io, open::dump(io));
    let Ok(mut lab) = Lab::open(io.clone(), options) else { return };
    for block in [0, 1, 130, 200] {
        let _ = lab.read(block);
    }
    let _ = lab.try_write(1, 1, 9);
    let _ = lab.try_checkpoint();
}

fn seeds() -> Vec<(SimStorage, OpenOptions)> {
    VERSION_1.iter().map(image_of).collect()
}

fn change(rng: &mut Rng, io: &SimStorage, device: Device, at: u64, len: usize, sign: impl FnOnce(&mut [u8])) {
    let mut bytes = io.disk().peek(device, at, len);
    mutate(rng, &mut bytes);
    sign(&mut bytes);
    io.disk().poke(device, at, &bytes);
}

#[test]
fn superblocks() {
    fuzz(&seeds(), |rng, io| {
        let (version, both, signed) = (rng.below(3), rng.chance(60), rng.chance(70));
        let seed = rng.below(1 << 32);
        for at in &SUPERBLOCKS[..if both { 2 } else { 1 }] {
            let sign = |bytes: &mut [u8]| {
                if version == 2 {
                    bytes[8] = 2;
                }
                if signed {
                    image::sign_block(bytes);
                }
            };
            change(&mut Rng::new(seed), io, Device::Meta, *at, SUPERBLOCK_BYTES, sign);
        }
    });
}

#[test]
fn identity_blocks() {
    let format = FormatOptions { separate_meta: true, ..format_options(512) };
    let options = OpenOptions { separate_meta: true, ..open_options(&mut Rng::new(1)) };
    let lab = Lab::new(&format, &options);
    fuzz(&[(lab.io.clone(), options)], |rng, io| {
        let (signed, alone) = (rng.chance(70), rng.chance(30));
        let sign = |bytes: &mut [u8]| {
            if signed {
                image::sign_block(bytes);
            }
        };
        change(rng, io, Device::Data, 0, SUPERBLOCK_BYTES, sign);
        if alone {
            SUPERBLOCKS.iter().for_each(|at| io.disk().poke(Device::Meta, *at, &[0; SUPERBLOCK_BYTES]));
        }
    });
}

#[test]
fn records() {
    fuzz(&seeds(), |rng, io| {
        let records = image::records(&io.disk());
        let record = &records[rng.below(records.len() as u64) as usize];
        let superblock = image::Superblock::newest(&io.disk());
        let signed = rng.chance(70);
        let sign = |bytes: &mut [u8]| {
            if signed {
                image::sign_record(&superblock, bytes);
            }
        };
        change(rng, io, Device::Meta, record.offset, record.bytes as usize, sign);
    });
}

#[test]
fn pages() {
    fuzz(&seeds(), |rng, io| {
        let superblock = image::Superblock::newest(&io.disk());
        let pages = superblock.pages(&io.disk());
        let page = &pages[rng.below(pages.len() as u64) as usize];
        change(rng, io, Device::Meta, page.offset, PAGE as usize, |_| ());
    });
}

#[test]
fn recovery_on_damaged_logs() {
    fuzz(&seeds(), |rng, io| {
        let superblock = image::Superblock::newest(&io.disk());
        for _ in 0..=rng.below(4) {
            let at = image::LOG_OFFSET + rng.below(superblock.log_size / 512) * 512;
            let from = image::LOG_OFFSET + rng.below(superblock.log_size / 512) * 512;
            let copied = io.disk().peek(Device::Meta, from, 512);
            match rng.below(3) {
                0 => io.disk().poke(Device::Meta, at, &copied),
                1 => change(rng, io, Device::Meta, at, 512, |_| ()),
                _ => io.disk().poke(Device::Meta, at, &[0; 512]),
            }
        }
    });
}

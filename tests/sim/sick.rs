//! A disk that is sick when the volume is opened: what can't be read is an error, and nothing that
//! a well disk would have given is lost by that.

use super::{
    Rng, SimStorage,
    disk::{BadRange, Faults},
    exec::block_on_steps,
    image::Superblock,
    oracle::Oracle,
    world::{compare, compare_but},
};
use std::time::Duration;
use ublk_integrity::{
    Access, Device, OpenOptions, ReadError,
    open::{OpenError, open},
};

/// What is wrong with it: some of these at a time.
fn fall_ill(io: &SimStorage, rng: &mut Rng) {
    let superblock = Superblock::newest(&io.disk());
    let mut bad = Vec::new();
    // Some disks try for long before they give up.
    let takes = Duration::from_secs(if rng.chance(20) { 1 + rng.below(30) } else { 0 });
    let slow = if rng.chance(10) { 50 } else { 0 };
    let mut faults = Faults { slow, in_order: rng.chance(50), ..Faults::default() };
    let mut unreadable = |device, from: u64, sectors: u64| {
        let range = from / 512 * 512..from / 512 * 512 + 512 * sectors;
        bad.push(BadRange { takes, ..BadRange::unreadable(device, range) });
    };
    match rng.below(10) {
        // The live log lies where it begins; the rest of the ring is old.
        0..3 => {
            let ahead = if rng.chance(70) { rng.below(16 << 10) } else { rng.below(superblock.log_size) };
            let place = (superblock.log_begin + ahead) % superblock.log_size;
            unreadable(Device::Meta, super::image::LOG_OFFSET + place, 1 + rng.below(4));
        }
        3 => (0..1 + rng.below(100)).for_each(|_| {
            unreadable(Device::Data, superblock.block_offset(rng.below(200)), superblock.block_size / 512);
        }),
        4 => faults.data_reads = 1 + rng.below(100),
        5 => faults.meta_reads = 1 + rng.below(50),
        6 => {
            faults.data_dead = true;
            faults.data_dead_until = rng.chance(50).then(|| io.disk().now() + Duration::from_secs(rng.below(20)));
        }
        7 => faults.garbled = 1 + rng.below(60),
        // A region, perhaps all that was ever written.
        8 => {
            let first = if rng.chance(50) { 0 } else { rng.below(200) };
            unreadable(Device::Data, superblock.block_offset(first), 600 * superblock.block_size / 512);
        }
        _ => (0..1 + rng.below(4)).for_each(|_| {
            let pages = superblock.pages(&io.disk());
            if !pages.is_empty() {
                unreadable(Device::Meta, pages[rng.index(pages.len())].offset, 8);
            }
        }),
    }
    io.disk().bad_ranges = bad;
    io.disk().faults = faults;
}

fn recuperate(io: &SimStorage) {
    io.disk().bad_ranges.clear();
    io.disk().faults = Faults::default();
}

/// Opens the volume on a disk that is sick for that time, perhaps cut short, and looks at all that
/// is served; then again when the disk is well.
pub fn open_sick(io: &SimStorage, options: &OpenOptions, rng: &mut Rng, oracle: &mut Oracle) {
    let access = if rng.chance(50) { Access::ReadOnly } else { Access::ReadWrite };
    let options = OpenOptions { access, open_id: rng.bytes(), ..options.clone() };
    let steps = if rng.chance(20) { rng.below(200) } else { u64::MAX };
    let newest = Superblock::newest_bytes(&io.disk());
    fall_ill(io, rng);
    let writes = io.disk().writes;
    let faults = io.disk().faults;
    let may_be_away = faults.data_dead || faults.data_reads + faults.meta_reads + faults.slow > 0;
    let opened = block_on_steps(io, open(io, &super::key(), &options), steps);
    match opened {
        None => {}
        Some(Err(OpenError::Away(e))) if !may_be_away => panic!("bad sectors are no device that is away: {e}"),
        // What is refused is left as it was,
        Some(Err(OpenError::Device(_) | OpenError::LogUnreadable(_) | OpenError::Away(_)))
            if io.disk().writes == writes => {}
        // but that both superblock copies are the newest, where a part of the log can't be read any more when its
        // blocks are to be put in place: before that is tried they must be.
        Some(Err(OpenError::Device(_) | OpenError::LogUnreadable(_) | OpenError::Away(_))) => {
            assert_eq!((io.disk().writes, access), (writes + 1, Access::ReadWrite));
            assert!(Superblock::copies(&io.disk()).iter().all(|copy| *copy == newest));
        }
        Some(Err(e)) => panic!("a sick disk is no tampered one: {e}"),
        Some(Ok(volume)) => {
            let garbled = io.disk().faults.garbled > 0;
            compare_but(&volume, io, oracle, |e| match e {
                ReadError::Device(_) => true,
                ReadError::Mismatch { .. } => garbled,
                _ => false,
            });
            recuperate(io);
            compare(&volume, io, oracle);
            if access == Access::ReadOnly || volume.latched().is_some() {
                let undecided = volume.status().undecided_blocks;
                let is_lost = !oracle.lost_pages().is_empty();
                assert!(undecided == 0 || is_lost, "each has been read from a well disk");
            }
        }
    }
    recuperate(io);
}

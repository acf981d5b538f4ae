//! Format version 2: when a superblock is of it, and that nothing of it is lost.

use crate::sim::{
    Disk, Lab, Rng, SimStorage, block_on,
    exec::block_on_steps,
    format_options,
    image::{self, SUPERBLOCK_BYTES, SUPERBLOCKS},
    lab::content,
    open_options, reopen,
};
use std::collections::BTreeSet;
use ublk_integrity::{
    Access, Device, Latched, MemoryStorage, OpenOptions, VolumeInfo, WriteError,
    create::{self, FormatError, FormatOptions},
    open::{self, Feature, OpenError},
};

const VERSION: usize = 8;
const FLAGS: usize = 12;
const EPOCH: usize = 64;
const SCRUB: usize = 296;
const ATOMIC: usize = 340;
const LABEL: usize = 352;
const SYNC_LOG: u32 = 1 << 7;

fn format() -> FormatOptions {
    FormatOptions { log_size: Some(VolumeInfo::LEAST_SYNC_LOG), ..format_options(512) }
}

fn named() -> FormatOptions {
    FormatOptions { label: "größer".parse().unwrap(), assumed_atomic_bytes: Some(2048), ..format() }
}

fn options(sync_log: bool) -> OpenOptions {
    OpenOptions { sync_log, ..open_options(&mut Rng::new(4)) }
}

fn u32_at(copy: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(copy[at..at + 4].try_into().unwrap())
}

fn copies(io: &SimStorage) -> [Vec<u8>; 2] {
    SUPERBLOCKS.map(|at| io.disk().peek(Device::Meta, at, SUPERBLOCK_BYTES))
}

/// Puts superblocks there, whole pages as they are written.
fn put(io: &SimStorage, copies: [&[u8]; 2]) {
    SUPERBLOCKS.iter().zip(copies).for_each(|(at, copy)| io.disk().poke(Device::Meta, *at, copy));
}

/// By the byte map of version 1 alone: what a program that knows no other asks of a superblock.
fn is_version_1(copy: &[u8]) -> bool {
    let mut signed = copy.to_vec();
    image::sign_block(&mut signed);
    copy[..8] == *b"UBLKINTG"
        && u32_at(copy, VERSION) == 1
        && u32_at(copy, FLAGS) <= 1
        && copy[60..64] == [0; 4]
        && copy[232..448].iter().all(|byte| *byte == 0)
        && signed == copy
}

/// Version and flags of both copies, which are equal.
fn version_and_flags(io: &SimStorage) -> (u32, u32) {
    let [a, b] = copies(io);
    assert!(a == b, "two copies of one state");
    (u32_at(&a, VERSION), u32_at(&a, FLAGS))
}

fn close(lab: &Lab) {
    block_on(&lab.io, lab.volume.close(&lab.io)).unwrap();
}

#[test]
fn the_sync_log_is_said_from_the_open_to_the_orderly_end() {
    for written in [false, true] {
        let mut lab = Lab::new(&format(), &options(true));
        assert_eq!(version_and_flags(&lab.io), (2, SYNC_LOG), "before anything is served");
        assert!(lab.volume.status().sync_log);
        if written {
            lab.write(3, 1, 1);
            lab.checkpoint();
            assert_eq!(version_and_flags(&lab.io), (2, SYNC_LOG), "checkpoints keep it");
            lab.write(4, 1, 2);
        }
        close(&lab);
        assert!(copies(&lab.io).iter().all(|copy| is_version_1(copy)), "{written}");
        assert_eq!(version_and_flags(&lab.io), (1, 0));
        let mut lab = lab.reopened().unwrap();
        assert_eq!(lab.volume.recovery().records, 0);
        assert!(!written || (lab.reads_as(3, 1) && lab.reads_as(4, 2)));
    }
}

#[test]
fn without_it_the_volume_stays_as_older_programs_know_it() {
    let mut lab = Lab::new(&format(), &options(false));
    assert!(copies(&lab.io).iter().all(|copy| is_version_1(copy)));
    assert!(!lab.volume.status().sync_log);
    lab.write(3, 1, 1);
    close(&lab);
    lab.write(3, 1, 2);
    assert!(copies(&lab.io).iter().all(|copy| is_version_1(copy)));
}

#[test]
fn a_crash_leaves_version_2_which_the_next_open_takes_back() {
    let mut lab = Lab::new(&format(), &options(true));
    lab.write(3, 1, 1);
    lab.flush();
    lab.options.sync_log = false;
    lab.disk().power_cut();
    assert_eq!(version_and_flags(&lab.io), (2, SYNC_LOG));
    let mut lab = lab.reopened().unwrap();
    assert!(copies(&lab.io).iter().all(|copy| is_version_1(copy)));
    assert!(lab.reads_as(3, 1));
}

#[test]
fn what_version_2_says_besides_stays_as_it_was() {
    let mut lab = Lab::new(&named(), &options(false));
    let scrub: Vec<u8> = (1..=40).chain([2, 0, 0, 0]).collect();
    // As another program may have left it.
    let mut copy = copies(&lab.io)[0].clone();
    copy[SCRUB..SCRUB + 44].copy_from_slice(&scrub);
    image::sign_block(&mut copy);
    put(&lab.io, [&copy, &copy]);
    for sync_log in [false, true, false] {
        lab.options.sync_log = sync_log;
        lab = lab.reopened().unwrap();
        let is_kept = |lab: &Lab, flags: u32, when: &str| {
            assert_eq!(version_and_flags(&lab.io), (2, flags), "{sync_log}, {when}");
            let [now, _] = copies(&lab.io);
            assert_eq!(now[SCRUB..ATOMIC], scrub, "{sync_log}, {when}");
            assert_eq!(u32_at(&now, ATOMIC), 2048, "{sync_log}, {when}");
            assert_eq!(now[LABEL..LABEL + 9], *"größer\0".as_bytes(), "{sync_log}, {when}");
            let info = lab.volume.info();
            assert_eq!((info.label.to_string().as_str(), info.assumed_atomic_bytes), ("größer", Some(2048)));
        };
        let flags = if sync_log { SYNC_LOG } else { 0 };
        is_kept(&lab, flags, "opened");
        lab.write(3, 1, 1);
        lab.checkpoint();
        is_kept(&lab, flags, "after a checkpoint");
        close(&lab);
        is_kept(&lab, 0, "closed");
    }
}

#[test]
fn nothing_is_written_once_the_log_may_hold_no_blocks_any_more() {
    let mut lab = Lab::new(&format(), &options(true));
    lab.write(3, 1, 1);
    close(&lab);
    assert_eq!(lab.try_write(3, 1, 2), Err(WriteError::Latched(Latched::Closed)));
    assert_eq!(lab.try_flush(), Err(WriteError::Latched(Latched::Closed)));
    assert!(lab.reads_as(3, 1), "reads go on");
    let writes = lab.disk().writes;
    close(&lab);
    assert_eq!(lab.disk().writes, writes, "closed is closed");
    assert!(lab.reopened().unwrap().reads_as(3, 1));
}

/// Versions of the copies that a power cut has left; at each, the volume opens and is whole, and
/// both copies are one again.
fn cut_at_each_step(work: impl AsyncFn(&Lab, &SimStorage), mut lab: Lab) -> BTreeSet<[u32; 2]> {
    lab.write(3, 1, 1);
    lab.flush();
    let mut found = BTreeSet::new();
    // What is in flight at the cut may arrive or not.
    for (steps, luck) in (0..).flat_map(|steps| (0..8).map(move |luck| (steps, luck))) {
        let of_fork = Lab::open(SimStorage::new(lab.disk().fork(luck)), &lab.options).unwrap();
        let done = block_on_steps(&of_fork.io, work(&of_fork, &of_fork.io), steps).is_some();
        let io = of_fork.io.clone();
        drop(of_fork);
        io.disk().power_cut();
        found.insert(copies(&io).map(|copy| u32_at(&copy, VERSION)));
        for sync_log in [false, true] {
            let io = SimStorage::new(io.disk().fork(1));
            let again = OpenOptions { open_id: [steps as u8; 32], ..options(sync_log) };
            let mut lab = Lab::open(io, &again).unwrap();
            assert_eq!(version_and_flags(&lab.io).0, 1 + u32::from(sync_log));
            assert!(lab.reads_as(3, 1), "{steps} steps");
        }
        if done {
            break;
        }
    }
    found
}

#[test]
fn a_crash_between_the_copies_of_two_versions_is_a_crash_like_any_other() {
    let closed = async |lab: &Lab, io: &SimStorage| lab.volume.close(io).await.unwrap();
    let found = cut_at_each_step(closed, Lab::new(&format(), &options(true)));
    assert_eq!(found, BTreeSet::from([[2, 2], [1, 2], [1, 1]]), "copy A first");
    let opened = async |_: &Lab, io: &SimStorage| {
        let options = OpenOptions { open_id: [9; 32], ..options(true) };
        drop(open::open(io, &crate::sim::key(), &options).await.unwrap());
    };
    let found = cut_at_each_step(opened, Lab::new(&format(), &options(false)));
    assert_eq!(found, BTreeSet::from([[1, 1], [2, 1], [2, 2]]), "copy A first");
}

/// Superblocks of one volume: before it was opened with a sync log, while it was, and closed.
fn history() -> (Lab, [Vec<u8>; 3]) {
    let mut lab = Lab::new(&format(), &options(false));
    lab.write(3, 1, 1);
    close(&lab);
    let [before, _] = copies(&lab.io);
    lab.options.sync_log = true;
    let mut lab = lab.reopened().unwrap();
    let [open, _] = copies(&lab.io);
    lab.write(3, 1, 2);
    close(&lab);
    let [closed, _] = copies(&lab.io);
    assert!(is_version_1(&before) && u32_at(&open, VERSION) == 2 && is_version_1(&closed));
    (lab, [before, open, closed])
}

#[test]
fn of_two_versions_the_newer_epoch_counts_whichever_copy_it_is() {
    let (lab, [_, open, closed]) = history();
    for newest_first in [true, false] {
        let io = SimStorage::new(lab.disk().fork(1));
        put(&io, if newest_first { [&closed, &open] } else { [&open, &closed] });
        let mut lab = Lab::open(io, &options(false)).unwrap();
        assert!(lab.reads_as(3, 2));
        let dump = block_on(&lab.io, open::dump(&lab.io)).unwrap();
        assert!(dump.copies.iter().all(|copy| copy.version == Some(1)), "both are made equal");
    }
    // A damaged copy of either version is passed over, and made good.
    for damaged in SUPERBLOCKS {
        let io = SimStorage::new(lab.disk().fork(1));
        io.disk().poke(Device::Meta, damaged + 200, &[0xaa; 8]);
        let mut lab = Lab::open(io, &options(true)).unwrap();
        assert!(lab.volume.recovery().superblock_repaired && lab.reads_as(3, 2));
        assert_eq!(version_and_flags(&lab.io), (2, SYNC_LOG));
    }
}

#[test]
fn an_older_version_put_back_is_tampering() {
    let (lab, [before, open, closed]) = history();
    let refused = |copies: [&[u8]; 2]| {
        let io = SimStorage::new(lab.disk().fork(1));
        put(&io, copies);
        let Err(error) = reopen(&io, &options(true)) else { panic!("opened") };
        assert!(matches!(error, OpenError::Tampered { .. }), "{error}");
    };
    refused([&before, &before]);
    // Two that claim one epoch, and differ.
    let mut same_epoch = open.clone();
    same_epoch[EPOCH..EPOCH + 8].copy_from_slice(&closed[EPOCH..EPOCH + 8]);
    image::sign_block(&mut same_epoch);
    refused([&same_epoch, &closed]);
    refused([&closed, &same_epoch]);
    // Without the key: the version is under the MAC, like all else.
    let mut changed = open.clone();
    changed[VERSION] = 1;
    let unsigned = |copy: &[u8]| {
        let mut with_sum = copy.to_vec();
        image::sign_block(&mut with_sum);
        with_sum[480..].copy_from_slice(&copy[480..]);
        with_sum
    };
    changed[FLAGS..FLAGS + 4].fill(0);
    refused([&unsigned(&changed), &closed]);
}

/// The superblock before the last put back where the log says more: the log goes on from there.
#[test]
fn the_superblock_before_the_end_brings_no_old_block_back() {
    let mut lab = Lab::new(&format(), &options(true));
    lab.write(7, 1, 1);
    lab.checkpoint();
    let [old, _] = copies(&lab.io);
    lab.write(7, 1, 2);
    close(&lab);
    put(&lab.io, [&old, &old]);
    lab.poke(Device::Data, lab.block_offset(7), &content(512, 7, 1));
    assert!(lab.reopened().expect("the log goes on from there").read(7).is_err());
}

#[test]
fn read_only_it_is_opened_and_left_as_it_is() {
    let mut lab = Lab::new(&named(), &options(true));
    lab.write(3, 1, 1);
    lab.flush();
    let before = copies(&lab.io);
    let (io, options) = (lab.io.clone(), OpenOptions { access: Access::ReadOnly, ..options(true) });
    drop(lab);
    let writes = io.disk().writes;
    let mut lab = Lab::open(io, &options).unwrap();
    assert!(lab.reads_as(3, 1) && !lab.volume.status().sync_log);
    close(&lab);
    assert!(copies(&lab.io) == before && lab.disk().writes == writes);
}

#[test]
fn a_log_too_small_for_blocks_stays_of_version_1() {
    for (log_size, version) in [(VolumeInfo::LEAST_SYNC_LOG - 4096, 1), (VolumeInfo::LEAST_SYNC_LOG, 2)] {
        let lab = Lab::new(&FormatOptions { log_size: Some(log_size), ..format() }, &options(true));
        assert_eq!(version_and_flags(&lab.io).0, version);
        assert_eq!(lab.volume.status().sync_log, version == 2);
        assert_eq!(lab.volume.info().fits_sync_log(), version == 2);
    }
}

#[test]
fn format_writes_version_2_only_where_version_1_says_too_little() {
    let written = |format: &FormatOptions| {
        let io = crate::sim::formatted(format, 1);
        let [a, b] = copies(&io);
        assert!(a == b);
        let dump = block_on(&io, open::dump(&io)).unwrap();
        (is_version_1(&a), dump)
    };
    assert!(written(&format()).0);
    assert!(written(&FormatOptions { separate_meta: true, ..format() }).0);
    let labelled = FormatOptions { label: "a".parse().unwrap(), ..format() };
    let assumed = FormatOptions { assumed_atomic_bytes: Some(512), separate_meta: true, ..format() };
    for (format, features) in [(labelled, vec![]), (assumed, vec![Feature::SeparateMeta])] {
        let (is_version_1, dump) = written(&format);
        assert!(!is_version_1);
        assert_eq!((dump.copies[0].version, &dump.copies[0].features), (Some(2), &features));
        let volume = dump.volume.unwrap();
        assert_eq!((volume.label, volume.assumed_atomic_bytes), (format.label, format.assumed_atomic_bytes));
    }
}

/// A volume with blocks of this size on a disk that says it writes `physical` bytes atomically, and
/// is trusted to write `assumed` so.
fn made_on(physical: u32, block_size: u32, assumed: Option<u32>) -> Result<MemoryStorage, FormatError> {
    let format = FormatOptions { assumed_atomic_bytes: assumed, ..format_options(block_size) };
    let disk = MemoryStorage::new(vec![0xaa; create::plan(&format)?.data_device_bytes as usize], physical);
    let before = disk.image();
    let made = disk.run(create::format(&disk, &crate::sim::key(), &format));
    assert!(made.is_ok() || disk.image() == before, "what can't be done destroys nothing");
    made.map(|_| disk)
}

/// What an open on a disk that says it writes `physical` bytes atomically warns of.
fn warnings(image: Vec<u8>, physical: u32) -> Vec<String> {
    let disk = MemoryStorage::new(image, physical);
    let volume = disk.run(open::open(&disk, &crate::sim::key(), &options(false))).unwrap();
    volume.warnings().to_vec()
}

#[test]
fn what_is_said_of_the_device_counts_whatever_it_says_itself() {
    let refusal = |physical, block, assumed| match made_on(physical, block, assumed) {
        Ok(_) => panic!("made"),
        Err(error) => error.to_string(),
    };
    assert!(refusal(512, 4096, None).contains("--block-size 512, or --assume-atomic 4096"));
    for physical in [512, 4096] {
        let error = refusal(physical, 4096, Some(2048));
        assert!(error.contains("4096 is larger than the 2048 bytes of --assume-atomic"), "{error}");
    }
    for assumed in [0, 1, 256, 513, 3000, 8192, u32::MAX] {
        let error = refusal(4096, 512, Some(assumed));
        assert!(error.contains(&format!("--assume-atomic of {assumed} bytes: must be")), "{error}");
    }
    assert!(refusal(16384, 4096, None).contains("16384"));
    for (physical, block, assumed) in [(512, 4096, 4096), (512, 1024, 2048), (4096, 512, 512), (16384, 4096, 4096)] {
        let image = made_on(physical, block, Some(assumed)).unwrap().image();
        assert_eq!(u32_at(&image, ATOMIC), assumed);
        assert_eq!(u32_at(&image, 56), physical.min(4096), "records are padded to what the device says");
        assert_eq!(warnings(image, physical), [""; 0], "{physical} {block} {assumed}");
    }
    // The metadata's own device is another one: nothing was said of that.
    let separate = FormatOptions { separate_meta: true, assumed_atomic_bytes: Some(4096), ..format_options(4096) };
    let size = create::plan(&separate).unwrap();
    let io = SimStorage::new(Disk::new(size.data_device_bytes, size.meta_device_bytes, 16384, 1));
    let error = block_on(&io, create::format(&io, &crate::sim::key(), &separate)).unwrap_err();
    assert!(matches!(error, FormatError::PhysicalBlock { device: Device::Meta, physical: 16384 }), "{error}");
}

#[test]
fn on_another_disk_there_is_no_warning_of_what_is_trusted() {
    let of = |made_on_physical, block, assumed, physical| {
        warnings(made_on(made_on_physical, block, assumed).unwrap().image(), physical).join("; ")
    };
    assert!(of(4096, 4096, None, 512).contains("writes only 512 at once"));
    assert_eq!(of(4096, 4096, Some(4096), 512), "");
    assert!(of(4096, 512, None, 4096).contains("neighbours of a block"));
    assert_eq!(of(4096, 512, Some(512), 4096), "");
    // Trusted to write 4096, and saying so: then it writes no less.
    assert!(of(4096, 512, Some(4096), 4096).contains("neighbours of a block"));
    assert_eq!(of(512, 512, Some(4096), 512), "");
    assert!(of(512, 4096, Some(4096), 4096).contains("the metadata device writes 4096 bytes at once"));
    assert_eq!(of(512, 512, Some(512), 4096), "");
}

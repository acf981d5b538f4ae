//! Volumes that can grow: what `format` reserves, and that a crash at any step leaves the old size or
//! the new one.

use crate::sim::{
    Disk, Lab, Rng, SimStorage, block_on,
    exec::block_on_steps,
    faults::BadRange,
    format_options,
    image::{self, SUPERBLOCK_BYTES, SUPERBLOCKS, Superblock},
    key, open_options, reopen,
};
use std::collections::BTreeSet;
use ublk_integrity::{
    Access, Device, Errno, OpenOptions,
    create::{self, Capacity, FormatError, FormatOptions, VolumeInfo},
    open::{self, Feature, Grow, GrowError, OpenError},
};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 512;
/// Bytes in the tags of which a tree of two levels, and of three, has room.
const TWO_LEVELS: u64 = BLOCK * 128 * 64;
const THREE_LEVELS: u64 = TWO_LEVELS * 64;

fn format(separate_meta: bool, capacity: u64) -> FormatOptions {
    FormatOptions { separate_meta, capacity: Capacity::Bytes(capacity), ..format_options(BLOCK as u32) }
}

fn options(separate_meta: bool, grow: Option<Grow>) -> OpenOptions {
    OpenOptions { separate_meta, grow, ..open_options(&mut Rng::new(4)) }
}

/// Opened again, after a crash that lost nothing, with another size.
fn grown(mut lab: Lab, grow: Grow) -> Result<Lab, OpenError> {
    lab.options.grow = Some(grow);
    let mut lab = lab.reopened()?;
    lab.options.grow = None;
    Ok(lab)
}

fn size(lab: &Lab) -> u64 {
    lab.volume.info().size
}

/// What `format` makes on devices of these sizes.
fn made_on(options: &FormatOptions, data: u64, meta: Option<u64>) -> (SimStorage, Result<VolumeInfo, FormatError>) {
    let io = SimStorage::new(Disk::new(data, meta, BLOCK as u32, 1));
    let made = block_on(&io, create::format(&io, &key(), options));
    (io, made)
}

#[test]
fn what_can_not_grow_is_as_version_1_has_it() {
    for separate in [false, true] {
        let as_size = FormatOptions { capacity: Capacity::OfSize, ..format(separate, 0) };
        let first = |format: &FormatOptions| {
            let lab = Lab::new(format, &options(separate, None));
            [Device::Data, Device::Meta].map(|device| lab.peek(device, 0, MIB as usize))
        };
        assert!(first(&as_size) == first(&format(separate, MIB)), "not a byte differs");
        let dump = |capacity| {
            let lab = Lab::new(&format(separate, capacity), &options(separate, None));
            block_on(&lab.io, open::dump(&lab.io)).unwrap().copies[0].clone()
        };
        assert_eq!(dump(MIB).version, Some(1));
        let can_grow = dump(MIB + BLOCK);
        assert_eq!(can_grow.version, Some(2));
        assert!(can_grow.features.contains(&Feature::ExplicitPlaces));
    }
}

#[test]
fn it_grows_level_by_level_and_what_is_new_reads_as_zeros() {
    for separate in [false, true] {
        let mut lab = Lab::new(&format(separate, 2 * THREE_LEVELS), &options(separate, None));
        let data_from = lab.superblock().data_offset();
        let sizes = [
            MIB + BLOCK,
            TWO_LEVELS - BLOCK,
            TWO_LEVELS,
            TWO_LEVELS + BLOCK,
            THREE_LEVELS - BLOCK,
            THREE_LEVELS,
            THREE_LEVELS + BLOCK,
            2 * THREE_LEVELS,
        ];
        let mut written = vec![];
        for (i, next) in sizes.into_iter().enumerate() {
            let last = size(&lab) / BLOCK - 1;
            lab.write(last, 1, i as u64 + 1);
            written.push(last);
            if i % 2 == 0 {
                lab.checkpoint();
            }
            // Whatever was on the device before.
            for new in [last + 1, next / BLOCK - 1] {
                lab.poke(Device::Data, data_from + new * BLOCK, &[0xee; BLOCK as usize]);
            }
            let levels = lab.superblock().levels();
            lab = grown(lab, Grow::To(next)).unwrap();
            assert_eq!((size(&lab), lab.superblock().data_offset()), (next, data_from));
            assert!(lab.superblock().levels() - levels <= 1);
            for (version, block) in written.iter().enumerate() {
                assert!(lab.reads_as(*block, version as u64 + 1), "block {block} after growing to {next}");
            }
            assert!(lab.reads_as(last + 1, 0) && lab.reads_as(next / BLOCK - 1, 0));
            assert!(lab.read(next / BLOCK).is_err(), "that is the end");
        }
        assert_eq!(lab.superblock().levels(), 4);
        let pages = lab.superblock().pages(&lab.disk());
        assert!(pages.len() > 4 && pages.iter().all(|page| page.offset < lab.volume.info().metadata_bytes));
    }
}

#[test]
fn a_tree_without_a_page_stays_so() {
    let lab = Lab::new(&format(false, 4 * TWO_LEVELS), &options(false, None));
    let mut lab = grown(lab, Grow::AllThatFits).unwrap();
    assert_eq!((size(&lab), lab.superblock().root.slot), (4 * TWO_LEVELS, None));
    assert!(lab.reads_as(0, 0) && lab.reads_as(4 * TWO_LEVELS / BLOCK - 1, 0));
}

/// Sizes that the superblock copies say, and the identity block.
fn said(io: &SimStorage, separate: bool) -> [u64; 3] {
    let u64_at = |device, at| u64::from_le_bytes(io.disk().peek(device, at, 8).try_into().unwrap());
    let [a, b] = SUPERBLOCKS.map(|at| u64_at(Device::Meta, at + 40) * BLOCK);
    [a, b, if separate { u64_at(Device::Data, 32) } else { 0 }]
}

/// The power is cut at each step of an open that makes the volume larger; what is found of its size
/// then. Each opens, with what was flushed, and has one size everywhere.
fn cut_at_each_step(separate: bool, new: u64) -> BTreeSet<[u64; 3]> {
    let mut lab = Lab::new(&format(separate, 2 * TWO_LEVELS), &options(separate, None));
    let (old, last) = (size(&lab), size(&lab) / BLOCK - 1);
    lab.write(3, 1, 1);
    lab.checkpoint();
    lab.write(last, 1, 2);
    lab.flush();
    let mut found = BTreeSet::new();
    for (steps, luck) in (0..).flat_map(|steps| (0..6).map(move |luck| (steps, luck))) {
        let io = SimStorage::new(lab.disk().fork(luck));
        let growing = OpenOptions { open_id: [steps as u8; 32], ..options(separate, Some(Grow::To(new))) };
        let done = block_on_steps(&io, open::open(&io, &key(), &growing), steps).is_some();
        io.disk().power_cut();
        found.insert(said(&io, separate));
        let again = OpenOptions { open_id: [0xee; 32], ..options(separate, None) };
        for access in [Access::ReadOnly, Access::ReadWrite] {
            let mut lab = Lab::open(io.clone(), &OpenOptions { access, ..again.clone() }).unwrap();
            assert!(size(&lab) == old || size(&lab) == new, "{steps} steps");
            assert!(lab.reads_as(3, 1) && lab.reads_as(last, 2), "{steps} steps");
            assert!(size(&lab) == old || (lab.reads_as(last + 1, 0) && lab.reads_as(new / BLOCK - 1, 0)));
        }
        let [a, b, identity] = said(&io, separate);
        assert!(a == b && (!separate || identity == a), "{steps} steps");
        if done {
            assert_eq!(a, new);
            return found;
        }
    }
    unreachable!("it ends")
}

#[test]
fn a_crash_at_any_step_leaves_the_old_size_or_the_new_one() {
    for new in [MIB + BLOCK, TWO_LEVELS + BLOCK] {
        let found = cut_at_each_step(false, new);
        assert_eq!(found, BTreeSet::from([[MIB, MIB, 0], [new, MIB, 0], [new, new, 0]]), "copy A first");
        let found = cut_at_each_step(true, new);
        let orders = [[MIB, MIB, MIB], [new, MIB, MIB], [new, new, MIB], [new, new, new]];
        assert_eq!(found, BTreeSet::from(orders), "the superblocks, then the data device");
    }
}

#[test]
fn either_superblock_copy_alone_has_the_new_size() {
    for damaged in SUPERBLOCKS {
        let lab = Lab::new(&format(true, 2 * MIB), &options(true, None));
        let lab = grown(lab, Grow::To(2 * MIB)).unwrap();
        lab.poke(Device::Meta, damaged + 200, &[0xaa; 8]);
        let lab = lab.reopened().unwrap();
        assert_eq!(size(&lab), 2 * MIB);
        let copies = SUPERBLOCKS.map(|at| Superblock::parse(&lab.peek(Device::Meta, at, SUPERBLOCK_BYTES)).unwrap());
        assert!(copies.iter().all(|copy| copy.blocks * BLOCK == 2 * MIB));
    }
}

#[test]
fn a_data_device_of_more_than_the_volume_is_another_volumes() {
    let lab = Lab::new(&format(true, 2 * MIB), &options(true, None));
    let before = SimStorage::new(lab.disk().fork(1));
    let lab = grown(lab, Grow::To(2 * MIB)).unwrap();
    let identity = |io: &SimStorage| io.disk().peek(Device::Data, 0, 512);
    let refused = |io: &SimStorage| reopen(io, &options(true, None)).err();
    let smaller = identity(&before);
    before.disk().poke(Device::Data, 0, &identity(&lab.io));
    assert!(matches!(refused(&before), Some(OpenError::Foreign(_))));
    // The smaller one is what a crash leaves: of this volume, and only where the MAC holds.
    lab.poke(Device::Data, 0, &smaller);
    assert!(refused(&SimStorage::new(lab.disk().fork(1))).is_none());
    let mut forged = identity(&lab.io);
    forged[32..40].copy_from_slice(&MIB.to_le_bytes());
    image::sign_block(&mut forged);
    forged[480] ^= 1;
    lab.poke(Device::Data, 0, &forged);
    assert!(matches!(refused(&lab.io), Some(OpenError::Tampered { .. })));
    // A volume that can't grow has one size.
    let mut fixed = Lab::new(&FormatOptions { capacity: Capacity::OfSize, ..format(true, 0) }, &options(true, None));
    let mut less = fixed.peek(Device::Data, 0, 512);
    less[32..40].copy_from_slice(&(MIB / 2).to_le_bytes());
    image::sign_block(&mut less);
    let io = fixed.io.clone();
    fixed.with_poked(Device::Data, 0, &less, |_| assert!(matches!(refused(&io), Some(OpenError::Foreign(_)))));
}

#[test]
fn a_data_device_that_can_not_be_told_the_size_is_a_warning() {
    let lab = Lab::new(&format(true, 2 * MIB), &options(true, None));
    let sector = BadRange::unwritable(Device::Data, 0..4096, Errno::EIO);
    lab.disk().bad_ranges.push(sector);
    let mut lab = grown(lab, Grow::To(2 * MIB)).unwrap();
    assert_eq!(size(&lab), 2 * MIB, "it has grown, and says so");
    assert!(lab.volume.latched().is_none());
    assert!(lab.volume.warnings().iter().any(|line| line.contains("does not say the volume's size")));
    lab.write(2 * MIB / BLOCK - 1, 1, 7);
    // The next open tells it.
    lab.disk().bad_ranges.clear();
    let lab = lab.reopened().unwrap();
    assert!(lab.volume.warnings().is_empty(), "{:?}", lab.volume.warnings());
    assert_eq!(said(&lab.io, true), [2 * MIB; 3]);
}

#[test]
fn an_identity_block_that_can_not_be_read_any_more_keeps_nothing_shut() {
    let lab = Lab::new(&format(true, 2 * MIB), &options(true, None));
    let lab = grown(lab, Grow::To(2 * MIB)).unwrap();
    lab.disk().bad_ranges.push(BadRange::unreadable(Device::Data, 0..4096));
    let read_only = OpenOptions { access: Access::ReadOnly, ..options(true, None) };
    assert_eq!(size(&Lab::open(lab.io.clone(), &read_only).unwrap()), 2 * MIB);
    // A disk makes a sector good when it is written.
    lab.disk().bad_ranges.clear();
    lab.poke(Device::Data, 44, &[0xaa; 8]);
    lab.poke(Device::Data, 460, &[0xaa; 8]);
    let refused = reopen(&SimStorage::new(lab.disk().fork(1)), &options(true, None));
    assert!(matches!(refused, Err(OpenError::Foreign(_))), "the key id is not the volume's");
}

#[test]
fn what_can_not_be_is_refused_before_anything_is_written() {
    let refusal = |capacity, grow| {
        let lab = Lab::new(&format(false, capacity), &options(false, None));
        let writes = lab.disk().writes;
        let io = lab.io.clone();
        let Err(error) = grown(lab, grow) else { panic!("it has grown") };
        assert_eq!(io.disk().writes, writes, "{error}");
        error
    };
    let grow = |capacity, grow| match refusal(capacity, grow) {
        OpenError::Grow(error) => error,
        error => panic!("{error}"),
    };
    let beyond = GrowError::Beyond { got: 2 * MIB + BLOCK, most: 2 * MIB };
    assert_eq!(grow(2 * MIB, Grow::To(2 * MIB + BLOCK)), beyond);
    assert!(beyond.to_string().contains("its page areas hold 2097152") && beyond.to_string().contains("`import`"));
    assert_eq!(grow(MIB, Grow::To(2 * MIB)), GrowError::Beyond { got: 2 * MIB, most: MIB }, "version 1 has no room");
    let shrinks = GrowError::Shrinks { got: MIB - BLOCK, now: MIB };
    assert_eq!(grow(2 * MIB, Grow::To(MIB - BLOCK)), shrinks);
    assert!(shrinks.to_string().ends_with("volumes do not shrink"));
    assert_eq!(grow(2 * MIB, Grow::To(MIB + 1)), GrowError::Size { got: MIB + 1, block: 512 });
    let lab = Lab::new(&format(false, 2 * MIB), &options(false, None));
    let read_only = OpenOptions { access: Access::ReadOnly, ..options(false, Some(Grow::AllThatFits)) };
    assert!(matches!(Lab::open(lab.io, &read_only), Err(OpenError::Grow(GrowError::ReadOnly))));
}

#[test]
fn as_much_as_fits_is_as_much_as_device_and_page_areas_have_room_for() {
    let growing = options(false, Some(Grow::AllThatFits));
    for (capacity, room, expected) in [
        (4 * MIB, 8 * MIB, Ok(4 * MIB)),
        (4 * MIB, 2 * MIB + 100, Ok(2 * MIB)),
        (4 * MIB, MIB, Ok(MIB)),
        (MIB, MIB + 100, Ok(MIB)),
        (MIB, 3 * MIB, Err(GrowError::Beyond { got: 3 * MIB, most: MIB })),
    ] {
        let format = format(false, capacity);
        let plan = create::plan(&format).unwrap();
        let (io, _) = made_on(&format, plan.data_device_bytes - MIB + room, None);
        let opened = reopen(&io, &growing).map(|volume| volume.info().size);
        match (opened, expected) {
            (Ok(size), Ok(expected)) => assert_eq!(size, expected),
            (Err(OpenError::Grow(error)), Err(expected)) => assert_eq!(error, expected),
            (opened, expected) => panic!("{opened:?}, not {expected:?}"),
        }
    }
    // The size that was asked for does not fit.
    let format = format(false, 4 * MIB);
    let plan = create::plan(&format).unwrap();
    let (io, _) = made_on(&format, plan.data_device_bytes, None);
    let error = reopen(&io, &options(false, Some(Grow::To(2 * MIB)))).err();
    assert!(matches!(error, Some(OpenError::Grow(GrowError::NoRoom { got, .. })) if got == 2 * MIB), "{error:?}");
}

#[test]
fn a_metadata_device_gives_as_much_capacity_as_it_holds() {
    let format = FormatOptions { capacity: Capacity::OfMetaDevice, ..format(true, 0) };
    let least = create::plan(&format).unwrap();
    assert_eq!(least.max_size, MIB, "without a device there is no more than the size");
    let (data, meta) = (least.data_device_bytes, least.meta_device_bytes.unwrap());
    let made = |meta| made_on(&format, data, Some(meta)).1.unwrap();
    assert_eq!(made(meta).max_size, MIB, "so that is of version 1");
    let some = made(meta + 64 * 8192 + MIB);
    // The last MiB stays free.
    assert!(some.max_size > 4 * MIB && some.meta_device_bytes.unwrap() <= meta + 64 * 8192);
    assert_eq!(made(16 << 20).max_size, 16 * MIB, "16 times its size");
    // On one device capacity is only what is asked for.
    let one = FormatOptions { separate_meta: false, size: None, ..format.clone() };
    let one = made_on(&one, 8 << 20, None).1.unwrap();
    assert_eq!(one.max_size, one.size);
    let asked = FormatOptions { size: None, ..self::format(false, 64 * MIB) };
    let asked = made_on(&asked, 16 << 20, None).1.unwrap();
    assert!(asked.max_size == 64 * MIB && asked.size < one.size + (8 << 20));
    for (capacity, size) in [(MIB - BLOCK, Some(MIB)), (MIB + 1, Some(MIB)), (2 << 46, Some(MIB)), (2 * MIB, None)] {
        let format = FormatOptions { size, ..self::format(false, capacity) };
        let refused = made_on(&format, 16 << 20, None).1;
        let fits = matches!(refused, Err(FormatError::Capacity { got, .. } | FormatError::TooSmall { need: got, .. }) if got >= capacity);
        assert!(fits, "{capacity}: {refused:?}");
    }
}

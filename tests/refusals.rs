//! What an open refuses, and what it must not believe: damaged logs, superblocks put back.

use crate::sim::{
    Disk, Lab, Rng, SimStorage, block_on, format_options,
    image::{LOG_OFFSET, SUPERBLOCKS},
    key,
    lab::content,
    open_options,
};
use ublk_integrity::{
    Access, Device, OpenOptions, ReadError,
    create::{self, FormatError, FormatOptions, plan},
    open::OpenError,
};

fn options() -> OpenOptions {
    open_options(&mut Rng::new(3))
}

/// Data and metadata apart, so that a trace tells them apart too.
fn lab() -> Lab {
    let format = FormatOptions { separate_meta: true, ..format_options(512) };
    Lab::new(&format, &OpenOptions { separate_meta: true, ..options() })
}

#[test]
fn a_log_damaged_in_the_middle_is_refused() {
    let mut lab = lab();
    (1..=3).for_each(|version| lab.write(version, 1, version));
    let records = lab.records();
    let tail = lab.peek(Device::Meta, records[2].offset, 512);
    lab.poke(Device::Meta, records[1].offset + 100, &[0xab]);
    let (io, options) = (lab.io.clone(), lab.options.clone());
    let refused = |result: Result<Lab, OpenError>| matches!(result, Err(OpenError::Tampered { .. }));
    assert!(refused(Lab::open(io.clone(), &options)));
    // Damaged at its end it is like one whose last write was cut short.
    io.disk().poke(Device::Meta, records[2].offset, &[0xab; 512]);
    let cut = Lab::open(SimStorage::new(io.disk().fork(1)), &options).unwrap();
    assert_eq!(cut.volume.recovery().records, 1);
    io.disk().poke(Device::Meta, records[2].offset, &tail);
    assert!(refused(Lab::open(io, &options)));
}

#[test]
fn the_superblock_of_an_earlier_life_is_refused() {
    let mut lab = lab();
    lab.write(7, 1, 1);
    let old = SUPERBLOCKS.map(|at| lab.peek(Device::Meta, at, 512));
    let mut lab = lab.reopened().expect("recovery does not refuse");
    // Something has been logged since: the old superblock does not know the link that
    // this life began with.
    lab.write(7, 1, 2);
    SUPERBLOCKS.iter().zip(&old).for_each(|(at, bytes)| lab.poke(Device::Meta, *at, bytes));
    assert!(matches!(lab.reopened(), Err(OpenError::Tampered { .. })));
}

#[test]
fn two_copies_of_one_epoch_that_differ_are_refused() {
    // Two daemons on copies of one disk: both recover from the same state.
    let mut lab = lab();
    lab.write(7, 1, 1);
    let other = SimStorage::new(lab.disk().fork(1));
    let options = OpenOptions { open_id: [77; 32], ..lab.options.clone() };
    let lab = lab.reopened().expect("recovery does not refuse");
    let other = Lab::open(other, &options).unwrap();
    let [_, b] = SUPERBLOCKS;
    lab.poke(Device::Meta, b, &other.peek(Device::Meta, b, 512));
    assert!(matches!(lab.reopened(), Err(OpenError::Tampered { .. })));
}

/// What happens to block 7, version 2 after version 1, when everything but its log is
/// put back to version 1.
fn put_back(last: impl FnOnce(&mut Lab)) -> Result<Vec<u8>, ReadError> {
    let mut lab = lab();
    lab.write(7, 1, 1);
    lab.checkpoint();
    let old = SUPERBLOCKS.map(|at| lab.peek(Device::Meta, at, 512));
    lab.write(7, 1, 2);
    last(&mut lab);
    SUPERBLOCKS.iter().zip(&old).for_each(|(at, bytes)| lab.poke(Device::Meta, *at, bytes));
    lab.poke(Device::Data, lab.block_offset(7), &content(512, 7, 1));
    lab.reopened().expect("the log goes on from there").read(7)
}

#[test]
fn the_superblock_before_an_orderly_end_brings_no_old_block_back() {
    let read = put_back(|lab| block_on(&lab.io, lab.volume.close(&lab.io)).unwrap());
    assert!(matches!(read, Err(ReadError::Mismatch { .. })), "{read:?}");
}

#[test]
fn a_checkpoint_does_not_forget_what_a_flush_had_to_say() {
    // The flush ends while the checkpoint thread is busy: its entry is gathered, and
    // the switch drops it.
    let read = put_back(|lab| {
        lab.try_flush().unwrap();
        lab.checkpoint();
        block_on(&lab.io, lab.volume.work(&lab.io, ublk_integrity::CheckpointerWork::FlushRecord)).unwrap();
    });
    assert!(matches!(read, Err(ReadError::Mismatch { .. })), "{read:?}");
}

/// The volume of [`lab`] on other disks, which transfer so much at least: data, metadata.
fn moved(lab: &Lab, logical: [u32; 2]) -> SimStorage {
    let io = SimStorage::new(lab.disk().fork(1));
    io.disk().logical = logical;
    io
}

#[test]
fn a_volume_finer_than_its_disks_sectors_is_not_opened() {
    let mut lab = lab();
    lab.write(7, 1, 1);
    lab.flush();
    let read_only = OpenOptions { access: Access::ReadOnly, ..lab.options.clone() };
    let refusal = |options: &OpenOptions, logical| {
        let io = moved(&lab, logical);
        let writes = io.disk().writes;
        let refused = match Lab::open(io.clone(), options) {
            Ok(_) => None,
            Err(OpenError::BelowSector(why)) => Some((why.device, why.unit, why.logical)),
            Err(e) => panic!("{e}"),
        };
        assert!(refused.is_none() || io.disk().writes == writes, "nothing was written");
        refused
    };
    assert_eq!(refusal(&lab.options, [512; 2]), None);
    for options in [&lab.options, &read_only] {
        assert_eq!(refusal(options, [4096, 512]), Some((Device::Data, 512, 4096)));
        assert_eq!(refusal(options, [512, 4096]), Some((Device::Meta, 512, 4096)), "records begin anywhere");
        assert_eq!(refusal(options, [512, 16384]), Some((Device::Meta, 4096, 16384)), "not even a superblock");
    }
}

#[test]
fn a_volume_finer_than_the_disks_sectors_is_not_made() {
    let refusal = |block_size, logical| {
        let format = FormatOptions { separate_meta: true, ..format_options(block_size) };
        let size = plan(&format).unwrap();
        let io = SimStorage::new(Disk::new(size.data_device_bytes, size.meta_device_bytes, 4096, 1));
        io.disk().logical = logical;
        let made = block_on(&io, create::format(&io, &key(), &format));
        match made {
            Ok(_) => None,
            Err(FormatError::BelowSector(why)) => {
                assert_eq!(io.disk().writes, 0, "nothing was written");
                Some((why.device, why.unit, why.logical))
            }
            Err(e) => panic!("{e}"),
        }
    };
    assert_eq!(refusal(512, [4096; 2]), Some((Device::Data, 512, 4096)));
    assert_eq!(refusal(2048, [4096, 512]), Some((Device::Data, 2048, 4096)));
    // Records are padded to what the metadata device writes atomically, which is no less than a
    // sector.
    assert_eq!(refusal(512, [512, 4096]), None);
    assert_eq!(refusal(4096, [4096; 2]), None);
}

#[test]
fn an_orderly_end_leaves_nothing_in_the_log() {
    let mut lab = lab();
    lab.write(7, 1, 1);
    lab.checkpoint();
    // What the checkpoint flushed is noted in the next epoch, and nothing else is.
    block_on(&lab.io, lab.volume.work(&lab.io, ublk_integrity::CheckpointerWork::FlushRecord)).unwrap();
    block_on(&lab.io, lab.volume.close(&lab.io)).unwrap();
    let mut lab = lab.reopened().unwrap();
    assert_eq!(lab.volume.recovery().records, 0);
    assert!(lab.reads_as(7, 1));
}

/// A log with one record, and all over it headers that look like records, each as far behind the
/// place that it names.
fn with_false_records(behind: u64) -> Lab {
    let format = FormatOptions { log_size: Some(1 << 20), size: Some(4 << 20), ..format_options(512) };
    let mut lab = Lab::new(&format, &options());
    lab.write(7, 1, 1);
    let mut head = lab.peek(Device::Meta, lab.records()[0].offset, 72);
    // A number far ahead, and the size of the largest record.
    head[16..24].copy_from_slice(&(1u64 << 62).to_le_bytes());
    head[32..36].copy_from_slice(&(60u32 << 10).to_le_bytes());
    for at in (8192_u64..1 << 20).step_by(512) {
        head[24..32].copy_from_slice(&(at + behind).to_le_bytes());
        lab.poke(Device::Meta, LOG_OFFSET + at, &head);
    }
    lab
}

#[test]
fn a_log_full_of_false_records_is_refused_before_all_are_hashed() {
    assert!(matches!(with_false_records(0).reopened(), Err(OpenError::Tampered { .. })));
}

/// What lies in the log as payload is chosen by whoever writes to the volume: a header that names
/// another place is not looked at.
#[test]
fn what_looks_like_records_of_other_places_is_not_hashed() {
    assert!(with_false_records(512).reopened().unwrap().reads_as(7, 1));
}

#[test]
fn the_log_of_a_volume_that_was_formatted_over_is_no_obstacle() {
    let format = FormatOptions { log_size: Some(256 << 10), ..format_options(512) };
    let mut lab = Lab::new(&format, &options());
    // Records one behind the other, all of its ring.
    for i in 0..450 {
        lab.write(i % 64, 1, i);
    }
    let io = lab.io.clone();
    drop(lab);
    let format = FormatOptions { uuid: [5; 16], ..format };
    block_on(&io, create::format(&io, &key(), &format)).unwrap();
    let mut lab = Lab::open(io, &options()).unwrap();
    lab.write(7, 1, 1000);
    assert!(lab.reopened().unwrap().reads_as(7, 1000));
}

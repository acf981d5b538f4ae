//! A crash and what comes after it: a volume is never closed, its disk is opened again, and all
//! blocks are checked.
//!
//! `cargo run --release --example crash`

use std::ops::ControlFlow;
use ublk_integrity::{
    Access, BlockIndex, BlockRange, Buf, Durability, MasterKey, MemoryStorage, OpenOptions,
    check::check,
    create::{FormatOptions, format, plan},
    open::open,
};

fn main() {
    let options = FormatOptions { size: Some(1 << 20), ..FormatOptions::new(4096, *b"an example's own") };
    let disk = MemoryStorage::new(vec![0; plan(&options).expect("a possible volume").data_device_bytes as usize], 4096);
    let key = MasterKey::new(&[7; 32]).expect("a key of 32 bytes");
    disk.run(format(&disk, &key, &options)).expect("formatted");
    let volume = disk.run(open(&disk, &key, &OpenOptions::new(Access::ReadWrite, [1; 32]))).expect("opened");
    let (mut context, mut buf) = (volume.context(0), Buf::new(4096));
    for block in 0..10 {
        buf.fill(block as u8 + 1);
        let range = BlockRange::new(BlockIndex(block), 1);
        let written;
        (written, buf) = disk.run(volume.write(&disk, &mut context, range, buf, Durability::MayBeLost));
        written.expect("written");
    }
    disk.run(volume.flush(&disk, &mut context)).expect("flushed");

    // The power fails: what is on the disk now is all that is left. There was no checkpoint, so the
    // tags of the ten blocks are in the log alone.
    let disk = MemoryStorage::new(disk.image(), 4096);
    drop(volume);

    let volume = disk.run(open(&disk, &key, &OpenOptions::new(Access::ReadWrite, [2; 32]))).expect("opened again");
    let recovery = volume.recovery();
    println!("recovery found {} blocks in {} log records", recovery.blocks, recovery.records);
    assert_eq!((recovery.blocks, recovery.settled, recovery.corrupt), (10, 10, 0));

    let mut context = volume.context(0);
    let report = disk.run(check(&volume, &disk, &mut context, |_| ControlFlow::Continue(())));
    println!("{} blocks hold data, {} of them are bad", report.data_blocks, report.bad_blocks);
    assert!(report.is_whole() && report.is_clean());
    let (read, buf) = disk.run(volume.read(&disk, &mut context, BlockRange::new(BlockIndex(9), 1), buf));
    read.expect("read");
    assert!(buf.iter().all(|byte| *byte == 10));
}

#[test]
fn it_runs() {
    main();
}

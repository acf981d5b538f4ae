//! A volume on a disk in memory: write a block, read it, change one bit on the disk, and see that
//! the read fails.
//!
//! `cargo run --release --example tamper`

use ublk_integrity::{
    Access, BlockIndex, BlockRange, Buf, Durability, MasterKey, MemoryStorage, OpenOptions, ReadError,
    create::{FormatOptions, format, plan},
    open::open,
};

fn main() {
    let options = FormatOptions { size: Some(1 << 20), ..FormatOptions::new(4096, *b"an example's own") };
    let disk = MemoryStorage::new(vec![0; plan(&options).expect("a possible volume").data_device_bytes as usize], 4096);
    let key = MasterKey::new(&[7; 32]).expect("a key of 32 bytes");
    disk.run(format(&disk, &key, &options)).expect("formatted");
    // The number is of this open: a program takes a random one each time.
    let volume = disk.run(open(&disk, &key, &OpenOptions::new(Access::ReadWrite, [1; 32]))).expect("opened");

    // The memory of one request is taken once. The buffer moves into an operation and comes back
    // with its result.
    let (mut context, mut buf) = (volume.context(0), Buf::new(4096));
    let range = BlockRange::new(BlockIndex(5), 1);
    buf.fill(0xab);
    let (written, buf) = disk.run(volume.write(&disk, &mut context, range, buf, Durability::Durable));
    written.expect("written");
    let (read, buf) = disk.run(volume.read(&disk, &mut context, range, buf));
    read.expect("read");
    println!("block 5 holds {:#x}", buf[0]);

    // Somebody changes one bit of it on the disk.
    disk.tamper(|bytes| {
        let block = bytes.chunks_exact_mut(4096).find(|block| block.iter().all(|byte| *byte == 0xab));
        block.expect("data is not encrypted")[100] ^= 1;
    });
    let (read, _) = disk.run(volume.read(&disk, &mut context, range, buf));
    assert_eq!(read, Err(ReadError::Mismatch { block: BlockIndex(5) }));
    println!("after one bit was changed: {}", read.expect_err("it is not believed"));
}

#[test]
fn it_runs() {
    main();
}

//! The volume against a plain buffer: random operations, tiny caches, forced checkpoints, reopening.

mod sim;

use proptest::prelude::*;
use sim::{Rng, block_on, format_options, formatted, lab::with_checkpoints, open_options, reopen};
use ublk_integrity::{BlockIndex, BlockRange, Buf, Durability};

#[derive(Clone, Debug)]
enum Op {
    Read(u64, u64),
    Write(u64, u64, u8, bool),
    Zero(u64, u64, bool),
    Flush,
    Checkpoint,
    Reopen,
    /// Without a last checkpoint: recovery.
    ReopenDirty,
}

fn ops(blocks: u64) -> impl Strategy<Value = Op> {
    let range =
        move |most: u64| (0..blocks, 1..=most).prop_map(move |(first, count)| (first, count.min(blocks - first)));
    prop_oneof![
        6 => range(200).prop_map(|(f, c)| Op::Read(f, c)),
        6 => (range(200), any::<u8>(), any::<bool>()).prop_map(|((f, c), v, fua)| Op::Write(f, c, v, fua)),
        3 => (range(blocks), any::<bool>()).prop_map(|((f, c), d)| Op::Zero(f, c, d)),
        1 => Just(Op::Flush),
        2 => Just(Op::Checkpoint),
        1 => Just(Op::Reopen),
        1 => Just(Op::ReopenDirty),
    ]
}

fn run(block_size: u32, separate: bool, cache_pages: u64, seed: u64, ops: Vec<Op>) {
    let bs = block_size as usize;
    let mut format = format_options(block_size);
    format.separate_meta = separate;
    format.tag = sim::tag_algorithm(seed);
    let io = formatted(&format, seed);
    let mut rng = Rng::new(seed);
    let mut options = open_options(&mut rng);
    options.cache_bytes = cache_pages * 4096;
    options.separate_meta = separate;
    options.max_request_bytes = 200 * bs;
    let mut volume = reopen(&io, &options).unwrap();
    let mut slot = volume.slot(0);
    let mut model = vec![0u8; volume.blocks() as usize * bs];
    let mut buf = Buf::new(options.max_request_bytes);
    for (n, op) in ops.into_iter().enumerate() {
        let bytes = |f: u64, c: u64| f as usize * bs..(f + c) as usize * bs;
        match op {
            Op::Read(f, c) => {
                let range = BlockRange::new(BlockIndex(f), c);
                let (result, b) = block_on(&io, volume.read(&io, &mut slot, range, buf));
                buf = b;
                result.unwrap();
                assert!(buf[..c as usize * bs] == model[bytes(f, c)], "operation {n}: read of {range}");
            }
            Op::Write(f, c, value, fua) => {
                for (i, byte) in buf[..c as usize * bs].iter_mut().enumerate() {
                    *byte = value.wrapping_add((i / bs) as u8).wrapping_add(n as u8);
                }
                model[bytes(f, c)].copy_from_slice(&buf[..c as usize * bs]);
                let durability = if fua { Durability::Durable } else { Durability::MayBeLost };
                let range = BlockRange::new(BlockIndex(f), c);
                let (result, b) = block_on(&io, async {
                    // Nothing runs beside: back-pressure must be relieved here, as the checkpoint thread would.
                    let write = volume.write(&io, &mut slot, range, buf, durability);
                    with_checkpoints(&volume, &io, write).await
                });
                buf = b;
                result.unwrap();
            }
            Op::Zero(f, c, discard) => {
                model[bytes(f, c)].fill(0);
                let range = BlockRange::new(BlockIndex(f), c);
                block_on(&io, async {
                    with_checkpoints(&volume, &io, volume.zero(&io, &mut slot, range, discard)).await
                })
                .unwrap();
            }
            Op::Flush => block_on(&io, volume.flush(&io, &mut slot)).unwrap(),
            Op::Checkpoint => block_on(&io, volume.checkpoint(&io)).unwrap(),
            Op::Reopen | Op::ReopenDirty => {
                if matches!(op, Op::Reopen) {
                    block_on(&io, volume.close(&io)).unwrap();
                }
                drop(volume);
                options.open_id = rng.bytes();
                volume = reopen(&io, &options).unwrap();
                let found = volume.recovery();
                assert_eq!((found.older, found.corrupt, found.unreadable), (0, 0, 0));
                slot = volume.slot(0);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn same_bytes_as_a_plain_buffer(
        shift in 9u32..=12,
        separate in any::<bool>(),
        cache_pages in prop_oneof![Just(0u64), Just(1), Just(2), Just(64)],
        seed in any::<u64>(),
        ops in prop::collection::vec(ops(256), 1..60),
    ) {
        run(1 << shift, separate, cache_pages, seed, ops);
    }
}

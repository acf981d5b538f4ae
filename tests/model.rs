//! The volume against a plain buffer: random operations, tiny caches, forced checkpoints, reopening.

use crate::sim::{Rng, SimStorage, block_on, format_options, formatted, lab::with_checkpoints, open_options, reopen};
use proptest::prelude::*;
use std::ops::Range;
use ublk_integrity::{BlockIndex, BlockRange, Buf, Durability, OpenOptions, RequestContext, Volume};

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

/// A volume and the plain buffer that it must behave like.
struct Pair {
    io: SimStorage,
    options: OpenOptions,
    rng: Rng,
    volume: Volume,
    context: RequestContext,
    buf: Option<Buf>,
    model: Vec<u8>,
}

impl Pair {
    fn new(block_size: u32, separate: bool, cache_pages: u64, seed: u64) -> Self {
        let bs = block_size as usize;
        let mut format = format_options(block_size);
        format.separate_meta = separate;
        format.tag = crate::sim::tag_algorithm(seed);
        let io = formatted(&format, seed);
        let mut rng = Rng::new(seed);
        let mut options = open_options(&mut rng);
        options.cache_bytes = cache_pages * 4096;
        options.separate_meta = separate;
        options.max_request_bytes = 200 * bs;
        let volume = reopen(&io, &options).unwrap();
        let (context, model) = (volume.context(0), vec![0; volume.blocks() as usize * bs]);
        let buf = Some(Buf::new(options.max_request_bytes));
        Self { io, options, rng, volume, context, buf, model }
    }

    fn bytes(&self, range: BlockRange) -> Range<usize> {
        let bs = self.volume.block_size();
        range.first.0 as usize * bs..range.end() as usize * bs
    }

    fn read(&mut self, range: BlockRange) -> bool {
        let bytes = self.bytes(range);
        let read = self.volume.read(&self.io, &mut self.context, range, self.buf.take().unwrap());
        let (result, buf) = block_on(&self.io, read);
        result.unwrap();
        let same = buf[..bytes.len()] == self.model[bytes];
        self.buf = Some(buf);
        same
    }

    fn write(&mut self, range: BlockRange, value: u8, durability: Durability) {
        let (bytes, bs) = (self.bytes(range), self.volume.block_size());
        let mut buf = self.buf.take().unwrap();
        for (i, byte) in buf[..bytes.len()].iter_mut().enumerate() {
            *byte = value.wrapping_add((i / bs) as u8);
        }
        self.model[bytes.clone()].copy_from_slice(&buf[..bytes.len()]);
        let Self { io, volume, context, .. } = self;
        // Nothing runs beside: back-pressure must be relieved here, as the checkpoint thread would.
        let write = volume.write(io, context, range, buf, durability);
        let (result, buf) = block_on(io, with_checkpoints(volume, io, write));
        result.unwrap();
        self.buf = Some(buf);
    }

    fn zero(&mut self, range: BlockRange, discard: bool) {
        let bytes = self.bytes(range);
        self.model[bytes].fill(0);
        let Self { io, volume, context, .. } = self;
        block_on(io, with_checkpoints(volume, io, volume.zero(io, context, range, discard))).unwrap();
    }

    fn reopen(&mut self) {
        self.options.open_id = self.rng.bytes();
        self.volume = reopen(&self.io, &self.options).unwrap();
        let found = self.volume.recovery();
        assert_eq!((found.older, found.corrupt, found.unreadable), (0, 0, 0));
        self.context = self.volume.context(0);
    }
}

fn run(mut pair: Pair, ops: Vec<Op>) {
    let range = |first, count| BlockRange::new(BlockIndex(first), count);
    for (n, op) in ops.into_iter().enumerate() {
        match op {
            Op::Read(f, c) => assert!(pair.read(range(f, c)), "operation {n}: read of {}", range(f, c)),
            Op::Write(f, c, value, fua) => {
                let durability = if fua { Durability::Durable } else { Durability::MayBeLost };
                pair.write(range(f, c), value.wrapping_add(n as u8), durability);
            }
            Op::Zero(f, c, discard) => pair.zero(range(f, c), discard),
            Op::Flush => block_on(&pair.io, pair.volume.flush(&pair.io, &mut pair.context)).unwrap(),
            Op::Checkpoint => block_on(&pair.io, pair.volume.checkpoint(&pair.io)).unwrap(),
            Op::Reopen => {
                block_on(&pair.io, pair.volume.close(&pair.io)).unwrap();
                pair.reopen();
            }
            Op::ReopenDirty => pair.reopen(),
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
        run(Pair::new(1 << shift, separate, cache_pages, seed), ops);
    }
}

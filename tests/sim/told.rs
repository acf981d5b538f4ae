//! What the log was told: an acknowledgement is *recorded* once a record is durable that
//! was sealed after it.

use super::{
    Disk, Rng, SimStorage, block_on,
    disk::Trace,
    image::{self, LOG_OFFSET, Logged, Superblock},
    oracle::{Oracle, fill},
    world::{World, recover},
};
use std::collections::{BTreeMap, VecDeque};
use ublk_integrity::{BlockIndex, BlockRange, Buf, Device, OpenOptions, ReadError};

/// By block: the oldest version, by its place in the history, that may be read.
type Promises = BTreeMap<u64, usize>;

struct UnderWay {
    offset: u64,
    durable: bool,
    /// What had been answered when the record was sealed.
    promised: Promises,
    /// Whether the ring had room for a longer record.
    room_in_ring: bool,
}

/// One life's.
pub struct Told {
    superblock: Superblock,
    under_way: VecDeque<UnderWay>,
    recorded: Promises,
}

/// Bytes of a record that carries data, without that.
const ENTRIES_BESIDE_PAYLOAD: u64 = 4096;
/// More than any flush entry takes here.
const ENTRY_BYTES: u64 = 24 + 8 * 100;

impl Told {
    /// Begins with a volume that has just been opened.
    pub fn new(io: &SimStorage) -> Self {
        let mut disk = io.disk();
        disk.trace = Some(Vec::new());
        Self { superblock: Superblock::newest(&disk), under_way: VecDeque::new(), recorded: Promises::new() }
    }

    /// Looks at what has happened since the last look; call it after every step.
    pub fn look(&mut self, world: &World) {
        let ring = LOG_OFFSET..LOG_OFFSET + self.superblock.log_size;
        let trace = world.io.disk().trace.replace(Vec::new()).expect("it has been there since the beginning");
        for (_, event) in trace {
            match event {
                Trace::WriteStart { device: Device::Meta, offset, .. } if ring.contains(&offset) => {
                    let left = self.superblock.log_size - world.volume.status().log_used;
                    let promised = world.oracle.borrow().promised();
                    let room_in_ring = left >= 2 * self.max_record();
                    self.under_way.push_back(UnderWay { offset, durable: false, promised, room_in_ring });
                }
                Trace::WriteEnd { device: Device::Meta, offset, .. } if ring.contains(&offset) => {
                    self.under_way.iter_mut().filter(|r| r.offset == offset).for_each(|r| r.durable = true);
                    self.durable(&world.io.disk(), &world.oracle.borrow());
                }
                _ => {}
            }
        }
    }

    /// What the log has been told of.
    pub fn recorded(&self) -> &Promises {
        &self.recorded
    }

    fn max_record(&self) -> u64 {
        self.superblock.log_size / 16
    }

    /// A record that says nothing of flushes, though it had room to, comes after others that have
    /// said it all.
    fn durable(&mut self, disk: &Disk, oracle: &Oracle) {
        while let Some(record) =
            self.under_way.front().is_some_and(|r| r.durable).then(|| self.under_way.pop_front()).flatten()
        {
            let entries = image::record_at(disk, &self.superblock, record.offset).expect("a record").entries;
            let bytes = |entry: &Logged| match entry {
                Logged::Tags { tags, .. } | Logged::Payload { tags, .. } => 24 + 32 * tags.len() as u64,
                Logged::Zeros { .. } | Logged::Flush { .. } => 24,
            };
            let says = entries.iter().any(|entry| matches!(entry, Logged::Flush { .. }));
            let content: u64 = entries.iter().map(bytes).sum();
            let carries = entries.iter().any(|entry| matches!(entry, Logged::Payload { .. }));
            let room = if carries { ENTRIES_BESIDE_PAYLOAD } else { self.max_record() };
            let had_room = record.room_in_ring && 104 + content + ENTRY_BYTES <= room;
            if says || had_room {
                self.recorded.extend(record.promised);
            }
            entries.iter().for_each(|entry| self.carried(entry, oracle));
        }
    }

    /// A record that carries a block says by itself that it is durable.
    fn carried(&mut self, entry: &Logged, oracle: &Oracle) {
        let Logged::Payload { first, blocks, .. } = entry else { return };
        let mut content = vec![0; self.superblock.block_size as usize];
        for (block, bytes) in (*first..).zip(blocks.chunks_exact(content.len())) {
            let same = |version: &u64| {
                fill(BlockIndex(block), *version, &mut content);
                content == bytes
            };
            let place = oracle.issued(BlockIndex(block)).iter().rposition(same).expect("somebody has written it");
            if place > 0 {
                let recorded = self.recorded.entry(block).or_default();
                *recorded = place.max(*recorded);
            }
        }
    }

    /// The power is off. In a copy of the world somebody puts older versions, or garbage, on blocks
    /// of which something is recorded: none may be read as what it was before. Returns how many.
    pub fn exchange(&self, io: &SimStorage, oracle: &Oracle, options: &OpenOptions, rng: &mut Rng) -> u64 {
        let copy = SimStorage::new(io.disk().fork(rng.next()));
        copy.disk().power_cut();
        let bs = self.superblock.block_size as usize;
        let mut content = vec![0; bs];
        for (block, place) in &self.recorded {
            let older = oracle.issued(BlockIndex(*block))[rng.below(*place as u64) as usize];
            fill(BlockIndex(*block), older, &mut content);
            content[0] ^= u8::from(rng.chance(30));
            copy.disk().poke(Device::Data, self.superblock.block_offset(*block), &content);
        }
        let volume = recover(&copy, options, rng, Disk::power_cut).expect("recovery does not refuse");
        let mut context = volume.context(0);
        let mut buf = Buf::new(bs);
        for (block, place) in &self.recorded {
            let one = BlockRange::new(BlockIndex(*block), 1);
            let (result, b) = block_on(&copy, volume.read(&copy, &mut context, one, buf));
            buf = b;
            match result {
                Ok(()) => oracle.check_exchanged(one.first, *place, &buf[..bs]),
                Err(e @ (ReadError::Mismatch { .. } | ReadError::BadPage { .. })) if oracle.explains(&e) => {}
                Err(e) => panic!("block {block}, exchanged: {e}"),
            }
        }
        self.recorded.len() as u64
    }
}

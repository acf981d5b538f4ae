//! The whole verified path on a disk that is a piece of memory: what it costs beside the tags.

use super::tags::{TagBench, median};
use serde::Serialize;
use std::{
    future::Future,
    pin::pin,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};
use ublk_integrity::{
    Access, BlockIndex, BlockRange, Buf, Durability, MasterKey, MemoryStorage, OpenOptions, RequestContext,
    TagAlgorithm, Volume,
    create::{self, FormatOptions},
    open::open,
};

const BLOCK: u32 = 4096;
const VOLUME: u64 = 8 << 20;
/// Bytes that a pass goes through: with one request's buffer they fit into a second-level cache.
const HOT: usize = 512 << 10;
/// Bytes of the largest request.
const LARGEST: usize = 128 << 10;

/// What [`measure`] found about one size of request.
#[derive(Clone, Debug, Serialize)]
pub struct MemorySpeed {
    /// "read" or "write", and how much at a time.
    pub pattern: String,
    /// Bytes of a request.
    pub request_bytes: usize,
    /// Bytes per second through the volume, metadata cached.
    pub verified: f64,
    /// Bytes per second of the tags alone, as many at a time; measured in turns with the former.
    pub tags: f64,
}

struct Bench {
    disk: MemoryStorage,
    volume: Volume,
    context: RequestContext,
    buf: Option<Buf>,
}

impl Bench {
    fn new(tag: TagAlgorithm) -> Self {
        let options = FormatOptions { size: Some(VOLUME), tag, ..FormatOptions::new(BLOCK, [1; 16]) };
        let bytes = create::plan(&options).expect("a possible volume").data_device_bytes;
        let disk = MemoryStorage::new(vec![0; bytes as usize], BLOCK);
        let key = MasterKey::new(&[0x5a; 32]).expect("32 bytes are enough");
        disk.run(create::format(&disk, &key, &options)).expect("memory does not fail");
        let options = OpenOptions {
            cache_bytes: 1 << 20,
            max_request_bytes: LARGEST,
            ..OpenOptions::new(Access::ReadWrite, [2; 32])
        };
        let volume = disk.run(open(&disk, &key, &options)).expect("a new volume opens");
        let mut buf = Buf::new(LARGEST);
        buf.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i % 251) as u8 + 1);
        let mut bench = Self { context: volume.context(0), disk, volume, buf: Some(buf) };
        bench.pass(LARGEST, true);
        bench.disk.run(bench.volume.checkpoint(&bench.disk)).expect("memory does not fail");
        bench
    }

    /// Reads or writes all hot bytes once.
    fn pass(&mut self, request: usize, write: bool) {
        let blocks = (request / BLOCK as usize) as u64;
        for first in (0..(HOT / BLOCK as usize) as u64).step_by(blocks as usize) {
            let range = BlockRange::new(BlockIndex(first), blocks);
            let buf = self.buf.take().expect("given back");
            let (ok, buf) = if write {
                let written = self.volume.write(&self.disk, &mut self.context, range, buf, Durability::MayBeLost);
                let (result, buf) = self.disk.run(written);
                self.checkpoint_if_wanted();
                (result.is_ok(), buf)
            } else {
                let (result, buf) = self.disk.run(self.volume.read(&self.disk, &mut self.context, range, buf));
                (result.is_ok(), buf)
            };
            assert!(ok, "memory does not fail");
            self.buf = Some(buf);
        }
    }

    fn checkpoint_if_wanted(&self) {
        let wanted = pin!(self.volume.work_wanted()).poll(&mut Context::from_waker(Waker::noop()));
        if let Poll::Ready(work) = wanted {
            self.disk.run(self.volume.work(&self.disk, work)).expect("memory does not fail");
        }
    }
}

/// Reads and writes of several sizes with these tags, each for about so long.
pub fn measure(tag: TagAlgorithm, time: Duration) -> Vec<MemorySpeed> {
    let mut bench = Bench::new(tag);
    let patterns = [("read 4K", 4 << 10, false), ("read 32K", 32 << 10, false), ("read 128K", 128 << 10, false)];
    let writes = [("write 4K", 4 << 10, true), ("write 128K", 128 << 10, true)];
    patterns.into_iter().chain(writes).map(|pattern| of_pattern(&mut bench, tag, pattern, time)).collect()
}

fn of_pattern(
    bench: &mut Bench,
    tag: TagAlgorithm,
    (name, request, write): (&str, usize, bool),
    time: Duration,
) -> MemorySpeed {
    let mut tags = TagBench::new(tag, BLOCK, request / BLOCK as usize, HOT);
    let (mut verified, mut alone) = (Vec::new(), Vec::new());
    let begin = Instant::now();
    while verified.len() < 3 || begin.elapsed() < time {
        let turn = Instant::now();
        bench.pass(request, write);
        verified.push(HOT as f64 / turn.elapsed().as_secs_f64());
        let turn = Instant::now();
        let bytes = tags.pass();
        alone.push(bytes as f64 / turn.elapsed().as_secs_f64());
    }
    MemorySpeed {
        pattern: name.into(),
        request_bytes: request,
        verified: median(&mut verified),
        tags: median(&mut alone),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pattern_is_measured_and_every_read_verified() {
        let mut bench = Bench::new(TagAlgorithm::Aegis128X2);
        bench.pass(LARGEST, false);
        let status = bench.volume.status();
        assert_eq!(status.counters.blocks_verified as usize, HOT / BLOCK as usize);
        assert_eq!(status.counters.mismatches, 0);
        let speeds = measure(TagAlgorithm::default(), Duration::ZERO);
        assert_eq!(speeds.len(), 5);
        assert!(speeds.iter().all(|s| s.verified > 0.0 && s.tags > 0.0), "{speeds:?}");
    }
}

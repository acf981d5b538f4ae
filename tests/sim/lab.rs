//! One volume on a simulated disk, one request at a time: for tests that look at a single thing.

use super::{
    Disk, Rng, SimStorage, block_on,
    disk::Trace,
    formatted,
    image::{self, Superblock},
    oracle::{VersionId, fill, fill_all},
    reopen,
};
use std::{
    cell::{Cell, RefMut},
    future::Future,
    pin::pin,
    task::Poll,
};
use ublk_integrity::{
    BlockIndex, BlockRange, Buf, Device, Durability, Latched, OpenOptions, ReadError, RequestContext, Volume,
    WriteError, create::FormatOptions, open::OpenError,
};

pub struct Lab {
    pub io: SimStorage,
    pub volume: Volume,
    pub options: OpenOptions,
    pub context: RequestContext,
    buf: Option<Buf>,
}

/// The bytes of one version of a block.
pub fn content(block_size: usize, block: u64, version: VersionId) -> Vec<u8> {
    let mut bytes = vec![0; block_size];
    fill(BlockIndex(block), version, &mut bytes);
    bytes
}

impl Lab {
    /// An empty volume.
    pub fn new(format: &FormatOptions, options: &OpenOptions) -> Self {
        let io = formatted(format, 1);
        let superblock = Superblock::newest(&io.disk());
        io.disk().set_data_from(superblock.data_offset());
        Self::open(io, options).expect("a new volume opens")
    }

    /// What is on the disk, opened.
    pub fn open(io: SimStorage, options: &OpenOptions) -> Result<Self, OpenError> {
        let volume = reopen(&io, options)?;
        Ok(Self::of(io, volume, options))
    }

    /// A volume that was opened like that.
    pub fn of(io: SimStorage, volume: Volume, options: &OpenOptions) -> Self {
        let context = volume.context(0);
        let buf = Some(Buf::new(options.max_request_bytes));
        Self { io, volume, options: options.clone(), context, buf }
    }

    /// Opens again without a last checkpoint, as after a crash that lost nothing.
    pub fn reopened(self) -> Result<Self, OpenError> {
        let Self { io, mut options, volume, .. } = self;
        drop(volume);
        options.open_id = Rng::new(u64::from(options.open_id[0]) + 1).bytes();
        Self::open(io, &options)
    }

    pub fn disk(&self) -> RefMut<'_, Disk> {
        self.io.disk()
    }
    pub fn superblock(&self) -> Superblock {
        Superblock::newest(&self.disk())
    }
    pub fn records(&self) -> Vec<image::Record> {
        image::records(&self.disk())
    }
    pub fn block_size(&self) -> usize {
        self.volume.block_size()
    }
    /// Where a block lies on the data device.
    pub fn block_offset(&self, block: u64) -> u64 {
        self.superblock().block_offset(block)
    }

    /// Writes one version to `count` blocks.
    pub fn try_write(&mut self, first: u64, count: u64, version: VersionId) -> Result<(), WriteError> {
        let range = BlockRange::new(BlockIndex(first), count);
        let mut buf = self.buf.take().unwrap();
        fill_all(range, version, self.volume.block_size(), &mut buf);
        let Self { io, volume, context, .. } = self;
        let write = volume.write(io, context, range, buf, Durability::MayBeLost);
        let (result, buf) = block_on(io, with_checkpoints(volume, io, write));
        self.buf = Some(buf);
        result
    }
    pub fn write(&mut self, first: u64, count: u64, version: VersionId) {
        self.try_write(first, count, version).unwrap();
    }
    pub fn zero(&mut self, first: u64, count: u64) {
        let range = BlockRange::new(BlockIndex(first), count);
        block_on(&self.io, self.volume.zero(&self.io, &mut self.context, range, false)).unwrap();
    }
    pub fn try_flush(&mut self) -> Result<(), WriteError> {
        block_on(&self.io, self.volume.flush(&self.io, &mut self.context))
    }
    /// Flushes, and does what the checkpoint thread does with the flush entry: writes it down.
    pub fn flush(&mut self) {
        self.try_flush().unwrap();
        block_on(&self.io, self.volume.work(&self.io, ublk_integrity::CheckpointerWork::FlushRecord)).unwrap();
    }
    pub fn checkpoint(&self) {
        self.try_checkpoint().unwrap();
    }
    pub fn try_checkpoint(&self) -> Result<(), Latched> {
        block_on(&self.io, self.volume.checkpoint(&self.io))
    }
    /// The content of one block, or why it can't be had.
    pub fn read(&mut self, block: u64) -> Result<Vec<u8>, ReadError> {
        let one = BlockRange::new(BlockIndex(block), 1);
        let buf = self.buf.take().unwrap();
        let (result, buf) = block_on(&self.io, self.volume.read(&self.io, &mut self.context, one, buf));
        let bytes = buf[..self.volume.block_size()].to_vec();
        self.buf = Some(buf);
        result.map(|()| bytes)
    }
    /// Reads a range at one go into the front of the buffer; the buffer comes back.
    pub fn read_range(&mut self, first: u64, count: u64) -> (Result<(), ReadError>, Vec<u8>) {
        let range = BlockRange::new(BlockIndex(first), count);
        let buf = self.buf.take().unwrap();
        let (result, buf) = block_on(&self.io, self.volume.read(&self.io, &mut self.context, range, buf));
        let bytes = buf[..count as usize * self.block_size()].to_vec();
        self.buf = Some(buf);
        (result, bytes)
    }
    /// Whether all blocks of a range, read at one go, are of this version.
    pub fn range_reads_as(&mut self, first: u64, count: u64, version: VersionId) -> bool {
        let bs = self.block_size();
        let (result, bytes) = self.read_range(first, count);
        result.is_ok() && (first..).zip(bytes.chunks_exact(bs)).all(|(b, bytes)| bytes == content(bs, b, version))
    }
    /// Whether the block reads as this version.
    pub fn reads_as(&mut self, block: u64, version: VersionId) -> bool {
        let want = content(self.block_size(), block, version);
        self.read(block).is_ok_and(|bytes| bytes == want)
    }

    /// What goes over the wire while `f` runs.
    pub fn traced(&mut self, f: impl FnOnce(&mut Self)) -> Vec<Trace> {
        self.disk().trace = Some(Vec::new());
        f(self);
        let trace = self.disk().trace.take().unwrap();
        trace.into_iter().map(|(_, event)| event).collect()
    }
    /// Current bytes of the medium.
    pub fn peek(&self, device: Device, offset: u64, len: usize) -> Vec<u8> {
        self.disk().peek(device, offset, len)
    }
    /// Changes the medium behind the volume's back.
    pub fn poke(&self, device: Device, offset: u64, bytes: &[u8]) {
        self.disk().poke(device, offset, bytes);
    }
    /// Puts bytes on the medium for as long as `f` runs.
    pub fn with_poked<T>(&mut self, device: Device, offset: u64, bytes: &[u8], f: impl FnOnce(&mut Self) -> T) -> T {
        let old = self.peek(device, offset, bytes.len());
        self.poke(device, offset, bytes);
        let result = f(self);
        self.poke(device, offset, &old);
        result
    }
}

/// Runs a request together with the checkpoint thread's work, which alone relieves back-pressure.
/// Work that has begun is brought to its end.
pub async fn with_checkpoints<T>(volume: &Volume, io: &SimStorage, request: impl Future<Output = T>) -> T {
    let working = Cell::new(false);
    let mut request = pin!(request);
    let mut worker = pin!(async {
        loop {
            let work = volume.work_wanted().await;
            working.set(true);
            // A failure latches the volume, and the request says so.
            let _ = volume.work(io, work).await;
            working.set(false);
        }
    });
    let mut result = None;
    std::future::poll_fn(|cx| {
        // Twice: either may have waited for what the other has just done.
        for _ in 0..2 {
            if result.is_none() {
                if let Poll::Ready(value) = request.as_mut().poll(cx) {
                    result = Some(value);
                }
            }
            let _: Poll<()> = worker.as_mut().poll(cx);
        }
        match result.take_if(|_| !working.get()) {
            Some(value) => Poll::Ready(value),
            None => Poll::Pending,
        }
    })
    .await
}

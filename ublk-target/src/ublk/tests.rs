//! The wall between ublk and what serves its requests: a double stands in the place of a volume, a
//! file in that of the character device. No kernel device is made.

use super::{BlockShift, Request, Shared, load::Load, shared::Memory, transfer::Transfer, write_back::WriteBack};
use crate::{
    offline::{Offline, scratch},
    write_back_file::{self, MOST_BYTES},
};
use libublk::sys::{self, ublksrv_io_desc};
use std::{
    fs::File,
    future::{Future, ready},
    os::{fd::AsRawFd, unix::fs::FileExt},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};
use ublk_integrity::{
    AdmittedWrite, BlockIndex, BlockRange, BlockTarget, Buf, Durability, Io, Latched, ReadError, RecordNumber,
    WriteBackId, WriteError,
};

const BLOCK: usize = 512;
const BLOCKS: usize = 64;
/// Reads of this block find that it is not what was written.
const DAMAGED: u64 = 40;

/// Blocks in memory, and what was asked of them.
struct Double {
    blocks: Mutex<Vec<u8>>,
    calls: Mutex<Vec<String>>,
}

/// A write that the double has admitted.
struct Admitted<'t>(&'t Double, BlockRange);

impl Double {
    fn call(&self, what: String) {
        self.calls.lock().unwrap().push(what);
    }
    fn put(&self, range: BlockRange, bytes: impl Fn(usize) -> u8) {
        let at = range.first.0 as usize * BLOCK;
        let mut blocks = self.blocks.lock().unwrap();
        (0..range.count as usize * BLOCK).for_each(|i| blocks[at + i] = bytes(i));
    }
}

impl AdmittedWrite for Admitted<'_> {
    fn range(&self) -> BlockRange {
        self.1
    }
    fn first_not_durable(&self) -> RecordNumber {
        RecordNumber(7)
    }
    fn id(&self) -> WriteBackId {
        WriteBackId { request: 0, number: self.1.first.0 }
    }
    fn withdraw(self) {
        self.0.call(format!("withdraw {}", self.1));
    }
}

impl BlockTarget for Double {
    type Context = usize;
    type Admitted<'t> = Admitted<'t>;
    type Status = usize;

    fn block_size(&self) -> usize {
        BLOCK
    }
    fn blocks(&self) -> u64 {
        BLOCKS as u64
    }
    fn status(&self) -> usize {
        self.calls.lock().unwrap().len()
    }
    fn latched(&self) -> Option<Latched> {
        None
    }
    fn context(&self, thread: usize) -> usize {
        thread
    }
    fn work_together<'c>(_: impl IntoIterator<Item = &'c mut usize>) {}

    fn read<S: Io>(
        &self,
        _: &S,
        _: &mut usize,
        range: BlockRange,
        mut buf: Buf,
    ) -> impl Future<Output = (Result<(), ReadError>, Buf)> {
        self.call(format!("read {range}"));
        if range.overlaps(BlockRange::new(BlockIndex(DAMAGED), 1)) {
            return ready((Err(ReadError::Mismatch { block: BlockIndex(DAMAGED) }), buf));
        }
        let (at, len) = (range.first.0 as usize * BLOCK, range.count as usize * BLOCK);
        buf[..len].copy_from_slice(&self.blocks.lock().unwrap()[at..at + len]);
        ready((Ok(()), buf))
    }
    fn write<S: Io>(
        &self,
        _: &S,
        _: &mut usize,
        range: BlockRange,
        buf: Buf,
        durability: Durability,
    ) -> impl Future<Output = (Result<(), WriteError>, Buf)> {
        self.call(format!("write {range} {durability:?}"));
        self.put(range, |i| buf[i]);
        ready((Ok(()), buf))
    }
    fn zero<S: Io>(
        &self,
        _: &S,
        _: &mut usize,
        range: BlockRange,
        discard: bool,
    ) -> impl Future<Output = Result<(), WriteError>> {
        self.call(format!("zero {range}{}", if discard { " discard" } else { "" }));
        self.put(range, |_| 0);
        ready(Ok(()))
    }
    fn flush<S: Io>(&self, _: &S, _: &mut usize) -> impl Future<Output = Result<(), WriteError>> {
        self.call("flush".into());
        ready(Err(WriteError::ReadOnly))
    }
    fn admit<'t>(&'t self, _: &usize, range: BlockRange, durability: Durability) -> Option<Admitted<'t>> {
        self.call(format!("admit {range} {durability:?}"));
        Some(Admitted(self, range))
    }
    fn write_back<'t, S: Io>(
        &'t self,
        _: &S,
        _: &mut usize,
        Admitted(_, range): Admitted<'t>,
        buf: Buf,
        clear: impl FnOnce(),
    ) -> impl Future<Output = (Result<(), WriteError>, Buf)> {
        self.call(format!("write back {range}"));
        self.put(range, |i| buf[i]);
        clear();
        ready((Ok(()), buf))
    }
    fn wait_safe(&self, _: &mut usize, id: WriteBackId) -> impl Future<Output = Result<(), WriteError>> {
        self.call(format!("wait for {}", id.number));
        ready(if id.number == DAMAGED { Err(WriteError::ReadOnly) } else { Ok(()) })
    }
    fn end_write_back(&self, thread: usize) {
        self.call(format!("end {thread}"));
    }
}

/// What a queue's thread has, with a file for its character device.
struct Wall {
    shared: Shared<Double>,
    offline: Offline,
    device: File,
}

impl Wall {
    fn new() -> Self {
        let (_file, offline, _key) = scratch();
        let (_, files) = offline.handles();
        let target = Double { blocks: Mutex::new(vec![0; BLOCKS * BLOCK]), calls: Mutex::default() };
        let shift = BlockShift::of(target.block_size() as u32);
        let shared = Shared { shift, discard: true, ..Shared::of_test(Arc::new(target), files) };
        Self { shared, offline, device: tempfile::tempfile().unwrap() }
    }

    fn load(&self) -> Load<'_> {
        Load::of(self.shared.gate.of_thread(0))
    }

    /// What the kernel is answered, and what the target was asked meanwhile.
    fn answer<'t>(
        &'t self,
        write_back: &WriteBack<'t, Double>,
        op: u32,
        first: u64,
        sectors: u32,
    ) -> (i32, Vec<String>) {
        let desc = ublksrv_io_desc { op_flags: op, start_sector: first, nr_sectors: sectors, ..Default::default() };
        let transfer = Transfer::Asked { device: self.device.as_raw_fd(), at: 0 };
        let mut memory = Memory { context: 0, buf: Buf::new(MOST_BYTES) };
        let (io, load) = (self.offline.io(), self.load());
        let served = async {
            self.shared.gate.enter(&load).await;
            self.shared
                .answer(Request::parse(&desc, self.shared.shift), transfer, &io, &mut memory, &load, write_back)
                .await
        };
        let code = self.offline.run(served).unwrap();
        load.answered();
        assert_eq!(memory.buf.len(), MOST_BYTES, "the buffer came back");
        (code, self.calls())
    }

    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut *self.shared.target.calls.lock().unwrap())
    }
}

#[test]
fn requests_reach_the_target_and_its_answers_the_kernel() {
    let wall = Wall::new();
    let write_back = WriteBack::new(&wall.shared, 0, 1, None);
    let answer = |op, first, sectors| wall.answer(&write_back, op, first, sectors);
    let asked = |code, call: &str| (code, vec![call.to_owned()]);

    wall.device.write_all_at(&[7; 2 * BLOCK], 0).unwrap();
    assert_eq!(answer(sys::UBLK_IO_OP_WRITE, 8, 2), asked(1024, "write 8-9 MayBeLost"));
    assert_eq!(answer(sys::UBLK_IO_OP_WRITE | sys::UBLK_IO_F_FUA, 3, 1), asked(512, "write 3 Durable"));
    wall.device.write_all_at(&[0; 3 * BLOCK], 0).unwrap();
    assert_eq!(answer(sys::UBLK_IO_OP_READ, 7, 3), asked(1536, "read 7-9"));
    let mut bytes = [1; 3 * BLOCK];
    wall.device.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes[..BLOCK].iter().all(|byte| *byte == 0) && bytes[BLOCK..].iter().all(|byte| *byte == 7));

    assert_eq!(answer(sys::UBLK_IO_OP_DISCARD, 8, 1), asked(0, "zero 8 discard"));
    assert_eq!(answer(sys::UBLK_IO_OP_WRITE_ZEROES, 9, 1), asked(0, "zero 9 discard"));
    let kept_allocated = sys::UBLK_IO_OP_WRITE_ZEROES | sys::UBLK_IO_F_NOUNMAP;
    assert_eq!(answer(kept_allocated, 9, 1), asked(0, "zero 9"));
    // Errors of the target, and what never gets to it.
    assert_eq!(answer(sys::UBLK_IO_OP_READ, DAMAGED, 1), asked(-libc::EILSEQ, &format!("read {DAMAGED}")));
    assert_eq!(answer(sys::UBLK_IO_OP_FLUSH, 0, 0), asked(-libc::EROFS, "flush"));
    assert_eq!(answer(200, 0, 8), (-libc::EINVAL, Vec::new()));
}

#[test]
fn a_small_write_is_answered_once_it_is_kept_and_written_back_afterwards() {
    let wall = Wall::new();
    let folder = tempfile::tempdir().unwrap();
    let (kept, part) = write_back_file::of_test(folder.path(), 1);
    let write_back = WriteBack::new(&wall.shared, 0, 1, Some(part));
    wall.device.write_all_at(&[9; BLOCK], 0).unwrap();
    // Longer than what can be copied.
    let (code, calls) = wall.answer(&write_back, sys::UBLK_IO_OP_WRITE, 0, 2);
    assert!(
        code < 0 && calls == ["admit 0-1 MayBeLost", "withdraw 0-1"] && kept.count().unwrap() == 0,
        "{code} {calls:?}"
    );
    let (code, calls) = wall.answer(&write_back, sys::UBLK_IO_OP_WRITE, 5, 1);
    assert!(code == 512 && calls == ["admit 5 MayBeLost"] && kept.count().unwrap() == 1, "{code} {calls:?}");
    write_back.tag_ends(&wall.shared);
    wall.offline.run(write_back.write(0, &wall.offline.io(), &wall.shared, &wall.load())).unwrap();
    assert_eq!((wall.calls(), kept.count().unwrap()), (vec!["end 0".to_owned(), "write back 5".to_owned()], 0));
    assert_eq!(wall.shared.target.blocks.lock().unwrap()[5 * BLOCK], 9);
}

#[test]
fn a_write_that_must_be_durable_is_answered_once_it_is_safe() {
    let wall = Wall::new();
    let folder = tempfile::tempdir().unwrap();
    let (kept, part) = write_back_file::of_test(folder.path(), 2);
    let write_back = WriteBack::new(&wall.shared, 0, 1, Some(part));
    wall.device.write_all_at(&[9; BLOCK], 0).unwrap();
    let fua = sys::UBLK_IO_OP_WRITE | sys::UBLK_IO_F_FUA;
    let (code, calls) = wall.answer(&write_back, fua, 5, 1);
    assert!(code == 512 && calls == ["admit 5 Durable", "wait for 5"], "{code} {calls:?}");
    let (code, calls) = wall.answer(&write_back, fua, DAMAGED, 1);
    assert!(code == -libc::EROFS && calls.len() == 2 && kept.count().unwrap() == 2, "{code} {calls:?}");
}

#[test]
fn a_request_that_waits_at_the_gate_is_served_when_that_opens() {
    let wall = Wall::new();
    let write_back = WriteBack::new(&wall.shared, 0, 1, None);
    wall.device.write_all_at(&[7; BLOCK], 0).unwrap();
    let (gate, target) = (&wall.shared.gate, &wall.shared.target);
    let closed = gate.close(Duration::ZERO).ok().unwrap();
    thread::scope(|s| {
        s.spawn(move || {
            // Until there is one that waits, and a moment more.
            while gate.waiting_count() == 0 {
                thread::sleep(Duration::from_millis(1));
            }
            thread::sleep(Duration::from_millis(20));
            assert!(target.calls.lock().unwrap().is_empty(), "served behind a closed gate");
            drop(closed);
        });
        assert_eq!(wall.answer(&write_back, sys::UBLK_IO_OP_WRITE, 8, 1), (512, vec!["write 8 MayBeLost".to_owned()]));
    });
}

#[test]
fn what_was_answered_early_is_in_place_before_the_gate_is_closed() {
    let wall = Wall::new();
    let folder = tempfile::tempdir().unwrap();
    let (kept, part) = write_back_file::of_test(folder.path(), 1);
    let write_back = WriteBack::new(&wall.shared, 0, 1, Some(part));
    wall.device.write_all_at(&[9; BLOCK], 0).unwrap();
    assert_eq!(wall.answer(&write_back, sys::UBLK_IO_OP_WRITE, 5, 1).0, 512);
    assert_eq!(wall.shared.gate.close(Duration::from_millis(20)).err(), Some(1));
    write_back.tag_ends(&wall.shared);
    wall.offline.run(write_back.write(0, &wall.offline.io(), &wall.shared, &wall.load())).unwrap();
    let closed = wall.shared.gate.close(Duration::from_secs(60));
    assert!(closed.is_ok() && kept.count().unwrap() == 0);
    assert_eq!(wall.shared.target.blocks.lock().unwrap()[5 * BLOCK], 9);
}

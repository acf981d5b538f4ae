//! A disk that is a piece of memory: for examples, tests and benchmarks.

use crate::{Buf, ByteOffset, Device, Durability, Errno, Geometry, Scheduler, Storage};
use std::{
    cell::RefCell,
    future::{Future, Ready, ready},
    ops::Range,
    pin::pin,
    task::{Context, Poll, Waker},
    time::Duration,
};

/// Both devices in one piece of memory, of one thread. Each operation has ended when it begins, and
/// what was written is there: [`image`](Self::image) is what a power cut leaves. Pauses take no
/// time. Where a test wants another behaviour it wraps this.
pub struct MemoryStorage {
    bytes: RefCell<Vec<u8>>,
    physical_block: u32,
}

impl MemoryStorage {
    /// A disk that holds these bytes and writes `physical_block` of them atomically.
    pub fn new(bytes: Vec<u8>, physical_block: u32) -> Self {
        Self { bytes: RefCell::new(bytes), physical_block }
    }

    /// A copy of all bytes.
    pub fn image(&self) -> Vec<u8> {
        self.bytes.borrow().clone()
    }

    /// Changes bytes behind the back of the disk's user, as an attacker would.
    pub fn tamper(&self, change: impl FnOnce(&mut [u8])) {
        change(&mut self.bytes.borrow_mut());
    }

    /// Runs what uses this disk alone, one operation after the other, so that it never has to wait.
    ///
    /// # Panics
    /// Where it waits for something else.
    pub fn run<T>(&self, future: impl Future<Output = T>) -> T {
        match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(value) => value,
            Poll::Pending => panic!("it waits for what this disk does not do"),
        }
    }

    /// What is done with the bytes of an operation; beyond the end it is an error.
    fn with(&self, at: ByteOffset, len: u64, operation: impl FnOnce(&mut [u8])) -> Result<(), Errno> {
        let mut bytes = self.bytes.borrow_mut();
        let range = at.0.checked_add(len).and_then(|end| Some(at.0.try_into().ok()?..end.try_into().ok()?));
        operation(range.and_then(|range: Range<usize>| bytes.get_mut(range)).ok_or(Errno::EIO)?);
        Ok(())
    }
}

impl Storage for MemoryStorage {
    type Transfer = Ready<(Result<(), Errno>, Buf)>;
    type Command = Ready<Result<(), Errno>>;

    fn geometry(&self, _: Device) -> Geometry {
        let size = self.bytes.borrow().len() as u64;
        Geometry { size, physical_block: self.physical_block, logical_block: 512 }
    }
    fn read(&self, _: Device, at: ByteOffset, mut buf: Buf, part: Range<usize>) -> Self::Transfer {
        let into = &mut buf[part];
        let read = self.with(at, into.len() as u64, |bytes| into.copy_from_slice(bytes));
        ready((read, buf))
    }
    fn write(&self, _: Device, at: ByteOffset, buf: Buf, part: Range<usize>, _: Durability) -> Self::Transfer {
        let from = &buf[part];
        let written = self.with(at, from.len() as u64, |bytes| bytes.copy_from_slice(from));
        ready((written, buf))
    }
    fn sync(&self, _: Device) -> Self::Command {
        ready(Ok(()))
    }
    /// Discarded bytes read as zeros.
    fn discard(&self, _: Device, at: ByteOffset, len: u64) -> Self::Command {
        ready(self.with(at, len, |bytes| bytes.fill(0)))
    }
    fn sleep(&self, _: Duration) -> Self::Command {
        ready(Ok(()))
    }
}

impl Scheduler for MemoryStorage {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_stay_where_they_were_written_and_the_end_is_an_error() {
        let disk = MemoryStorage::new(vec![9; 4096], 512);
        let mut buf = Buf::new(1024);
        buf[512..].fill(7);
        let at = ByteOffset(1024);
        let (written, buf) = disk.write(Device::Data, at, buf, 512..1024, Durability::Durable).into_inner();
        assert_eq!(written, Ok(()));
        assert_eq!(disk.discard(Device::Meta, ByteOffset(0), 512).into_inner(), Ok(()));
        let image = disk.image();
        assert!(image[..512].iter().all(|&b| b == 0) && image[1024..1536].iter().all(|&b| b == 7) && image[1536] == 9);
        let (read, buf) = disk.read(Device::Meta, at, buf, 0..512).into_inner();
        assert!(read.is_ok() && buf[..512].iter().all(|&b| b == 7));
        for at in [3584, 4096, u64::MAX - 100] {
            assert_eq!(
                disk.read(Device::Data, ByteOffset(at), Buf::new(1024), 0..1024).into_inner().0,
                Err(Errno::EIO)
            );
        }
    }
}

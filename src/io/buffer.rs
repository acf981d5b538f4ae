//! Owned, aligned memory for device I/O.

use bytes::{Buf as _, BytesMut};
use stable_deref_trait::StableDeref;
use std::ops::{Deref, DerefMut};

/// Alignment of every buffer in bytes: enough for O_DIRECT on any device Linux knows.
pub const BUF_ALIGN: usize = 4096;

/// A buffer whose first byte lies on a [`BUF_ALIGN`] boundary.
///
/// It is moved into a [`Storage`](crate::Storage) operation and comes back when the operation has
/// ended, so nobody else can touch memory that a device is writing to. The memory never moves while
/// the `Buf` does: only the handle is moved.
pub struct Buf {
    memory: Memory,
    mark: Option<BufMark>,
}

enum Memory {
    Heap(BytesMut),
    Other(Box<dyn Other>),
}

trait Other: DerefMut<Target = [u8]> + Send + Sync {}

impl<T: DerefMut<Target = [u8]> + Send + Sync> Other for T {}

/// What a [`Storage`](crate::Storage) has noted about a buffer's memory: that it is known to the
/// kernel beforehand. It goes with the memory, so that it can't be taken for true of other memory
/// at the same address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BufMark {
    /// The ring that knows it.
    pub ring: u32,
    /// Its number there.
    pub index: u16,
}

impl Buf {
    /// A zeroed buffer of `len` bytes; every page of it has been touched, so that
    /// later use does not fault.
    pub fn new(len: usize) -> Self {
        let [buf] = Self::several(1, len).try_into().expect("one was asked for");
        buf
    }

    /// `count` such buffers side by side in one allocation, which goes with the last of them: large
    /// enough, it can be made of huge pages, which the processor and the kernel find faster than
    /// many small ones.
    pub fn several(count: usize, len: usize) -> Vec<Self> {
        let place = len.next_multiple_of(BUF_ALIGN);
        // Fresh zeroed memory may be one shared page until it is written to.
        let mut bytes = BytesMut::zeroed(count * place + BUF_ALIGN);
        bytes.chunks_mut(BUF_ALIGN).for_each(|page| page[0] = std::hint::black_box(0));
        bytes.advance(bytes.as_ptr().align_offset(BUF_ALIGN));
        let one = |_| {
            let mut bytes = bytes.split_to(place);
            bytes.truncate(len);
            Self { memory: Memory::Heap(bytes), mark: None }
        };
        (0..count).map(one).collect()
    }

    /// A buffer of no bytes and without memory: what is left where one has been moved away.
    pub fn none() -> Self {
        Self { memory: Memory::Heap(BytesMut::new()), mark: None }
    }

    /// A buffer in memory of another kind, a mapping for instance.
    ///
    /// # Panics
    /// When it does not begin on a boundary of [`BUF_ALIGN`].
    pub fn of(memory: impl StableDeref<Target = [u8]> + DerefMut + Send + Sync + 'static) -> Self {
        assert_eq!(memory.as_ptr().align_offset(BUF_ALIGN), 0, "buffers are aligned");
        Self { memory: Memory::Other(Box::new(memory)), mark: None }
    }

    /// What was noted about this memory.
    pub fn mark(&self) -> Option<BufMark> {
        self.mark
    }

    /// Notes something about this memory.
    pub fn set_mark(&mut self, mark: BufMark) {
        self.mark = Some(mark);
    }
}

impl Deref for Buf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match &self.memory {
            Memory::Heap(bytes) => bytes,
            Memory::Other(bytes) => bytes,
        }
    }
}

impl DerefMut for Buf {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.memory {
            Memory::Heap(bytes) => bytes,
            Memory::Other(bytes) => bytes,
        }
    }
}

impl std::fmt::Debug for Buf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buf({} bytes)", self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned_and_zeroed() {
        for len in [0, 1, 512, 4096, 100_000] {
            let buf = Buf::new(len);
            assert_eq!(buf.len(), len);
            assert_eq!(buf.as_ptr() as usize % BUF_ALIGN, 0);
            assert!(buf.iter().all(|&b| b == 0));
        }
        assert!(Buf::none().is_empty());
    }

    #[test]
    fn several_share_an_allocation_and_no_byte() {
        for len in [1, 4096, 5000] {
            let mut bufs = Buf::several(3, len);
            for (i, buf) in (1..).zip(&mut bufs) {
                assert_eq!((buf.len(), buf.as_ptr() as usize % BUF_ALIGN), (len, 0));
                buf.fill(i);
            }
            assert_eq!(bufs[2].as_ptr() as usize - bufs[0].as_ptr() as usize, 2 * len.next_multiple_of(BUF_ALIGN));
            // The others stay when one goes.
            drop(bufs.remove(1));
            assert!((1..).step_by(2).zip(&bufs).all(|(i, buf)| buf.iter().all(|&byte| byte == i)));
        }
        assert!(Buf::several(0, 4096).is_empty());
    }
}

//! The root entry that lookups start from: read without a lock, replaced by the checkpoint.

use crate::{
    format::TreeEntry,
    sync::{AtomicU64, Ordering, fence},
};
use zerocopy::{FromBytes, IntoBytes};

const WORDS: usize = size_of::<TreeEntry>() / 8;

/// A sequence lock around one [`TreeEntry`]; one writer, the checkpoint.
pub(crate) struct Root {
    version: AtomicU64,
    words: [AtomicU64; WORDS],
}

impl Root {
    pub(crate) fn new(entry: TreeEntry) -> Self {
        let root = Self { version: AtomicU64::new(0), words: std::array::from_fn(|_| AtomicU64::new(0)) };
        root.store(entry);
        root
    }

    pub(crate) fn load(&self) -> TreeEntry {
        loop {
            let version = self.version.load(Ordering::Acquire);
            let words: [u64; WORDS] = std::array::from_fn(|i| self.words[i].load(Ordering::Relaxed));
            fence(Ordering::Acquire);
            // The writer stores eight words and nothing else in between: the loop ends at once.
            if version & 1 == 0 && self.version.load(Ordering::Relaxed) == version {
                return TreeEntry::read_from_bytes(words.as_bytes()).expect("same size");
            }
            crate::sync::spin_loop();
        }
    }

    pub(crate) fn store(&self, entry: TreeEntry) {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version + 1, Ordering::Relaxed);
        fence(Ordering::Release);
        let words = <[u64; WORDS]>::read_from_bytes(entry.as_bytes()).expect("same size");
        for (place, word) in self.words.iter().zip(words) {
            place.store(word, Ordering::Relaxed);
        }
        self.version.store(version + 2, Ordering::Release);
    }
}

//! Pages that have rotted on the medium and whose content is known all the same, as the entry proves that names
//! them. The next checkpoint writes them to their other slots.

use crate::{
    crypto::keys::{Digest, equal},
    format::{PAGE_BYTES, PageId},
    sync::{AtomicUsize, Mutex, Ordering},
};
use arrayvec::ArrayVec;

/// Most of them at a time: memory for what a checkpoint has to write besides. More are found once these are written.
pub(crate) const MOST_RESCUED: usize = 64;

struct RescuedPage {
    id: PageId,
    digest: Digest,
    bytes: Box<[u8; PAGE_BYTES]>,
}

/// The pages that wait for the next checkpoint.
pub(crate) struct Rescued {
    /// Length of the list, to be read without the lock: there are hardly ever any.
    count: AtomicUsize,
    pages: Mutex<ArrayVec<RescuedPage, MOST_RESCUED>>,
}

impl Rescued {
    pub(crate) fn new() -> Self {
        Self { count: AtomicUsize::new(0), pages: Mutex::new(ArrayVec::new()) }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.count.load(Ordering::SeqCst) == 0
    }

    /// Keeps a page whose bytes have this digest. `false`: there is no room.
    pub(crate) fn add(&self, id: PageId, digest: Digest, bytes: &[u8]) -> bool {
        let page = RescuedPage { id, digest, bytes: Box::new(bytes.try_into().expect("a page")) };
        let mut pages = self.pages.lock();
        pages.retain(|known| known.id != id);
        let added = pages.try_push(page).is_ok();
        self.count.store(pages.len(), Ordering::SeqCst);
        added
    }

    /// The bytes of a page, if it is the one that this digest names.
    pub(crate) fn get(&self, id: PageId, digest: &Digest, out: &mut [u8]) -> bool {
        if self.is_empty() {
            return false;
        }
        let pages = self.pages.lock();
        let page = pages.iter().find(|page| page.id == id && equal(&page.digest, digest));
        page.inspect(|page| out[..PAGE_BYTES].copy_from_slice(&page.bytes[..])).is_some()
    }

    /// Which pages there are.
    pub(crate) fn list(&self, into: &mut Vec<PageId>) {
        into.clear();
        into.extend(self.pages.lock().iter().map(|page| page.id));
    }

    /// These have been written.
    pub(crate) fn forget(&self, written: &[PageId]) {
        let mut pages = self.pages.lock();
        pages.retain(|page| !written.contains(&page.id));
        self.count.store(pages.len(), Ordering::SeqCst);
    }
}

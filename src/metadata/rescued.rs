//! Pages that have rotted on the medium and whose content is known all the same, as the entry proves that names
//! them, with pages above them. The next checkpoint writes them to their other slots.
//!
//! Nobody has asked for that: where it fails, all stays as it is.

use crate::{
    crypto::keys::{Digest, equal},
    format::{PAGE_BYTES, PageId, digest},
    sync::{AtomicUsize, Mutex, Ordering},
};
use arrayvec::ArrayVec;

/// Most of them at a time: memory for what a checkpoint has to write besides. More are found once these are written.
pub(crate) const MOST_RESCUED: usize = 64;

/// A page and the digest of what it should be: of one that has changed meanwhile nothing is to be rescued.
#[derive(Clone, Copy)]
pub(crate) struct Rescue {
    pub(crate) id: PageId,
    pub(crate) digest: Digest,
    /// A checkpoint has come upon what keeps it from writing the page.
    pub(crate) failed: bool,
}

impl Rescue {
    pub(crate) fn new(id: PageId, digest: Digest) -> Self {
        Self { id, digest, failed: false }
    }

    /// Whether it is the page itself, or one below it.
    pub(crate) fn hangs_on(&self, page: PageId) -> bool {
        self.id.hangs_on(page)
    }

    pub(crate) fn is(&self, id: PageId, digest: &Digest) -> bool {
        self.id == id && equal(&self.digest, digest)
    }
}

/// What has become of a page that was to be rescued.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum RescueState {
    /// It waits for the next checkpoint.
    Waits,
    /// It has been written, or its place is not current any more.
    Written,
    /// A checkpoint could not write it.
    Failed,
}

struct RescuedPage {
    what: Rescue,
    /// It is here for those below it alone, and nobody asks what becomes of it.
    is_above: bool,
    bytes: Box<[u8; PAGE_BYTES]>,
}

/// The pages that wait for the next checkpoint.
pub(crate) struct Rescued {
    /// How many wait, to be read without the lock: there are hardly ever any.
    waiting: AtomicUsize,
    pages: Mutex<ArrayVec<RescuedPage, MOST_RESCUED>>,
}

impl Rescued {
    pub(crate) fn new() -> Self {
        Self { waiting: AtomicUsize::new(0), pages: Mutex::new(ArrayVec::new()) }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) == 0
    }

    fn change<T>(&self, change: impl FnOnce(&mut ArrayVec<RescuedPage, MOST_RESCUED>) -> T) -> T {
        let mut pages = self.pages.lock();
        let result = change(&mut pages);
        self.waiting.store(pages.iter().filter(|page| !page.what.failed).count(), Ordering::SeqCst);
        result
    }

    /// Keeps a page whose bytes have this digest. `false`: they have not, or there is no room.
    pub(crate) fn add(&self, id: PageId, of: Digest, bytes: &[u8]) -> bool {
        self.put(id, of, bytes, false)
    }

    fn put(&self, id: PageId, of: Digest, bytes: &[u8], is_above: bool) -> bool {
        if !equal(&digest(id, bytes), &of) {
            return false;
        }
        let page =
            RescuedPage { what: Rescue::new(id, of), is_above, bytes: Box::new(bytes.try_into().expect("a page")) };
        self.change(|pages| {
            pages.retain(|known| known.what.id != id);
            pages.try_push(page).is_ok()
        })
    }

    /// The same, if the page is not there already: one that itself has rotted must not make room for an older one.
    pub(crate) fn add_above(&self, id: PageId, of: Digest, bytes: &[u8]) {
        if self.pages.lock().iter().all(|known| known.what.id != id) {
            self.put(id, of, bytes, true);
        }
    }

    /// Forgets those that could not be written, of which nobody has asked any more.
    pub(crate) fn forget_failed(&self) {
        self.change(|pages| pages.retain(|page| !page.what.failed));
    }

    /// The bytes of a page, if it is the one that this digest names.
    pub(crate) fn get(&self, id: PageId, digest: &Digest, out: &mut [u8]) -> bool {
        if self.is_empty() {
            return false;
        }
        let pages = self.pages.lock();
        let page = pages.iter().find(|page| page.what.is(id, digest));
        page.inspect(|page| out[..PAGE_BYTES].copy_from_slice(&page.bytes[..])).is_some()
    }

    /// What waits.
    pub(crate) fn list(&self, into: &mut Vec<Rescue>) {
        into.clear();
        into.extend(self.pages.lock().iter().map(|page| page.what).filter(|what| !what.failed));
    }

    /// A checkpoint has done with these. What has come meanwhile stays.
    pub(crate) fn done(&self, with: &[Rescue]) {
        self.change(|pages| {
            for done in with {
                match pages.iter().position(|page| page.what.is(done.id, &done.digest)) {
                    Some(at) if done.failed && !pages[at].is_above => pages[at].what.failed = true,
                    Some(at) => drop(pages.remove(at)),
                    None => {}
                }
            }
        });
    }

    /// What has become of a page that was added. One that has failed makes room: it is told but once.
    pub(crate) fn settle(&self, id: PageId, digest: &Digest) -> RescueState {
        self.change(|pages| match pages.iter().position(|page| page.what.is(id, digest)) {
            None => RescueState::Written,
            Some(at) if pages[at].what.failed => {
                pages.remove(at);
                RescueState::Failed
            }
            Some(_) => RescueState::Waits,
        })
    }

    /// For how many more there is room.
    pub(crate) fn room(&self) -> usize {
        self.pages.lock().remaining_capacity()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: PageId = PageId { level: 0, index: 70 };

    #[test]
    fn nothing_gets_in_that_is_not_proven() {
        let rescued = Rescued::new();
        let bytes = [7; PAGE_BYTES];
        assert!(!rescued.add(PAGE, digest(PAGE, &[8; PAGE_BYTES]), &bytes) && rescued.is_empty());
        assert!(rescued.add(PAGE, digest(PAGE, &bytes), &bytes) && !rescued.is_empty());
    }

    #[test]
    fn what_comes_while_a_checkpoint_writes_waits_for_the_next() {
        let rescued = Rescued::new();
        let add = |fill| {
            let bytes = [fill; PAGE_BYTES];
            let of = digest(PAGE, &bytes);
            assert!(rescued.add(PAGE, of, &bytes));
            of
        };
        let old = add(1);
        let mut listed = Vec::new();
        rescued.list(&mut listed);
        let new = add(2);
        rescued.done(&listed);
        assert_eq!(rescued.settle(PAGE, &old), RescueState::Written);
        assert_eq!(rescued.settle(PAGE, &new), RescueState::Waits);
        rescued.list(&mut listed);
        listed[0].failed = true;
        rescued.done(&listed);
        assert_eq!(rescued.settle(PAGE, &new), RescueState::Failed);
        assert!(rescued.is_empty() && rescued.room() == MOST_RESCUED, "it is not tried again");
        rescued.list(&mut listed);
        assert!(listed.is_empty());
    }

    #[test]
    fn a_page_hangs_on_itself_and_those_above() {
        let rescue = Rescue::new(PAGE, [0; 32]);
        let on = |level, index| rescue.hangs_on(PageId { level, index });
        assert!(on(0, 70) && on(1, 1) && on(2, 0));
        assert!(!on(0, 71) && !on(1, 0) && !on(2, 1));
    }
}

//! Passes of a scrub beside requests: what they find is what has rotted, and all of it. And what they have found is healed, from
//! replicas that may be older, damaged, or unreadable.

use super::{
    SimStorage, block_on,
    exec::join,
    image::{Superblock, TAGS_PER_PAGE},
    oracle::{Before, Oracle, fill},
    rot::{OnMedium, Rot, page_on_medium, rotten_tag_pages, see_what_is_whole, tag_pages},
    world::{MAX_REQUEST, World},
};
use std::{
    cell::{Cell, RefCell},
    collections::{BTreeSet, HashMap, HashSet},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};
use ublk_integrity::{
    BlockIndex, Buf, Device, PageName, RequestContext, Storage, Volume, WriteError,
    heal::{HealError, Healed},
    scrub::{BadMetadata, MetadataPart, Remedy, Scrub, ScrubControl, ScrubFinding, ScrubState},
};

/// What passes and those who heal have done.
pub static DONE: Done = Done {
    passes: AtomicU64::new(0),
    bad_blocks: AtomicU64::new(0),
    mended_pages: AtomicU64::new(0),
    healed: AtomicU64::new(0),
    refused: AtomicU64::new(0),
};

pub struct Done {
    /// Passes that have come to their end.
    pub passes: AtomicU64,
    pub bad_blocks: AtomicU64,
    pub mended_pages: AtomicU64,
    pub healed: AtomicU64,
    /// Replicas that did not hold what was written last.
    pub refused: AtomicU64,
}

/// After each pass, so that the next one begins.
const MOST_HEALED: usize = 20;

fn add(what: &AtomicU64, n: usize) {
    what.fetch_add(n as u64, Ordering::Relaxed);
}

/// What a pass may find, and what it must.
struct Pass<'a> {
    io: &'a SimStorage,
    oracle: &'a RefCell<Oracle>,
    /// The block that it begins with.
    from: u64,
    begun: u64,
    before: HashMap<u64, Before>,
    rotten_pages: Vec<(u64, u64)>,
    found: RefCell<BTreeSet<u64>>,
    found_pages: RefCell<HashSet<PageName>>,
    /// Pages that wait for a checkpoint, and when one had rotted last by then.
    waiting: RefCell<HashMap<PageName, u64>>,
}

impl<'a> Pass<'a> {
    fn begin(io: &'a SimStorage, oracle: &'a RefCell<Oracle>, from: u64) -> Self {
        let begun = oracle.borrow_mut().tick();
        let (before, rotten_pages) = (oracle.borrow().before_all(), rotten_tag_pages(io, &oracle.borrow()));
        let (found, found_pages, waiting) = Default::default();
        Self { io, oracle, from, begun, before, rotten_pages, found, found_pages, waiting }
    }

    /// It tells of something.
    fn hears(&self, finding: ScrubFinding, is_torn: &impl Fn(BlockIndex) -> bool) {
        match finding {
            ScrubFinding::Blocks(run) => {
                let nothing = Before::default();
                for block in run.range.blocks() {
                    let before = self.before.get(&block.0).unwrap_or(&nothing);
                    let is_right = self.oracle.borrow().broken_since(block, before) || is_torn(block);
                    assert!(is_right, "a false alarm of a pass, block {block}: {finding}");
                    self.found.borrow_mut().insert(block.0);
                }
            }
            ScrubFinding::Metadata(BadMetadata { part: MetadataPart::TreePage { name }, remedy, .. }) => {
                let below = tag_pages(name.level, name.index);
                let is_right = self.oracle.borrow().page_broken_since(below, self.begun);
                self.found_pages.borrow_mut().insert(name);
                match remedy {
                    // It was bad when it was found first.
                    Remedy::Mended => self.is_mended(name),
                    Remedy::Waits => {
                        assert!(is_right, "a false alarm of a pass: {finding}");
                        self.waiting.borrow_mut().insert(name, self.oracle.borrow().last_page_rot());
                    }
                    Remedy::None if self.waiting.borrow().contains_key(&name) => {}
                    Remedy::None => assert!(is_right, "a false alarm of a pass: {finding}"),
                }
            }
            ScrubFinding::Metadata(_) => panic!("a false alarm of a pass: {finding}"),
        }
    }

    /// What was mended is whole on the medium, if nothing has rotted since.
    fn is_mended(&self, name: PageName) {
        let mut oracle = self.oracle.borrow_mut();
        let since = self.waiting.borrow_mut().remove(&name);
        if since == Some(oracle.last_page_rot()) {
            let disk = self.io.disk();
            let found = page_on_medium(&disk, &Superblock::newest_bytes(&disk), name.level, name.index);
            assert!(matches!(found, OnMedium::Whole(_) | OnMedium::Absent), "{name} is no more whole than before");
        }
        see_what_is_whole(self.io, &mut oracle);
        add(&DONE.mended_pages, 1);
    }

    /// It has come to its end: what was bad from before its beginning on has been found.
    fn ends(&self) -> BTreeSet<u64> {
        let (oracle, found) = (self.oracle.borrow(), self.found.take());
        for block in oracle.bad_since(self.begun) {
            let is_found = block.0 < self.from || found.contains(&block.0);
            assert!(is_found, "block {block} has been bad for the whole of a pass that has not found it");
        }
        let still = rotten_tag_pages(self.io, &oracle);
        for (index, _) in self.rotten_pages.iter().filter(|page| still.contains(page)) {
            if oracle.page_rots_since(*index..index + 1, self.begun) {
                continue;
            }
            let is_found = *index < self.from / TAGS_PER_PAGE
                || self.found_pages.borrow().iter().any(|name| (name.level, name.index) == (0, *index));
            assert!(is_found, "tag page {index} has been bad for the whole of a pass that has not found it");
        }
        add(&DONE.passes, 1);
        add(&DONE.bad_blocks, found.len());
        found
    }
}

/// A pass over the volume. It goes on where one was when the volume was last open.
async fn pass(
    volume: &Volume,
    io: &SimStorage,
    oracle: &RefCell<Oracle>,
    is_torn: impl Fn(BlockIndex) -> bool,
) -> (ScrubControl, BTreeSet<u64>) {
    let last = volume.last_scrub().unwrap_or_default();
    let next = Scrub { pass: last.pass + 1, ..Scrub::default() };
    let begins = if last.state == ScrubState::Running { last } else { next };
    let control = ScrubControl::new(begins, None);
    let pass = Pass::begin(io, oracle, begins.cursor);
    volume.scrub(io, &control, |finding| pass.hears(finding, &is_torn)).await;
    assert_eq!(control.state(), ScrubState::Ended);
    let found = pass.ends();
    (control, found)
}

/// After a crash a pass goes on where it was, and finds what that has torn or what had failed before.
pub fn scrub_after(volume: &Volume, io: &SimStorage, oracle: &RefCell<Oracle>) {
    let (bs, info) = (volume.block_size() as u64, volume.info());
    let at = |block: BlockIndex| info.data_device_bytes - info.size + block.0 * bs;
    let is_torn = |block| io.disk().is_torn(Device::Data, at(block));
    let has_ended = Cell::new(false);
    let scrub = async {
        pass(volume, io, oracle, is_torn).await;
        has_ended.set(true);
    };
    let is_sick = !oracle.borrow().lost_pages().is_empty();
    let checkpoints = async {
        while is_sick && !has_ended.get() {
            io.sleep(Duration::from_secs(1)).await.unwrap();
            volume.checkpoint(io).await.expect("the devices are in order");
        }
    };
    block_on(io, join(scrub, checkpoints));
}

impl World {
    /// Passes over the volume, one after the other. On a sick disk somebody heals what they find.
    pub async fn scrubs(&self) {
        let mut memory = self.rot.as_ref().map(|rot| (rot, self.volume.context(0), Some(Buf::new(MAX_REQUEST))));
        loop {
            let (control, found) = pass(&self.volume, &self.io, &self.oracle, |_| false).await;
            let Some((rot, context, buf)) = &mut memory else { continue };
            let mut healed = 0;
            for block in found.into_iter().take(MOST_HEALED) {
                if rot.rests.get() {
                    break;
                }
                rot.healing.set(rot.healing.get() + 1);
                let done = self.heal(rot, context, buf, BlockIndex(block)).await;
                rot.healing.set(rot.healing.get() - 1);
                if let Some(done) = done {
                    let was_bad = done == Healed::Healed;
                    let is_listed = control.is_good(BlockIndex(block), was_bad);
                    healed += u64::from(was_bad && is_listed);
                }
            }
            assert_eq!(control.report().healed_blocks, healed);
        }
    }

    /// Tries to heal a block from some replicas, until one will do. What it was healed by, or that it is good.
    pub async fn heal(
        &self,
        rot: &Rot,
        context: &mut RequestContext,
        buf: &mut Option<Buf>,
        block: BlockIndex,
    ) -> Option<Healed> {
        for _ in 0..=rot.below(3) {
            let Some(replica) = self.replica(rot, block) else { continue };
            let done = self.heal_from(context, buf, block, &replica).await;
            if let Some(Healed::Healed | Healed::WasGood) = done {
                return done;
            }
        }
        None
    }

    /// What a replica holds of a block; `None`: it can't be read there.
    fn replica(&self, rot: &Rot, block: BlockIndex) -> Option<Vec<u8>> {
        let oracle = self.oracle.borrow();
        let (issued, mut bytes) = (oracle.issued(block), vec![0; self.volume.block_size()]);
        let newest = *issued.last().expect("zeros at least");
        let older = issued[rot.below(issued.len() as u64) as usize];
        match rot.below(20) {
            0..11 => fill(block, newest, &mut bytes),
            11..15 => fill(block, older, &mut bytes),
            15 => bytes = rot.bytes(bytes.len()),
            16 => fill(BlockIndex(block.0 ^ 1), newest, &mut bytes),
            // One that was being written when it was copied.
            17 => {
                fill(block, newest, &mut bytes);
                bytes[..8].fill(0xee);
            }
            _ => return None,
        }
        Some(bytes)
    }

    /// Tries to heal a block from these bytes. `None`: that has failed, as it may.
    async fn heal_from(
        &self,
        context: &mut RequestContext,
        buf: &mut Option<Buf>,
        block: BlockIndex,
        replica: &[u8],
    ) -> Option<Healed> {
        let mut bytes = buf.take().expect("nobody else has it");
        bytes[..replica.len()].copy_from_slice(replica);
        let start = self.oracle.borrow_mut().heal_begins(block);
        let result;
        (result, bytes) = self.volume.heal(&self.io, context, block, bytes).await;
        *buf = Some(bytes);
        let mut oracle = self.oracle.borrow_mut();
        let (may_fail, has_changed) = (self.io.disk().faults.data_writes > 0, oracle.has_changed(block, &start));
        match result {
            Ok(_) => {}
            Err(HealError::TagLost { .. }) => {
                assert!(oracle.broken_since(block, &start.before), "nobody has taken the tag of block {block}");
            }
            Err(HealError::Refused(WriteError::Device(_))) if may_fail => {}
            // It has rotted once more before it was read back.
            Err(HealError::StillBad(..)) if has_changed => {}
            Err(e) => panic!("healing block {block}: {e}"),
        }
        let version = start.version.filter(|_| !has_changed && oracle.tag_of(block) == start.version);
        if let (Some(version), Ok(done)) = (version, result) {
            let mut content = vec![0; replica.len()];
            fill(block, version, &mut content);
            let (is_in_replica, is_bad) = (replica == content, start.before.is_broken());
            let is_right = match done {
                _ if version == 0 => done == Healed::WasGood,
                Healed::Healed => is_in_replica && is_bad,
                Healed::WasGood => is_in_replica && !start.is_bad,
                Healed::NotInReplica => !is_in_replica,
            };
            assert!(is_right, "block {block}, {start:?}, is said to be {done:?} by a replica of it: {is_in_replica}");
        }
        if result == Ok(Healed::Healed) {
            oracle.healed(block, &start, replica);
            add(&DONE.healed, 1);
        }
        add(&DONE.refused, usize::from(result == Ok(Healed::NotInReplica)));
        oracle.heal_ended(block, result.is_ok());
        result.ok()
    }
}

//! What rots on the disk while a volume is in use, blocks and pages; and which pages are whole, by the bytes on the medium alone.

use super::{
    Disk, Rng, SimStorage,
    image::{FANOUT, PAGE, Superblock, TAG_BYTES, TAGS_PER_PAGE, page_digest, tag},
    oracle::{Oracle, VersionId, fill},
    world::{World, recover},
};
use std::{
    cell::{Cell, RefCell},
    future::{Future, poll_fn},
    ops::Range,
    pin::pin,
    task::Poll,
    time::Duration,
};
use ublk_integrity::{
    BlockIndex, CheckpointerWork, Device, Latched, OpenOptions, Storage, Volume, open::UnreadableBlocks,
};

/// A disk that is sick for one life.
pub struct Rot {
    rng: RefCell<Rng>,
    /// Whether pages of the metadata rot, too.
    pages: bool,
    /// Nobody begins to heal a block any more.
    pub rests: Cell<bool>,
    /// Blocks that are being healed, beside requests.
    pub healing: Cell<u32>,
}

impl Rot {
    /// In a quarter of all lives.
    pub fn draw(seed: u64) -> Option<Self> {
        let mut rng = Rng::new(seed ^ 0x0070_7407);
        let (draws, pages) = (rng.chance(25), rng.chance(50));
        draws.then(|| Self { rng: RefCell::new(rng), pages, rests: Cell::new(false), healing: Cell::new(0) })
    }

    pub fn below(&self, n: u64) -> u64 {
        self.rng.borrow_mut().below(n)
    }
    pub fn chance(&self, percent: u64) -> bool {
        self.below(100) < percent
    }
    pub fn bytes(&self, len: usize) -> Vec<u8> {
        self.rng.borrow_mut().bytes().into_iter().cycle().take(len).collect()
    }
    fn one_of<T: Copy>(&self, all: &[T]) -> Option<T> {
        (!all.is_empty()).then(|| all[self.below(all.len() as u64) as usize])
    }

    /// A block that may be bad, or any that is in play.
    pub fn block(&self, world: &World) -> BlockIndex {
        let bad = if self.chance(80) { self.one_of(&world.oracle.borrow().bad()) } else { None };
        bad.filter(|block| block.0 < world.volume.blocks()).unwrap_or_else(|| BlockIndex(self.in_play()))
    }

    /// Of the blocks that most requests go to: the first ones, or those at the end of a tag page.
    fn in_play(&self) -> u64 {
        if self.chance(50) { self.below(6) } else { 126 + self.below(8) }
    }

    /// A step of a life: now and then something rots.
    pub fn step(&self, world: &World) {
        match self.below(1000) {
            0..25 => self.block_rots(world),
            25..30 if self.pages => self.page_rots(world),
            _ => {}
        }
    }

    /// Garbage on a block, what it held before, what another holds, or a bit that has flipped.
    fn block_rots(&self, world: &World) {
        let in_play = self.in_play();
        let block = BlockIndex(if self.chance(20) { self.below(300).min(world.volume.blocks() - 1) } else { in_play });
        let (bs, info) = (world.volume.block_size(), world.volume.info());
        let at = |block: BlockIndex| info.data_device_bytes - info.size + block.0 * bs as u64;
        let mut oracle = world.oracle.borrow_mut();
        if oracle.tag_of(block) == Some(0) {
            return;
        }
        let mut disk = world.io.disk();
        let mut bytes = disk.peek(Device::Data, at(block), bs);
        match self.below(4) {
            0 => bytes = self.bytes(bs),
            1 => fill(block, self.one_of(oracle.issued(block)).expect("zeros at least"), &mut bytes),
            2 => bytes = disk.peek(Device::Data, at(BlockIndex(block.0 ^ 1)), bs),
            _ => bytes[self.below(bs as u64) as usize] ^= 1 << self.below(8),
        }
        disk.rot(Device::Data, at(block), &bytes);
        let mut content = vec![0; bs];
        oracle.rot(block, |version| {
            fill(block, version, &mut content);
            content == bytes
        });
    }

    /// Some tags of a page, some sectors, or all of it; or the version before.
    fn page_rots(&self, world: &World) {
        let mut disk = world.io.disk();
        let (superblock, newest) = (Superblock::newest(&disk), Superblock::newest_bytes(&disk));
        let level = |of_tags: bool| move |page: &super::image::Page| (page.level == 0) == of_tags;
        let pages: Vec<_> = superblock.pages(&disk).into_iter().filter(level(self.chance(85))).collect();
        let Some(page) = self.one_of(&pages) else { return };
        let OnMedium::Whole(old) = page_on_medium(&disk, &newest, page.level, page.index) else { return };
        let mut bytes = old.clone();
        match self.below(4) {
            0 => {
                let from = self.below(TAGS_PER_PAGE - 8) as usize * 32;
                let len = (1 + self.below(8) as usize) * 32;
                bytes[from..from + len].copy_from_slice(&self.bytes(len));
            }
            1 => (0..1 + self.below(3)).for_each(|_| {
                let from = self.below(8) as usize * 512;
                bytes[from..from + 512].copy_from_slice(&self.bytes(512));
            }),
            2 => bytes = self.bytes(PAGE as usize),
            _ => {
                let other = superblock.slot_offset(page.level, page.index, page.slot ^ 1);
                bytes = disk.peek(Device::Meta, other, PAGE as usize);
            }
        }
        if bytes != old {
            disk.rot(Device::Meta, page.offset, &bytes);
            let below = tag_pages(page.level, page.index);
            let most = world.volume.info().max_size / superblock.block_size / TAGS_PER_PAGE + 1;
            world.oracle.borrow_mut().page_rots(below.start..below.end.min(most));
        }
    }

    /// What the checkpoint thread has to do. Where pages are to be mended one comes after some time, too.
    pub async fn work(&self, world: &World) -> Option<CheckpointerWork> {
        let mut wanted = pin!(world.volume.work_wanted());
        let mut time = pin!(async {
            for _ in 0..=self.below(6) {
                let _ = world.io.sleep(Duration::from_millis(900)).await;
            }
        });
        poll_fn(|cx| match wanted.as_mut().poll(cx) {
            Poll::Ready(work) => Poll::Ready(Some(work)),
            Poll::Pending if self.pages => time.as_mut().poll(cx).map(|()| None),
            Poll::Pending => Poll::Pending,
        })
        .await
    }
}

/// Recovers. Where a page has rotted without which nothing decides about a block the volume is read-only, and somebody takes the
/// newest tags.
pub fn recover_rotten(
    io: &SimStorage,
    options: &OpenOptions,
    rng: &mut Rng,
    crash: fn(&mut Disk),
    oracle: &mut Oracle,
) -> Volume {
    let volume = recover(io, options, rng, crash).expect("recovery does not refuse");
    let Some(why) = volume.latched() else { return volume };
    assert!(matches!(why, Latched::Undecided(_)) && !oracle.lost_pages().is_empty(), "{why}");
    drop(volume);
    let options = OpenOptions { unreadable_blocks: UnreadableBlocks::TakeNewest, ..options.clone() };
    let volume = recover(io, &options, rng, crash).expect("recovery does not refuse");
    assert_eq!(volume.latched(), None);
    volume
}

/// The tag pages below a page.
pub fn tag_pages(level: u8, index: u64) -> Range<u64> {
    let each = FANOUT.pow(level.into());
    index * each..(index + 1) * each
}

/// What there is of a page.
#[derive(PartialEq, Eq, Debug)]
pub enum OnMedium {
    Whole(Vec<u8>),
    /// All that hangs on it reads as zeros.
    Absent,
    /// It has rotted in the slot at this offset.
    Rotten(u64),
    /// It can't be known, for one above it has rotted, or says that it is lost.
    Unknown,
}

/// Looks for a page from a superblock copy down.
pub fn page_on_medium(disk: &Disk, copy: &[u8], level: u8, index: u64) -> OnMedium {
    let Some(superblock) = Superblock::parse(copy) else { return OnMedium::Unknown };
    let mut entry = copy[72..136].to_vec();
    for above in (level..superblock.levels()).rev() {
        let ancestor = |level_of: u8| index / FANOUT.pow((level_of - level).into());
        let slot = match entry[40] {
            0 => return OnMedium::Absent,
            state @ 1..=2 => state - 1,
            _ => return OnMedium::Unknown,
        };
        let offset = superblock.slot_offset(above, ancestor(above), slot);
        let bytes = disk.peek(Device::Meta, offset, PAGE as usize);
        match (page_digest(above, ancestor(above), &bytes) == entry[..32], above == level) {
            (true, true) => return OnMedium::Whole(bytes),
            (true, false) => {
                let at = (ancestor(above - 1) % FANOUT * 64) as usize;
                entry = bytes[at..at + 64].to_vec();
            }
            (false, true) => return OnMedium::Rotten(offset),
            (false, false) => return OnMedium::Unknown,
        }
    }
    OnMedium::Unknown
}

/// The tag pages that are rotten in the slots that the newest superblock names, with those.
pub fn rotten_tag_pages(io: &SimStorage, oracle: &Oracle) -> Vec<(u64, u64)> {
    let (disk, lost) = (io.disk(), oracle.lost_pages());
    if lost.is_empty() {
        return Vec::new();
    }
    let newest = Superblock::newest_bytes(&disk);
    let rotten = |page: u64| match page_on_medium(&disk, &newest, 0, page) {
        OnMedium::Rotten(offset) => Some((page, offset)),
        _ => None,
    };
    lost.into_iter().filter_map(rotten).collect()
}

/// Tells the oracle which tag pages are whole again, whichever superblock copy is followed.
pub fn see_what_is_whole(io: &SimStorage, oracle: &mut Oracle) {
    let disk = io.disk();
    let copies = Superblock::copies(&disk);
    for page in oracle.lost_pages() {
        let mut gone = Vec::new();
        let is_known = copies.iter().all(|copy| match page_on_medium(&disk, copy, 0, page) {
            OnMedium::Absent => true,
            OnMedium::Whole(bytes) => {
                let tags = bytes.chunks_exact(TAG_BYTES as usize);
                let lost = (page * TAGS_PER_PAGE..).zip(tags).filter(|(_, tag)| tag.iter().all(|byte| *byte == 0xff));
                gone.extend(lost.map(|(block, _)| block));
                true
            }
            OnMedium::Rotten(_) | OnMedium::Unknown => false,
        });
        if is_known {
            oracle.page_is_whole(page, gone.into_iter());
        }
    }
}

/// After a recovery: what the tags of bad blocks are of, as far as these can be told from the medium.
pub fn see_tags_of_bad_blocks(io: &SimStorage, oracle: &mut Oracle) {
    let unsure = oracle.unsure();
    if unsure.is_empty() {
        return;
    }
    let disk = io.disk();
    let (superblock, newest) = (Superblock::newest(&disk), Superblock::newest_bytes(&disk));
    let mut content = vec![0; superblock.block_size as usize];
    for block in unsure {
        let OnMedium::Whole(page) = page_on_medium(&disk, &newest, 0, block.0 / TAGS_PER_PAGE) else { continue };
        let at = (block.0 % TAGS_PER_PAGE * TAG_BYTES) as usize;
        let is_of = |version: &&VersionId| {
            fill(block, **version, &mut content);
            tag(&superblock, block, &content) == page[at..at + 32]
        };
        // Of other algorithms than the default none is found.
        if let Some(version) = oracle.issued(block).iter().rev().find(is_of).copied() {
            oracle.set_tag(block, version);
        }
    }
}

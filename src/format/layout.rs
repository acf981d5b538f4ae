//! Where everything lies: the one type that computes offsets.

use super::{
    TAGS_PER_PAGE,
    places::{self, Extent, MIB, PAGE, PAIR, Places},
};
use crate::{BlockIndex, BlockRange, ByteOffset, PageName};

/// Most levels, tag pages included: 64 TiB / 512 = 2^37 blocks = 2^30 tag pages, 64^5 = 2^30.
pub(crate) const MAX_LEVELS: usize = 6;
/// Smallest and largest volume in bytes.
pub(crate) const MIN_VOLUME: u64 = 1 << 20;
pub(crate) const MAX_VOLUME: u64 = 64 << 40;
/// Smallest and largest tag log in bytes.
pub(crate) const MIN_LOG: u64 = 64 << 10;
pub(crate) const MAX_LOG: u64 = 1 << 30;
/// The smallest log that may hold blocks, in bytes: its records have room for 4 KiB of entries and 16
/// KiB of blocks.
pub(crate) const LEAST_SYNC_LOG: u64 = 320 << 10;

/// A page of the metadata; level 0 are the tag pages.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub(crate) struct PageId {
    pub(crate) level: u8,
    pub(crate) index: u64,
}

impl PageId {
    pub(crate) fn name(self) -> PageName {
        PageName { level: self.level, index: self.index }
    }
}

impl PageId {
    /// Whether it is that page, or hangs on it.
    pub(crate) fn hangs_on(self, above: Self) -> bool {
        self.level <= above.level && self.index >> (6 * u32::from(above.level - self.level)) == above.index
    }
}

/// Offsets of everything on both devices. Made from four numbers and the places of the regions, so
/// that a superblock needs to be checked in one place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Layout {
    pub(crate) block_size: u32,
    pub(crate) blocks: u64,
    pub(crate) log_size: u64,
    pub(crate) separate_meta: bool,
    places: Places,
}

/// Why a layout is impossible.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum LayoutError {
    BlockSize,
    Size,
    LogSize,
    /// This can't be how far the volume can grow.
    Capacity,
    /// This place can't be.
    Place(&'static str),
}

impl Layout {
    /// With the places that version 1 computes.
    pub(crate) fn new(block_size: u32, size: u64, log_size: u64, separate_meta: bool) -> Result<Self, LayoutError> {
        if !block_size.is_power_of_two() || !(512..=4096).contains(&block_size) {
            return Err(LayoutError::BlockSize);
        }
        if !(MIN_VOLUME..=MAX_VOLUME).contains(&size) || size % u64::from(block_size) != 0 {
            return Err(LayoutError::Size);
        }
        if !(MIN_LOG..=MAX_LOG).contains(&log_size) || log_size % PAGE != 0 {
            return Err(LayoutError::LogSize);
        }
        Ok(Self::of(block_size, size / u64::from(block_size), log_size, separate_meta))
    }

    fn of(block_size: u32, blocks: u64, log_size: u64, separate_meta: bool) -> Self {
        let extent = Extent { size: blocks * u64::from(block_size), blocks, log_size, separate_meta };
        Self { block_size, blocks, log_size, separate_meta, places: Places::computed(&extent, blocks) }
    }

    fn extent(&self) -> Extent {
        let Self { blocks, log_size, separate_meta, .. } = *self;
        Extent { size: self.size(), blocks, log_size, separate_meta }
    }

    /// The same volume with its regions elsewhere, if they can be there.
    pub(crate) fn with_places(self, places: Places) -> Result<Self, LayoutError> {
        places.check(&self.extent(), MAX_VOLUME / u64::from(self.block_size)).map_err(LayoutError::Place)?;
        Ok(Self { places, ..self })
    }
    pub(crate) fn places(&self) -> &Places {
        &self.places
    }

    /// The same volume with room for the pages of `bytes`: so far it can grow.
    pub(crate) fn with_capacity(self, bytes: u64) -> Result<Self, LayoutError> {
        if !(self.size()..=MAX_VOLUME).contains(&bytes) || bytes % u64::from(self.block_size) != 0 {
            return Err(LayoutError::Capacity);
        }
        Ok(Self { places: Places::computed(&self.extent(), bytes / u64::from(self.block_size)), ..self })
    }

    /// The same volume, its metadata on a device of `meta` bytes of its own, with as much capacity
    /// as that holds: up to 64 TiB, and 16 times the size. Its last MiB stays free, for a header copy.
    pub(crate) fn with_capacity_of(self, meta: u64) -> Self {
        let block = u64::from(self.block_size);
        let fits =
            |blocks: u64| self.with_capacity(blocks * block).ok().filter(|l| l.meta_device_bytes() + MIB <= meta);
        largest(self.blocks, self.blocks.saturating_mul(16).min(MAX_VOLUME / block), fits).unwrap_or(self)
    }

    /// Whether pages may lie in an area that they are to move to, or from.
    pub(crate) fn has_second_area(&self) -> bool {
        self.places.areas[1].blocks > 0
    }

    /// Bytes that the page areas have room for.
    pub(crate) fn capacity(&self) -> u64 {
        self.places.areas.map(|area| area.blocks).into_iter().max().unwrap_or(0) * u64::from(self.block_size)
    }

    /// The same volume with so many bytes, all in its place.
    pub(crate) fn grown(self, bytes: u64) -> Result<Self, LayoutError> {
        if bytes < self.size() || bytes % u64::from(self.block_size) != 0 {
            return Err(LayoutError::Size);
        }
        if bytes > self.capacity() {
            return Err(LayoutError::Capacity);
        }
        Self { blocks: bytes / u64::from(self.block_size), ..self }.with_places(self.places)
    }

    /// The log for a volume of `size` bytes, a power of two: an eighth of it, or up to twice as much,
    /// from 256 KiB to 32 MiB; where a 32nd is more, that, up to 128 MiB. Each small synchronous
    /// write takes two pages of it, and the fewer checkpoints there are, the fewer pages of tags are
    /// written for them.
    pub(crate) fn default_log_size(size: u64) -> u64 {
        let small = (size / 8).clamp(256 << 10, 32 << 20);
        small.max((size / 32).min(128 << 20)).next_power_of_two()
    }

    /// The largest volume that fits: on one device of `data` bytes, or with its metadata on another
    /// of `meta` bytes. `least`: capacity that it has at least.
    pub(crate) fn largest(
        block_size: u32,
        log_size: Option<u64>,
        (data, meta): (u64, Option<u64>),
        least: u64,
    ) -> Option<Self> {
        let fits = |blocks: u64| {
            let size = blocks * u64::from(block_size);
            let log = log_size.unwrap_or_else(|| Self::default_log_size(size));
            let l =
                Self::new(block_size, size, log, meta.is_some()).and_then(|l| l.with_capacity(size.max(least))).ok()?;
            (l.data_device_bytes() <= data && meta.is_none_or(|m| l.meta_device_bytes() <= m)).then_some(l)
        };
        largest(MIN_VOLUME / u64::from(block_size), data.min(MAX_VOLUME) / u64::from(block_size), fits)
    }

    /// The one that takes the most memory: the most blocks, the deepest tree.
    pub(crate) fn most_demanding() -> Self {
        Self::of(512, MAX_VOLUME / 512, MAX_LOG, false)
    }

    /// Usable bytes.
    pub(crate) fn size(&self) -> u64 {
        self.blocks * u64::from(self.block_size)
    }
    /// Places of the two superblock copies on the metadata device.
    pub(crate) fn superblock_offsets() -> [ByteOffset; 2] {
        [ByteOffset(0), ByteOffset(MIB / 2)]
    }
    /// Places of the two copies of the key area on the metadata device.
    pub(crate) fn key_area_offsets() -> [ByteOffset; 2] {
        Self::superblock_offsets().map(|superblock| ByteOffset(superblock.0 + (64 << 10)))
    }
    /// Place of the identity block on a data device without metadata.
    pub(crate) fn identity_offset() -> ByteOffset {
        ByteOffset(0)
    }
    /// The first MiB of each device is ours.
    pub(crate) fn reserved_bytes() -> u64 {
        MIB
    }
    /// Largest log record in bytes, header, MAC and padding included: a sixteenth of the ring, at
    /// most 64 KiB.
    pub(crate) fn max_record(&self) -> usize {
        (self.log_size / 16).next_multiple_of(PAGE).min(64 << 10) as usize
    }
    /// Where the ring begins on the metadata device.
    pub(crate) fn log_offset(&self) -> ByteOffset {
        ByteOffset(self.places.log)
    }
    /// Levels of the tree, tag pages included; the page of the last level is the root page.
    pub(crate) fn levels(&self) -> usize {
        places::levels(self.blocks).into()
    }
    /// Pages in a level.
    pub(crate) fn pages_in(&self, level: u8) -> u64 {
        places::pages_in(self.blocks, level)
    }
    /// The page above all others.
    pub(crate) fn root_page(&self) -> PageId {
        PageId { level: self.levels() as u8 - 1, index: 0 }
    }
    /// Place of a page's slot on the metadata device; slot 1 follows slot 0.
    ///
    /// All pages are in the first area: states of tree entries that name the second
    /// are not written yet.
    pub(crate) fn slot_offset(&self, page: PageId, slot: u8) -> ByteOffset {
        let level = self.places.areas[0].level_offset(page.level);
        ByteOffset(level + page.index * PAIR + u64::from(slot) * PAGE)
    }
    /// Bytes of the metadata device that are used by metadata.
    pub(crate) fn metadata_end(&self) -> u64 {
        self.places.metadata_end(self.log_size)
    }
    /// Where the blocks begin on the data device.
    pub(crate) fn data_offset(&self) -> u64 {
        self.places.data
    }
    /// Place of a block on the data device.
    pub(crate) fn block_offset(&self, block: BlockIndex) -> ByteOffset {
        ByteOffset(self.places.data + block.0 * u64::from(self.block_size))
    }
    /// Place of a block within the volume: what its tag is bound to.
    pub(crate) fn volume_offset(&self, block: BlockIndex) -> ByteOffset {
        ByteOffset(block.0 * u64::from(self.block_size))
    }
    pub(crate) fn data_device_bytes(&self) -> u64 {
        let blocks_end = self.data_offset() + self.size();
        if self.separate_meta { blocks_end } else { blocks_end.max(self.metadata_end()) }
    }
    pub(crate) fn meta_device_bytes(&self) -> u64 {
        if self.separate_meta { self.metadata_end() } else { self.data_device_bytes() }
    }
    /// The tag page of a block, and the tag's place in it.
    pub(crate) fn tag_page_of(&self, block: BlockIndex) -> (PageId, usize) {
        (PageId { level: 0, index: block.0 / TAGS_PER_PAGE }, (block.0 % TAGS_PER_PAGE) as usize)
    }
    /// The ancestor of a tag page at a level.
    pub(crate) fn ancestor(&self, tag_page: u64, level: u8) -> PageId {
        PageId { level, index: tag_page >> (6 * u32::from(level)) }
    }
    /// The blocks that hang on a page, cut at the volume's end.
    pub(crate) fn blocks_under(&self, page: PageId) -> BlockRange {
        let span = TAGS_PER_PAGE << (6 * u32::from(page.level));
        let first = page.index * span;
        BlockRange::new(BlockIndex(first), span.min(self.blocks - first))
    }
    /// Whether the run lies inside the volume.
    pub(crate) fn contains(&self, range: BlockRange) -> bool {
        range.first.0 < self.blocks && range.count <= self.blocks - range.first.0
    }
}

/// What fits of the largest count from `low` to `high`: what is needed grows with the blocks, so the
/// range is bisected.
fn largest<T>(mut low: u64, high: u64, fits: impl Fn(u64) -> Option<T>) -> Option<T> {
    let mut found = fits(low)?;
    let mut too_many = high + 1;
    while too_many - low > 1 {
        let middle = low + (too_many - low) / 2;
        match fits(middle) {
            Some(more) => (low, found) = (middle, more),
            None => too_many = middle,
        }
    }
    Some(found)
}

/// The tag pages of some blocks.
pub(crate) fn tag_pages(range: BlockRange) -> std::ops::Range<u64> {
    range.first.0 / TAGS_PER_PAGE..range.end().div_ceil(TAGS_PER_PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::TREE_FANOUT;
    use proptest::prelude::*;

    fn layouts() -> impl Strategy<Value = Layout> {
        (9u32..=12, MIN_VOLUME..MAX_VOLUME, 16u64..4096, any::<bool>()).prop_map(|(shift, size, log, separate)| {
            let bs = 1 << shift;
            Layout::new(bs, size / u64::from(bs) * u64::from(bs), log * 4096, separate).unwrap()
        })
    }

    proptest! {
        #[test]
        fn regions_follow_each_other_without_overlap(l in layouts()) {
            prop_assert!(Layout::superblock_offsets()[1].0 >= (64 << 10) + 4096);
            prop_assert!(l.log_offset().0 >= Layout::superblock_offsets()[1].0 + 4096);
            let mut end = l.log_offset().0 + l.log_size;
            for level in 0..l.levels() as u8 {
                let first = PageId { level, index: 0 };
                prop_assert!(l.slot_offset(first, 0).0 >= end);
                end = l.slot_offset(PageId { level, index: l.pages_in(level) - 1 }, 1).0 + 4096;
            }
            prop_assert_eq!(end, l.metadata_end());
            prop_assert_eq!(l.pages_in(l.levels() as u8 - 1), 1);
            prop_assert!(l.levels() <= MAX_LEVELS);
            if !l.separate_meta { prop_assert!(l.data_offset() >= end); }
        }

        #[test]
        fn metadata_is_at_most_six_percent(mib in 256u64..(64 << 20)) {
            let size = mib << 20;
            let l = Layout::new(4096, size, Layout::default_log_size(size), false).unwrap();
            prop_assert!(l.data_offset() * 100 <= l.data_device_bytes() * 6, "{} of {}", l.data_offset(), l.data_device_bytes());
        }

        #[test]
        fn largest_is_the_largest(bytes in (3u64 << 20)..(1 << 44), shift in 9u32..=12) {
            let bs = 1 << shift;
            let l = Layout::largest(bs, None, (bytes, None), 0).unwrap();
            prop_assert!(l.data_device_bytes() <= bytes);
            let size = l.size() + u64::from(bs);
            if let Ok(more) = Layout::new(bs, size, Layout::default_log_size(size), false) {
                prop_assert!(more.data_device_bytes() > bytes);
            }
        }

        #[test]
        fn every_block_hangs_on_its_ancestors(l in layouts(), at in any::<prop::sample::Index>()) {
            let block = BlockIndex(at.index(l.blocks as usize) as u64);
            let (leaf, place) = l.tag_page_of(block);
            prop_assert_eq!(leaf.index * TAGS_PER_PAGE + place as u64, block.0);
            let mut page = leaf;
            for level in 0..l.levels() as u8 {
                prop_assert_eq!(page, l.ancestor(leaf.index, level));
                let under = l.blocks_under(page);
                prop_assert!(under.first <= block && block.0 < under.end());
                page = PageId { level: page.level + 1, index: page.index / TREE_FANOUT };
            }
        }
    }
}

//! Where the regions of a volume begin: computed in version 1, read from the superblock in version 2.

use super::{PAGE_BYTES, TAG_BYTES};

/// Tags in a tag page: 4096 / 32 = 128.
pub(crate) const TAGS_PER_PAGE: u64 = (PAGE_BYTES / TAG_BYTES) as u64;

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const PAGE: u64 = PAGE_BYTES as u64;
/// Both slots of a page, side by side. Every place is a multiple of it.
pub(crate) const PAIR: u64 = 2 * PAGE;
/// Children of a tree page: 4096 / 64.
pub(crate) const TREE_FANOUT: u64 = 64;
/// No device is so large; sums of three places do not overflow.
const END: u64 = 1 << 60;

/// Pages in a level of the tree over this many blocks.
pub(crate) fn pages_in(blocks: u64, level: u8) -> u64 {
    (0..level).fold(blocks.div_ceil(TAGS_PER_PAGE), |pages, _| pages.div_ceil(TREE_FANOUT))
}

/// Levels of the tree over this many blocks, tag pages included.
pub(crate) fn levels(blocks: u64) -> u8 {
    (0..).find(|level| pages_in(blocks, *level) <= 1).map_or(u8::MAX, |top| top + 1)
}

/// Room for all pages of a volume of so many blocks, level by level.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct PageArea {
    /// On the metadata device, in bytes.
    pub(crate) offset: u64,
    /// Blocks that it is laid out for, which may be more than the volume has; 0: no area.
    pub(crate) blocks: u64,
}

impl PageArea {
    /// Where a level's pages begin; the level above all levels is the area's end.
    pub(crate) fn level_offset(&self, level: u8) -> u64 {
        self.offset + (0..level).map(|l| pages_in(self.blocks, l) * PAIR).sum::<u64>()
    }
    fn end(&self) -> u64 {
        self.level_offset(levels(self.blocks))
    }
}

/// Places of all regions but the superblock copies, which never move. In bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Places {
    /// On the data device: where the blocks begin.
    pub(crate) data: u64,
    /// On the metadata device, as all that follow: where the ring begins.
    pub(crate) log: u64,
    /// Tree entries name their page's area. There are two only while pages move from one to the
    /// other.
    pub(crate) areas: [PageArea; 2],
    /// The blocks of the data device's first MiB; 0: they are in their place.
    pub(crate) head: u64,
    /// The copy of the first MiB; 0: there is none.
    pub(crate) header_copy: u64,
}

/// What the regions have to hold.
#[derive(Clone, Copy)]
pub(crate) struct Extent {
    pub(crate) size: u64,
    pub(crate) blocks: u64,
    pub(crate) log_size: u64,
    pub(crate) separate_meta: bool,
}

impl Places {
    /// One region behind the other, with room for the pages of so many blocks: as version 1 has
    /// them, where these are the volume's.
    pub(crate) fn computed(extent: &Extent, capacity: u64) -> Self {
        let area = PageArea { offset: (MIB + extent.log_size).next_multiple_of(PAIR), blocks: capacity };
        let data = if extent.separate_meta { MIB } else { area.end().next_multiple_of(MIB) };
        Self { data, log: MIB, areas: [area, PageArea::default()], head: 0, header_copy: 0 }
    }

    /// Where the last region of metadata ends.
    pub(crate) fn metadata_end(&self, log_size: u64) -> u64 {
        self.metadata(log_size).map(|(_, end)| end).max().expect("the log is there")
    }

    /// Begin and end of each region on the metadata device, but for its first MiB.
    fn metadata(&self, log_size: u64) -> impl Iterator<Item = (u64, u64)> {
        let areas = self.areas.into_iter().filter(|area| area.blocks > 0).map(|area| (area.offset, area.end()));
        let mibs = [self.head, self.header_copy].into_iter().filter(|at| *at > 0).map(|at| (at, at + MIB));
        [(self.log, self.log + log_size)].into_iter().chain(areas).chain(mibs)
    }

    /// Names the field that can't be.
    pub(crate) fn check(&self, extent: &Extent, most_blocks: u64) -> Result<(), &'static str> {
        let possible = |at: u64| at % PAIR == 0 && at < END;
        if !possible(self.log) {
            return Err("log offset");
        }
        for area in self.areas {
            let none = area == PageArea::default();
            if !none && (area.blocks == 0 || area.blocks > most_blocks || !possible(area.offset)) {
                return Err("page area");
            }
        }
        if self.areas.iter().all(|area| area.blocks < extent.blocks) {
            return Err("page area");
        }
        // The first MiB of the device is never ours to give: with the blocks from 0 on, those in it
        // lie elsewhere.
        if !possible(self.head) || (self.head > 0) != (self.data == 0) {
            return Err("head offset");
        }
        if !possible(self.data) {
            return Err("data offset");
        }
        if !possible(self.header_copy) || self.header_copy % MIB != 0 {
            return Err("header copy");
        }
        self.check_apart(extent)
    }

    /// No two regions of a device have a byte in common.
    fn check_apart(&self, extent: &Extent) -> Result<(), &'static str> {
        let blocks = (self.data.max(if self.head > 0 { MIB } else { 0 }), self.data + extent.size);
        let mut regions: Vec<_> = self.metadata(extent.log_size).chain([(0, MIB)]).collect();
        match extent.separate_meta {
            true if blocks.0 < MIB => return Err("data offset"),
            true => {}
            false => regions.push(blocks),
        }
        regions.sort_unstable();
        let apart = regions.windows(2).all(|pair| pair[0].1 <= pair[1].0);
        if apart { Ok(()) } else { Err("layout of regions") }
    }
}

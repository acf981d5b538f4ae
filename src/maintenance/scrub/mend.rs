//! Metadata that has rotted is mended from what there is: from memory, or from the blocks.
//!
//! Nothing is signed for that. A page that is found or made anew is proven by the digest in its parent, as one
//! that is read is. The next checkpoint writes it to its other slot ([`Rescued`](crate::metadata::rescued)).

use super::{
    Scrubber,
    blocks::Pass,
    findings::WaitsFor,
    lane::Lane,
    report::{MetadataPart, Remedy, ScrubFinding},
};
use crate::{
    BadReason, Buf, Device, Io,
    crypto::keys::{Digest, equal},
    format::{Identity, PAGE_BYTES, PageId, ScrubState, TAG_BYTES, TAGS_PER_PAGE, Tag, TreeEntry, ZERO_TAG, digest},
    lifecycle::identity_block::write_identity,
    metadata::rescued::RescueState,
};
use std::{mem, time::Duration};

/// Most tags of a page that are tried in each way: 3^8 pages take a fraction of a second.
const MOST_DOUBTFUL: usize = 8;
/// How often it is looked whether a checkpoint has come.
const BETWEEN_CHECKPOINT_LOOKS: Duration = Duration::from_millis(100);
/// What a disk loses as one.
const SECTOR: usize = 512;
const SECTORS: usize = PAGE_BYTES / SECTOR;

impl<T: FnMut(ScrubFinding)> Pass<'_, T> {
    /// A page has rotted. `bytes`: what it should be, where that is known.
    pub(super) fn page_has_rotted(&mut self, page: PageId, entry: TreeEntry, reason: BadReason, bytes: Option<&[u8]>) {
        let tree = &self.of.metadata.tree;
        let waits = bytes.is_some_and(|bytes| {
            // Reads find it there from now on.
            tree.cache.put(page, entry.epoch(), bytes, false);
            self.may_write() && tree.rescued.add(page, entry.digest, bytes)
        });
        let part = MetadataPart::TreePage { name: page.name() };
        if !waits {
            return self.findings.metadata(part, reason, Remedy::None);
        }
        for (above, entry, bytes) in self.way.above(page) {
            tree.rescued.add_above(above, entry.digest, bytes);
        }
        self.findings.mended_later(part, reason, WaitsFor::Page(page, entry.digest));
    }

    /// Whether something can be mended.
    fn may_write(&self) -> bool {
        self.of.writable && self.of.log.latched().is_none()
    }

    /// The next checkpoint writes both superblock copies, and frees the log.
    pub(super) fn mend_by_checkpoint(&mut self, part: MetadataPart, reason: BadReason, waits: WaitsFor) {
        if !self.may_write() {
            return self.findings.metadata(part, reason, Remedy::None);
        }
        self.of.checkpoints.want();
        self.findings.mended_later(part, reason, waits);
    }

    /// Tells of what checkpoints have mended.
    pub(super) fn see_what_is_mended(&mut self) {
        if self.findings.are_waiting() {
            let Scrubber { metadata, checkpoints, log, .. } = self.of;
            let is = |written| if written { RescueState::Written } else { RescueState::Waits };
            self.findings.settle(|waits| match waits {
                WaitsFor::Page(id, digest) => metadata.tree.rescued.settle(id, &digest),
                WaitsFor::NewerThan(epoch) => is(checkpoints.superblock().epoch > epoch),
                WaitsFor::LogFree(position) => is(log.live().start >= position),
            });
        }
    }

    /// For how many tag pages there is room, if all have rotted, with those above them.
    pub(super) fn room(&self) -> usize {
        let metadata = self.of.metadata;
        metadata.tree.rescued.room() / metadata.layout().levels()
    }

    /// What has rotted, and finds no room to wait in, would be bad: waits for the checkpoint that makes it. `false`: the
    /// pass is to end.
    pub(super) async fn has_room<S: Io>(&mut self, io: &S) -> bool {
        while self.room() == 0 && self.may_write() {
            if !self.may_go_on().await {
                return false;
            }
            if !self.findings.are_waiting() {
                self.of.metadata.tree.rescued.forget_failed();
            }
            self.control.sleep(io, BETWEEN_CHECKPOINT_LOOKS).await;
        }
        true
    }

    /// Nothing is mended before it is written: waits for the next checkpoint, or the one after that, however long they
    /// take. Where none comes any more nothing is. One that was stopped reads nothing more, but tells that, too.
    pub(super) async fn until_mended<S: Io>(&mut self, io: &S) {
        loop {
            let may_tell = self.may_go_on().await || self.control.state() == ScrubState::Stopped;
            if !may_tell || self.control.has_left() || !self.findings.are_waiting() {
                return;
            }
            if self.of.log.latched().is_some() {
                return self.findings.settle(|_| RescueState::Failed);
            }
            let _ = io.sleep(BETWEEN_CHECKPOINT_LOOKS).await;
        }
    }

    /// Writes the block by which the data device says whose it is. Nobody else does.
    pub(super) async fn mend_identity<S: Io>(&self, io: &S, own: &Identity) -> bool {
        self.may_write() && write_identity(io, self.of.checkpoints.keys(), own).await.is_ok()
    }

    /// Makes the tag page of a lane anew from its blocks; `false`: nothing that is made is the page.
    pub(super) async fn rebuild<S: Io>(&mut self, io: &S, lane: usize, (page, entry): (PageId, TreeEntry)) -> bool {
        let of = self.of;
        let its = &mut self.lanes[lane];
        let at = of.metadata.layout().block_offset(its.range.first);
        let all = 0..its.range.count as usize * of.tagger.block_size();
        let read;
        (read, its.data) = io.read(Device::Data, at, mem::replace(&mut its.data, Buf::none()), all.clone()).await;
        if read.is_err() {
            return false;
        }
        let mut made = [ZERO_TAG; TAGS_PER_PAGE as usize];
        of.tagger.tags(its.range.first, &its.data[all], &mut made[..its.range.count as usize]);
        let found = Rebuild { page, digest: entry.digest, made: &made }.run(its, of.tagger.block_size());
        io.charge();
        found
    }
}

/// A tag page that is made anew.
struct Rebuild<'a> {
    page: PageId,
    digest: Digest,
    /// The tags of what lies on the medium.
    made: &'a [Tag; TAGS_PER_PAGE as usize],
}

impl Rebuild<'_> {
    fn is_it(&self, bytes: &[u8]) -> bool {
        equal(&digest(self.page, bytes), &self.digest)
    }

    /// Leaves the page in the lane, if it can be made.
    fn run(&self, lane: &mut Lane, block_size: usize) -> bool {
        let mut said = [0; PAGE_BYTES];
        said.copy_from_slice(&lane.page);
        // Beyond the volume's end there is nothing.
        said[lane.range.count as usize * TAG_BYTES..].fill(0);
        if self.single_tags(&said, &mut lane.page) {
            return true;
        }
        // What was never written has no tag, and often zeros.
        let mut by_content = [0; PAGE_BYTES];
        let blocks = lane.data.chunks_exact(block_size).zip(by_content.chunks_exact_mut(TAG_BYTES)).zip(self.made);
        for ((content, tag), made) in blocks.take(lane.range.count as usize) {
            if content.iter().any(|byte| *byte != 0) {
                tag.copy_from_slice(made);
            }
        }
        self.sectors(&said, &by_content, &mut lane.page)
    }

    /// A few tags have rotted: each that is neither zero nor what the block says is made, zero, or right.
    fn single_tags(&self, said: &[u8; PAGE_BYTES], page: &mut [u8]) -> bool {
        let is_doubtful = |i: &usize| ![&self.made[*i], &ZERO_TAG].contains(&tag(said, *i));
        let doubtful: Vec<usize> = (0..TAGS_PER_PAGE as usize).filter(is_doubtful).collect();
        if doubtful.len() > MOST_DOUBTFUL {
            return false;
        }
        (0..3usize.pow(doubtful.len() as u32)).any(|way| {
            page.copy_from_slice(said);
            for (nth, i) in doubtful.iter().enumerate() {
                let tag = match way / 3usize.pow(nth as u32) % 3 {
                    0 => &self.made[*i],
                    1 => &ZERO_TAG,
                    _ => tag(said, *i),
                };
                page[i * TAG_BYTES..][..TAG_BYTES].copy_from_slice(tag);
            }
            self.is_it(page)
        })
    }

    /// Sectors have been lost, whichever.
    fn sectors(&self, said: &[u8; PAGE_BYTES], by_content: &[u8; PAGE_BYTES], page: &mut [u8]) -> bool {
        (1..1u32 << SECTORS).any(|lost| {
            for sector in 0..SECTORS {
                let from = if lost >> sector & 1 != 0 { by_content } else { said };
                let part = sector * SECTOR..(sector + 1) * SECTOR;
                page[part.clone()].copy_from_slice(&from[part]);
            }
            self.is_it(page)
        })
    }
}

fn tag(page: &[u8; PAGE_BYTES], i: usize) -> &Tag {
    page[i * TAG_BYTES..].first_chunk().expect("inside the page")
}

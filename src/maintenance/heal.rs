//! Healing: a block that has rotted is put back from a copy of it, a *replica*.
//!
//! The replica is not trusted. It is written only if the block's own tag proves it, while nobody else
//! may change the block, so its tag stays as it is: nothing is logged, and no page changes.
//!
//! ```text
//!   range held ─> tag looked up ─> replica proven ─> medium read: it is bad ─> written in place ─> synced ─> read back
//! ```
//!
//! A crash before the write leaves the block as bad as it was, one after the sync leaves it healed, and
//! one in between leaves either, or a torn block, which its tag does not prove.

use crate::{
    BadReason, BlockIndex, BlockRange, Buf, Device, DeviceError, Durability, Errno, Io, PageName, RequestContext,
    WriteError,
    format::{LOST_TAG, Tag, ZERO_TAG},
    io::retry::{READ_BACK, retry},
    log::Unsynced,
    maintenance::scrub::Scrubber,
    request::{context::TagSide, lock_queue::Mode},
};
use serde::{Deserialize, Serialize};

/// What has become of a block for which there was a replica.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Healed {
    /// It was bad, and holds now what was written last.
    Healed,
    /// It holds what was written last, as its tag proves, or reads as zeros: nothing was written.
    WasGood,
    /// The replica holds something else than what was written last: nothing was written.
    NotInReplica,
}

/// Why a block could not be healed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum HealError {
    /// Nothing may be written there.
    #[error(transparent)]
    Refused(#[from] WriteError),
    /// No replica can be proven.
    #[error("block {block} can't be healed: its tag is lost with {page}")]
    TagLost {
        /// The block.
        block: BlockIndex,
        /// The damaged page, where it is a page for which the tag can't be known.
        page: PageName,
    },
    /// A write of it was answered before it was in place, and failed then.
    #[error("block {0} can't be healed: what was last written there could not be put in place")]
    NotInPlace(BlockIndex),
    /// What was written does not read back.
    #[error("block {0} was written and is bad yet: {1}")]
    StillBad(BlockIndex, BadReason),
}

impl From<DeviceError> for HealError {
    fn from(e: DeviceError) -> Self {
        Self::Refused(WriteError::Device(e))
    }
}

impl Scrubber<'_> {
    /// Heals `block` from the front of `replica`.
    pub(crate) async fn heal<S: Io>(
        &self,
        io: &S,
        context: &mut RequestContext,
        block: BlockIndex,
        replica: Buf,
    ) -> (Result<Healed, HealError>, Buf) {
        let one = BlockRange::new(block, 1);
        // Before the tag is looked up: a write that came between would change it.
        let _guard = self.ranges.acquire(context.id, one, Mode::Exclusive).await;
        let tag = match self.tag(io, context, one).await {
            Ok(tag) if tag == ZERO_TAG => return (Ok(Healed::WasGood), replica),
            Ok(tag) => tag,
            Err(e) => return (Err(e), replica),
        };
        let bs = self.metadata.block_size();
        if !self.tagger.proves(&tag, block, &replica[..bs]) {
            return (Ok(Healed::NotInReplica), replica);
        }
        // Once, as requests wait. One that can't be read may be readable once it has been written.
        if self.read(io, context, block, &tag).await == Ok(true) {
            return (Ok(Healed::WasGood), replica);
        }
        // What a failed write has left there is not touched: recovery judges by it.
        if let Some(why) = self.log.latched() {
            return (Err(WriteError::Latched(why).into()), replica);
        }
        let at = self.metadata.layout().block_offset(block);
        let (written, replica) = io.write(Device::Data, at, replica, 0..bs, Durability::MayBeLost).await;
        // It was bad, and at worst it is so yet: nothing that was good is lost.
        if let Err(errno) = written {
            return (Err(DeviceError::new("write", Device::Data, at, bs, errno).into()), replica);
        }
        if let Err(why) = self.log.sync_data(io, context.id, Unsynced::Uncounted).await {
            return (Err(WriteError::Latched(why).into()), replica);
        }
        let reason = match retry(io, READ_BACK, async || self.read(io, context, block, &tag).await).await {
            Ok(true) => {
                context.counters.healed_blocks.add(1);
                return (Ok(Healed::Healed), replica);
            }
            Ok(false) => BadReason::Mismatch,
            Err(errno) => BadReason::Unreadable { device: Device::Data, errno },
        };
        (Err(HealError::StillBad(block, reason)), replica)
    }

    /// The tag of a block whose range is held.
    async fn tag<S: Io>(&self, io: &S, context: &mut RequestContext, one: BlockRange) -> Result<Tag, HealError> {
        let block = one.first;
        // A volume that is open to be written has nothing undecided, and nothing in the log alone, but this.
        if self.admitted.has_failed(one) {
            return Err(HealError::NotInPlace(block));
        }
        let bad_page = self.metadata.lookup_patiently(io, context, one, TagSide::New).await?;
        match context.tags.tags(1)[0] {
            // A page that was lost once and written anew as such names none that is damaged now.
            LOST_TAG => {
                let (page, _) = self.metadata.layout().tag_page_of(block);
                Err(HealError::TagLost { block, page: bad_page.unwrap_or_else(|| page.name()) })
            }
            tag => Ok(tag),
        }
    }

    /// Whether the block on the medium is what its tag says.
    async fn read<S: Io>(
        &self,
        io: &S,
        context: &mut RequestContext,
        block: BlockIndex,
        tag: &Tag,
    ) -> Result<bool, Errno> {
        let (at, bs) = (self.metadata.layout().block_offset(block), self.metadata.block_size());
        let (result, buf) = io.read(Device::Data, at, context.pages.lend(), 0..bs).await;
        io.charge();
        let proven = result.map(|()| self.tagger.proves(tag, block, &buf[..bs]));
        context.pages.give_back(buf);
        proven
    }
}

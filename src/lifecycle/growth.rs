//! A volume that grows as it is opened.
//!
//! Its page areas are laid out for more blocks than it has, so nothing moves: new blocks have no
//! page, or zeros for a tag, and read as zeros. In this order, each step durable before the next:
//! 1. pages above the root, where the tree gets higher: to slots that nothing has ever named
//! 2. both superblock copies: recovery's own step, with the new number of blocks
//! 3. the identity block of a data device without metadata: an open accepts the smaller size there

use crate::{
    Buf, Device, DeviceError, Durability, Epoch, Latched, Storage,
    crypto::keys::Keys,
    format::{EntryState, Identity, Layout, LayoutError, PAGE_BYTES, PageId, Superblock, TreeEntry, digest},
    lifecycle::{
        grow_error::GrowError,
        identity_block::{Claimed, write_identity},
        open_error::OpenError,
    },
    options::{Access, Grow, OpenOptions},
};
use zerocopy::IntoBytes;

/// What of the volume's size is written down as it is opened.
pub(crate) struct Growth {
    /// How the volume is laid out from then on.
    layout: Layout,
    /// What the data device says, where it has no metadata.
    claimed: Option<Claimed>,
}

impl Growth {
    /// As the options ask for it, if that can be.
    pub(crate) fn plan<S: Storage>(
        io: &S,
        layout: &Layout,
        claimed: Option<Claimed>,
        options: &OpenOptions,
    ) -> Result<Self, OpenError> {
        let Some(grow) = options.grow else { return Ok(Self { layout: *layout, claimed }) };
        if options.access == Access::ReadOnly {
            return Err(GrowError::ReadOnly.into());
        }
        Ok(Self { layout: grown(io, layout, grow)?, claimed })
    }

    /// The superblock with the size that the volume has from then on.
    pub(crate) fn of(&self, superblock: &Superblock) -> Superblock {
        Superblock { layout: self.layout, ..*superblock }
    }

    /// The root for that superblock. What is above the old one leads to it alone: a page's digest
    /// says its level, counted from the tags, so no page below changes. Nothing is synced.
    pub(crate) async fn raise<S: Storage>(
        &self,
        io: &S,
        from: &Layout,
        mut root: TreeEntry,
        epoch: Epoch,
    ) -> Result<TreeEntry, Latched> {
        for level in from.levels()..self.layout.levels() {
            if root.state() == EntryState::Absent {
                break;
            }
            let (id, slot) = (PageId { level: level as u8, index: 0 }, 0);
            let mut page = Buf::new(PAGE_BYTES);
            page[..size_of::<TreeEntry>()].copy_from_slice(root.as_bytes());
            root = TreeEntry::new(digest(id, &page), epoch, slot);
            let at = self.layout.slot_offset(id, slot);
            let (result, _) = io.write(Device::Meta, at, page, 0..PAGE_BYTES, Durability::MayBeLost).await;
            let error = |errno| DeviceError::new("write", Device::Meta, at, PAGE_BYTES, errno);
            result.map_err(|errno| Latched::Device(error(errno)))?;
        }
        Ok(root)
    }

    /// Has the data device say the volume's size, if it says another yet: because the volume has
    /// just grown, or did before a crash. A warning where it can't: each open accepts what is there,
    /// and tries again.
    pub(crate) async fn say<S: Storage>(&self, io: &S, keys: &Keys, superblock: &Superblock) -> Option<String> {
        let size = superblock.layout.size();
        if self.claimed.is_none_or(|claimed| claimed == Claimed::Size(size)) {
            return None;
        }
        let written = write_identity(io, keys, &Identity { uuid: superblock.uuid, size }).await;
        match (written, self.claimed) {
            (Err(e), _) => Some(format!("the data device does not say the volume's size, which is {size} bytes: {e}")),
            (Ok(()), Some(Claimed::Torn)) => Some(
                "the identity block of the data device was damaged, as a crash while the volume grew leaves it: it is made good".into(),
            ),
            (Ok(()), _) => None,
        }
    }
}

/// The volume's layout when it has grown, if it can.
pub(crate) fn grown<S: Storage>(io: &S, layout: &Layout, grow: Grow) -> Result<Layout, GrowError> {
    let have = io.geometry(Device::Data).size;
    let got = match grow {
        Grow::To(bytes) => bytes,
        Grow::AllThatFits => room_for(layout, have),
    };
    let grown = layout.grown(got).map_err(|e| match e {
        LayoutError::Capacity => GrowError::Beyond { got, most: layout.capacity() },
        _ if got < layout.size() => GrowError::Shrinks { got, now: layout.size() },
        _ => GrowError::Size { got, block: layout.block_size },
    })?;
    match grown.data_device_bytes() {
        need if need > have => Err(GrowError::NoRoom { got, have, need }),
        _ => Ok(grown),
    }
}

/// The size of the largest volume for which a data device of so many bytes and the page areas have
/// room. Where these hold no more than there is, that of the device alone: for the refusal.
fn room_for(layout: &Layout, have: u64) -> u64 {
    let block = u64::from(layout.block_size);
    let on_device = have.saturating_sub(layout.data_offset()) / block * block;
    match layout.capacity() {
        most if most > layout.size() => on_device.min(most),
        _ => on_device,
    }
    .max(layout.size())
}

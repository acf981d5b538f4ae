//! Opening a volume in stages, each a type of its own, so that none can be left out:
//!
//! ```text
//!   two superblock copies ─ read, verified, devices compared ─> VerifiedVolume
//!     ─ log followed ─> CrashedVolume ─ one tag chosen for each block ─> RecoveredVolume
//!     ─ written down, or served from memory ─> Volume
//! ```
//!
//! The superblocks are read once: an attacker who holds the disk could answer a second read with
//! other copies.

mod anchored;

use crate::{
    BlockIndex, Buf, Device, DeviceError, Latched, MasterKey, Storage, Volume,
    anchor::{Anchor, AnchorError, NoAnchor, Opening},
    crypto::tagger::Tagger,
    format::{KeyAreaMark, PAGE_BYTES, Superblock, uuid_text},
    info::{RecoveryReport, VolumeInfo},
    io::sectors::refuse_pages_below_sector,
    lifecycle::{
        devices::{atomicity_warnings, check_devices, explain_no_superblock, refuse_unserved},
        growth::{Growth, grown},
        open_error::OpenError,
        recovery::{
            BlockCandidates, Budget, Candidates, Placer, Settle, TooMuch, Torn, Unread, follow, in_log::InLog,
            undecided::Undecided,
        },
        superblocks::{Newest, SuperblockUpdate, publish, read_copies},
    },
    log::LogPoint,
    metadata::{
        page_cache::PageCache,
        pending::PendingSet,
        rescued::Rescued,
        root::Root,
        tree::Tree,
        tree_update::{Applied, apply},
        update_scratch::Scratch,
    },
    options::{Access, Grow, OpenOptions, UnreadLog},
    volume::{Parts, Unsaved},
};
use std::sync::Arc;

/// A request takes at least one block of any size.
const MAX_BLOCK_BYTES: usize = 4096;

/// A volume whose newest superblock has been read and verified, on the devices that belong to it.
/// Nothing has been written.
pub struct VerifiedVolume {
    newest: Newest,
    growth: Growth,
    /// Where its key was had from, if that is known.
    key_area: Option<KeyAreaMark>,
}

/// One whose log has been followed: what each block may rightly be is known.
struct CrashedVolume {
    newest: Newest,
    growth: Growth,
    tagger: Arc<Tagger>,
    candidates: Candidates,
    torn: Torn,
    head: LogPoint,
    unread: Option<Unread>,
    report: RecoveryReport,
    warnings: Vec<String>,
}

/// One of which recovery has chosen a tag for each block, but for those of which nothing can be said.
struct RecoveredVolume {
    newest: Newest,
    growth: Growth,
    head: LogPoint,
    tree: Tree,
    tagger: Arc<Tagger>,
    set: PendingSet,
    undecided: Vec<BlockCandidates<'static>>,
    in_log: InLog,
    unread: Option<Unread>,
    report: RecoveryReport,
    warnings: Vec<String>,
}

/// What has been written down.
struct WrittenDown {
    superblock: Superblock,
    applied: Applied,
    /// Blocks put in place.
    placed: u64,
    /// What else there is to say.
    warning: Option<String>,
}

impl VerifiedVolume {
    /// Reads and verifies. To write, what an earlier life has written is made durable first.
    pub async fn read<S: Storage>(io: &S, key: &MasterKey, options: &OpenOptions) -> Result<Self, OpenError> {
        if options.max_request_bytes < MAX_BLOCK_BYTES {
            let got = options.max_request_bytes;
            return Err(OpenError::Options(format!(
                "requests of {got} bytes are too small: at least {MAX_BLOCK_BYTES}"
            )));
        }
        if options.unread_log != UnreadLog::Refuse && options.access == Access::ReadWrite {
            return Err(OpenError::Options("a log that can't be read can be followed read-only alone".into()));
        }
        if options.access == Access::ReadWrite {
            // What an earlier life has written and not synced is on the medium, or lost, from here
            // on.
            for device in [Device::Data, Device::Meta] {
                let synced = io.sync(device).await;
                synced.map_err(|errno| DeviceError::sync(device, errno))?;
            }
        }
        refuse_pages_below_sector(io)?;
        let newest = match read_copies(io).await?.newest(key) {
            Err(OpenError::NotAVolume) => return Err(explain_no_superblock(io).await?),
            other => other?,
        };
        if let Some(expected) = options.expected_uuid.filter(|expected| *expected != newest.superblock.uuid) {
            let (expected, found) = (uuid_text(&expected), uuid_text(&newest.superblock.uuid));
            return Err(OpenError::OtherVolume { expected, found });
        }
        refuse_unserved(&newest.superblock)?;
        let claimed = check_devices(io, &newest, options).await?;
        let growth = Growth::plan(io, &newest.superblock.layout, claimed, options)?;
        Ok(Self { newest, growth, key_area: None })
    }

    /// Sizes and identity.
    pub fn info(&self) -> VolumeInfo {
        VolumeInfo::of(&self.newest.superblock)
    }

    /// The size in bytes that the volume has when it is opened to grow so, or why it can't.
    pub fn size_when_grown<S: Storage>(&self, io: &S, grow: Grow) -> Result<u64, OpenError> {
        Ok(grown(io, &self.newest.superblock.layout, grow)?.size())
    }

    /// Its UUID.
    pub fn uuid(&self) -> &[u8; 16] {
        &self.newest.superblock.uuid
    }

    /// The id that was drawn when the volume was last opened for writing: 256 random bits, or that
    /// of its format.
    pub fn last_opened(&self) -> &[u8; 32] {
        &self.newest.superblock.open_id
    }

    /// Recovers from the log and opens. A volume that has an anchor is refused, unless the options say otherwise.
    pub async fn open<S: Storage>(self, io: &S, options: &OpenOptions) -> Result<Volume, OpenError> {
        let passed = options.without_anchor && options.access == Access::ReadOnly;
        if self.is_anchored() && !passed {
            return Err(AnchorError::Needed.into());
        }
        self.open_with(io, options, &mut None::<Opening<'_, NoAnchor>>).await
    }

    async fn open_with<S: Storage, A: Anchor>(
        mut self,
        io: &S,
        options: &OpenOptions,
        anchor: &mut Option<Opening<'_, A>>,
    ) -> Result<Volume, OpenError> {
        loop {
            let crashed = self.follow_log(io, options, anchor.as_ref()).await?;
            match crashed.recover(io, options).await?.open(io, options, anchor).await? {
                Ok(volume) => return Ok(volume),
                Err(again) => self = again,
            }
        }
    }

    async fn follow_log<S: Storage, A: Anchor>(
        self,
        io: &S,
        options: &OpenOptions,
        anchor: Option<&Opening<'_, A>>,
    ) -> Result<CrashedVolume, OpenError> {
        let Self { newest, growth, .. } = self;
        let (available, own) = (options.max_memory_bytes, most_memory_bytes(&growth.of(&newest.superblock), options));
        let left = available.checked_sub(own).ok_or(OpenError::Memory { needed: own, available })?;
        let candidates = Candidates::within(left);
        let tagger = Arc::new(Tagger::new(&newest.keys, newest.superblock.tag, &newest.superblock.layout));
        let asked_for = anchor.and_then(Opening::asks_for);
        let chain = follow(io, &newest, &tagger, options.unread_log, asked_for, candidates).await?;
        if let Some(anchor) = anchor {
            let judged = anchor.judge(&newest.superblock, chain.followed_to, chain.link_at);
            // A disk that can't be read is not one that was put back.
            judged.map_err(|older| match (older, chain.unread) {
                (AnchorError::Older { followed_to: Some(_), .. }, Some(unread)) => AnchorError::Unread(unread.why),
                (older, _) => older,
            })?;
        }
        // Of what recovery skips nothing is known: the records that it followed count.
        if chain.followed_to < options.first_not_durable {
            return Err(OpenError::OlderState { next: chain.followed_to, least: options.first_not_durable });
        }
        let mut warnings = atomicity_warnings(io, &newest.superblock);
        warnings.extend(chain.unreadable.map(|why| {
            format!("a part of the tag log that holds nothing can't be read, writing may fail there: {why}")
        }));
        let report = RecoveryReport {
            records: chain.records,
            torn_records: chain.torn.records,
            superblock_repaired: newest.damaged,
            ..Default::default()
        };
        let head = LogPoint { link: options.open_id, ..chain.end };
        let (candidates, torn, unread) = (chain.candidates, chain.torn, chain.unread);
        Ok(CrashedVolume { newest, growth, tagger, candidates, torn, head, unread, report, warnings })
    }
}

impl CrashedVolume {
    async fn recover<S: Storage>(self, io: &S, options: &OpenOptions) -> Result<RecoveredVolume, OpenError> {
        let Self { newest, growth, tagger, candidates, torn, head, unread, mut report, warnings } = self;
        let superblock = &newest.superblock;
        let cache = PageCache::new(options.cache_bytes);
        let tree = Tree { layout: superblock.layout, root: Root::new(superblock.root), cache, rescued: Rescued::new() };
        let settling = candidates.into_set_and_blocks(&superblock.layout);
        let (own, available) = (most_memory_bytes(&growth.of(superblock), options), options.max_memory_bytes);
        let (set, settling, needed) = settling
            .map_err(|TooMuch { needed }| OpenError::Memory { needed: own.saturating_add(needed), available })?;
        let mut memory = Budget { taken: own.saturating_add(needed), available };
        let mut settle = Settle::new(io, &tree, &tagger, &newest, options.unreadable_blocks);
        let (undecided, in_log) = settle.all(&settling, &set, &mut memory, &mut report).await?;
        report.torn_was_durable = settle.proves_any(&torn.tags, &set).await;
        Ok(RecoveredVolume { newest, growth, head, tree, tagger, set, undecided, in_log, unread, report, warnings })
    }
}

impl RecoveredVolume {
    /// Writes down what recovery found and serves the volume; what must not or can't be written
    /// down is served from memory. The inner error: it is to be judged once more.
    async fn open<S: Storage, A: Anchor>(
        mut self,
        io: &S,
        options: &OpenOptions,
        anchor: &mut Option<Opening<'_, A>>,
    ) -> Result<Result<Volume, VerifiedVolume>, OpenError> {
        // No decision without evidence becomes durable.
        let first = self.undecided.first().map(|c| Latched::Undecided(c.block));
        let mut why = self.unread.map(|unread| Latched::Device(unread.why)).or(first);
        if why.is_none() && options.access == Access::ReadWrite {
            match self.write_down(io, options, anchor).await? {
                Ok(None) => {
                    let Self { newest, growth, .. } = self;
                    return Ok(Err(VerifiedVolume { newest, growth, key_area: None }));
                }
                Ok(Some(WrittenDown { superblock, applied, placed, warning })) => {
                    self.warnings.extend(warning);
                    self.report.placed = placed;
                    self.tree.root.store(superblock.root);
                    self.tree.layout = superblock.layout;
                    self.newest.superblock = superblock;
                    self.report.pages_lost = applied.pages_lost;
                    return Ok(Ok(self.into_volume(None, options)));
                }
                // Nothing current was overwritten: what recovery found can be served,
                // but not be added to.
                Err(latched) => why = Some(latched),
            }
        }
        let set = std::mem::replace(&mut self.set, PendingSet::new(1, 1));
        let mut blocks: Vec<BlockIndex> = self.undecided.iter().map(|c| c.block).collect();
        let (mut tags, mut runs) = (Vec::new(), Vec::new());
        set.sorted(&mut tags, &mut runs);
        blocks.extend(tags.iter().map(|t| t.block));
        blocks.sort_unstable();
        let unread = self.unread.filter(|_| options.unread_log == UnreadLog::FailOlder);
        let newer_from = unread.map(|unread| unread.newer_from);
        let undecided = Undecided::new(std::mem::take(&mut self.undecided));
        let in_log = std::mem::replace(&mut self.in_log, InLog::with_capacity(0));
        Ok(Ok(self.into_volume(Some(Unsaved { set, blocks, undecided, in_log, newer_from, why }), options)))
    }

    fn into_volume(self, unsaved: Option<Unsaved>, options: &OpenOptions) -> Volume {
        let Self { newest, head, tree, tagger, report, warnings, .. } = self;
        let Newest { superblock, keys, .. } = newest;
        Volume::new(Parts { superblock, keys, head, tree, tagger, report, warnings, unsaved }, options)
    }

    /// What was found goes to pages that nothing current names, then into the superblock. Before
    /// that, while the log still has them, blocks go to their places. The outer error: there is
    /// nothing that could be served. `None`: nothing was written, and the anchor asks for another judgement.
    async fn write_down<S: Storage, A: Anchor>(
        &self,
        io: &S,
        options: &OpenOptions,
        anchor: &mut Option<Opening<'_, A>>,
    ) -> Result<Result<Option<WrittenDown>, Latched>, OpenError> {
        let Self { newest, tree, tagger, set, in_log, .. } = self;
        let page = match self.repair(io).await {
            Ok(page) => page,
            Err(latched) => return Ok(Err(latched)),
        };
        // Both copies are equal: from here on the devices may get the new id, and nothing older.
        if let Some(anchor) = anchor {
            if !anchor.intent(&newest.superblock, options.open_id).await? {
                return Ok(Ok(None));
            }
        }
        let placed = match Placer::new(io, tree, tagger, set, newest).all(in_log).await? {
            Ok(placed) => placed,
            Err(latched) => return Ok(Err(latched)),
        };
        let is_anchored = anchor.as_ref().map_or(newest.superblock.is_anchored(), Opening::is_kept);
        let moved = self.move_on(io, options, is_anchored, page).await;
        Ok(match moved {
            Ok((superblock, applied)) => {
                // The superblock counts: nothing fails from here on.
                let warning = self.growth.say(io, &newest.keys, &superblock).await;
                if let Some(anchor) = anchor {
                    anchor.commit(&superblock).await?;
                }
                Ok(Some(WrittenDown { superblock, applied, placed, warning }))
            }
            Err(latched) => Err(latched),
        })
    }

    /// Both copies must name the current state before anything that the older one names is
    /// overwritten.
    async fn repair<S: Storage>(&self, io: &S) -> Result<Buf, Latched> {
        let Self { newest, .. } = self;
        let repair = SuperblockUpdate::Repair(&newest.superblock, &newest.stale);
        let (repaired, page) = publish(io, &newest.keys, repair, Buf::new(PAGE_BYTES)).await;
        repaired.map(|()| page).map_err(Latched::Superblock)
    }

    async fn move_on<S: Storage>(
        &self,
        io: &S,
        options: &OpenOptions,
        is_anchored: bool,
        page: Buf,
    ) -> Result<(Superblock, Applied), Latched> {
        let Self { newest, growth, head, tree, set, .. } = self;
        // Not the next epoch: the crashed life may have written pages and records of that one.
        let epoch = newest.superblock.epoch.next().next();
        let mut scratch = Scratch::new(&tree.layout, set.len(), set.runs());
        let (root, applied) = apply(io, tree, &mut scratch, set, newest.superblock.root, epoch).await?;
        let root = growth.raise(io, &tree.layout, root, epoch).await?;
        let synced = io.sync(Device::Meta).await;
        synced.map_err(|errno| Latched::Device(DeviceError::sync(Device::Meta, errno)))?;
        let next = Superblock {
            epoch,
            root,
            log_begin: head.position,
            record_number: head.number,
            link: head.link,
            open_id: options.open_id,
            ..growth.of(&newest.superblock)
        };
        // What this log may hold is said before it holds anything.
        let next = next.with_sync_log(options.sync_log && VolumeInfo::of(&next).fits_sync_log());
        let next = next.with_anchor(is_anchored);
        let (moved, _) = publish(io, &newest.keys, SuperblockUpdate::MoveOn(&newest.superblock, &next), page).await;
        moved.map_err(Latched::Superblock)?;
        Ok((next, applied))
    }
}

/// What the volume takes at most, recovery apart.
fn most_memory_bytes(superblock: &Superblock, options: &OpenOptions) -> u64 {
    let OpenOptions { cache_bytes, max_requests, max_request_bytes, .. } = *options;
    crate::most_memory_bytes(Some(&VolumeInfo::of(superblock)), cache_bytes, max_requests, max_request_bytes)
}

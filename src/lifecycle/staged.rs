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

use crate::{
    BlockIndex, Buf, Device, DeviceError, Latched, MasterKey, Storage, Volume,
    crypto::tagger::Tagger,
    format::{PAGE_BYTES, Superblock, uuid_text},
    info::{RecoveryReport, VolumeInfo},
    io::sectors::{refuse_blocks_below_sector, refuse_pages_below_sector, refuse_records_below_sector},
    lifecycle::{
        growth::{Growth, grown},
        identity_block::{Claimed, are_exchanged, check_identity, read_identity},
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
        Ok(Self { newest, growth })
    }

    /// Sizes and identity.
    pub fn info(&self) -> VolumeInfo {
        VolumeInfo::of(&self.newest.superblock)
    }

    /// The size in bytes that the volume has when it is opened to grow so, or why it can't.
    pub fn size_when_grown<S: Storage>(&self, io: &S, grow: Grow) -> Result<u64, OpenError> {
        Ok(grown(io, &self.newest.superblock.layout, grow)?.size())
    }

    /// The id that was drawn when the volume was last opened for writing: 256 random bits, or that
    /// of its format.
    pub fn last_opened(&self) -> &[u8; 32] {
        &self.newest.superblock.open_id
    }

    /// Recovers from the log and opens.
    pub async fn open<S: Storage>(self, io: &S, options: &OpenOptions) -> Result<Volume, OpenError> {
        self.follow_log(io, options).await?.recover(io, options).await?.open(io, options).await
    }

    async fn follow_log<S: Storage>(self, io: &S, options: &OpenOptions) -> Result<CrashedVolume, OpenError> {
        let Self { newest, growth } = self;
        let (available, own) = (options.max_memory_bytes, most_memory_bytes(&growth.of(&newest.superblock), options));
        let left = available.checked_sub(own).ok_or(OpenError::Memory { needed: own, available })?;
        let candidates = Candidates::within(left);
        let tagger = Arc::new(Tagger::new(&newest.keys, newest.superblock.tag, &newest.superblock.layout));
        let chain = follow(io, &newest, &tagger, options.unread_log, candidates).await?;
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
    /// down is served from memory.
    async fn open<S: Storage>(mut self, io: &S, options: &OpenOptions) -> Result<Volume, OpenError> {
        // No decision without evidence becomes durable.
        let first = self.undecided.first().map(|c| Latched::Undecided(c.block));
        let mut why = self.unread.map(|unread| Latched::Device(unread.why)).or(first);
        if why.is_none() && options.access == Access::ReadWrite {
            match self.write_down(io, options).await? {
                Ok(WrittenDown { superblock, applied, placed, warning }) => {
                    self.warnings.extend(warning);
                    self.report.placed = placed;
                    self.tree.root.store(superblock.root);
                    self.tree.layout = superblock.layout;
                    self.newest.superblock = superblock;
                    self.report.pages_lost = applied.pages_lost;
                    return Ok(self.into_volume(None, options));
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
        Ok(self.into_volume(Some(Unsaved { set, blocks, undecided, in_log, newer_from, why }), options))
    }

    fn into_volume(self, unsaved: Option<Unsaved>, options: &OpenOptions) -> Volume {
        let Self { newest, head, tree, tagger, report, warnings, .. } = self;
        let Newest { superblock, keys, .. } = newest;
        Volume::new(Parts { superblock, keys, head, tree, tagger, report, warnings, unsaved }, options)
    }

    /// What was found goes to pages that nothing current names, then into the superblock. Before
    /// that, while the log still has them, blocks go to their places. The outer error: there is
    /// nothing that could be served.
    async fn write_down<S: Storage>(
        &self,
        io: &S,
        options: &OpenOptions,
    ) -> Result<Result<WrittenDown, Latched>, OpenError> {
        let Self { newest, tree, tagger, set, in_log, .. } = self;
        let page = match self.repair(io).await {
            Ok(page) => page,
            Err(latched) => return Ok(Err(latched)),
        };
        let placed = match Placer::new(io, tree, tagger, set, newest).all(in_log).await? {
            Ok(placed) => placed,
            Err(latched) => return Ok(Err(latched)),
        };
        let moved = self.move_on(io, options, page).await;
        Ok(match moved {
            Ok((superblock, applied)) => {
                // The superblock counts: nothing fails from here on.
                let warning = self.growth.say(io, &newest.keys, &superblock).await;
                Ok(WrittenDown { superblock, applied, placed, warning })
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

/// The devices may not be those that the volume was formatted on: an image copied to another disk.
fn atomicity_warnings<S: Storage>(io: &S, superblock: &Superblock) -> Vec<String> {
    let (data, meta) = (io.geometry(Device::Data).physical_block, io.geometry(Device::Meta).physical_block);
    let mut warnings = Vec::new();
    let block = superblock.layout.block_size;
    // The user's word counts for what the data device does not tear, and for what a write leaves
    // alone if that is less than the device says.
    let assumed = superblock.assumed_atomic_bytes();
    let atomic = assumed.unwrap_or(data);
    let data = assumed.map_or(data, |bytes| bytes.min(data));
    let meta = assumed.filter(|_| !superblock.layout.separate_meta).map_or(meta, |bytes| bytes.min(meta));
    if block > atomic {
        warnings.push(format!(
            "blocks of {block} bytes on a device that writes only {atomic} at once: a power cut may tear one, which then reads as an error"
        ));
    }
    if block < data {
        warnings.push(format!(
            "blocks of {block} bytes on a device that writes {data} at once: a power cut may damage the neighbours of a block under way, which then read as errors"
        ));
    }
    if meta > superblock.physical_block {
        warnings.push(format!(
            "the metadata device writes {meta} bytes at once, the volume was made for {}: a power cut may damage neighbouring metadata",
            superblock.physical_block
        ));
    }
    warnings
}

/// Nothing in this program does yet what the other features ask for.
fn refuse_unserved(superblock: &Superblock) -> Result<(), OpenError> {
    let unserved = superblock.features().iter().filter(|feature| !feature.is_served());
    let mut names: Vec<_> = unserved.map(|feature| feature.to_string()).collect();
    // Nothing moves pages from one area to the other yet.
    names.extend(superblock.layout.has_second_area().then(|| "a second page area".into()));
    if names.is_empty() { Ok(()) } else { Err(OpenError::NotServed { features: names.join(", ") }) }
}

/// There is no superblock: perhaps this is the data device of a volume whose metadata is elsewhere.
async fn explain_no_superblock<S: Storage>(io: &S) -> Result<OpenError, DeviceError> {
    if are_exchanged(io).await? {
        let exchanged = "the devices are the other way round: use --data the metadata device --meta the data device";
        return Ok(OpenError::Foreign(exchanged.into()));
    }
    Ok(match read_identity(io).await?.claim() {
        Err(unknown) => unknown.into(),
        Ok(Some(claim)) => OpenError::Foreign(format!(
            "the data device holds the data of volume {}: name its metadata device with --meta",
            uuid_text(&claim.uuid)
        )),
        Ok(None) => OpenError::NotAVolume,
    })
}

/// The devices are the volume's, and large enough. What the data device says of its size,
/// where it has no metadata.
async fn check_devices<S: Storage>(
    io: &S,
    newest: &Newest,
    options: &OpenOptions,
) -> Result<Option<Claimed>, OpenError> {
    let superblock = &newest.superblock;
    let layout = &superblock.layout;
    let uuid = uuid_text(&superblock.uuid);
    match (layout.separate_meta, options.separate_meta) {
        (true, false) => {
            return Err(OpenError::Foreign(format!(
                "the metadata device holds the metadata of volume {uuid}: name it with --meta, and its data device with --data"
            )));
        }
        (false, true) => {
            return Err(OpenError::Foreign(format!(
                "volume {uuid} on the metadata device keeps data and metadata on one device: leave out --meta"
            )));
        }
        _ => {}
    }
    for (device, need) in [(Device::Meta, layout.meta_device_bytes()), (Device::Data, layout.data_device_bytes())] {
        let have = io.geometry(device).size;
        if have < need {
            return Err(OpenError::TooSmall { device, have, need });
        }
    }
    refuse_blocks_below_sector(io, layout.block_size)?;
    refuse_records_below_sector(io, superblock.physical_block)?;
    match layout.separate_meta {
        true => check_identity(io, superblock, &newest.keys).await.map(Some),
        false => Ok(None),
    }
}

//! Opening a volume: which superblock, recovery, and only then a [`Volume`].

use crate::{
    BlockIndex, Buf, ByteOffset, Device, DeviceError, Latched, MasterKey, OnMismatch, Storage, Volume,
    apply::{Applied, Scratch, apply},
    create::VolumeInfo,
    format::{Identity, Layout, PAGE_BYTES, RawIdentity, RawSuperblock, Superblock, SuperblockError, hex, uuid_text},
    log::LogPoint,
    pending::PendingSet,
    recovery::{follow, settle},
    superblocks::{Newest, meta_error, read_copies, write_both, write_copy},
};
use serde::{Deserialize, Serialize};
use zerocopy::FromBytes;

/// Whether anything may be written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// Reads and writes; recovery is written down.
    ReadWrite,
    /// Nothing is written, not even recovery's result.
    ReadOnly,
}

/// How to open a volume. All limits are fixed for as long as it is open: memory is taken once.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Whether anything may be written.
    pub access: Access,
    /// Bytes of the cache of verified pages; 0 is allowed.
    pub cache_bytes: u64,
    /// How many [`Slot`](crate::Slot)s may be made: queues × depth, and one for each worker thread that reads or writes.
    pub max_slots: usize,
    /// Queues, for counters that do not share a cache line.
    pub queues: usize,
    /// Largest request in bytes.
    pub max_request_bytes: usize,
    /// Whether the metadata was given as a device of its own.
    pub separate_meta: bool,
    /// What a read does with a block that does not match its tag.
    pub on_mismatch: OnMismatch,
    /// 32 fresh random bytes, drawn for this open.
    pub open_id: [u8; 32],
    /// Where prefetch hints go; none are made where `None`.
    pub hints: Option<crate::HintSender>,
    /// Threads that hash for those that serve requests, where there are any.
    pub hash_threads: Option<crate::HashThreads>,
}

/// What can be known without a key (`dump`).
#[derive(Clone, Debug, Serialize)]
pub struct Dump {
    /// One entry for each superblock copy, in order of place.
    pub copies: Vec<CopyDump>,
    /// The volume, from the newest copy whose checksum holds.
    pub volume: Option<VolumeInfo>,
    /// UUID of the volume whose data device this is, where the metadata is elsewhere.
    pub identity: Option<String>,
}

/// One superblock copy, unauthenticated.
#[derive(Clone, Debug, Serialize)]
pub struct CopyDump {
    /// Its place on the metadata device, in bytes.
    pub offset: u64,
    /// "valid checksum", "damaged", "absent".
    pub state: String,
    /// Epoch, where readable.
    pub epoch: Option<u64>,
    /// Key id (16 bytes, hexadecimal), where readable.
    pub key_id: Option<String>,
}

/// How many blocks of a kind a report lists.
pub const MAX_REPORTED_BLOCKS: usize = 1000;

/// What recovery found, for status and the daemon's log.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
pub struct RecoveryReport {
    /// Records followed in the log.
    pub records: u64,
    /// Blocks that had log entries.
    pub blocks: u64,
    /// Blocks settled without reading or with the newest tag (rows A and B).
    pub settled: u64,
    /// Blocks whose newest writes never arrived: an older candidate (row C) or zeros (row D).
    pub older: u64,
    /// Blocks that match no candidate: corrupt, lost or rolled back (row E).
    pub corrupt: u64,
    /// Blocks that could not be read (row F).
    pub unreadable: u64,
    /// The first of the blocks of rows C and D.
    pub older_blocks: Vec<u64>,
    /// The first of the blocks of row E.
    pub corrupt_blocks: Vec<u64>,
    /// The first of the blocks of row F.
    pub unreadable_blocks: Vec<u64>,
    /// Metadata pages that did not verify when recovery had to change them.
    pub pages_lost: u64,
    /// A superblock copy was damaged and has been made good (or would be, were it not read-only).
    pub superblock_repaired: bool,
}

/// Why a volume can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No superblock anywhere.
    #[error("no ublk-integrity volume on the metadata device")]
    NotAVolume,
    /// The superblock is of a later format.
    #[error("format version {0} is not known to this program")]
    Version(u32),
    /// Both copies fail their checksums.
    #[error("both superblock copies on the metadata device are damaged")]
    Damaged,
    /// The key is not this volume's.
    #[error("wrong key for volume {uuid}")]
    WrongKey {
        /// The volume.
        uuid: String,
    },
    /// Right key, but a MAC does not hold, or copies contradict each other, or the log is newer than the superblock.
    #[error("the {what} was tampered with")]
    Tampered {
        /// What.
        what: &'static str,
    },
    /// The data device is not the one that belongs to this metadata, or the other way round.
    #[error("{0}")]
    Foreign(String),
    /// The device is smaller than the volume.
    #[error("the {device} has {have} bytes, the volume needs {need}")]
    TooSmall {
        /// Which.
        device: crate::Device,
        /// Its size.
        have: u64,
        /// What the volume needs.
        need: u64,
    },
    /// An option makes no sense.
    #[error("{0}")]
    Options(String),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Reads what can be known without a key. Writes nothing.
pub async fn dump<S: Storage>(io: &S) -> Result<Dump, OpenError> {
    let copies = read_copies(io).await?;
    let mut dump = Dump { copies: Vec::new(), volume: None, identity: None };
    let mut newest = None;
    for (raw, offset) in copies.0.iter().zip(Layout::superblock_offsets()) {
        let parsed = raw.parse();
        let readable = raw.check().is_ok();
        dump.copies.push(CopyDump {
            offset: offset.0,
            state: match &parsed {
                Ok(_) => "checksum valid".into(),
                Err(SuperblockError::Absent) => "absent".into(),
                Err(SuperblockError::Version(v)) => format!("unknown version {v}"),
                Err(_) => "damaged".into(),
            },
            epoch: readable.then(|| raw.epoch()),
            key_id: readable.then(|| hex(&raw.key_id())),
        });
        if let Ok(superblock) = parsed {
            if newest.as_ref().is_none_or(|n: &Superblock| superblock.epoch > n.epoch) {
                newest = Some(superblock);
            }
        }
    }
    dump.volume = newest.as_ref().map(VolumeInfo::of);
    if newest.is_none() {
        dump.identity = read_identity(io).await?.claim().map(|claim| uuid_text(&claim.uuid));
    }
    match newest.is_some() || dump.identity.is_some() || dump.copies.iter().any(|c| c.state != "absent") {
        true => Ok(dump),
        false => Err(OpenError::NotAVolume),
    }
}

async fn read_identity<S: Storage>(io: &S) -> Result<RawIdentity, DeviceError> {
    let buf = read_page(io, Device::Data, Layout::identity_offset()).await?;
    Ok(RawIdentity::read_from_prefix(&buf).expect("a page is large enough").0)
}

async fn read_page<S: Storage>(io: &S, device: Device, at: ByteOffset) -> Result<Buf, DeviceError> {
    let (result, buf) = io.read(device, at, Buf::new(PAGE_BYTES), 0..PAGE_BYTES).await;
    let error = |errno| DeviceError { op: "read", device, offset: at, len: PAGE_BYTES as u64, errno };
    result.map_err(error).map(|()| buf)
}

/// The id that was drawn when the volume was last opened for writing: 256 random bits, or that of its format. Writes nothing.
pub async fn last_opened<S: Storage>(io: &S, key: &MasterKey) -> Result<[u8; 32], OpenError> {
    Ok(read_copies(io).await?.newest(key)?.superblock.open_id)
}

/// Opens a volume: verifies the newest superblock, recovers from the log, and (unless read-only)
/// writes recovery's result down before anything is served.
///
/// The caller holds the locks on the devices and has waited for I/O of earlier holders.
pub async fn open<S: Storage>(io: &S, key: &MasterKey, options: &OpenOptions) -> Result<Volume, OpenError> {
    if options.max_request_bytes < MAX_BLOCK_BYTES {
        let got = options.max_request_bytes;
        return Err(OpenError::Options(format!("requests of {got} bytes are too small: at least {MAX_BLOCK_BYTES}")));
    }
    if options.access == Access::ReadWrite {
        // What an earlier life has written and not synced is on the medium, or lost, from here on.
        for device in [Device::Data, Device::Meta] {
            let synced = io.sync(device).await;
            synced.map_err(|errno| DeviceError { op: "sync", device, offset: ByteOffset(0), len: 0, errno })?;
        }
    }
    let newest = match read_copies(io).await?.newest(key) {
        Err(OpenError::NotAVolume) => return Err(explain_no_superblock(io).await?),
        other => other?,
    };
    check_devices(io, &newest, options).await?;
    let chain = follow(io, &newest.superblock, &newest.keys).await?;
    let mut options = options.clone();
    // Recovery reads and looks tags up as a request does: one slot of its own.
    options.max_slots += 1;
    let head = LogPoint { link: options.open_id, ..chain.end };
    let mut volume = Volume::new(key, newest.superblock, head, &options);
    let mut report =
        RecoveryReport { records: chain.records, superblock_repaired: newest.damaged, ..Default::default() };
    volume.warnings = atomicity_warnings(io, &newest.superblock);
    let (set, settling) = chain.candidates.into_set_and_blocks();
    let mut slot = volume.slot(0);
    let unread = settle(io, &volume, &mut slot, &settling, &set, &mut report).await;
    report.blocks = report.settled + report.older + report.corrupt + report.unreadable;
    let away = report.unreadable_blocks.first().filter(|_| report.unreadable > MAX_UNREADABLE);
    let unread = chain.unreadable.or(unread);
    let undecided = unread.map(Latched::Device).or(away.map(|b| Latched::UnknownBlock(BlockIndex(*b))));
    volume.recovery = report;
    if let Some(why) = undecided {
        volume.log.latch(why);
    } else if options.access == Access::ReadWrite {
        match write_down(io, &newest, &volume, &set, head, options.open_id).await {
            Ok((superblock, applied)) => {
                volume.begin(superblock, head);
                volume.recovery.pages_lost = applied.pages_lost;
                return Ok(volume);
            }
            // Nothing current was overwritten: what recovery found can be served, but not be added to.
            Err(why) => volume.log.latch(why),
        }
    }
    volume.serve_from_memory(set);
    Ok(volume)
}

/// A request takes at least one block of any size.
const MAX_BLOCK_BYTES: usize = 4096;

/// More blocks than this that can't be read mean that the device is away: nothing is written then.
const MAX_UNREADABLE: u64 = 64;

/// The end of recovery: what was found goes to pages that nothing current names, then into the superblock.
async fn write_down<S: Storage>(
    io: &S,
    newest: &Newest,
    volume: &Volume,
    set: &PendingSet,
    head: LogPoint,
    open_id: [u8; 32],
) -> Result<(Superblock, Applied), Latched> {
    // Both copies must name the current state before anything that the older one names is overwritten.
    let current = newest.superblock.seal(&newest.keys);
    for at in &newest.stale {
        let (written, _) = write_copy(io, *at, &current, Buf::new(PAGE_BYTES)).await;
        written.map_err(Latched::Superblock)?;
    }
    // Not the next epoch: the crashed life may have written pages and records of that one.
    let epoch = newest.superblock.epoch.next().next();
    let mut scratch = Scratch::new(&volume.tree.layout, set.len(), set.runs());
    let (root, applied) = apply(io, &volume.tree, &mut scratch, set, newest.superblock.root, epoch).await?;
    let synced = io.sync(Device::Meta).await;
    synced.map_err(|errno| Latched::Device(meta_error("sync", ByteOffset(0), 0, errno)))?;
    let superblock = Superblock {
        epoch,
        root,
        log_begin: head.position,
        record_number: head.number,
        link: head.link,
        open_id,
        ..newest.superblock
    };
    let (written, _) = write_both(io, &superblock, &newest.keys, Buf::new(PAGE_BYTES)).await;
    written.map_err(Latched::Superblock)?;
    Ok((superblock, applied))
}

/// The devices may not be those that the volume was formatted on: an image copied to another disk.
fn atomicity_warnings<S: Storage>(io: &S, superblock: &Superblock) -> Vec<String> {
    let (data, meta) = (io.geometry(Device::Data).physical_block, io.geometry(Device::Meta).physical_block);
    let mut warnings = Vec::new();
    let block = superblock.layout.block_size;
    if block > data {
        warnings.push(format!(
            "blocks of {block} bytes on a device that writes only {data} at once: a power cut may tear one, which then reads as an error"
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

/// There is no superblock: perhaps this is the data device of a volume whose metadata is elsewhere.
async fn explain_no_superblock<S: Storage>(io: &S) -> Result<OpenError, DeviceError> {
    let at = Layout::identity_offset();
    let (data, meta) = (read_page(io, Device::Data, at).await?, read_page(io, Device::Meta, at).await?);
    let is_superblock =
        RawSuperblock::read_from_prefix(&data).is_ok_and(|(raw, _)| raw.check() != Err(SuperblockError::Absent));
    let is_data = RawIdentity::read_from_prefix(&meta).is_ok_and(|(raw, _)| raw.claim().is_some());
    if is_superblock && is_data {
        let exchanged = "the devices are the other way round: use --data the metadata device --meta the data device";
        return Ok(OpenError::Foreign(exchanged.into()));
    }
    Ok(match read_identity(io).await?.claim() {
        Some(claim) => OpenError::Foreign(format!(
            "the data device holds the data of volume {}: name its metadata device with --meta",
            uuid_text(&claim.uuid)
        )),
        None => OpenError::NotAVolume,
    })
}

/// The devices are the volume's, and large enough.
async fn check_devices<S: Storage>(io: &S, newest: &Newest, options: &OpenOptions) -> Result<(), OpenError> {
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
                "volume {uuid} keeps data and metadata on one device: leave out --meta"
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
    if layout.separate_meta {
        let raw = read_identity(io).await?;
        let belongs = raw.claim() == Some(Identity { uuid: superblock.uuid, size: layout.size() });
        if !belongs {
            let what = raw.claim().map_or("no volume".into(), |c| format!("volume {}", uuid_text(&c.uuid)));
            return Err(OpenError::Foreign(format!(
                "the data device belongs to {what}, the metadata device to volume {uuid}"
            )));
        }
        if !raw.verify(&newest.keys) {
            return Err(OpenError::Tampered { what: "identity block of the data device" });
        }
    }
    Ok(())
}

impl Volume {
    /// Keeps what recovery found in memory, where it can't or must not be written down.
    fn serve_from_memory(&mut self, set: PendingSet) {
        let (mut tags, mut runs) = (Vec::new(), Vec::new());
        set.sorted(&mut tags, &mut runs);
        self.overlay = tags.iter().map(|t| t.block).collect();
        self.pending[0] = set;
        self.access = Access::ReadOnly;
    }
}

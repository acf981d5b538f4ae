//! Volumes without ublk: `format`, `dump`, `check`, `export` and `import` drive the library on a ring
//! of their own.

use crate::{
    checkpoints::{self, Stop},
    device::{Backing, Backings, Use},
    failure::{Context, Exit, Failure, Outcome, no_ring},
    kept::{Kept, Owner, writes},
    output,
    ring::{DeviceFiles, OwnRing, RingStorage},
};
use futures_util::future::join;
use std::{future::Future, os::fd::RawFd, time::Duration};
use ublk_integrity::{
    Buf, MasterKey, OnMismatch, Slot, Volume,
    open::{Access, OpenError, OpenOptions, last_opened, open},
};

/// Requests under way at a time.
pub const LANES: usize = 8;
/// Bytes of the largest request.
pub const REQUEST: usize = 1 << 20;
/// Bytes of verified pages kept.
const CACHE: u64 = 64 << 20;

/// Open devices and a ring to use them with.
pub struct Offline {
    // Before the devices: operations under way end before the descriptors are closed.
    ring: OwnRing,
    files: DeviceFiles,
    /// The devices, locked for as long as this lives.
    backings: Backings,
}

/// The memory of one request of a pipeline.
pub struct Lane {
    /// The library's part.
    pub slot: Slot,
    /// The payload, [`REQUEST`] bytes.
    pub buf: Buf,
}

impl Offline {
    /// Opens the devices.
    pub fn open(devices: &crate::cli::DeviceArgs, purpose: Use) -> Outcome<Self> {
        let backings = Backings::open(&devices.data, devices.meta.as_deref(), purpose, Duration::ZERO)?;
        backings.each().try_for_each(refuse_short)?;
        for path in backings.buffered() {
            let path = path.display();
            output::warn(format_args!(
                "the file system of {path} has no O_DIRECT: every byte passes through the page cache"
            ));
        }
        Self::with(backings)
    }

    /// Takes devices that are open already.
    pub fn with(backings: Backings) -> Outcome<Self> {
        let ring = OwnRing::new(&backings.fds()).map_err(|e| no_ring(&e))?;
        Ok(Self { ring, files: backings.files(0), backings })
    }

    /// A handle on the devices.
    pub fn io(&self) -> RingStorage {
        self.ring.storage(self.files)
    }

    /// What a thread needs for a ring of its own on the same devices.
    pub fn handles(&self) -> (Vec<RawFd>, DeviceFiles) {
        (self.backings.fds(), self.files)
    }

    /// The devices.
    pub fn backings(&self) -> &Backings {
        &self.backings
    }

    /// Gives the devices back, once nothing is under way.
    pub fn into_backings(self) -> Backings {
        let Self { ring, backings, .. } = self;
        drop(ring);
        backings
    }

    /// Runs `work` to its end.
    pub fn run<T>(&self, work: impl Future<Output = T>) -> Outcome<T> {
        self.ring.block_on(work).doing("io_uring failed")
    }

    /// Opens the volume, with recovery.
    pub fn open_volume(&self, key: &MasterKey, access: Access) -> Outcome<Volume> {
        let options = OpenOptions {
            access,
            cache_bytes: CACHE,
            max_slots: LANES + 1,
            queues: 1,
            max_request_bytes: REQUEST,
            separate_meta: self.backings.meta.is_some(),
            on_mismatch: OnMismatch::Fail,
            open_id: random()?,
            hints: None,
            hash_threads: None,
        };
        Ok(self.run(open(&self.io(), key, &options))??)
    }

    /// What the last daemon of the volume has left in memory.
    pub fn left_behind(&self, key: &MasterKey) -> Outcome<Option<Kept>> {
        match self.run(last_opened(&self.io(), key))? {
            Ok(last) => Kept::left_by(&last, &Owner::of(&self.backings.data)?),
            // Explained when it is opened.
            Err(OpenError::NotAVolume) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// A line about that, where there is something that only `add` puts in place.
    pub fn left_in_memory(&self, key: &MasterKey) -> Outcome<Option<String>> {
        let count = self.left_behind(key)?.map_or(Ok(0), |left| left.count())?;
        let line = || {
            format!(
                "{} of a daemon that was killed, in memory yet: `add` without --read-only puts them in place",
                writes(count)
            )
        };
        Ok((count > 0).then(line))
    }

    /// Refuses what must not be done before.
    pub fn refuse_left_in_memory(&self, key: &MasterKey) -> Outcome {
        self.left_in_memory(key)?.map_or(Ok(()), |line| Err(Failure::new(Exit::Busy, line)))
    }

    /// Runs `work` while checkpoints make room for what it writes, and one more at the end.
    pub fn run_with_checkpoints<T>(&self, volume: &Volume, work: impl Future<Output = Outcome<T>>) -> Outcome<T> {
        let io = self.io();
        let stop = Stop::default();
        let working = async {
            let result = work.await;
            stop.set();
            result
        };
        let (result, closed) = self.run(join(working, checkpoints::run(volume, &io, &stop, |_| {})))?;
        let result = result?;
        closed?;
        Ok(result)
    }
}

/// Reading it would fail as if it were broken.
fn refuse_short(backing: &Backing) -> Outcome {
    /// A superblock or an identity block.
    const LEAST: u64 = 4096;
    let (path, size) = (backing.path().display(), backing.size());
    match size {
        0 => Err(Failure::new(Exit::Device, format_args!("{path} is empty (0 bytes)"))),
        1..LEAST => Err(Failure::new(Exit::Device, format_args!("{path} has {size} bytes: too short for a volume"))),
        _ => Ok(()),
    }
}

/// Fresh random bytes from the kernel.
pub fn random<const N: usize>() -> Outcome<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|e| Failure::new(Exit::Device, format_args!("no random bytes: {e}")))?;
    Ok(bytes)
}

/// Lanes for a pipeline of [`LANES`] requests.
pub fn lanes(volume: &Volume) -> Vec<Lane> {
    Buf::several(LANES, REQUEST).into_iter().map(|buf| Lane { slot: volume.slot(0), buf }).collect()
}

/// For tests: a formatted volume in a file that goes with the first of these.
#[cfg(test)]
pub fn scratch() -> (tempfile::NamedTempFile, Offline, MasterKey) {
    use ublk_integrity::{
        TagAlgorithm,
        create::{FormatOptions, format},
    };
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(16 << 20).unwrap();
    let offline = Offline::with(Backings::open(file.path(), None, Use::Exclusive, Duration::ZERO).unwrap()).unwrap();
    let key = MasterKey::new(&[7; 32]).unwrap();
    let layout = FormatOptions {
        block_size: 4096,
        size: Some(4 << 20),
        log_size: None,
        tag: TagAlgorithm::default(),
        uuid: [2; 16],
        separate_meta: false,
    };
    offline.run(format(&offline.io(), &key, &layout)).unwrap().unwrap();
    (file, offline, key)
}

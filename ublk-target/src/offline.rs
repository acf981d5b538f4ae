//! Volumes without ublk: `format`, `dump`, `check`, `export` and `import` drive the library on a ring
//! of their own.

use crate::{
    anchor::{AnyAnchor, MetaDevice, asked, note},
    checkpoints::{self, AtStop, Stop},
    daemon::memory_budget::{Available, Purpose},
    device::{Backing, Backings, Use},
    event_loop::{
        OwnRing,
        ring::{DeviceFiles, RingStorage},
    },
    failure::{Context, Exit, Failure, Outcome, no_ring, with_paths},
    interrupt,
    notice::Notice,
    os, output,
    random::random,
    size::Size,
    wait,
    write_back_file::{Owner, WriteBackFile, writes},
};
use futures_util::future::{Either, join, select};
use std::{future::Future, path::Path, pin::pin, time::Duration};
use ublk_integrity::{
    Buf, Credential, Device, RequestContext, Volume,
    anchor::{AnchorError, AnchorKeeper, AnchorPurpose, AnchorUse},
    key_slots::unlock,
    open::{Access, Grow, OpenError, OpenOptions, UnreadLog, VerifiedVolume},
};

/// Requests in flight at a time.
pub const LANES: usize = 8;
/// Bytes of the largest request.
pub const REQUEST: usize = 1 << 20;
/// Bytes of verified pages kept.
const CACHE: u64 = 64 << 20;
/// How long an open takes without a word more.
const SILENCE: Duration = Duration::from_secs(10);

/// Open devices and a ring to use them with.
pub struct Offline {
    // Before the devices: operations in flight end before the descriptors are closed.
    ring: OwnRing,
    files: DeviceFiles,
    /// The devices, locked for as long as this lives.
    backings: Closed,
}

/// Devices that are free when this is gone.
struct Closed(Option<Backings>);

impl Closed {
    fn backings(&self) -> &Backings {
        self.0.as_ref().expect("given away only at the end")
    }
}

impl Drop for Closed {
    fn drop(&mut self) {
        self.0.take().into_iter().for_each(Backings::close);
    }
}

/// How a command opens a volume.
#[derive(Clone, Copy)]
pub struct Opening {
    /// Whether it writes.
    pub access: Access,
    /// The UUID that the volume must have, where one is known.
    pub uuid: Option<[u8; 16]>,
    /// What becomes of a log that can't be read.
    pub unread_log: UnreadLog,
    /// How large it is to be from then on, where that is another size.
    pub grow: Option<Grow>,
    /// Whether to go on, with a warning, where a daemon that was killed has left writes in memory.
    pub without_kept: bool,
    /// Whether a volume that has an anchor is read without it.
    pub without_anchor: bool,
    /// What becomes of its anchor, where one is named.
    pub purpose: AnchorPurpose,
}

impl Opening {
    /// The strictest way.
    pub fn new(access: Access, uuid: Option<uuid::Uuid>) -> Self {
        let uuid = uuid.map(uuid::Uuid::into_bytes);
        Self {
            access,
            uuid,
            unread_log: UnreadLog::Refuse,
            grow: None,
            without_kept: false,
            without_anchor: false,
            purpose: AnchorPurpose::Keep,
        }
    }
}

/// The memory of one request of a pipeline.
pub struct Lane {
    /// The library's part.
    pub context: RequestContext,
    /// The payload, [`REQUEST`] bytes.
    pub buf: Buf,
}

impl Offline {
    /// Opens the devices.
    pub fn open(data: &Path, meta: Option<&Path>, purpose: Use) -> Outcome<Self> {
        let backings = Backings::open(data, meta, purpose, Duration::ZERO)?;
        backings.both().try_for_each(refuse_short)?;
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
        let ring = backings.descriptors().and_then(OwnRing::new).map_err(|e| no_ring(&e))?;
        Ok(Self { ring, files: backings.files(0), backings: Closed(Some(backings)) })
    }

    /// A handle on the devices.
    pub fn io(&self) -> RingStorage {
        self.ring.storage(self.files)
    }

    /// What a thread needs for a ring of its own on the same devices.
    pub fn handles(&self) -> (&Backings, DeviceFiles) {
        (self.backings(), self.files)
    }

    /// The devices.
    pub fn backings(&self) -> &Backings {
        self.backings.backings()
    }

    /// Gives the devices back, once nothing is in flight.
    pub fn into_backings(self) -> Backings {
        let Self { ring, mut backings, .. } = self;
        drop(ring);
        backings.0.take().expect("given away only here")
    }

    /// Runs `work` to its end, or until the command is interrupted.
    pub fn run<T>(&self, work: impl Future<Output = T>) -> Outcome<T> {
        let work = pin!(work);
        let came = pin!(interrupt::came());
        match self.ring.block_on(select(work, came)).doing("io_uring failed")? {
            Either::Left((done, _)) => Ok(done),
            Either::Right(_) => Err(interrupt::failure()),
        }
    }

    /// Runs `work`, which looks by itself whether the command is interrupted, to its end.
    pub fn run_to_its_end<T>(&self, work: impl Future<Output = T>) -> Outcome<T> {
        self.ring.block_on(work).doing("io_uring failed")
    }

    /// Opens the volume, with recovery. One read of the superblocks says which volume it is, what a
    /// daemon that was killed has left for it in memory, and what is opened.
    #[cfg(test)]
    pub fn open_volume(&self, key: &Credential, how: Opening) -> Outcome<Volume> {
        self.open_anchored(key, how, None).map(|(volume, _)| volume)
    }

    /// The same with an anchor. Who tells it what becomes of the volume, if that is written.
    pub fn open_anchored(
        &self,
        key: &Credential,
        how: Opening,
        anchor: Option<&AnyAnchor>,
    ) -> Outcome<(Volume, Option<AnchorKeeper>)> {
        let available = Available::here(Purpose::Needed).bytes.saturating_sub((LANES * REQUEST) as u64);
        let options = OpenOptions {
            cache_bytes: CACHE.min(available / 4),
            max_requests: LANES + 1,
            max_request_bytes: REQUEST,
            max_memory_bytes: available,
            separate_meta: self.backings().meta.is_some(),
            expected_uuid: how.uuid,
            unread_log: how.unread_log,
            grow: how.grow,
            without_anchor: how.without_anchor,
            ..OpenOptions::new(how.access, random()?)
        };
        let verified = self.verify(key, &options)?;
        match self.left_in_memory(&verified) {
            Ok(None) => {}
            Ok(Some(line)) if !how.without_kept => return Err(Failure::new(Exit::Busy, line)),
            Err(failure) if !how.without_kept => return Err(failure),
            Ok(Some(line)) | Err(Failure { message: line, .. }) => {
                output::warn(format_args!("{line}; here the volume is as it was without them"));
            }
        }
        anchor.map_or(Ok(()), |anchor| self.introduce(&verified, anchor))?;
        let with = anchor.map(|anchor| anchor.used(how.purpose));
        let (volume, keeper) = self.open_verified((verified, with), &options, |failure| failure)?;
        if let Some(why) = volume.latched().filter(|_| how.access == Access::ReadWrite) {
            let backings = self.backings();
            let meta = backings.meta.as_ref().map(Backing::path);
            let line = format!("nothing can be written to the volume: {why}");
            output::warn(with_paths(&line, backings.data.path(), meta));
        }
        Ok((volume, keeper))
    }

    /// Unlocks the volume's key, and reads and verifies the superblocks.
    pub fn verify(&self, key: &Credential, options: &OpenOptions) -> Outcome<VerifiedVolume> {
        let _notice = self.notice();
        let io = self.io();
        let read = async {
            let key = unlock(&io, key).await?;
            if key.has_one_copy() {
                let path = self.backings().get(Device::Meta).path().display();
                output::warn(format_args!(
                    "{path}: one of the two copies of the key area is older than the other, damaged or unreadable: `key list` shows it, the next change writes both"
                ));
            }
            VerifiedVolume::read(&io, &key, options).await.map(|volume| volume.unlocked_by(key.area()))
        };
        self.run(read)?.map_err(|e| self.refusal(e))
    }

    /// Tells an anchor what it has to know of the volume, before it is asked anything.
    pub fn introduce(&self, verified: &VerifiedVolume, anchor: &AnyAnchor) -> Outcome {
        let AnyAnchor::Agent(agent) = anchor else { return Ok(()) };
        if agent.keeps_counters(verified.uuid()).map_err(AnchorError::Away)? {
            let device = MetaDevice::of(self.backings()).doing("can't open the metadata device once more")?;
            agent.introduce(verified.anchor_secret(), device);
            agent.wait_for_counter(verified.uuid());
        }
        Ok(())
    }

    /// Recovers and opens.
    ///
    /// `older`: what more there is to say where the devices hold an older state than they should.
    pub fn open_verified(
        &self,
        (verified, anchor): (VerifiedVolume, Option<AnchorUse<'_, AnyAnchor>>),
        options: &OpenOptions,
        older: impl FnOnce(Failure) -> Failure,
    ) -> Outcome<(Volume, Option<AnchorKeeper>)> {
        let _notice = self.notice();
        let io = self.io();
        let opened = self.run(async {
            match anchor {
                Some(anchor) => {
                    let opened = verified.open_anchored(&io, options, anchor).await;
                    opened.map(|(volume, keeper)| (volume, Some(keeper)))
                }
                None => verified.open(&io, options).await.map(|volume| (volume, None)),
            }
        });
        opened?.map_err(|e| match e {
            OpenError::OlderState { .. } => older(e.into()),
            _ => self.refusal(e),
        })
    }

    /// Why the volume can't be opened, with the path where sectors are too large or memory is too
    /// small for it.
    fn refusal(&self, e: OpenError) -> Failure {
        match e {
            OpenError::Memory { needed, available } => {
                let path = self.backings().get(Device::Meta).path().display();
                let (needed, available) = (Size(needed), Size(available));
                let message = format!(
                    "opening {path} takes {needed} of memory at least, {available} can be had: free some, or raise its limit"
                );
                Failure::new(Exit::Memory, message)
            }
            _ => e.into(),
        }
    }

    /// What the last daemon of the volume has left in memory.
    pub fn left_behind(&self, verified: &VerifiedVolume) -> Outcome<Option<WriteBackFile>> {
        WriteBackFile::left_by(verified.last_opened(), &Owner::of(&self.backings().data)?)
    }

    /// A line about that, where there is something that only `add` puts in place.
    pub fn left_in_memory(&self, verified: &VerifiedVolume) -> Outcome<Option<String>> {
        let count = self.left_behind(verified)?.map_or(Ok(0), |left| left.count())?;
        let line = || {
            format!(
                "{} of a daemon that was killed, in memory yet: `add` without --read-only puts them in place",
                writes(count)
            )
        };
        Ok((count > 0).then(line))
    }

    /// How long an open takes has no limit: it goes on as long as the devices answer. Whether they
    /// do is said, again and again.
    fn notice(&self) -> Notice {
        let paths = self.backings().paths().map(|path| path.display().to_string()).collect::<Vec<_>>().join(" and ");
        let mut before = os::bytes_read();
        Notice::every(SILENCE, move |passed| {
            let now = os::bytes_read();
            wait::tell(&still_opening(&paths, passed, now.zip(before).map(|(now, before)| now.saturating_sub(before))));
            before = now;
        })
    }

    /// Tells the anchor of a volume that has been closed its last point.
    pub fn finish(volume: &Volume, keeper: Option<AnchorKeeper>, anchor: Option<&AnyAnchor>) -> Outcome {
        if let Some((mut keeper, chosen)) = keeper.zip(anchor) {
            asked(keeper.finish(volume, (chosen, &note())))?;
        }
        Ok(())
    }

    /// Runs `work` while checkpoints make room for what it writes, and one more at the end.
    pub fn run_with_checkpoints<T>(
        &self,
        volume: &Volume,
        at_end: AtStop,
        work: impl Future<Output = Outcome<T>>,
    ) -> Outcome<T> {
        let io = self.io();
        let stop = Stop::default();
        let working = async {
            let result = work.await;
            stop.set();
            result
        };
        let (result, closed) = self.run(join(working, checkpoints::run(volume, &io, (&stop, at_end), |_| {})))?;
        let result = result?;
        closed?;
        Ok(result)
    }
}

/// What is told of an open that takes long, with what was read since the last word.
fn still_opening(paths: &str, passed: Duration, read: Option<u64>) -> String {
    let (seconds, period) = (passed.as_secs(), SILENCE.as_secs());
    let progress = match read {
        Some(0) => format!(": nothing has been read in the last {period} s"),
        Some(bytes) => format!(": {} read in the last {period} s", Size(bytes)),
        None => String::new(),
    };
    format!("still opening the volume on {paths} after {seconds} s{progress}")
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

/// Lanes for a pipeline of [`LANES`] requests.
pub fn lanes(volume: &Volume) -> Vec<Lane> {
    Buf::several(LANES, REQUEST).into_iter().map(|buf| Lane { context: volume.context(0), buf }).collect()
}

/// For tests: a formatted volume in a file that goes with the first of these.
#[cfg(test)]
pub fn scratch() -> (tempfile::NamedTempFile, Offline, Credential) {
    use ublk_integrity::create::{FormatOptions, format};
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(16 << 20).unwrap();
    let offline = Offline::with(Backings::open(file.path(), None, Use::Exclusive, Duration::ZERO).unwrap()).unwrap();
    let key = ublk_integrity::MasterKey::new(&[7; 32]).unwrap();
    let layout = FormatOptions { size: Some(4 << 20), ..FormatOptions::new(4096, [2; 16]) };
    offline.run(format(&offline.io(), &key, &layout)).unwrap().unwrap();
    (file, offline, Credential::Key(key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_that_takes_long_says_whether_it_goes_on() {
        let line = |read| still_opening("/dev/a and /dev/b", Duration::from_secs(20), read);
        assert!(line(Some(0)).contains("/dev/a and /dev/b after 20 s: nothing has been read in the last 10 s"));
        assert!(line(Some(3 << 20)).ends_with(": 3.00 MiB read in the last 10 s"), "{}", line(Some(3 << 20)));
        assert!(os::bytes_read().is_some());
    }
}

//! What comes before a device: the volume is opened, recovered, and given what the daemon before
//! has answered for.

use super::{memory_budget::largest_request, settings::Settings, workers};
use crate::{
    anchor::{AnyAnchor, Kept},
    device::Backings,
    event_loop::HashPool,
    failure::{Context, Exit, Failure, Outcome, way_out},
    offline::Offline,
    random::random,
    replay::Left,
    write_back_file::{MappedFile, OpenId, Owner, WriteBackFile, writes},
};
use std::sync::Arc;
use ublk_integrity::{
    Credential, HintReceiver, Latched, RecordNumber, Volume,
    anchor::{Anchor, AnchorPurpose},
    create::VolumeInfo,
    hints,
    open::{Access, OpenOptions, UnreadableBlocks, VerifiedVolume},
};

/// Hints that may wait for the prefetch thread.
const HINTS: usize = 256;

/// An open volume and what belongs to it.
pub(super) struct Opened {
    pub(super) volume: Arc<Volume>,
    /// The id that was drawn for this open.
    pub(super) open_id: OpenId,
    pub(super) backings: Backings,
    pub(super) hints: Option<HintReceiver>,
    pub(super) hashing: HashPool,
    /// Where writes are kept that are answered before they are in place.
    pub(super) write_back_file: Option<MappedFile>,
    /// The volume's anchor, and who tells it.
    pub(super) anchored: Option<Kept>,
    /// Writes that a daemon which was killed has answered: they are in place now.
    pub(super) put_in_place: usize,
}

impl Opened {
    /// Opens the volume on `backings`, with `write_back` slots of each thread in the write-back
    /// file. It must have this UUID, where one is given, and `accept` may refuse it before
    /// anything is written.
    pub(super) fn volume(
        settings: &Settings,
        (key, uuid): (&Credential, Option<[u8; 16]>),
        backings: Backings,
        (write_back, anchor): (usize, Option<AnyAnchor>),
        max_memory_bytes: u64,
        accept: impl FnOnce(&VolumeInfo) -> Outcome,
    ) -> Outcome<Self> {
        let (sender, receiver) = hints::channel(HINTS);
        let (sender, hints) = if settings.prefetch { (Some(sender), Some(receiver)) } else { (None, None) };
        let counts = settings.counts();
        let hashing = HashPool::new(settings.hash_threads.into());
        workers::start_hashing(&hashing, settings.hash_threads).doing("can't start a hash thread")?;
        let open_id = random()?;
        let access = if settings.read_only { Access::ReadOnly } else { Access::ReadWrite };
        let mut options = OpenOptions {
            cache_bytes: settings.cache,
            max_requests: counts.contexts(),
            threads: counts.io_threads() as usize,
            max_request_bytes: largest_request(settings.max_io),
            max_memory_bytes,
            separate_meta: backings.meta.is_some(),
            on_mismatch: settings.on_mismatch.into(),
            expected_uuid: uuid,
            grow: settings.grow,
            hints: sender,
            hash_threads: Some(hashing.threads()),
            unreadable_blocks: match settings.decide_unreadable {
                true => UnreadableBlocks::TakeNewest,
                false => UnreadableBlocks::KeepUndecided,
            },
            ..OpenOptions::new(access, open_id)
        };
        let offline = Offline::with(backings)?;
        // Dropped before them: it may have one of the devices open.
        let anchor = anchor;
        let owner = Owner::of(&offline.backings().data)?;
        let verified = offline.verify(key, &options)?;
        accept(&verified.info())?;
        options.write_back_slots = write_back;
        options.sync_log = settings.sync_log.decide(&verified.info(), settings.read_only, write_back)?;
        let left = to_put_in_place(&offline, &verified, settings.read_only, &open_id)?;
        let left = left.map(Left::of).transpose()?;
        // Before anything is written: what is kept must find the records that were there when it
        // was answered.
        options.first_not_durable = left.as_ref().map_or(RecordNumber(0), Left::first_not_durable);
        let older = |failure| match &left {
            Some(left) => left.cant_be_put_in_place(failure),
            None => failure,
        };
        let pace = match anchor.as_ref().zip(settings.anchor.as_ref()) {
            Some((anchor, told)) => {
                offline.introduce(&verified, anchor)?;
                Some(told.pace(anchor.is_counter())?)
            }
            None => None,
        };
        options.without_anchor = settings.without_anchor;
        let with = anchor.as_ref().map(|anchor| anchor.used(AnchorPurpose::Keep));
        let (volume, keeper) = offline.open_verified((verified, with), &options, older)?;
        let anchored = anchor.zip(keeper).zip(settings.anchor.clone().zip(pace));
        let anchored = anchored.map(|((anchor, keeper), (settings, pace))| Kept { anchor, keeper, settings, pace });
        let put_in_place = left.as_ref().map_or(Ok(0), |left| put_in_place(left, &offline, &volume))?;
        drop(left);
        let write_back_file = match write_back {
            0 => None,
            _ if volume.latched().is_some() => None,
            each => Some(MappedFile::new(&open_id, &owner, counts.io_threads() as usize, each)?),
        };
        let backings = offline.into_backings();
        Ok(Self {
            volume: Arc::new(volume),
            open_id,
            backings,
            hints,
            hashing,
            write_back_file,
            anchored,
            put_in_place,
        })
    }
}

/// What the last daemon of the volume has left in memory, which the open of `open_id` must find,
/// too, once it has begun.
fn to_put_in_place(
    offline: &Offline,
    verified: &VerifiedVolume,
    read_only: bool,
    open_id: &OpenId,
) -> Outcome<Option<WriteBackFile>> {
    if read_only {
        let line = offline.left_in_memory(verified)?;
        return line.map_or(Ok(None), |line| Err(Failure::new(Exit::Busy, line)));
    }
    let left = offline.left_behind(verified)?;
    left.iter().try_for_each(|left| left.belongs_to(open_id))?;
    Ok(left)
}

/// Without them the volume would answer with what is older than what was answered before.
fn put_in_place(left: &Left, offline: &Offline, volume: &Volume) -> Outcome<usize> {
    match (volume.latched(), left.count()) {
        (Some(why), count @ 1..) => Err(stay_kept(&left.file, count, why)),
        _ => left.replay(offline, volume),
    }
}

/// Nothing can be written to the volume, so they stay where they are: what there is to do.
fn stay_kept(left: &WriteBackFile, count: usize, why: Latched) -> Failure {
    let remedy = way_out(why);
    let kept = writes(count);
    left.unless_given_up(Failure::new(
        Exit::Device,
        format_args!("{kept} of a daemon that was killed can't be put in place: {why}; {remedy}"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::write_back_file::{KeptWrite, of_test};
    use ublk_integrity::{BlockIndex, BlockRange, RecordNumber};

    #[test]
    fn what_stays_kept_says_every_way_out() {
        let folder = tempfile::tempdir().unwrap();
        let (kept, mut part) = of_test(folder.path(), 2);
        let range = BlockRange::new(BlockIndex(3), 1);
        part.heads.keep(0, KeptWrite { range, first_not_durable: RecordNumber(5), number: 1 });
        let said = |why| stay_kept(&kept, kept.count().unwrap(), why).message;
        let link = format!("remove {}/kept-0101", folder.path().display());
        let undecided = said(Latched::Undecided(BlockIndex(7)));
        for words in ["1 write of a daemon", "block 7", "--decide-unreadable", &link] {
            assert!(undecided.contains(words), "{undecided}");
        }
        let other = said(Latched::Abandoned);
        assert!(other.contains("open it anew") && other.contains(&link), "{other}");
        assert!(!other.contains("--decide-unreadable"), "it would not help: {other}");
    }
}

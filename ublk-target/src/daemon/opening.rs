//! What comes before a device: the volume is opened, recovered, and given what the daemon before has answered for.

use super::{
    settings::{Settings, largest_request},
    workers,
};
use crate::{
    device::Backings,
    failure::{Context, Outcome},
    hash_queue::HashQueue,
    kept::{Kept, KeptWrites, OpenId, Owner},
    offline::{Offline, random},
};
use std::sync::Arc;
use ublk_integrity::{
    HintReceiver, MasterKey, Volume, hints,
    open::{Access, OpenOptions, open},
};

/// Hints that may wait for the prefetch thread.
const HINTS: usize = 256;

/// An open volume and what belongs to it.
pub(super) struct Opened {
    pub(super) volume: Arc<Volume>,
    pub(super) backings: Backings,
    pub(super) hints: Option<HintReceiver>,
    pub(super) hashing: HashQueue,
    /// For writes that will be answered before they are in place.
    pub(super) kept: Option<KeptWrites>,
    /// Writes that a daemon which was killed has answered: they are in place now.
    pub(super) put_in_place: usize,
}

impl Opened {
    /// Opens the volume on `backings`, to answer `write_back` small writes of each thread early.
    pub(super) fn volume(settings: &Settings, key: &MasterKey, backings: Backings, write_back: usize) -> Outcome<Self> {
        let (sender, receiver) = hints::channel(HINTS);
        let (sender, hints) = if settings.prefetch { (Some(sender), Some(receiver)) } else { (None, None) };
        let counts = settings.counts();
        let hashing = HashQueue::new(settings.hash_threads.into());
        workers::start_hashing(&hashing, settings.hash_threads).doing("can't start a hash thread")?;
        let open_id = random()?;
        let options = OpenOptions {
            access: if settings.read_only { Access::ReadOnly } else { Access::ReadWrite },
            cache_bytes: settings.cache,
            max_slots: counts.slots(),
            queues: counts.io_threads() as usize,
            max_request_bytes: largest_request(settings.max_io),
            separate_meta: backings.meta.is_some(),
            on_mismatch: settings.on_mismatch.into(),
            open_id,
            hints: sender,
            hash_threads: Some(hashing.way()),
        };
        let offline = Offline::with(backings)?;
        let owner = Owner::of(&offline.backings().data)?;
        let left = to_put_in_place(&offline, key, settings.read_only, &open_id)?;
        let volume = offline.run(open(&offline.io(), key, &options))?.map_err(|e| offline.refusal(e))?;
        let put_in_place = left.as_ref().map_or(Ok(0), |left| left.put_in_place(&offline, &volume))?;
        drop(left);
        let kept = match write_back {
            0 => None,
            each => Some(KeptWrites::new(&open_id, &owner, counts.io_threads() as usize, each)?),
        };
        let backings = offline.into_backings();
        Ok(Self { volume: Arc::new(volume), backings, hints, hashing, kept, put_in_place })
    }
}

/// What the last daemon of the volume has left in memory, which the open of `open_id` must find, too, once it has begun.
fn to_put_in_place(offline: &Offline, key: &MasterKey, read_only: bool, open_id: &OpenId) -> Outcome<Option<Kept>> {
    if read_only {
        return offline.refuse_left_in_memory(key).map(|()| None);
    }
    let left = offline.left_behind(key)?;
    left.iter().try_for_each(|left| left.belongs_to(open_id))?;
    Ok(left)
}

//! Puts in place what a daemon that was killed had answered and kept.

use crate::{
    failure::{Context, Failure, Outcome},
    kept::{Kept, MOST_BYTES},
    offline::Offline,
};
use ublk_integrity::{Buf, Durability, Volume};

/// Writes all that is kept to the volume, and lets go of what is in place: how much.
pub fn replay(kept: &Kept, offline: &Offline, volume: &Volume) -> Outcome<usize> {
    let (all, _) = kept.all()?;
    if all.is_empty() {
        return Ok(0);
    }
    let what = format!("can't put in place what is kept in {}", kept.path().display());
    let (io, mut failure) = (offline.io(), None);
    let count = all.len();
    let written = offline.run_with_checkpoints(volume, async {
        let (mut slot, mut buf, mut written) = (volume.context(0), Buf::new(MOST_BYTES), Vec::new());
        for (place, range) in all {
            kept.read(place, &mut buf).doing(&what)?;
            let result;
            (result, buf) = volume.write(&io, &mut slot, range, buf, Durability::MayBeLost).await;
            match result {
                Ok(()) => written.push(place),
                // One bad sector shall not keep the others.
                Err(e) => failure = failure.or(Some(e)),
            }
        }
        Ok(written)
    });
    let written = written.map_err(|e| kept.unless_given_up(e.context(&what)))?;
    written.iter().try_for_each(|place| kept.free(*place)).doing(&what)?;
    match failure {
        None => Ok(count),
        Some(e) => {
            let what = format!("{what}: {} of {count}", count - written.len());
            Err(kept.unless_given_up(Failure::from(e).context(what)))
        }
    }
}

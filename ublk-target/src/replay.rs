//! Puts in place what a daemon that was killed had answered and kept.

use crate::{
    failure::{Context, Failure, Outcome},
    kept::{Kept, MOST_BYTES, Place},
    offline::Offline,
};
use ublk_integrity::{BlockRange, Buf, Durability, RecordNumber, Volume};

/// What such a daemon has left.
pub struct Left {
    pub kept: Kept,
    writes: Vec<(Place, BlockRange)>,
    /// The number that the log's next record had at least when the last of them was answered.
    pub least_record: RecordNumber,
}

impl Left {
    /// What is kept, looked at once.
    pub fn of(kept: Kept) -> Outcome<Self> {
        let (writes, least_record) = kept.all()?;
        Ok(Self { kept, writes, least_record })
    }

    /// How many writes.
    pub fn count(&self) -> usize {
        self.writes.len()
    }

    /// The failure, with what hangs on it and every way out.
    pub fn cant_be_put_in_place(&self, failure: Failure) -> Failure {
        self.kept.unless_given_up(failure.context(self.what()))
    }

    fn what(&self) -> String {
        format!("can't put in place what is kept in {}", self.kept.path().display())
    }

    /// Writes all of it to the volume, and lets go of what is in place: how much.
    pub fn replay(&self, offline: &Offline, volume: &Volume) -> Outcome<usize> {
        if self.writes.is_empty() {
            return Ok(0);
        }
        let what = self.what();
        let (io, mut failure) = (offline.io(), None);
        let written = offline.run_with_checkpoints(volume, async {
            let (mut context, mut buf, mut written) = (volume.context(0), Buf::new(MOST_BYTES), Vec::new());
            for (place, range) in self.writes.iter().copied() {
                self.kept.read(place, &mut buf).doing(&what)?;
                let result;
                (result, buf) = volume.write(&io, &mut context, range, buf, Durability::MayBeLost).await;
                match result {
                    Ok(()) => written.push(place),
                    // One bad sector shall not keep the others.
                    Err(e) => failure = failure.or(Some(e)),
                }
            }
            Ok(written)
        });
        let written = written.map_err(|failure| self.cant_be_put_in_place(failure))?;
        written.iter().try_for_each(|place| self.kept.free(*place)).doing(&what)?;
        match failure {
            None => Ok(self.count()),
            Some(e) => {
                let what = format!("{what}: {} of {}", self.count() - written.len(), self.count());
                Err(self.kept.unless_given_up(Failure::from(e).context(what)))
            }
        }
    }
}

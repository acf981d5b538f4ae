//! Replays the write-back file of a daemon that was killed: writes in place what it had answered.

use crate::{
    checkpoints::AtStop,
    failure::{Context, Failure, Outcome},
    offline::Offline,
    write_back_file::{MOST_BYTES, Slot, WriteBackFile},
};
use ublk_integrity::{BlockRange, Buf, Durability, RecordNumber, Volume};

/// What such a daemon has left.
pub struct Left {
    pub file: WriteBackFile,
    writes: Vec<(Slot, BlockRange)>,
    /// The first record of the log that was not durable when the last of them was admitted.
    pub first_not_durable: RecordNumber,
}

impl Left {
    /// Reads the heads of a file, once.
    pub fn of(file: WriteBackFile) -> Outcome<Self> {
        let (writes, first_not_durable) = file.all()?;
        Ok(Self { file, writes, first_not_durable })
    }

    /// How many writes.
    pub fn count(&self) -> usize {
        self.writes.len()
    }

    /// The failure, with what hangs on it and every way out.
    pub fn cant_be_put_in_place(&self, failure: Failure) -> Failure {
        self.file.unless_given_up(failure.context(self.what()))
    }

    fn what(&self) -> String {
        format!("can't put in place what is kept in {}", self.file.path().display())
    }

    /// Writes all of it to the volume, and clears what is in place: how many writes.
    pub fn replay(&self, offline: &Offline, volume: &Volume) -> Outcome<usize> {
        if self.writes.is_empty() {
            return Ok(0);
        }
        let what = self.what();
        let (io, mut failure) = (offline.io(), None);
        let written = offline.run_with_checkpoints(volume, AtStop::GoOn, async {
            let (mut context, mut buf, mut written) = (volume.context(0), Buf::new(MOST_BYTES), Vec::new());
            for (slot, range) in self.writes.iter().copied() {
                self.file.read(slot, &mut buf).doing(&what)?;
                let result;
                (result, buf) = volume.write(&io, &mut context, range, buf, Durability::MayBeLost).await;
                match result {
                    Ok(()) => written.push(slot),
                    // One bad sector shall not keep the others.
                    Err(e) => failure = failure.or(Some(e)),
                }
            }
            Ok(written)
        });
        let written = written.map_err(|failure| self.cant_be_put_in_place(failure))?;
        written.iter().try_for_each(|slot| self.file.clear(*slot)).doing(&what)?;
        match failure {
            None => Ok(self.count()),
            Some(e) => {
                let what = format!("{what}: {} of {}", self.count() - written.len(), self.count());
                Err(self.file.unless_given_up(Failure::from(e).context(what)))
            }
        }
    }
}

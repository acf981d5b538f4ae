//! Replays the write-back file of a daemon that was killed: writes in place what it had answered.

use crate::{
    checkpoints::AtStop,
    failure::{Context, Failure, Outcome},
    offline::Offline,
    write_back_file::{KeptWrite, MOST_BYTES, Slot, WriteBackFile},
};
use ublk_integrity::{BlockRange, Buf, Durability, RecordNumber, Volume};

/// What such a daemon has left.
pub struct Left {
    pub file: WriteBackFile,
    /// In the order in which they are to be put in place.
    writes: Vec<(Slot, KeptWrite)>,
}

impl Left {
    /// Reads the heads of a file, once.
    pub fn of(file: WriteBackFile) -> Outcome<Self> {
        Ok(Self { writes: file.all()?, file })
    }

    /// How many writes.
    pub fn count(&self) -> usize {
        self.writes.len()
    }

    /// The first record of the log that was not durable when the last of them was admitted.
    pub fn first_not_durable(&self) -> RecordNumber {
        self.writes.iter().map(|(_, write)| write.first_not_durable).max().unwrap_or(RecordNumber(0))
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
            let (mut context, mut buf, mut written) = (volume.context(0), Buf::new(MOST_BYTES), Written::default());
            for (slot, KeptWrite { range, .. }) in self.writes.iter().copied() {
                self.file.read(slot, &mut buf).doing(&what)?;
                let result;
                (result, buf) = volume.write(&io, &mut context, range, buf, Durability::MayBeLost).await;
                written.note(slot, range, result.is_ok());
                // One bad sector shall not keep the others.
                failure = failure.or(result.err());
            }
            Ok(written.slots)
        });
        let written = written.map_err(|failure| self.cant_be_put_in_place(failure))?;
        // In their order: one that is cleared late would be written over a later one by the next replay.
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

/// The slots that may be cleared, in their order.
#[derive(Default)]
struct Written {
    slots: Vec<Slot>,
    /// What stays kept.
    kept: Vec<BlockRange>,
}

impl Written {
    /// Whether the next write is in place. One that has failed is written again by the next replay, which must not write it
    /// over what came later: that stays kept, too.
    fn note(&mut self, slot: Slot, range: BlockRange, in_place: bool) {
        if in_place && !self.kept.iter().any(|kept| kept.overlaps(range)) {
            self.slots.push(slot);
        } else {
            self.kept.push(range);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        offline::{Opening, scratch},
        write_back_file::of_test,
    };
    use ublk_integrity::{Access, BlockIndex};

    fn range(first: u64, count: u64) -> BlockRange {
        BlockRange::new(BlockIndex(first), count)
    }

    #[test]
    fn what_was_kept_last_is_written_last() {
        let (_volume, offline, key) = scratch();
        let volume = offline.open_volume(&key, Opening::new(Access::ReadWrite, None)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let (file, mut part) = of_test(folder.path(), 3);
        for (slot, (blocks, number)) in [(range(5, 1), 9), (range(5, 2), 7), (range(4, 2), 8)].into_iter().enumerate() {
            part.bufs[slot].fill(number as u8);
            part.heads.keep(slot, KeptWrite { range: blocks, first_not_durable: RecordNumber(number), number });
        }
        let left = Left::of(file).unwrap();
        assert_eq!((left.count(), left.first_not_durable()), (3, RecordNumber(9)));
        assert_eq!(left.replay(&offline, &volume).unwrap(), 3);
        assert_eq!(left.file.count().unwrap(), 0);
        let (io, mut context) = (offline.io(), volume.context(0));
        let read = volume.read(&io, &mut context, range(4, 3), Buf::new(MOST_BYTES));
        let (result, buf) = offline.run(read).unwrap();
        result.unwrap();
        assert_eq!([0, 4096, 8192].map(|at| buf[at]), [8, 9, 7]);
    }

    #[test]
    fn what_lies_over_a_write_that_failed_stays_kept() {
        let slot = |head| Slot { head, bytes: 0 };
        let mut written = Written::default();
        let steps =
            [(range(0, 2), true), (range(4, 2), false), (range(5, 2), true), (range(6, 1), true), (range(8, 1), true)];
        for (i, (blocks, in_place)) in steps.into_iter().enumerate() {
            written.note(slot(i as u64), blocks, in_place);
        }
        assert_eq!(written.slots.iter().map(|slot| slot.head).collect::<Vec<_>>(), [0, 4]);
    }
}

//! The last events of a volume, in a file that outlives its daemon: `events` shows it, `monitor`
//! follows it.

use super::{Record, SUFFIX, files};
use nix::fcntl::{Flock, FlockArg};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

/// Bytes of a file; then it becomes the one before, whose place it takes.
const MOST_BYTES: u64 = 128 << 10;

/// How often the lock is tried for, and the time between: whoever holds it writes a line. A log shall wait for nobody
/// who was stopped there.
const TRIES: (u32, Duration) = (50, Duration::from_millis(2));

/// Where the events of one volume go.
pub struct EventFile {
    newest: PathBuf,
    before: PathBuf,
    lock: PathBuf,
}

impl EventFile {
    /// In `folder`, which is in memory.
    pub fn of(folder: &Path, volume: &str) -> Self {
        let [newest, before] = files(folder, volume);
        Self { newest, before, lock: folder.join(format!("{volume}{SUFFIX}-lock")) }
    }

    /// Adds a line. Where it can't, the log has it yet.
    pub fn add(&self, record: &Record) {
        let _ = self.try_add(record);
    }

    fn try_add(&self, record: &Record) -> io::Result<()> {
        let mut line = serde_json::to_vec(record)?;
        line.push(b'\n');
        // The daemon and `monitor` may tell at the same time: the second of two that find the file full would put one
        // that has just begun in the place of the one before.
        let alone = self.alone();
        let is_full = || fs::metadata(&self.newest).is_ok_and(|meta| meta.len() + line.len() as u64 > MOST_BYTES);
        if alone.is_some() && is_full() {
            fs::rename(&self.newest, &self.before)?;
        }
        let mut file = OpenOptions::new().append(true).create(true).mode(0o644).open(&self.newest)?;
        // One call, so that lines stay whole whoever else writes.
        file.write_all(&line)
    }

    /// A lock that nobody but root can have, where it is free soon. Without it the file grows.
    fn alone(&self) -> Option<Flock<File>> {
        let mut file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&self.lock).ok()?;
        for _ in 0..TRIES.0 {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(alone) => return Some(alone),
                Err((held, _)) => file = held,
            }
            thread::sleep(TRIES.1);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::super::{About, Class};
    use super::*;

    #[test]
    fn the_last_events_are_there_and_no_more() {
        let folder = tempfile::tempdir().unwrap();
        let file = EventFile::of(folder.path(), "uuid");
        for i in 0..3000 {
            file.add(&Record::new(Class::Mismatch, &About::default(), format!("event {i}")));
        }
        let [newest, before] = files(folder.path(), "uuid");
        let lines = [&before, &newest].map(|path| fs::read_to_string(path).unwrap()).concat();
        let all: Vec<Record> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert!(all.len() > 300 && lines.len() as u64 <= 2 * MOST_BYTES, "{}", all.len());
        let first = 3000 - all.len();
        assert!(all.iter().zip(first..).all(|(record, i)| record.message == format!("event {i}")));
        // Nowhere to go: nothing happens.
        EventFile::of(&folder.path().join("nowhere"), "uuid").add(&all[0]);
    }

    #[test]
    fn those_who_tell_at_the_same_time_lose_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let [_, before] = files(folder.path(), "uuid");
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let file = EventFile::of(folder.path(), "uuid");
                    for i in 0..3000 {
                        file.add(&Record::new(Class::Mismatch, &About::default(), format!("event {i}")));
                        let full = fs::metadata(&before).map_or(MOST_BYTES, |meta| meta.len());
                        assert!(full > MOST_BYTES / 2, "the file before has gone: this one has {full} bytes");
                    }
                });
            }
        });
        // Who holds the lock and stands still holds nobody up.
        let file = EventFile::of(folder.path(), "held");
        let _held = file.alone().unwrap();
        file.add(&Record::new(Class::Mismatch, &About::default(), "told".into()));
        assert!(fs::read_to_string(&file.newest).unwrap().contains("told"));
    }
}

//! The last events of a volume, in a file that outlives its daemon: `events` shows it, `monitor`
//! follows it.

use super::{Record, files};
use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// Bytes of a file; then it becomes the one before, whose place it takes.
const MOST_BYTES: u64 = 128 << 10;

/// Where the events of one volume go.
pub struct EventFile {
    newest: PathBuf,
    before: PathBuf,
}

impl EventFile {
    /// In `folder`, which is in memory.
    pub fn of(folder: &Path, volume: &str) -> Self {
        let [newest, before] = files(folder, volume);
        Self { newest, before }
    }

    /// Adds a line. Where it can't, the log has it yet.
    pub fn add(&self, record: &Record) {
        let _ = self.try_add(record);
    }

    fn try_add(&self, record: &Record) -> io::Result<()> {
        let mut line = serde_json::to_vec(record)?;
        line.push(b'\n');
        if fs::metadata(&self.newest).is_ok_and(|meta| meta.len() + line.len() as u64 > MOST_BYTES) {
            fs::rename(&self.newest, &self.before)?;
        }
        let mut file = OpenOptions::new().append(true).create(true).mode(0o644).open(&self.newest)?;
        // One call, so that lines stay whole where two daemons serve a volume to read only.
        file.write_all(&line)
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
}

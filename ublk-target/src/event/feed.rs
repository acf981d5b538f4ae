//! Events as they come, of all volumes, read from their files.

use super::{Record, SUFFIX, files};
use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// Follows the files.
pub struct Feed {
    folder: PathBuf,
    /// How far each volume's newest file has been read: which it was, and how many bytes of it.
    read: HashMap<String, (u64, u64)>,
}

impl Feed {
    /// From the first event that is still there.
    pub fn of(folder: &Path) -> Self {
        Self { folder: folder.to_owned(), read: HashMap::new() }
    }

    /// All events that have come since this was last asked, in the order of their times.
    pub fn take(&mut self) -> Vec<Record> {
        let names = fs::read_dir(&self.folder).into_iter().flatten().flatten().map(|entry| entry.file_name());
        let volumes: Vec<_> = names.filter_map(|name| name.to_str()?.strip_suffix(SUFFIX).map(str::to_owned)).collect();
        // A file that can't be read now is read next time.
        let mut all: Vec<_> = volumes.iter().flat_map(|volume| self.take_of(volume).unwrap_or_default()).collect();
        all.sort_by(|a, b| a.time.cmp(&b.time));
        all
    }

    fn take_of(&mut self, volume: &str) -> io::Result<Vec<Record>> {
        let [newest, before] = files(&self.folder, volume);
        let newest = File::open(newest)?;
        let (this, last) = (newest.metadata()?.ino(), self.read.get(volume).copied());
        let mut text = Vec::new();
        let from = match last {
            Some((inode, offset)) if inode == this => offset,
            // Another has begun: what had not been read lies in the one before.
            _ => {
                if let Ok(before) = File::open(before) {
                    let inode = before.metadata()?.ino();
                    let from = last.filter(|(read, _)| *read == inode).map_or(0, |(_, offset)| offset);
                    if inode != this {
                        read_lines(before, from, &mut text)?;
                    }
                }
                0
            }
        };
        let to = read_lines(newest, from, &mut text)?;
        self.read.insert(volume.to_owned(), (this, to));
        let lines = text.split(|byte| *byte == b'\n');
        // Whatever a newer program writes there besides.
        Ok(lines.filter_map(|line| serde_json::from_slice(line).ok()).collect())
    }
}

/// The whole lines behind `from`; where they end.
fn read_lines(mut file: File, from: u64, into: &mut Vec<u8>) -> io::Result<u64> {
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    into.extend_from_slice(&bytes[..whole]);
    Ok(from + whole as u64)
}

#[cfg(test)]
mod tests {
    use super::{
        super::{About, Class, EventFile},
        *,
    };
    use std::io::Write;

    fn told(folder: &Path, volume: &str, messages: std::ops::Range<u32>) {
        let file = EventFile::of(folder, volume);
        for i in messages {
            let about = About { volume: volume.into(), ..About::default() };
            file.add(&Record::new(Class::Mismatch, &about, format!("{i}")));
        }
    }

    fn messages(feed: &mut Feed) -> Vec<String> {
        feed.take().into_iter().map(|record| format!("{}{}", record.volume, record.message)).collect()
    }

    #[test]
    fn each_event_comes_once() {
        let folder = tempfile::tempdir().unwrap();
        let mut feed = Feed::of(folder.path());
        assert!(feed.take().is_empty());
        told(folder.path(), "a", 0..3);
        assert_eq!(messages(&mut feed), ["a0", "a1", "a2"]);
        told(folder.path(), "b", 0..1);
        told(folder.path(), "a", 3..4);
        let mut both = messages(&mut feed);
        both.sort();
        assert_eq!(both, ["a3", "b0"]);
        assert!(feed.take().is_empty());
        // Half a line, a line that is none, and the rest.
        let mut file = fs::OpenOptions::new().append(true).open(&files(folder.path(), "a")[0]).unwrap();
        let line = serde_json::to_string(&Record::new(Class::Latched, &About::default(), "x".into())).unwrap();
        file.write_all(&line.as_bytes()[..20]).unwrap();
        assert!(feed.take().is_empty());
        file.write_all(&line.as_bytes()[20..]).unwrap();
        file.write_all(b"\nnonsense\n").unwrap();
        assert_eq!(messages(&mut feed), ["x"]);
    }

    #[test]
    fn files_that_follow_one_another_lose_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (mut feed, mut seen) = (Feed::of(folder.path()), Vec::new());
        // Less than a file takes between two looks.
        for i in 0..50 {
            told(folder.path(), "a", i * 100..(i + 1) * 100);
            seen.extend(messages(&mut feed));
        }
        assert!(fs::exists(&files(folder.path(), "a")[1]).unwrap());
        assert_eq!(seen, (0..5000).map(|i| format!("a{i}")).collect::<Vec<_>>());
        // Who comes later gets what is there yet.
        let late = messages(&mut Feed::of(folder.path()));
        assert!(late.len() > 300 && seen.ends_with(&late));
    }
}

//! Events as they come, of all volumes, read from their files.

use super::{
    Record, SUFFIX, files,
    position::{Place, Position, Told},
};
use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// Follows the files.
pub struct Feed {
    folder: PathBuf,
    /// How far they have been read.
    read: Position,
}

impl Feed {
    /// From the first event that is still there.
    pub fn of(folder: &Path) -> Self {
        Self::from(folder, Position::default())
    }

    /// From where somebody has come to.
    pub fn from(folder: &Path, read: Position) -> Self {
        Self { folder: folder.to_owned(), read }
    }

    /// All events that have come since this was last asked, in the order of their times.
    pub fn take(&mut self) -> Vec<Record> {
        let mut all: Vec<_> = self.take_told().into_iter().map(|told| told.record).collect();
        all.sort_by(|a, b| a.time.cmp(&b.time));
        all
    }

    /// The same, but those of a volume as they were told, whatever the clock has done meanwhile.
    pub fn take_told(&mut self) -> Vec<Told> {
        let names = fs::read_dir(&self.folder).into_iter().flatten().flatten().map(|entry| entry.file_name());
        let volumes: Vec<_> = names.filter_map(|name| name.to_str()?.strip_suffix(SUFFIX).map(str::to_owned)).collect();
        let mut all = Vec::new();
        for volume in volumes {
            let mut latest = String::new();
            // A file that can't be read now is read next time.
            for told in self.take_of(&volume).unwrap_or_default() {
                latest = latest.max(told.record.time.clone());
                all.push((latest.clone(), told));
            }
        }
        all.sort_by(|(a, _), (b, _)| a.cmp(b));
        all.into_iter().map(|(_, told)| told).collect()
    }

    fn take_of(&mut self, volume: &str) -> io::Result<Vec<Told>> {
        let [newest, before] = files(&self.folder, volume);
        let newest = File::open(newest)?;
        let (meta, last, mut all) = (newest.metadata()?, self.read.of(volume), Vec::new());
        let from = match last {
            Some(Place { inode, offset }) if inode == meta.ino() && offset <= meta.len() => offset,
            // Another has begun: what had not been read lies in the one before.
            _ => {
                if let Ok(before) = File::open(before) {
                    let inode = before.metadata()?.ino();
                    let from = last.filter(|last| last.inode == inode).map_or(0, |last| last.offset);
                    if inode != meta.ino() {
                        read_lines(before, Place { inode, offset: from }, volume, &mut all)?;
                    }
                }
                0
            }
        };
        let end = read_lines(newest, Place { inode: meta.ino(), offset: from }, volume, &mut all)?;
        self.read.set(volume, end);
        Ok(all)
    }
}

/// The events of the whole lines behind `from`; where these end.
fn read_lines(mut file: File, from: Place, volume: &str, into: &mut Vec<Told>) -> io::Result<Place> {
    file.seek(SeekFrom::Start(from.offset))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    let mut end = from;
    for line in bytes[..whole].split_inclusive(|byte| *byte == b'\n') {
        end.offset += line.len() as u64;
        // Whatever a newer program writes there besides.
        let Ok(record) = serde_json::from_slice(line) else { continue };
        into.push(Told { record, volume: volume.to_owned(), end });
    }
    Ok(end)
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
    fn who_stops_goes_on_where_it_has_come_to() {
        let folder = tempfile::tempdir().unwrap();
        let kept = folder.path().join("kept");
        let message = |told: &Told| format!("{}{}", told.record.volume, told.record.message);
        let mut seen = Vec::new();
        // What is told before the first start and between two is told once, though the files follow one another
        // meanwhile; of what comes at a time only the first half is dealt with.
        for i in 0..20 {
            told(folder.path(), "a", i * 200..(i + 1) * 200);
            told(folder.path(), "b", i..i + 1);
            let mut position = Position::load(&kept);
            let come = Feed::from(folder.path(), position.clone()).take_told();
            for one in &come[..come.len().div_ceil(2)] {
                seen.push(message(one));
                position.note(one);
                position.save(&kept).unwrap();
            }
        }
        seen.extend(Feed::from(folder.path(), Position::load(&kept)).take_told().iter().map(message));
        let of = |volume: &str| seen.iter().filter(|name| name.starts_with(volume)).cloned().collect::<Vec<_>>();
        assert_eq!(of("a"), (0..4000).map(|i| format!("a{i}")).collect::<Vec<_>>());
        assert_eq!(of("b"), (0..20).map(|i| format!("b{i}")).collect::<Vec<_>>());
        // A file that is none of a position: from the first that is there.
        fs::write(&kept, "nonsense").unwrap();
        assert!(Feed::from(folder.path(), Position::load(&kept)).take_told().len() > 300);
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

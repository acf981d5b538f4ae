//! The file of an anchor: two slots of 4096 bytes, of which one is whole at any moment. docs/format.md has the bytes.
//! What is asked of it takes as long as the disk takes; `file.rs` waits for it within a limit.

use crate::{
    failure::{Context, Exit, Failure, Outcome},
    new_file::NewFile,
};
use nix::fcntl::{FcntlArg, fcntl};
use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};
use ublk_integrity::{
    Buf,
    anchor::{AnchorBytes, Replaced, SLOT_BYTES, Slot, generation},
};

/// Bytes of the file.
const BYTES: u64 = 2 * SLOT_BYTES as u64;
/// What is wrong with anything else.
const NO_ANCHOR: &str = "is no anchor: a file of 8192 bytes, as `anchor init` makes it";

/// An open anchor file.
pub(super) struct SlotFile {
    path: PathBuf,
    file: File,
    /// Whether the system refused something of it: a stick that was taken out and put back is another one, and this descriptor
    /// leads to the first for good.
    is_lost: bool,
    /// The highest generation that was found, or put there.
    seen: u64,
    /// Generation of a body whose write has failed. It may be read back from memory, and not be on the disk.
    doubtful: Option<u64>,
}

/// What the file holds, in which slot, and where the next body goes.
struct Current {
    body: Option<AnchorBytes>,
    /// Whether its checksum holds.
    is_whole: bool,
    next: usize,
}

impl SlotFile {
    /// Opens the file, which must be there.
    pub(super) fn open(path: &Path) -> Outcome<Self> {
        let what = format!("can't open {}", path.display());
        let file = open(path).doing(&what)?;
        if !is_anchor(&file).doing(&what)? {
            return Err(Failure::new(Exit::Arguments, format_args!("{} {NO_ANCHOR}", path.display())));
        }
        Ok(Self { path: path.into(), file, is_lost: false, seen: 0, doubtful: None })
    }

    /// Does something with the file, opened anew where the system has refused something of it.
    fn opened<T>(&mut self, then: impl FnOnce(&mut Self) -> io::Result<T>) -> io::Result<T> {
        if self.is_lost {
            let file = open(&self.path)?;
            if !is_anchor(&file)? {
                return Err(io::Error::other(format!("what is there by now {NO_ANCHOR}")));
            }
            self.file = file;
            // What lies below the mount point of a stick that is out, say: the anchor is away, and nobody has taken its place.
            if generation(self.read()?.body.as_ref()) < self.seen {
                return Err(io::Error::other("what is there by now is older than what was"));
            }
            self.is_lost = false;
        }
        let done = then(self);
        self.is_lost = matches!(&done, Err(e) if e.raw_os_error().is_some());
        done
    }

    /// The same, and makes the file where there is none: whether it did. It has its name once it is whole, for a power cut may
    /// leave a part of it; nothing of it is left where that fails.
    pub(super) fn make(path: &Path) -> Outcome<(Self, bool)> {
        if path.exists() {
            return Ok((Self::open(path)?, false));
        }
        let what = format!("can't make {}", path.display());
        let new = NewFile::beside(path, false).doing(&what)?;
        new.file().write_all_at(&[0; 2 * SLOT_BYTES], 0).doing(&what)?;
        match new.finish() {
            // Somebody else was faster.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Ok((Self::open(path)?, false)),
            named => named.doing(&what)?,
        }
        Ok((Self::open(path).inspect_err(|_| drop(std::fs::remove_file(path)))?, true))
    }

    /// The body that counts. One whose write has failed counts once it has been written.
    pub(super) fn load(&mut self, until: Instant) -> io::Result<Option<AnchorBytes>> {
        let body = self.opened(|this| this.load_opened(until))?;
        self.seen = self.seen.max(generation(body.as_ref()));
        Ok(body)
    }

    fn load_opened(&mut self, until: Instant) -> io::Result<Option<AnchorBytes>> {
        let Some(doubtful) = self.doubtful else {
            return self.locked(libc::F_RDLCK, until, |this| this.read()).map(|current| current.body);
        };
        let body = self.locked(libc::F_WRLCK, until, |this| {
            let current = this.read()?;
            // The one before it is in the other slot, and stays.
            if let Some(body) = current.body.filter(|body| current.is_whole && generation(Some(body)) == doubtful) {
                this.write(&body, 1 - current.next)?;
            }
            Ok(current.body)
        })?;
        self.doubtful = None;
        Ok(body)
    }

    /// Has `body` take the place of the one of generation `expected`; not once it is late: nobody waits for it any more.
    pub(super) fn replace(&mut self, expected: u64, body: &AnchorBytes, until: Instant) -> io::Result<Replaced> {
        let replaced = self.opened(|this| this.replace_opened(expected, body, until))?;
        if replaced == Replaced::Done {
            self.seen = self.seen.max(generation(Some(body)));
        }
        Ok(replaced)
    }

    fn replace_opened(&mut self, expected: u64, body: &AnchorBytes, until: Instant) -> io::Result<Replaced> {
        let mut begun = false;
        let done = self.locked(libc::F_WRLCK, until, |this| {
            let current = this.read()?;
            if generation(current.body.as_ref()) != expected {
                return Ok(Replaced::Conflict);
            }
            in_time(until)?;
            begun = true;
            // Not over the one that counts: a write may be cut short.
            this.write(body, current.next)?;
            Ok(Replaced::Done)
        });
        if begun && done.is_err() {
            self.doubtful = Some(generation(Some(body)));
        }
        done
    }

    fn read(&self) -> io::Result<Current> {
        let mut buf = Buf::new(2 * SLOT_BYTES);
        self.file.read_exact_at(&mut buf, 0)?;
        let slots = [&buf[..SLOT_BYTES], &buf[SLOT_BYTES..]].map(Slot::parse);
        let newest = (0..2).filter_map(|i| Some((i, slots[i].whole()?))).max_by_key(|(_, body)| generation(Some(body)));
        if let Some((at, body)) = newest {
            return Ok(Current { body: Some(body), is_whole: true, next: 1 - at });
        }
        // Whoever asks finds that it is damaged: that is not the same as nothing.
        let damaged = slots.iter().find_map(|slot| if let Slot::Damaged(body) = slot { Some(*body) } else { None });
        Ok(Current { body: damaged, is_whole: false, next: 0 })
    }

    /// From memory that is aligned as O_DIRECT wants it.
    fn write(&self, body: &AnchorBytes, slot: usize) -> io::Result<()> {
        let mut buf = Buf::new(SLOT_BYTES);
        Slot::fill(&mut buf, body);
        self.file.write_all_at(&buf, (slot * SLOT_BYTES) as u64)
    }

    /// Does something while nobody else reads or writes the file, on whichever host.
    fn locked<T>(&self, kind: i32, until: Instant, then: impl FnOnce(&Self) -> io::Result<T>) -> io::Result<T> {
        while let Err(e) = self.lock(kind) {
            if !matches!(e, nix::Error::EAGAIN | nix::Error::EACCES | nix::Error::EINTR) {
                return Err(e.into());
            }
            in_time(until)?;
            thread::sleep(Duration::from_millis(5));
        }
        let done = self.is_there().and_then(|()| then(self));
        let unlocked = self.lock(libc::F_UNLCK);
        done.and_then(|done| unlocked.map(|()| done).map_err(Into::into))
    }

    /// What no path leads to any more nobody finds at the next open.
    fn is_there(&self) -> io::Result<()> {
        if self.file.metadata()?.nlink() == 0 { Err(io::Error::other("the file was removed")) } else { Ok(()) }
    }

    /// Belongs to this descriptor: another one in the same process is somebody else.
    fn lock(&self, kind: i32) -> nix::Result<()> {
        let all = libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: 0, l_len: 0, l_pid: 0 };
        fcntl(&self.file, FcntlArg::F_OFD_SETLK(&all)).map(drop)
    }
}

fn in_time(until: Instant) -> io::Result<()> {
    if Instant::now() < until { Ok(()) } else { Err(io::ErrorKind::TimedOut.into()) }
}

fn is_anchor(file: &File) -> io::Result<bool> {
    let meta = file.metadata()?;
    Ok(meta.is_file() && meta.len() == BYTES)
}

/// Each write is durable when it returns, and what is read comes from the disk, where the file system can.
fn open(path: &Path) -> io::Result<File> {
    let with = |direct| {
        let flags = libc::O_DSYNC | libc::O_NOFOLLOW | direct;
        OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)
    };
    match with(libc::O_DIRECT) {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => with(0),
        opened => opened,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ublk_integrity::anchor::ANCHOR_BODY_BYTES;

    fn body(generation: u64, fill: u8) -> AnchorBytes {
        let mut body = [fill; ANCHOR_BODY_BYTES];
        body[32..40].copy_from_slice(&generation.to_le_bytes());
        body
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    fn made() -> (tempfile::TempDir, std::path::PathBuf, SlotFile) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("anchor");
        let (file, made) = SlotFile::make(&path).unwrap();
        assert!(made);
        (folder, path, file)
    }

    fn replace(file: &mut SlotFile, expected: u64, body: &AnchorBytes) -> Replaced {
        file.replace(expected, body, soon()).unwrap()
    }

    fn load(file: &mut SlotFile) -> Option<AnchorBytes> {
        file.load(soon()).unwrap()
    }

    #[test]
    fn a_body_takes_the_place_of_the_one_that_is_expected_alone() {
        let (_folder, path, mut file) = made();
        assert_eq!(load(&mut file), None);
        assert_eq!(replace(&mut file, 1, &body(2, 1)), Replaced::Conflict);
        for (expected, fill) in [(0, 1), (1, 2), (2, 3)] {
            assert_eq!(replace(&mut file, expected, &body(expected + 1, fill)), Replaced::Done);
            let mut other = SlotFile::open(&path).unwrap();
            assert_eq!(load(&mut other), Some(body(expected + 1, fill)));
            assert_eq!(replace(&mut other, expected, &body(expected + 1, 9)), Replaced::Conflict);
        }
    }

    #[test]
    fn a_write_that_is_cut_short_leaves_the_body_before() {
        let (_folder, path, mut file) = made();
        for (expected, fill) in [(0, 1), (1, 2)] {
            replace(&mut file, expected, &body(expected + 1, fill));
        }
        // The next one goes to the first slot.
        for torn in [0, 40, 511, 512, 520] {
            let whole = std::fs::read(&path).unwrap();
            let mut cut = whole.clone();
            cut[torn] ^= 1;
            std::fs::write(&path, cut).unwrap();
            assert_eq!(load(&mut file), Some(body(2, 2)), "byte {torn}");
            assert_eq!(replace(&mut file, 2, &body(3, 3)), Replaced::Done);
            assert_eq!(load(&mut file), Some(body(3, 3)));
            std::fs::write(&path, whole).unwrap();
        }
    }

    #[test]
    fn what_is_damaged_is_not_nothing() {
        let (_folder, path, mut file) = made();
        replace(&mut file, 0, &body(1, 1));
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[7] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        assert!(load(&mut file).is_some_and(|found| found != body(1, 1)));
        assert_eq!(replace(&mut file, 1, &body(2, 2)), Replaced::Done, "a reset goes on from there");
    }

    #[test]
    fn only_a_file_of_its_size_is_an_anchor() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("other");
        assert_eq!(SlotFile::open(&path).err().map(|e| e.exit), Some(Exit::Device));
        std::fs::write(&path, [0; 100]).unwrap();
        assert_eq!(SlotFile::open(&path).err().map(|e| e.exit), Some(Exit::Arguments));
        assert_eq!(SlotFile::make(&path).err().map(|e| e.exit), Some(Exit::Arguments), "it is left alone");
        assert_eq!(std::fs::read(&path).unwrap().len(), 100);
        // One that leads nowhere is not a file that is not there.
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(folder.path().join("nothing"), &link).unwrap();
        assert!(SlotFile::make(&link).is_err());
        assert!(link.symlink_metadata().is_ok(), "it was removed");
    }

    #[test]
    fn a_file_that_is_made_is_there_whole_or_not_at_all() {
        let (folder, path, mut file) = made();
        replace(&mut file, 0, &body(1, 1));
        let (mut again, is_new) = SlotFile::make(&path).unwrap();
        assert_eq!((is_new, load(&mut again)), (false, Some(body(1, 1))));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left");
        // It has no name before it has its size: whoever watches the folder sees no other.
        for _ in 0..50 {
            std::fs::remove_file(&path).unwrap();
            let seen = thread::scope(|s| {
                let looks = s.spawn(|| {
                    loop {
                        if let Ok(found) = path.metadata() {
                            return found.len();
                        }
                    }
                });
                assert!(SlotFile::make(&path).unwrap().1);
                looks.join().unwrap()
            });
            assert_eq!(seen, BYTES);
        }
    }

    #[test]
    fn who_holds_the_lock_keeps_others_out_and_who_is_late_writes_nothing() {
        let (_folder, path, mut file) = made();
        let mut other = SlotFile::open(&path).unwrap();
        file.lock(libc::F_WRLCK).unwrap();
        let late = Instant::now() + Duration::from_millis(20);
        assert_eq!(other.load(late).unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(other.replace(0, &body(1, 1), late).unwrap_err().kind(), io::ErrorKind::TimedOut);
        file.lock(libc::F_UNLCK).unwrap();
        assert_eq!(other.replace(0, &body(1, 1), late).unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!((load(&mut file), other.doubtful), (None, None));
        assert_eq!(replace(&mut other, 0, &body(1, 1)), Replaced::Done);
    }

    /// A write that failed may be read back from memory all the same.
    #[test]
    fn what_could_not_be_written_counts_once_it_was() {
        let (_folder, path, mut file) = made();
        replace(&mut file, 0, &body(1, 1));
        replace(&mut file, 1, &body(2, 2));
        let bytes = std::fs::read(&path).unwrap();
        let before = body(1, 1);
        for doubtful in [2, 3] {
            file.doubtful = Some(doubtful);
            assert_eq!(load(&mut file), Some(body(2, 2)));
            assert_eq!((file.doubtful, std::fs::read(&path).unwrap() == bytes), (None, true));
        }
        // Where it can't be written now it is not told.
        file.doubtful = Some(2);
        file.file = File::open(&path).unwrap();
        assert!(file.load(soon()).is_err() && file.doubtful == Some(2));
        assert_eq!(&std::fs::read(&path).unwrap()[..512], &before);
    }

    /// What a stick leaves that was taken out: each call fails, for as long as the descriptor is open.
    #[test]
    fn a_descriptor_that_leads_nowhere_any_more_is_opened_anew() {
        let (_folder, path, mut file) = made();
        replace(&mut file, 0, &body(1, 1));
        let gone = || OpenOptions::new().read(true).write(true).open("/proc/self/mem").unwrap();
        file.file = gone();
        assert_eq!(file.load(soon()).unwrap_err().raw_os_error(), Some(libc::EIO));
        assert_eq!(load(&mut file), Some(body(1, 1)));
        file.file = gone();
        assert!(file.replace(1, &body(2, 2), soon()).is_err());
        assert_eq!(replace(&mut file, 1, &body(2, 2)), Replaced::Done);
        // What is there by then is looked at as at first.
        file.file = gone();
        assert!(file.load(soon()).is_err());
        std::fs::rename(&path, path.with_extension("away")).unwrap();
        assert_eq!(file.load(soon()).unwrap_err().kind(), io::ErrorKind::NotFound);
        std::fs::write(&path, [0; 100]).unwrap();
        assert!(file.load(soon()).unwrap_err().to_string().contains("no anchor"));
        // An anchor that has never been told anything lies below where a stick was mounted.
        std::fs::write(&path, [0; 2 * SLOT_BYTES]).unwrap();
        assert!(file.load(soon()).unwrap_err().to_string().contains("older"));
        assert!(file.replace(0, &body(1, 1), soon()).is_err());
        std::fs::rename(path.with_extension("away"), &path).unwrap();
        assert_eq!(load(&mut file), Some(body(2, 2)));
    }

    #[test]
    fn a_file_that_was_removed_is_no_anchor_any_more() {
        let (_folder, path, mut file) = made();
        std::fs::remove_file(&path).unwrap();
        assert!(file.load(soon()).unwrap_err().to_string().contains("removed"));
        assert!(file.replace(0, &body(1, 1), soon()).is_err());
    }
}

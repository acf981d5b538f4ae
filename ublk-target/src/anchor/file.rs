//! An anchor in a file: two slots of 4096 bytes, of which one is whole at any moment. docs/format.md has the bytes.

use crate::failure::{Context, Exit, Failure, Outcome, plain};
use nix::fcntl::{FcntlArg, fcntl};
use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};
use ublk_integrity::{
    Buf,
    anchor::{ANCHOR_BODY_BYTES, Anchor, AnchorBytes, Replaced, checksum, generation},
};

/// Bytes of a slot: what a disk writes at once, or more.
const SLOT: usize = 4096;
/// Bytes of the file.
const BYTES: u64 = 2 * SLOT as u64;
/// How long somebody else may hold the lock of the file: for one read and one write.
const LOCK_WITHIN: Duration = Duration::from_secs(5);

/// An open anchor file. Reads and writes wait for the disk that it is on.
pub struct FileAnchor {
    file: File,
    path: PathBuf,
}

/// A slot as it was read.
enum Slot {
    /// Nothing was ever written.
    Empty,
    Whole(AnchorBytes),
    /// A write was cut short, or it has rotted.
    Damaged(AnchorBytes),
}

/// What the file holds, and where the next body goes.
struct Current {
    body: Option<AnchorBytes>,
    next: usize,
}

impl FileAnchor {
    /// Opens the file, which must be there.
    pub fn open(path: &Path) -> Outcome<Self> {
        let what = format!("can't open {}", path.display());
        let file = open(path, 0).doing(&what)?;
        let meta = file.metadata().doing(&what)?;
        if !meta.is_file() || meta.len() != BYTES {
            let message =
                format!("{} is no anchor: a file of {BYTES} bytes, as `anchor init` makes it", path.display());
            return Err(Failure::new(Exit::Arguments, message));
        }
        Ok(Self { file, path: path.into() })
    }

    /// The same, and makes the file where there is none; nothing of it is left where that fails.
    pub fn make(path: &Path) -> Outcome<Self> {
        if path.exists() {
            return Self::open(path);
        }
        let what = format!("can't make {}", path.display());
        let made = open(path, libc::O_CREAT | libc::O_EXCL).and_then(|file| {
            write(&file, &[0; 2 * SLOT], 0)?;
            file.sync_all()?;
            // Its name, too.
            File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()?;
            Ok(file)
        });
        let file = made.inspect_err(|_| drop(std::fs::remove_file(path))).doing(&what)?;
        Ok(Self { file, path: path.into() })
    }

    fn read(&self) -> io::Result<Current> {
        let mut buf = Buf::new(2 * SLOT);
        self.file.read_exact_at(&mut buf, 0)?;
        let slots = [&buf[..SLOT], &buf[SLOT..]].map(Slot::parse);
        let of = |slot: &Slot| if let Slot::Whole(body) = slot { Some(*body) } else { None };
        let newest = (0..2).filter_map(|i| Some((i, of(&slots[i])?))).max_by_key(|(_, body)| generation(Some(body)));
        if let Some((at, body)) = newest {
            return Ok(Current { body: Some(body), next: 1 - at });
        }
        // Whoever asks finds that it is damaged: that is not the same as nothing.
        let damaged = slots.iter().find_map(|slot| if let Slot::Damaged(body) = slot { Some(*body) } else { None });
        Ok(Current { body: damaged, next: 0 })
    }

    /// Does something while nobody else reads or writes the file, on whichever host.
    fn locked<T>(&self, exclusive: bool, then: impl FnOnce(&Self) -> io::Result<T>) -> io::Result<T> {
        let begun = Instant::now();
        while let Err(e) = self.lock(if exclusive { libc::F_WRLCK } else { libc::F_RDLCK }) {
            let is_held = matches!(e, nix::Error::EAGAIN | nix::Error::EACCES | nix::Error::EINTR);
            if !is_held || begun.elapsed() > LOCK_WITHIN {
                return Err(e.into());
            }
            thread::sleep(Duration::from_millis(5));
        }
        let done = then(self);
        let unlocked = self.lock(libc::F_UNLCK);
        done.and_then(|done| unlocked.map(|()| done).map_err(Into::into))
    }

    /// Belongs to this descriptor: another one in the same process is somebody else.
    fn lock(&self, kind: i32) -> nix::Result<()> {
        let all = libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: 0, l_len: 0, l_pid: 0 };
        fcntl(&self.file, FcntlArg::F_OFD_SETLK(&all)).map(drop)
    }

    fn why(&self, e: &io::Error) -> String {
        format!("{}: {}", self.path.display(), plain(e))
    }
}

impl Slot {
    fn parse(bytes: &[u8]) -> Self {
        let body: AnchorBytes = bytes[..ANCHOR_BODY_BYTES].try_into().expect("a slot is larger");
        let (sum, rest) = bytes[ANCHOR_BODY_BYTES..].split_at(32);
        let zeros = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
        match () {
            () if zeros(bytes) => Self::Empty,
            () if sum == checksum(&body) && zeros(rest) => Self::Whole(body),
            () => Self::Damaged(body),
        }
    }
}

/// Each write is durable when it returns, and what is read comes from the disk, where the file system can.
fn open(path: &Path, more: i32) -> io::Result<File> {
    let with = |direct| {
        let flags = libc::O_DSYNC | libc::O_NOFOLLOW | more | direct;
        OpenOptions::new().read(true).write(true).mode(0o600).custom_flags(flags).open(path)
    };
    match with(libc::O_DIRECT) {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => with(0),
        opened => opened,
    }
}

/// From memory that is aligned as O_DIRECT wants it.
fn write(file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    let mut buf = Buf::new(bytes.len());
    buf.copy_from_slice(bytes);
    file.write_all_at(&buf, at)
}

impl Anchor for FileAnchor {
    async fn load(&self, _: &[u8; 16]) -> Result<Option<AnchorBytes>, String> {
        self.locked(false, Self::read).map(|current| current.body).map_err(|e| self.why(&e))
    }

    async fn replace(&self, _: &[u8; 16], expected: u64, body: &AnchorBytes) -> Replaced {
        let done = self.locked(true, |this| {
            let current = this.read()?;
            if generation(current.body.as_ref()) != expected {
                return Ok(Replaced::Conflict);
            }
            let mut slot = [0; SLOT];
            slot[..ANCHOR_BODY_BYTES].copy_from_slice(body);
            slot[ANCHOR_BODY_BYTES..ANCHOR_BODY_BYTES + 32].copy_from_slice(&checksum(body));
            // Not over the one that counts: a write may be cut short.
            write(&this.file, &slot, (current.next * SLOT) as u64)?;
            Ok(Replaced::Done)
        });
        done.unwrap_or_else(|e| Replaced::Unknown(self.why(&e)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::anchor::asked;

    const VOLUME: [u8; 16] = [1; 16];

    fn body(generation: u64, fill: u8) -> AnchorBytes {
        let mut body = [fill; ANCHOR_BODY_BYTES];
        body[32..40].copy_from_slice(&generation.to_le_bytes());
        body
    }

    fn made() -> (tempfile::TempDir, FileAnchor) {
        let folder = tempfile::tempdir().unwrap();
        let anchor = FileAnchor::make(&folder.path().join("anchor")).unwrap();
        (folder, anchor)
    }

    #[test]
    fn a_body_takes_the_place_of_the_one_that_is_expected_alone() {
        let (_folder, anchor) = made();
        assert_eq!(asked(anchor.load(&VOLUME)), Ok(None));
        assert_eq!(asked(anchor.replace(&VOLUME, 1, &body(2, 1))), Replaced::Conflict);
        for (expected, fill) in [(0, 1), (1, 2), (2, 3)] {
            assert_eq!(asked(anchor.replace(&VOLUME, expected, &body(expected + 1, fill))), Replaced::Done);
            let other = FileAnchor::open(&anchor.path).unwrap();
            assert_eq!(asked(other.load(&VOLUME)), Ok(Some(body(expected + 1, fill))));
            assert_eq!(asked(other.replace(&VOLUME, expected, &body(expected + 1, 9))), Replaced::Conflict);
        }
    }

    #[test]
    fn a_write_that_is_cut_short_leaves_the_body_before() {
        let (_folder, anchor) = made();
        for (expected, fill) in [(0, 1), (1, 2)] {
            asked(anchor.replace(&VOLUME, expected, &body(expected + 1, fill)));
        }
        // The next one goes to the first slot.
        for torn in [0, 40, 511, 512, 520] {
            let whole = std::fs::read(&anchor.path).unwrap();
            let mut cut = whole.clone();
            cut[torn] ^= 1;
            std::fs::write(&anchor.path, cut).unwrap();
            assert_eq!(asked(anchor.load(&VOLUME)), Ok(Some(body(2, 2))), "byte {torn}");
            assert_eq!(asked(anchor.replace(&VOLUME, 2, &body(3, 3))), Replaced::Done);
            assert_eq!(asked(anchor.load(&VOLUME)), Ok(Some(body(3, 3))));
            std::fs::write(&anchor.path, whole).unwrap();
        }
    }

    #[test]
    fn what_is_damaged_is_not_nothing() {
        let (_folder, anchor) = made();
        asked(anchor.replace(&VOLUME, 0, &body(1, 1)));
        let mut bytes = std::fs::read(&anchor.path).unwrap();
        bytes[7] ^= 1;
        std::fs::write(&anchor.path, &bytes).unwrap();
        let found = asked(anchor.load(&VOLUME)).unwrap();
        assert!(found.is_some_and(|found| found != body(1, 1)));
        assert_eq!(asked(anchor.replace(&VOLUME, 1, &body(2, 2))), Replaced::Done, "a reset goes on from there");
    }

    #[test]
    fn only_a_file_of_its_size_is_an_anchor() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("other");
        assert_eq!(FileAnchor::open(&path).err().map(|e| e.exit), Some(Exit::Device));
        std::fs::write(&path, [0; 100]).unwrap();
        assert_eq!(FileAnchor::open(&path).err().map(|e| e.exit), Some(Exit::Arguments));
        assert_eq!(FileAnchor::make(&path).err().map(|e| e.exit), Some(Exit::Arguments), "it is left alone");
        assert_eq!(std::fs::read(&path).unwrap().len(), 100);
    }

    #[test]
    fn who_holds_the_lock_keeps_others_out() {
        let (_folder, anchor) = made();
        let other = FileAnchor::open(&anchor.path).unwrap();
        anchor.lock(libc::F_WRLCK).unwrap();
        assert!(other.lock(libc::F_RDLCK).is_err() && other.lock(libc::F_WRLCK).is_err());
        anchor.lock(libc::F_UNLCK).unwrap();
        assert!(other.lock(libc::F_WRLCK).is_ok());
    }
}

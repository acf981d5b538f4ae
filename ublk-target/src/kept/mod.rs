//! Writes that were answered and are not in place, in memory that outlives the daemon.
//!
//! A file for each open of a volume, on a ramfs of our own: it goes with the machine, as what a disk has in its cache does,
//! and is never swapped out, for a daemon that takes over must not wait for swap on the very device that it is to serve.
//!
//! A link beside the devices' states leads to it. Its name has the random id that was drawn when the volume was opened, which
//! the superblock holds. So it is found by whoever opens that volume next, unless somebody has opened it elsewhere since:
//! then what is kept is out of date. A link that leads nowhere is refused, not passed over: our ramfs may be mounted where
//! it can't be seen from here.
//!
//! Before the volume is opened anew, with an id of its own, that gets a link to the same file. Whichever of the two ids the
//! superblock holds after a crash, the file is found.
//!
//! A copy of the device has the same id, so the file says whose it is, and is locked for as long as its daemon lives.

mod memory;
mod part;

use crate::{
    daemon::state::FOLDER,
    device::Backing,
    failure::{Context, Exit, Failure, Outcome, plain},
    offline::Offline,
    os,
};
pub use memory::mount_memory;
use memory::{DYING, links_to, lock, lock_memory};
use nix::{errno::Errno, fcntl::Flock};
pub use part::{KeptWrites, Part};
use serde::{Deserialize, Serialize};
use std::{
    fmt::Display,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt, symlink},
    path::{Path, PathBuf},
    slice::from_ref,
    sync::atomic::AtomicU64,
    time::Duration,
};
use ublk_integrity::{BlockIndex, BlockRange, Buf, Durability, RecordNumber, Volume, hex};
use zerocopy::{FromBytes, IntoBytes, KnownLayout};

/// Where our ramfs is mounted.
const MEMORY: &str = "/run/ublk-integrity/memory";

/// Bytes of the largest write that is kept. Larger ones gain little by an early answer, and their copy costs more.
pub const MOST_BYTES: usize = 16 << 10;

/// Of a place that holds a write, in this layout.
const TAKEN: u64 = u64::from_le_bytes(*b"kept wr1");
const FREE: u64 = 0;

/// What stands before the bytes of a write.
#[derive(FromBytes, IntoBytes, KnownLayout)]
#[repr(C)]
struct Head {
    /// [`TAKEN`] or [`FREE`]; written last, so that whoever finds it taken finds all of it.
    state: AtomicU64,
    first_block: u64,
    blocks: u64,
    /// All records of the log before this one were durable.
    after: u64,
}

const PAGE: usize = 4096;
/// Bytes of a place: whole pages, for each thread maps its own. Its head has one.
pub const STRIDE: usize = PAGE + MOST_BYTES;
/// Where the places begin: after the owner.
const PLACES: u64 = PAGE as u64;

/// The id that is drawn when a volume is opened.
pub type OpenId = [u8; 32];

/// Whose writes are kept: the data device, by its path and its number. Either may change; where both have, it is another.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Owner {
    /// Empty where it is too long to be kept.
    path: String,
    number: (Option<u64>, u64),
}

/// The file of one open.
pub struct Kept {
    /// Locked until it is dropped, or its owner dies.
    file: Flock<File>,
    path: PathBuf,
    /// Where the links to it are.
    folder: PathBuf,
}

fn link_of(folder: &Path, id: &OpenId) -> PathBuf {
    folder.join(format!("kept-{}", hex(id)))
}

/// How many writes to this device wait in memory for an `add` or a `recover`.
pub fn waiting_for(data: &Path) -> usize {
    let files = fs::read_dir(MEMORY).into_iter().flatten().flatten().map(|entry| entry.path());
    let left = files.filter_map(|path| {
        let (file, _) = opened(&path).ok().filter(|(_, owner)| owner.path == data.to_string_lossy())?;
        let kept = Kept { file: lock(file, Duration::ZERO).ok()?, path, folder: FOLDER.into() };
        kept.count().ok()
    });
    left.sum()
}

/// A file and whose it is.
fn opened(path: &Path) -> io::Result<(File, Owner)> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let mut owner = vec![0; PAGE];
    file.read_exact_at(&mut owner, 0)?;
    Ok((file, serde_json::from_slice(&owner)?))
}

/// The failure, with what to do where nothing else helps.
fn unless_given_up(failure: Failure, links: &[PathBuf]) -> Failure {
    let links: Vec<_> = links.iter().map(|link| link.display().to_string()).collect();
    let message = format!("{failure}; to give up what is kept there, remove {}", links.join(" and "));
    Failure { message, ..failure }
}

impl Owner {
    /// That of an open data device.
    pub fn of(data: &Backing) -> Outcome<Self> {
        let what = || format!("can't use {}", data.path().display());
        let path = std::path::absolute(data.path()).doing(what())?;
        Ok(Self { path: path.to_string_lossy().into(), number: data.number().doing(what())? })
    }

    fn is(&self, other: &Self) -> bool {
        !self.path.is_empty() && self.path == other.path || self.number == other.number
    }

    /// In a page.
    fn page(&self) -> Vec<u8> {
        let json = |owner: &Self| serde_json::to_vec(owner).expect("plain data");
        let mut page = json(self);
        if page.len() > PAGE {
            page = json(&Self { path: String::new(), ..self.clone() });
        }
        page.resize(PAGE, b' ');
        page
    }
}

impl Kept {
    /// A new file of so many places for an open of that id.
    pub fn create(id: &OpenId, owner: &Owner, places: usize) -> Outcome<Self> {
        let _alone = lock_memory()?;
        Self::create_in(Path::new(FOLDER), Path::new(MEMORY), id, owner, places)
    }

    fn create_in(folder: &Path, memory: &Path, id: &OpenId, owner: &Owner, places: usize) -> Outcome<Self> {
        let path = memory.join(hex(id));
        let what = format!("can't keep writes in {}", path.display());
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path).doing(&what)?;
        let file = lock(file, Duration::ZERO).doing(&what)?;
        let kept = Self { file, path, folder: folder.into() };
        kept.file.write_all_at(&owner.page(), 0).doing(&what)?;
        kept.file.set_len(PLACES + (places * STRIDE) as u64).doing(&what)?;
        kept.belongs_to(id)?;
        Ok(kept)
    }

    /// What the open of that id has left, if it did not end in good order, and is not that of a copy of this device which
    /// is being served.
    pub fn left_by(id: &OpenId, opener: &Owner) -> Outcome<Option<Self>> {
        Self::left_in(Path::new(FOLDER), id, opener, DYING)
    }

    fn left_in(folder: &Path, id: &OpenId, opener: &Owner, patience: Duration) -> Outcome<Option<Self>> {
        let link = link_of(folder, id);
        let path = match fs::read_link(&link) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            path => path.doing(format!("can't follow {}", link.display()))?,
        };
        let refuse = |what: &dyn Display| {
            unless_given_up(Failure::new(Exit::Device, format!("{}: {what}", path.display())), from_ref(&link))
        };
        let (file, owner) = match opened(&path) {
            // Its daemon has ended in good order since.
            Err(_) if !link.is_symlink() => return Ok(None),
            Err(e) => return Err(refuse(&format_args!("{} (is it mounted elsewhere?)", plain(&e)))),
            Ok(opened) => opened,
        };
        let is_ours = owner.is(opener);
        let file = match lock(file, if is_ours { patience } else { Duration::ZERO }) {
            // The original is being served.
            Err(Errno::EWOULDBLOCK) if !is_ours => return Ok(None),
            locked => locked.doing(format!("can't lock {}", path.display()))?,
        };
        let kept = Self { file, path: path.clone(), folder: folder.into() };
        if is_ours {
            return Ok(Some(kept));
        }
        if kept.count()? == 0 {
            return Ok(None);
        }
        let what = format_args!(
            "it is of {}, and this has neither that path nor that number: if it is a copy, open that first; if it is the same, make it known by that path",
            owner.path
        );
        Err(refuse(&what))
    }

    /// Lets the open of an id find it.
    pub fn belongs_to(&self, id: &OpenId) -> Outcome {
        let link = link_of(&self.folder, id);
        symlink(&self.path, &link).doing(format!("can't make {}", link.display()))
    }

    /// So many places after the first `before`, of a new file.
    pub fn part(&self, before: usize, places: usize) -> Outcome<Part> {
        let what = format!("can't map {}", self.path.display());
        let mut map = os::map_shared(&self.file, PLACES + (before * STRIDE) as u64, places * STRIDE).doing(&what)?;
        // The first store to each page is a fault.
        map.chunks_mut(PAGE).for_each(|page| page[0] = std::hint::black_box(0));
        Ok(Part(map))
    }

    fn places(&self) -> Outcome<impl Iterator<Item = u64>> {
        let what = format!("can't read {}", self.path.display());
        let len = self.file.metadata().doing(&what)?.len();
        Ok((PLACES..len).step_by(STRIDE))
    }

    /// What a place holds: where it belongs, and the record that comes after all that were durable by then.
    fn held_at(&self, place: u64) -> Outcome<Option<(BlockRange, RecordNumber)>> {
        let what = format!("can't read {}", self.path.display());
        let mut head = [0; size_of::<Head>()];
        self.file.read_exact_at(&mut head, place).doing(&what)?;
        let head = Head::read_from_bytes(&head).expect("its size");
        match head.state.into_inner() {
            FREE => Ok(None),
            TAKEN => {
                let range = BlockRange::new(BlockIndex(head.first_block), head.blocks);
                Ok(Some((range, RecordNumber(head.after))))
            }
            other => {
                let what = format!("{what}: {other:#x} is not known: is it of another version of this program?");
                Err(self.unless_given_up(Failure::new(Exit::Device, what)))
            }
        }
    }

    fn unless_given_up(&self, failure: Failure) -> Failure {
        unless_given_up(failure, &links_to(&self.folder, &self.path).unwrap_or_default())
    }

    /// How many writes are kept.
    pub fn count(&self) -> Outcome<usize> {
        self.places()?.try_fold(0, |count, place| Ok(count + usize::from(self.held_at(place)?.is_some())))
    }

    /// Writes all of it to the volume, and lets go of what is in place: how much.
    pub fn put_in_place(&self, offline: &Offline, volume: &Volume) -> Outcome<usize> {
        let (mut all, mut newest) = (Vec::new(), RecordNumber(0));
        for place in self.places()? {
            if let Some((range, after)) = self.held_at(place)? {
                all.push((place, range));
                newest = newest.max(after);
            }
        }
        if all.is_empty() {
            return Ok(0);
        }
        let what = format!("can't put in place what is kept in {}", self.path.display());
        if volume.next_record() < newest {
            let what = format!("{what}: the device holds an older state of the volume than it was for");
            return Err(self.unless_given_up(Failure::new(Exit::Device, what)));
        }
        let (io, mut failure) = (offline.io(), None);
        let count = all.len();
        let written = offline.run_with_checkpoints(volume, async {
            let (mut slot, mut buf, mut written) = (volume.slot(0), Buf::new(MOST_BYTES), Vec::new());
            for (place, range) in all {
                self.file.read_exact_at(&mut buf, place + PAGE as u64).doing(&what)?;
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
        let written = written.map_err(|e| self.unless_given_up(e.context(&what)))?;
        written.iter().try_for_each(|place| self.file.write_all_at(FREE.as_bytes(), *place)).doing(&what)?;
        match failure {
            None => Ok(count),
            Some(e) => {
                let what = format!("{what}: {} of {count}", count - written.len());
                Err(self.unless_given_up(Failure::from(e).context(what)))
            }
        }
    }

    /// Removes it, unless something is left: returns how much.
    pub fn retire(&self) -> Outcome<usize> {
        let left = self.count()?;
        if left == 0 {
            // The links first: none may lead nowhere. There may be more than two, of opens that were cut short.
            let links = links_to(&self.folder, &self.path);
            if links.and_then(|links| links.iter().try_for_each(fs::remove_file)).is_ok() {
                let _ = fs::remove_file(&self.path);
            }
        }
        Ok(left)
    }
}

impl Drop for Kept {
    /// Whatever goes wrong, nothing is left behind but what somebody was promised.
    fn drop(&mut self) {
        let _ = self.retire();
    }
}

/// So many, for people.
pub fn writes(count: usize) -> String {
    format!("{count} write{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::{memory::sweep, *};

    fn range(first: u64, count: u64) -> BlockRange {
        BlockRange::new(BlockIndex(first), count)
    }

    fn owner(path: &str, number: u64) -> Owner {
        Owner { path: path.into(), number: (None, number) }
    }

    fn memory(folder: &Path) -> PathBuf {
        folder.join("memory")
    }

    fn created(folder: &Path, places: usize) -> Kept {
        let _ = fs::create_dir(memory(folder));
        Kept::create_in(folder, &memory(folder), &[1; 32], &owner("/dev/a", 1), places).unwrap()
    }

    fn found_by(folder: &Path, id: u8, opener: &Owner) -> Outcome<Option<Kept>> {
        Kept::left_in(folder, &[id; 32], opener, Duration::ZERO)
    }

    fn found(folder: &Path, id: u8) -> Outcome<Option<Kept>> {
        found_by(folder, id, &owner("/dev/a", 1))
    }

    fn files(folder: &Path) -> usize {
        // But for the folder of the memory.
        [folder, &memory(folder)].map(|folder| fs::read_dir(folder).unwrap().count()).iter().sum::<usize>() - 1
    }

    #[test]
    fn what_was_kept_and_not_let_go_of_is_found_by_either_id() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let kept = created(folder, 5);
        let (mut one, mut other) = (kept.part(0, 2).unwrap(), kept.part(2, 3).unwrap());
        one.keep(1, range(7, 2), RecordNumber(5), &[1; 8192]);
        other.keep(0, range(9, 1), RecordNumber(5), &[2; 4096]);
        other.keep(2, range(u64::MAX >> 9, 4), RecordNumber(5), &[3; MOST_BYTES]);
        other.forget(0);
        one.keep(0, range(0, 1), RecordNumber(5), &[4; 512]);
        // A daemon that is killed lets go of nothing.
        drop((kept, one, other));
        assert!(found(folder, 2).unwrap().is_none());
        found(folder, 1).unwrap().unwrap().belongs_to(&[2; 32]).unwrap();
        for id in [1, 2] {
            let left = found(folder, id).unwrap().unwrap();
            let mut bytes = vec![0; MOST_BYTES];
            let seen: Vec<_> = left
                .places()
                .unwrap()
                .filter_map(|place| {
                    left.file.read_exact_at(&mut bytes, place + PAGE as u64).unwrap();
                    Some((left.held_at(place).unwrap()?.0, bytes[0], bytes[511]))
                })
                .collect();
            assert_eq!(seen, [(range(0, 1), 4, 4), (range(7, 2), 1, 1), (range(u64::MAX >> 9, 4), 3, 3)]);
            assert!(bytes.iter().all(|byte| *byte == 3));
            assert_eq!(left.retire().unwrap(), 3, "kept for the next");
        }
        let left = found(folder, 2).unwrap().unwrap();
        left.places().unwrap().for_each(|place| left.file.write_all_at(FREE.as_bytes(), place).unwrap());
        drop(left);
        assert!(found(folder, 1).unwrap().is_none() && files(folder) == 0);
    }

    #[test]
    fn nothing_is_left_of_a_daemon_that_ends_in_good_order() {
        let folder = tempfile::tempdir().unwrap();
        let kept = created(folder.path(), 1);
        let mut part = kept.part(0, 1).unwrap();
        part.keep(0, range(1, 1), RecordNumber(5), &[1; 512]);
        part.forget(0);
        assert_eq!((kept.retire().unwrap(), files(folder.path())), (0, 0));
    }

    #[test]
    fn a_copy_of_the_device_gets_none_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let (renamed, renumbered, copy) = (owner("/dev/b", 1), owner("/dev/a", 2), owner("/dev/b", 2));
        let kept = created(folder, 1);
        kept.part(0, 1).unwrap().keep(0, range(1, 1), RecordNumber(5), &[1; 512]);
        assert!(found_by(folder, 1, &copy).unwrap().is_none(), "the original is being served");
        assert_eq!(found_by(folder, 1, &renamed).map(|_| ()).unwrap_err().exit, Exit::Busy);
        drop(kept);
        let refused = found_by(folder, 1, &copy).map(|_| ()).unwrap_err();
        assert!(refused.message.contains("/dev/a") && refused.message.contains("kept-0101"), "{refused}");
        for opener in [renamed, renumbered] {
            assert_eq!(found_by(folder, 1, &opener).unwrap().unwrap().count().unwrap(), 1);
        }
    }

    #[test]
    fn what_nobody_can_find_any_more_is_swept_away() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let kept = created(folder, 1);
        kept.part(0, 1).unwrap().keep(0, range(1, 1), RecordNumber(5), &[1; 512]);
        let link = link_of(folder, &[1; 32]);
        fs::remove_file(&link).unwrap();
        sweep(folder, &memory(folder));
        assert_eq!(files(folder), 1, "its daemon lives");
        symlink(&kept.path, &link).unwrap();
        drop(kept);
        sweep(folder, &memory(folder));
        assert_eq!(files(folder), 2, "somebody may come for it");
        fs::remove_file(&link).unwrap();
        sweep(folder, &memory(folder));
        assert_eq!(files(folder), 0, "given up");
    }

    #[test]
    fn a_path_that_is_too_long_is_not_compared() {
        let long = Owner { path: "x".repeat(5000), number: (Some(1), 2) };
        let page: Owner = serde_json::from_slice(&long.page()).unwrap();
        assert!(long.page().len() == PAGE && page.is(&long));
        assert!(!page.is(&Owner { path: String::new(), number: (Some(1), 3) }));
    }

    #[test]
    fn what_cant_be_seen_or_understood_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let kept = created(folder, 1);
        kept.file.write_all_at(b"kept wr2", PLACES).unwrap();
        drop(kept);
        let unknown = found(folder, 1).unwrap().unwrap().count().unwrap_err();
        assert!(unknown.message.contains("another version"), "{unknown}");
        fs::remove_file(memory(folder).join(hex(&[1; 32]))).unwrap();
        let away = found(folder, 1).map(|_| ()).unwrap_err();
        assert!(away.message.contains("mounted elsewhere") && away.message.contains("kept-0101"), "{away}");
    }
}

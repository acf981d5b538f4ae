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

use crate::{
    device,
    failure::{Context, Exit, Failure, Outcome},
    offline::Offline,
    os,
};
use memmap2::MmapMut;
use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sys::statfs::{FsType, statfs},
};
use serde::{Deserialize, Serialize};
use std::{
    fmt::Display,
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, symlink},
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use ublk_integrity::{BlockIndex, BlockRange, Buf, Durability, Volume};
use zerocopy::{FromBytes, IntoBytes, KnownLayout};

/// Where the links are.
const FOLDER: &str = "/run/ublk-integrity";
/// Where our ramfs is mounted.
const MEMORY: &str = "/run/ublk-integrity/memory";
/// `linux/magic.h`
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

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
}

const PAGE: usize = 4096;
/// Bytes of a place: whole pages, for each thread maps its own. Its head has one.
pub const STRIDE: usize = PAGE + MOST_BYTES;
/// Where the places begin: after the owner.
const PLACES: u64 = PAGE as u64;

/// How long the end of a daemon may take from letting go of its devices to letting go of its file.
const DYING: Duration = Duration::from_secs(5);

/// The id that is drawn when a volume is opened.
pub type OpenId = [u8; 32];

/// Whose writes are kept: the data device, by its path and its number. Either may change; where both have, it is another.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Owner {
    path: PathBuf,
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

/// The places of one thread. While they are mapped nobody else looks at them.
pub struct Part(MmapMut);

fn hex(id: &OpenId) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn link_of(folder: &Path, id: &OpenId) -> PathBuf {
    folder.join(format!("kept-{}", hex(id)))
}

/// Mounts the memory, once for all daemons. Before a daemon leaves the mounts of its caller.
pub fn mount_memory() -> Outcome {
    let what = format!("keeping writes in {MEMORY}");
    DirBuilder::new().recursive(true).mode(0o755).create(FOLDER).doing(&what)?;
    // Two at once would mount twice, and the second would hide what the first has kept.
    let folder = File::open(FOLDER).doing(&what)?;
    let _alone = Flock::lock(folder, FlockArg::LockExclusive).map_err(|(_, e)| e).doing(&what)?;
    DirBuilder::new().recursive(true).mode(0o700).create(MEMORY).doing(&what)?;
    if statfs(MEMORY).doing(&what)?.filesystem_type() != RAMFS_MAGIC {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("ramfs"), MEMORY, Some("ramfs"), flags, Some("mode=0700")).doing(&what)?;
    }
    let device = |path: &Path| path.metadata().map(|found| found.dev()).ok();
    match device(Path::new(MEMORY)) == device(&Path::new("/proc/1/root").join(&MEMORY[1..])) {
        true => Ok(()),
        false => Err(Failure::new(Exit::Device, format!("{what}: it would go with this mount namespace"))),
    }
}

impl Owner {
    /// That of a data device.
    pub fn of(path: &Path) -> Outcome<Self> {
        let number = device::number(&path.metadata().doing(format!("can't use {}", path.display()))?);
        Ok(Self { path: path.into(), number })
    }

    fn is(&self, other: &Self) -> bool {
        self.path == other.path || self.number == other.number
    }
}

impl Kept {
    /// A new file of so many places for an open of that id.
    pub fn create(id: &OpenId, owner: &Owner, places: usize) -> Outcome<Self> {
        Self::create_in(Path::new(FOLDER), Path::new(MEMORY), id, owner, places)
    }

    fn create_in(folder: &Path, memory: &Path, id: &OpenId, owner: &Owner, places: usize) -> Outcome<Self> {
        let path = memory.join(hex(id));
        let what = format!("can't keep writes in {}", path.display());
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path).doing(&what)?;
        let file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| e).doing(&what)?;
        let kept = Self { file, path, folder: folder.into() };
        let mut owner = serde_json::to_vec(owner).expect("plain data");
        // Of a longer path the number alone is compared.
        owner.resize(PAGE, b' ');
        kept.file.write_all_at(&owner, 0).doing(&what)?;
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
        let give_up = format!("to give up what a daemon has answered and not put in place, remove {}", link.display());
        let path = match fs::read_link(&link) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            path => path.doing(format!("can't follow {}", link.display()))?,
        };
        let refuse = |what: &dyn Display| Failure::new(Exit::Device, format!("{}: {what}; {give_up}", path.display()));
        let file = OpenOptions::new().read(true).write(true).open(&path);
        let mut file = file.map_err(|e| refuse(&format_args!("{e} (is it mounted elsewhere?)")))?;
        let mut owner = vec![0; PAGE];
        file.read_exact_at(&mut owner, 0).map_err(|e| refuse(&e))?;
        let owner: Owner = serde_json::from_slice(&owner).map_err(|e| refuse(&e))?;
        let deadline = Instant::now() + patience;
        let file = loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(locked) => break locked,
                Err((_, e)) if Instant::now() > deadline => match owner.is(opener) {
                    true => return Err(Failure::io(format_args!("{} is in use", path.display()), &e.into())),
                    false => return Ok(None),
                },
                Err((again, _)) => file = again,
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        let kept = Self { file, path: path.clone(), folder: folder.into() };
        match owner.is(opener) {
            true => Ok(Some(kept)),
            false if kept.count()? == 0 => Ok(None),
            false => {
                let what = format_args!("it is of {}, which this is a copy of: open that first", owner.path.display());
                Err(refuse(&what))
            }
        }
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

    /// What a place holds.
    fn held_at(&self, place: u64) -> Outcome<Option<BlockRange>> {
        let what = format!("can't read {}", self.path.display());
        let mut head = [0; size_of::<Head>()];
        self.file.read_exact_at(&mut head, place).doing(&what)?;
        let head = Head::read_from_bytes(&head).expect("its size");
        match head.state.into_inner() {
            FREE => Ok(None),
            TAKEN => Ok(Some(BlockRange::new(BlockIndex(head.first_block), head.blocks))),
            other => {
                let message = format!("{what}: {other:#x} is not known: is it of another version of this program?");
                Err(Failure::new(Exit::Device, message))
            }
        }
    }

    /// How many writes are kept.
    pub fn count(&self) -> Outcome<usize> {
        self.places()?.try_fold(0, |count, place| Ok(count + usize::from(self.held_at(place)?.is_some())))
    }

    /// Writes all of it to the volume.
    pub fn put_in_place(&self, offline: &Offline, volume: &Volume) -> Outcome<usize> {
        let count = self.count()?;
        if count == 0 {
            return Ok(0);
        }
        let what = format!("can't put in place what is kept in {} (removed, it is given up)", self.path.display());
        let io = offline.io();
        let all = async {
            let (mut slot, mut buf) = (volume.slot(0), Buf::new(MOST_BYTES));
            for place in self.places()? {
                let Some(range) = self.held_at(place)? else { continue };
                self.file.read_exact_at(&mut buf, place + PAGE as u64).doing(&what)?;
                let written;
                (written, buf) = volume.write(&io, &mut slot, range, buf, Durability::MayBeLost).await;
                written.map_err(Failure::from).doing(&what)?;
            }
            Ok(count)
        };
        offline.run_with_checkpoints(volume, all)
    }

    /// Lets go of all of it: it is in place.
    pub fn forget(&self) -> Outcome {
        let free = |place| self.file.write_all_at(FREE.as_bytes(), place);
        self.places()?.try_for_each(free).doing(format!("can't empty {}", self.path.display()))
    }

    /// Removes it, unless something is left: returns how much.
    pub fn retire(&self) -> Outcome<usize> {
        let left = self.count()?;
        if left == 0 {
            // The links first: none may lead nowhere. There may be more than two, of opens that were cut short.
            let all = fs::read_dir(&self.folder).into_iter().flatten().flatten().map(|entry| entry.path());
            let ours = |link: &PathBuf| fs::read_link(link).is_ok_and(|path| path == self.path);
            all.filter(ours).for_each(|link| _ = fs::remove_file(link));
            let _ = fs::remove_file(&self.path);
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

/// What a daemon keeps: its file, and the places of each thread, for that to take.
pub struct KeptWrites {
    /// The file.
    pub file: Kept,
    /// Writes that each thread keeps at most.
    pub each: usize,
    parts: Vec<Mutex<Option<Part>>>,
}

impl KeptWrites {
    /// Of `each` writes for so many threads.
    pub fn new(id: &OpenId, owner: &Owner, threads: usize, each: usize) -> Outcome<Self> {
        let file = Kept::create(id, owner, threads * each)?;
        let part = |thread| Ok(Mutex::new(Some(file.part(thread * each, each)?)));
        Ok(Self { parts: (0..threads).map(part).collect::<Outcome<_>>()?, file, each })
    }

    /// The places of a thread, once.
    pub fn take(&self, thread: usize) -> Option<Part> {
        self.parts[thread].lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// So many, for people.
pub fn writes(count: usize) -> String {
    format!("{count} write{}", if count == 1 { "" } else { "s" })
}

impl Part {
    fn head(&mut self, place: usize) -> &mut Head {
        Head::mut_from_prefix(&mut self.0[place * STRIDE..]).expect("places are aligned").0
    }

    /// Keeps a write of at most [`MOST_BYTES`] in a place that is free.
    pub fn keep(&mut self, place: usize, range: BlockRange, bytes: &[u8]) {
        let at = place * STRIDE + PAGE;
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        let head = self.head(place);
        (head.first_block, head.blocks) = (range.first.0, range.count);
        head.state.store(TAKEN, Ordering::Release);
    }

    /// Lets go of it.
    pub fn forget(&mut self, place: usize) {
        self.head(place).state.store(FREE, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u64, count: u64) -> BlockRange {
        BlockRange::new(BlockIndex(first), count)
    }

    fn owner(path: &str, number: u64) -> Owner {
        Owner { path: path.into(), number: (None, number) }
    }

    fn created(folder: &Path, places: usize) -> Kept {
        Kept::create_in(folder, folder, &[1; 32], &owner("/dev/a", 1), places).unwrap()
    }

    fn found_by(folder: &Path, id: u8, opener: &Owner) -> Outcome<Option<Kept>> {
        Kept::left_in(folder, &[id; 32], opener, Duration::ZERO)
    }

    fn found(folder: &Path, id: u8) -> Outcome<Option<Kept>> {
        found_by(folder, id, &owner("/dev/a", 1))
    }

    fn files(folder: &Path) -> usize {
        fs::read_dir(folder).unwrap().count()
    }

    #[test]
    fn what_was_kept_and_not_let_go_of_is_found_by_either_id() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let kept = created(folder, 5);
        let (mut one, mut other) = (kept.part(0, 2).unwrap(), kept.part(2, 3).unwrap());
        one.keep(1, range(7, 2), &[1; 8192]);
        other.keep(0, range(9, 1), &[2; 4096]);
        other.keep(2, range(u64::MAX >> 9, 4), &[3; MOST_BYTES]);
        other.forget(0);
        one.keep(0, range(0, 1), &[4; 512]);
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
                    Some((left.held_at(place).unwrap()?, bytes[0], bytes[511]))
                })
                .collect();
            assert_eq!(seen, [(range(0, 1), 4, 4), (range(7, 2), 1, 1), (range(u64::MAX >> 9, 4), 3, 3)]);
            assert!(bytes.iter().all(|byte| *byte == 3));
            assert_eq!(left.retire().unwrap(), 3, "kept for the next");
        }
        found(folder, 2).unwrap().unwrap().forget().unwrap();
        assert!(found(folder, 1).unwrap().is_none() && files(folder) == 0);
    }

    #[test]
    fn nothing_is_left_of_a_daemon_that_ends_in_good_order() {
        let folder = tempfile::tempdir().unwrap();
        let kept = created(folder.path(), 1);
        let mut part = kept.part(0, 1).unwrap();
        part.keep(0, range(1, 1), &[1; 512]);
        part.forget(0);
        assert_eq!((kept.retire().unwrap(), files(folder.path())), (0, 0));
    }

    #[test]
    fn a_copy_of_the_device_gets_none_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let (renamed, renumbered, copy) = (owner("/dev/b", 1), owner("/dev/a", 2), owner("/dev/b", 2));
        let kept = created(folder, 1);
        kept.part(0, 1).unwrap().keep(0, range(1, 1), &[1; 512]);
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
    fn what_cant_be_seen_or_understood_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let kept = created(folder, 1);
        kept.file.write_all_at(b"kept wr2", PLACES).unwrap();
        drop(kept);
        let unknown = found(folder, 1).unwrap().unwrap().count().unwrap_err();
        assert!(unknown.message.contains("another version"), "{unknown}");
        fs::remove_file(folder.join(hex(&[1; 32]))).unwrap();
        let away = found(folder, 1).map(|_| ()).unwrap_err();
        assert!(away.message.contains("mounted elsewhere") && away.message.contains("kept-0101"), "{away}");
    }
}

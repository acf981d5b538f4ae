//! The write-back file: it keeps the writes that were answered and are not in place, in memory that
//! outlives the daemon.
//!
//! There is one for each open of a volume, on a tmpfs of our own. It is lost with the machine, as
//! what a disk has in its cache is. It is never swapped out: a daemon that takes over must not wait
//! for swap on the very device that it is to serve.
//!
//! A link beside the devices' states leads to the file. The link's name has the random id that was
//! drawn when the volume was opened, and the superblock holds that id. So the next open of the
//! volume finds the file, unless the volume was opened elsewhere since: then the writes in the file
//! are out of date. A link that leads nowhere is refused, not passed over: our tmpfs may be mounted
//! where it can't be seen from here.
//!
//! Each open draws a new id. Before the superblock gets it, a second link with the new id
//! is made to the same file. So the file is found whichever of the two ids the superblock
//! holds after a crash.
//!
//! A copy of the device has the same id. So the file says which device it belongs to, and is locked
//! while its daemon lives.

mod layout;
mod memory;
mod part;

use crate::{
    failure::{Context, Exit, Failure, Outcome, plain},
    run_dir::FOLDER,
    unnamed,
};
use layout::{FREE, FileLabel, FileLayout, Head, TAKEN, opened};
pub use layout::{KeptWrite, MOST_BYTES, Owner, PAGE, Slot};
pub use memory::mount_memory;
use memory::{DYING, links_to, lock};
use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, Flock, fallocate},
};
#[cfg(test)]
pub use part::of_test;
pub use part::{Heads, MappedFile, MappedPart};
use std::{
    fmt::Display,
    fs::{self, File},
    io,
    os::unix::fs::{FileExt, symlink},
    path::{Path, PathBuf},
    slice::from_ref,
    time::Duration,
};
use ublk_integrity::{BlockIndex, BlockRange, RecordNumber, hex};
use zerocopy::{FromBytes, IntoBytes};

/// Where our tmpfs is mounted.
const MEMORY: &str = "/run/ublk-integrity/memory";

/// The id that is drawn when a volume is opened.
pub type OpenId = [u8; 32];

/// The write-back file of one open.
pub struct WriteBackFile {
    /// Locked until it is dropped, or its owner dies.
    file: Flock<File>,
    path: PathBuf,
    /// Where the links to it are.
    folder: PathBuf,
    layout: FileLayout,
}

fn link_of(folder: &Path, id: &OpenId) -> PathBuf {
    link_named(folder, &hex(id))
}

fn link_named(folder: &Path, id: &str) -> PathBuf {
    folder.join(format!("kept-{id}"))
}

/// How many writes that were answered in the open of that id (hexadecimal) wait in memory for an
/// `add` or a `recover`.
pub fn waiting_for(id: &str) -> usize {
    waiting_in(Path::new(FOLDER), id)
}

fn waiting_in(folder: &Path, id: &str) -> usize {
    left_unlocked(folder, id).and_then(|kept| kept.count().ok()).unwrap_or(0)
}

/// Refuses what the open of that id keeps if this program would not know how to put it in place. It
/// may be in use.
pub fn refuse_unknown(id: &str) -> Outcome {
    refuse_unknown_in(Path::new(FOLDER), id)
}

fn refuse_unknown_in(folder: &Path, id: &str) -> Outcome {
    let Ok(path) = fs::read_link(link_named(folder, id)) else { return Ok(()) };
    match opened(&path) {
        Ok(_) => Ok(()),
        Err(e) => {
            let (path, why) = (path.display(), plain(&e));
            let message = format!("{path}, which keeps answered writes, can't be read by this program: {why}");
            Err(Failure::new(Exit::Device, message))
        }
    }
}

/// What the open of that id has left, if no daemon has it.
fn left_unlocked(folder: &Path, id: &str) -> Option<WriteBackFile> {
    let path = fs::read_link(link_named(folder, id)).ok()?;
    let (file, label) = opened(&path).ok()?;
    let file = lock(file, &path, Duration::ZERO).ok()?;
    Some(WriteBackFile { file, path, folder: folder.into(), layout: label.layout })
}

/// Removes the file of an open of a volume that is no more, on the device that is `owner`: how many
/// writes it held. The file of a copy of the device stays.
pub fn give_up(id: &str, owner: &Owner) -> usize {
    give_up_in(Path::new(FOLDER), id, owner)
}

fn give_up_in(folder: &Path, id: &str, owner: &Owner) -> usize {
    let Ok(path) = fs::read_link(link_named(folder, id)) else { return 0 };
    if !opened(&path).is_ok_and(|(_, label)| label.owner.is(owner)) {
        return 0;
    }
    let Some(kept) = left_unlocked(folder, id) else { return 0 };
    let count = kept.count().unwrap_or(0);
    kept.remove();
    count
}

/// Gives a new file its length, and its memory: where there is not enough, that is an error here
/// and SIGBUS later.
fn reserve(file: &File, bytes: u64) -> io::Result<()> {
    file.set_len(bytes)?;
    loop {
        match fallocate(file, FallocateFlags::empty(), 0, bytes as libc::off_t) {
            Err(Errno::EINTR) => {}
            // A ramfs, which an older version may have mounted, can't.
            Ok(()) | Err(Errno::EOPNOTSUPP) => return Ok(()),
            Err(e) => return Err(e.into()),
        }
    }
}

/// The failure, with what to do where nothing else helps.
fn unless_given_up(failure: Failure, links: &[PathBuf]) -> Failure {
    let links: Vec<_> = links.iter().map(|link| link.display().to_string()).collect();
    let message = format!("{failure}; to give up what is kept there, remove {}", links.join(" and "));
    Failure { message, ..failure }
}

impl WriteBackFile {
    /// A new file for an open of that id.
    pub fn create(id: &OpenId, owner: &Owner, layout: FileLayout) -> Outcome<Self> {
        Self::create_in(Path::new(FOLDER), Path::new(MEMORY), id, owner, layout)
    }

    fn create_in(folder: &Path, memory: &Path, id: &OpenId, owner: &Owner, layout: FileLayout) -> Outcome<Self> {
        let path = memory.join(hex(id));
        let what = format!("can't keep writes in {}", path.display());
        // Locked before `sweep` can find it, which removes what nobody holds and no link leads to.
        let file = unnamed::locked(memory).doing(&what)?;
        let label = FileLabel { owner: owner.clone(), layout };
        file.write_all_at(&label.page(), 0).doing(&what)?;
        reserve(&file, layout.file_bytes()).doing(&what)?;
        unnamed::name(&file, &path).doing(&what)?;
        let kept = Self { file, path, folder: folder.into(), layout };
        kept.belongs_to(id)?;
        Ok(kept)
    }

    /// The file that the open of that id has left, if it did not end in good order. `None`, too,
    /// where it belongs to a copy of this device that is being served.
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
        let (file, FileLabel { owner, layout }) = match opened(&path) {
            // Its daemon has ended in good order since.
            Err(_) if !link.is_symlink() => return Ok(None),
            Err(e) if e.get_ref().is_some_and(|cause| cause.is::<serde_json::Error>()) => {
                return Err(refuse(
                    &"it can't be read: if another version of this program has left it, `add` with that puts it in place",
                ));
            }
            Err(e) => return Err(refuse(&format_args!("{} (is it mounted elsewhere?)", plain(&e)))),
            Ok(opened) => opened,
        };
        let is_ours = owner.is(opener);
        let file = match lock(file, &path, if is_ours { patience } else { Duration::ZERO }) {
            // The original is being served.
            Err(Errno::EWOULDBLOCK) if !is_ours => return Ok(None),
            Err(Errno::EWOULDBLOCK) => return Err(still_held(&path, patience)),
            locked => locked.doing(format!("can't lock {}", path.display()))?,
        };
        let kept = Self { file, path: path.clone(), folder: folder.into(), layout };
        if is_ours {
            return Ok(Some(kept));
        }
        if kept.count()? == 0 {
            return Ok(None);
        }
        let what = format!(
            "it is of {}, and this has neither that path nor that number: if it is a copy, open that first; if it is the same, make it known by that path",
            owner.path
        );
        Err(refuse(&what))
    }

    /// Makes a link, by which the open of an id finds the file.
    pub fn belongs_to(&self, id: &OpenId) -> Outcome {
        let link = link_of(&self.folder, id);
        symlink(&self.path, &link).doing(format!("can't make {}", link.display()))
    }

    /// The write in a slot.
    fn held_in(&self, slot: Slot) -> Outcome<Option<KeptWrite>> {
        let what = format!("can't read {}", self.path.display());
        let mut head = [0; size_of::<Head>()];
        self.file.read_exact_at(&mut head, slot.head).doing(&what)?;
        let head = Head::read_from_bytes(&head).expect("its size");
        match head.state.into_inner() {
            FREE => Ok(None),
            TAKEN => {
                let range = BlockRange::new(BlockIndex(head.first_block), head.blocks);
                let first_not_durable = RecordNumber(head.first_not_durable);
                Ok(Some(KeptWrite { range, first_not_durable, number: head.number }))
            }
            other => {
                let what = format!("{what}: {other:#x} is not known: is it of another version of this program?");
                Err(self.unless_given_up(Failure::new(Exit::Device, what)))
            }
        }
    }

    /// The failure, with what to remove where nothing else helps.
    pub fn unless_given_up(&self, failure: Failure) -> Failure {
        unless_given_up(failure, &links_to(&self.folder, &self.path).unwrap_or_default())
    }

    /// How many writes are kept.
    pub fn count(&self) -> Outcome<usize> {
        self.layout.all().try_fold(0, |count, slot| Ok(count + usize::from(self.held_in(slot)?.is_some())))
    }

    /// All writes and their slots, in the order in which they are to be put in place.
    pub fn all(&self) -> Outcome<Vec<(Slot, KeptWrite)>> {
        let mut all = Vec::new();
        for slot in self.layout.all() {
            all.extend(self.held_in(slot)?.map(|write| (slot, write)));
        }
        all.sort_by_key(|(_, write)| write.number);
        Ok(all)
    }

    /// Reads the bytes in a slot, to the front of `buf`.
    pub fn read(&self, slot: Slot, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, slot.bytes)
    }

    /// Where the bytes in a slot of a thread begin.
    pub fn bytes_at(&self, thread: usize, slot: usize) -> u64 {
        self.layout.bytes_at(thread, slot)
    }

    /// Reads bytes at such a place, whoever writes them meanwhile: what is read may be anything then.
    pub fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, at)
    }

    /// Marks a slot as free: its write is in place.
    pub fn clear(&self, slot: Slot) -> io::Result<()> {
        self.file.write_all_at(FREE.as_bytes(), slot.head)
    }

    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the file, unless it holds writes: returns how many.
    pub fn retire(&self) -> Outcome<usize> {
        let left = self.count()?;
        if left == 0 {
            self.remove();
        }
        Ok(left)
    }

    /// The links first: none may lead nowhere. There may be more than two, where opens were cut
    /// short.
    fn remove(&self) {
        let links = links_to(&self.folder, &self.path);
        if links.and_then(|links| links.iter().try_for_each(fs::remove_file)).is_ok() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Drop for WriteBackFile {
    /// Whatever goes wrong, only a file that holds answered writes is left behind.
    fn drop(&mut self) {
        let _ = self.retire();
    }
}

fn still_held(path: &Path, patience: Duration) -> Failure {
    let (path, seconds) = (path.display(), patience.as_secs());
    let message = format!(
        "{path}: the daemon that keeps writes of this device there has not ended within {seconds} s: `fuser {path}` names it"
    );
    Failure::new(Exit::Busy, message)
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

    const LAYOUT: FileLayout = FileLayout { parts: 2, slots: 3 };

    fn created(folder: &Path) -> WriteBackFile {
        let _ = fs::create_dir(memory(folder));
        WriteBackFile::create_in(folder, &memory(folder), &[1; 32], &owner("/dev/a", 1), LAYOUT).unwrap()
    }

    fn part(kept: &WriteBackFile, thread: usize) -> MappedPart {
        kept.part(thread).unwrap()
    }

    /// Fills the front of the buffer in a slot, and keeps it. It has the number of its bytes.
    fn keep(part: &mut MappedPart, slot: usize, range: BlockRange, bytes: &[u8]) {
        part.bufs[slot][..bytes.len()].copy_from_slice(bytes);
        part.heads.keep(slot, KeptWrite { range, first_not_durable: RecordNumber(5), number: bytes[0].into() });
    }

    fn found_by(folder: &Path, id: u8, opener: &Owner) -> Outcome<Option<WriteBackFile>> {
        WriteBackFile::left_in(folder, &[id; 32], opener, Duration::ZERO)
    }

    fn found(folder: &Path, id: u8) -> Outcome<Option<WriteBackFile>> {
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
        let kept = created(folder);
        let (mut one, mut other) = (part(&kept, 0), part(&kept, 1));
        keep(&mut one, 1, range(7, 2), &[1; 8192]);
        keep(&mut other, 0, range(9, 1), &[2; 4096]);
        keep(&mut other, 2, range(u64::MAX >> 9, 4), &[3; MOST_BYTES]);
        other.heads.clear(0);
        keep(&mut one, 0, range(0, 1), &[4; 512]);
        // A daemon that is killed clears no slots.
        drop((kept, one, other));
        assert!(found(folder, 2).unwrap().is_none());
        found(folder, 1).unwrap().unwrap().belongs_to(&[2; 32]).unwrap();
        for id in [1, 2] {
            let left = found(folder, id).unwrap().unwrap();
            let mut bytes = vec![0; MOST_BYTES];
            let read = |(slot, write): (Slot, KeptWrite)| {
                left.read(slot, &mut bytes).unwrap();
                (write.range, bytes[0], bytes[511])
            };
            let seen: Vec<_> = left.all().unwrap().into_iter().map(read).collect();
            assert_eq!(seen, [(range(7, 2), 1, 1), (range(u64::MAX >> 9, 4), 3, 3), (range(0, 1), 4, 4)], "by number");
            assert_eq!(left.retire().unwrap(), 3, "kept for the next");
        }
        let left = found(folder, 2).unwrap().unwrap();
        left.layout.all().for_each(|slot| left.file.write_all_at(FREE.as_bytes(), slot.head).unwrap());
        drop(left);
        assert!(found(folder, 1).unwrap().is_none() && files(folder) == 0);
    }

    #[test]
    fn nothing_is_left_of_a_daemon_that_ends_in_good_order() {
        let folder = tempfile::tempdir().unwrap();
        let kept = created(folder.path());
        let mut part = part(&kept, 0);
        keep(&mut part, 0, range(1, 1), &[1; 512]);
        part.heads.clear(0);
        assert_eq!((kept.retire().unwrap(), files(folder.path())), (0, 0));
    }

    #[test]
    fn what_waits_goes_by_the_open_and_goes_when_it_is_given_up() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let (ours, another) = (owner("/dev/a", 1), owner("/dev/b", 2));
        let kept = created(folder);
        keep(&mut part(&kept, 0), 0, range(1, 1), &[1; 512]);
        let (id, other) = (hex(&[1; 32]), hex(&[2; 32]));
        assert_eq!((waiting_in(folder, &id), give_up_in(folder, &id, &ours)), (0, 0), "its daemon lives");
        drop(kept);
        assert_eq!((waiting_in(folder, &id), waiting_in(folder, &other), waiting_in(folder, "")), (1, 0, 0));
        assert_eq!(
            (give_up_in(folder, &id, &another), waiting_in(folder, &id)),
            (0, 1),
            "that of another device stays"
        );
        assert_eq!((give_up_in(folder, &other, &ours), waiting_in(folder, &id)), (0, 1));
        assert_eq!((give_up_in(folder, &id, &ours), files(folder)), (1, 0));
    }

    #[test]
    fn a_copy_of_the_device_gets_none_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let (renamed, renumbered, copy) = (owner("/dev/b", 1), owner("/dev/a", 2), owner("/dev/b", 2));
        let kept = created(folder);
        keep(&mut part(&kept, 0), 0, range(1, 1), &[1; 512]);
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
        let kept = created(folder);
        keep(&mut part(&kept, 0), 0, range(1, 1), &[1; 512]);
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
    fn a_number_or_a_path_that_came_again_proves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (folder.path().join("a"), folder.path().join("b"));
        let owner_of = |path: &Path| Owner {
            path: path.to_str().unwrap().into(),
            number: crate::device::number(&path.metadata().unwrap()),
        };
        fs::write(&a, "").unwrap();
        let original = owner_of(&a);
        fs::rename(&a, &b).unwrap();
        assert!(original.is(&owner_of(&b)), "it has another path now");
        fs::write(&a, "").unwrap();
        let impostor = Owner { number: original.number, ..owner_of(&b) };
        assert!(!original.is(&impostor), "its path leads to another, so its number has come again");
        let Some(disk) = fs::read_dir("/sys/dev/block").ok().and_then(|mut all| all.next()?.ok()) else {
            println!("skipped: no block device here");
            return;
        };
        let (major, minor) =
            disk.file_name().to_str().unwrap().split_once(':').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
        let there = (None, libc::makedev(major.parse().unwrap(), minor.parse().unwrap()));
        let original = Owner { path: "/dev/disk/by-id/x".into(), number: there };
        assert!(
            !original.is(&Owner { number: (None, 1), ..original.clone() }),
            "it is still there, and that is another"
        );
    }

    #[test]
    fn a_path_that_is_too_long_is_not_compared() {
        let long = Owner { path: "x".repeat(5000), number: (Some(1), 2) };
        let page = FileLabel { owner: long.clone(), layout: LAYOUT }.page();
        let FileLabel { owner, .. } = serde_json::from_slice(&page).unwrap();
        assert!(page.len() == PAGE && owner.is(&long));
        assert!(!owner.is(&Owner { path: String::new(), number: (Some(1), 3) }));
    }

    #[test]
    fn what_cant_be_seen_or_understood_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let kept = created(folder);
        kept.file.write_all_at(b"kept wr9", kept.layout.all().last().unwrap().head).unwrap();
        drop(kept);
        let unknown = found(folder, 1).unwrap().unwrap().count().unwrap_err();
        assert!(unknown.message.contains("another version"), "{unknown}");
        fs::write(memory(folder).join(hex(&[1; 32])), serde_json::to_vec(&owner("/dev/a", 1)).unwrap()).unwrap();
        File::options()
            .write(true)
            .open(memory(folder).join(hex(&[1; 32])))
            .unwrap()
            .write_all_at(&[b' '; PAGE], 100)
            .unwrap();
        let unnumbered = found(folder, 1).map(|_| ()).unwrap_err();
        assert!(unnumbered.message.contains("another version"), "{unnumbered}");
        let label = format!(
            "{{\"owner\":{},\"layout\":{{\"parts\":2,\"places\":3}}}}",
            serde_json::to_string(&owner("/dev/a", 1)).unwrap()
        );
        let file = File::options().write(true).open(memory(folder).join(hex(&[1; 32]))).unwrap();
        file.write_all_at(format!("{label:4096}").as_bytes(), 0).unwrap();
        let older = found(folder, 1).map(|_| ()).unwrap_err();
        assert!(older.message.contains("another version"), "{older}");
        fs::remove_file(memory(folder).join(hex(&[1; 32]))).unwrap();
        let away = found(folder, 1).map(|_| ()).unwrap_err();
        assert!(away.message.contains("mounted elsewhere") && away.message.contains("kept-0101"), "{away}");
    }
}

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

use crate::{
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
use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, symlink},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
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

/// From the head of a place to its bytes.
const HEAD: usize = 4096;
/// Bytes of a place: whole pages, for each thread maps its own.
pub const STRIDE: usize = HEAD + MOST_BYTES;

/// The id that is drawn when a volume is opened.
pub type OpenId = [u8; 32];

/// The file of one open.
pub struct Kept {
    file: File,
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
    let what = format!("can't keep writes in {MEMORY} (--write-back 0 does without)");
    DirBuilder::new().recursive(true).mode(0o755).create(FOLDER).doing(&what)?;
    // Two at once would mount twice, and the second would hide what the first has kept.
    let folder = File::open(FOLDER).doing(&what)?;
    let _alone = Flock::lock(folder, FlockArg::LockExclusive).map_err(|(_, e)| e).doing(&what)?;
    DirBuilder::new().recursive(true).mode(0o700).create(MEMORY).doing(&what)?;
    if statfs(MEMORY).doing(&what)?.filesystem_type() != RAMFS_MAGIC {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("ramfs"), MEMORY, Some("ramfs"), flags, Some("mode=0700")).doing(&what)?;
    }
    Ok(())
}

impl Kept {
    /// A new file of so many places for an open of that id.
    pub fn create(id: &OpenId, places: usize) -> Outcome<Self> {
        Self::create_in(Path::new(FOLDER), Path::new(MEMORY), id, places)
    }

    fn create_in(folder: &Path, memory: &Path, id: &OpenId, places: usize) -> Outcome<Self> {
        let path = memory.join(hex(id));
        let what = format!("can't keep writes in {}", path.display());
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path).doing(&what)?;
        file.set_len((places * STRIDE) as u64).doing(&what)?;
        let kept = Self { file, path, folder: folder.into() };
        kept.belongs_to(id)?;
        Ok(kept)
    }

    /// What the open of that id has left, if it did not end in good order.
    pub fn left_by(id: &OpenId) -> Outcome<Option<Self>> {
        Self::left_in(Path::new(FOLDER), id)
    }

    fn left_in(folder: &Path, id: &OpenId) -> Outcome<Option<Self>> {
        let link = link_of(folder, id);
        let Ok(path) = fs::read_link(&link) else { return Ok(None) };
        let file = OpenOptions::new().read(true).write(true).open(&path).map_err(|e| {
            let e = Failure::io(format_args!("can't open {}", path.display()), &e);
            let message = format!(
                "{e}. It holds what a daemon has answered and not put in place: is it mounted elsewhere? To give it up, remove {}",
                link.display()
            );
            Failure { message, ..e }
        })?;
        Ok(Some(Self { file, path, folder: folder.into() }))
    }

    /// Lets the open of an id find it.
    pub fn belongs_to(&self, id: &OpenId) -> Outcome {
        let link = link_of(&self.folder, id);
        symlink(&self.path, &link).doing(format!("can't make {}", link.display()))
    }

    /// So many places, after the first `before`.
    pub fn part(&self, before: usize, places: usize) -> io::Result<Part> {
        os::map_shared(&self.file, (before * STRIDE) as u64, places * STRIDE).map(Part)
    }

    /// All that is kept.
    pub fn writes(&self) -> Outcome<Vec<(BlockRange, Vec<u8>)>> {
        let what = format!("can't read {}", self.path.display());
        let mut bytes = vec![0; self.file.metadata().doing(&what)?.len() as usize];
        self.file.read_exact_at(&mut bytes, 0).doing(&what)?;
        let mut writes = Vec::new();
        for place in bytes.chunks_exact(STRIDE) {
            let (head, bytes) = place.split_at(HEAD);
            let (head, _) = Head::read_from_prefix(head).expect("a page is larger");
            match head.state.into_inner() {
                FREE => {}
                TAKEN => writes.push((BlockRange::new(BlockIndex(head.first_block), head.blocks), bytes.to_vec())),
                other => {
                    let message =
                        format!("{what}: {other:#x} is not known: was it left by another version of this program?");
                    return Err(Failure::new(Exit::Device, message));
                }
            }
        }
        Ok(writes)
    }

    /// Writes all of it to the volume.
    pub fn put_in_place(&self, offline: &Offline, volume: &Volume) -> Outcome<usize> {
        let (io, writes) = (offline.io(), self.writes()?);
        let count = writes.len();
        if count == 0 {
            return Ok(0);
        }
        offline.run_with_checkpoints(volume, async {
            let (mut slot, mut buf) = (volume.slot(0), Buf::new(MOST_BYTES));
            for (range, bytes) in writes {
                buf.copy_from_slice(&bytes);
                let written;
                (written, buf) = volume.write(&io, &mut slot, range, buf, Durability::MayBeLost).await;
                written
                    .map_err(Failure::from)
                    .doing(format!("can't put in place what is kept in {}", self.path.display()))?;
            }
            Ok(count)
        })
    }

    /// Removes it: all of it is in place.
    pub fn remove(&self) {
        // The links first: none may lead nowhere. There may be more than two, of opens that were cut short.
        let all = fs::read_dir(&self.folder).into_iter().flatten().flatten().map(|entry| entry.path());
        let ours = |link: &PathBuf| fs::read_link(link).is_ok_and(|path| path == self.path);
        all.filter(ours).for_each(|link| _ = fs::remove_file(link));
        let _ = fs::remove_file(&self.path);
    }

    /// Removes it at the end of a daemon, unless something is left: returns how much.
    pub fn retire(&self) -> Outcome<usize> {
        let left = self.writes()?.len();
        if left == 0 {
            self.remove();
        }
        Ok(left)
    }
}

/// So many, for people.
pub fn writes(count: usize) -> String {
    format!("{count} write{}", if count == 1 { "" } else { "s" })
}

impl Part {
    fn head(&mut self, place: usize) -> &mut Head {
        let at = place * STRIDE;
        Head::mut_from_prefix(&mut self.0[at..at + HEAD]).expect("places are aligned").0
    }

    /// Keeps a write of at most [`MOST_BYTES`] in a place that is free.
    pub fn keep(&mut self, place: usize, range: BlockRange, bytes: &[u8]) {
        let at = place * STRIDE + HEAD;
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

    fn found(folder: &Path, id: u8) -> Outcome<Option<Kept>> {
        Kept::left_in(folder, &[id; 32])
    }

    #[test]
    fn what_was_kept_and_not_let_go_of_is_found_by_either_id() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let kept = Kept::create_in(folder, folder, &[1; 32], 5).unwrap();
        let (mut one, mut other) = (kept.part(0, 2).unwrap(), kept.part(2, 3).unwrap());
        one.keep(1, range(7, 2), &[1; 8192]);
        other.keep(0, range(9, 1), &[2; 4096]);
        other.keep(2, range(u64::MAX >> 9, 4), &[3; MOST_BYTES]);
        other.forget(0);
        one.keep(0, range(0, 1), &[4; 512]);
        // A daemon that is killed lets go of nothing.
        drop((kept, one, other));
        assert!(found(folder, 2).unwrap().is_none());
        let left = found(folder, 1).unwrap().unwrap();
        left.belongs_to(&[2; 32]).unwrap();
        for id in [1, 2] {
            let writes = found(folder, id).unwrap().unwrap().writes().unwrap();
            let seen: Vec<_> = writes.iter().map(|(range, bytes)| (*range, bytes[0], bytes[511])).collect();
            assert_eq!(seen, [(range(0, 1), 4, 4), (range(7, 2), 1, 1), (range(u64::MAX >> 9, 4), 3, 3)]);
            assert!(writes[2].1.iter().all(|byte| *byte == 3) && writes[2].1.len() == MOST_BYTES);
        }
        assert_eq!(left.retire().unwrap(), 3, "kept for the next");
        found(folder, 2).unwrap().unwrap().remove();
        assert!(found(folder, 1).unwrap().is_none() && found(folder, 2).unwrap().is_none());
        assert_eq!(fs::read_dir(folder).unwrap().count(), 0);
    }

    #[test]
    fn nothing_is_left_of_a_daemon_that_ends_in_good_order() {
        let folder = tempfile::tempdir().unwrap();
        let kept = Kept::create_in(folder.path(), folder.path(), &[1; 32], 1).unwrap();
        let mut part = kept.part(0, 1).unwrap();
        part.keep(0, range(1, 1), &[1; 512]);
        part.forget(0);
        assert_eq!(kept.retire().unwrap(), 0);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_cant_be_seen_or_understood_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let kept = Kept::create_in(folder, folder, &[1; 32], 1).unwrap();
        kept.file.write_all_at(b"kept wr2", 0).unwrap();
        let unknown = found(folder, 1).unwrap().unwrap().writes().unwrap_err();
        assert!(unknown.message.contains("another version"), "{unknown}");
        fs::remove_file(&kept.path).unwrap();
        let away = found(folder, 1).map(|_| ()).unwrap_err();
        assert!(away.message.contains("mounted elsewhere") && away.message.contains("kept-0101"), "{away}");
    }
}

//! The file system in memory that write-back files are on.

use super::MEMORY;
use crate::{
    failure::{Context, Exit, Failure, Outcome},
    run_dir::{FOLDER, lock_alone, make_folder},
    wait::{LONGEST, Wait, lock_within},
};
use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
};
use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    time::Duration,
};

/// Of the tmpfs: without limits, and never swapped out (`noswap`, Linux 6.4; before 6.5
/// no write is admitted).
const OPTIONS: &str = "mode=0700,size=0,nr_inodes=0,noswap";

/// How long a daemon may take from closing its devices to unlocking its file.
pub(super) const DYING: Duration = LONGEST;

/// Mounts the memory, once for all daemons. Before a daemon leaves the mounts of its caller.
pub fn mount_memory() -> Outcome {
    let what = format!("keeping writes in {MEMORY}");
    make_folder().doing(&what)?;
    // Two at once would mount twice, and the second would hide what the first has kept.
    let _alone = lock_alone("kept.lock")?;
    DirBuilder::new().recursive(true).mode(0o700).create(MEMORY).doing(&what)?;
    let device = |path: &Path| path.metadata().map(|found| found.dev()).ok();
    if device(Path::new(MEMORY)) == device(Path::new(FOLDER)) {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("ublk-integrity"), MEMORY, Some("tmpfs"), flags, Some(OPTIONS)).doing(&what)?;
    }
    if device(Path::new(MEMORY)) != device(&Path::new("/proc/1/root").join(&MEMORY[1..])) {
        return Err(Failure::new(Exit::Device, format!("{what}: it would go with this mount namespace")));
    }
    sweep(Path::new(FOLDER), Path::new(MEMORY));
    Ok(())
}

/// Locks the file at `path`. A daemon that is ending may hold the lock for so long yet.
pub(super) fn lock(file: File, path: &Path, patience: Duration) -> nix::Result<Flock<File>> {
    let mut wait = Wait::up_to(patience, format_args!("the lock on {}", path.display()));
    lock_within(file, FlockArg::LockExclusiveNonblock, &mut wait)
}

/// The links in the folder that lead to a file.
pub(super) fn links_to(folder: &Path, file: &Path) -> io::Result<Vec<PathBuf>> {
    let mut links = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if fs::read_link(&path).is_ok_and(|target| target == file) {
            links.push(path);
        }
    }
    Ok(links)
}

/// Removes files of dead daemons that no link leads to any more: an administrator removed the link,
/// or the volume is gone.
pub(super) fn sweep(folder: &Path, memory: &Path) {
    for path in fs::read_dir(memory).into_iter().flatten().flatten().map(|entry| entry.path()) {
        let of_nobody = File::open(&path).is_ok_and(|file| lock(file, &path, Duration::ZERO).is_ok());
        if of_nobody && links_to(folder, &path).is_ok_and(|links| links.is_empty()) {
            let _ = fs::remove_file(&path);
        }
    }
}

//! A file that is there whole, or not at all.

use crate::{
    failure::{Context, Outcome},
    interrupt,
    random::random,
};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use std::{
    fs::{self, File, OpenOptions, Permissions},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown},
    path::{Path, PathBuf},
};

/// A file under a name of its own beside its place, for its owner alone; it goes again unless it is
/// finished. What takes the place of another has the owner and the permissions of that, as if it
/// had been written over.
pub struct NewFile {
    file: File,
    path: PathBuf,
    place: PathBuf,
    replaces: bool,
}

impl NewFile {
    /// Makes one. Whether it takes the place of a file that is there.
    pub fn beside(place: &Path, replaces: bool) -> Outcome<Self> {
        // Of a link, what it leads to is replaced.
        let place = if replaces { place.canonicalize().doing("can't follow it")? } else { place.to_owned() };
        let name = format!(".ublk-integrity-{}", random::<8>()?.map(|byte| format!("{byte:02x}")).concat());
        let path = place.with_file_name(name);
        interrupt::take_away(path.clone());
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let new = Self { file: file.doing("can't make a file in its folder")?, path, place, replaces };
        if replaces {
            new.take_after().doing("can't look at it")?;
        }
        Ok(new)
    }

    /// Where the owner can't be had, nobody else may look into it either.
    fn take_after(&self) -> io::Result<()> {
        let (old, new) = (fs::metadata(&self.place)?, self.file.metadata()?);
        let same = (old.uid(), old.gid()) == (new.uid(), new.gid());
        if same || fchown(&self.file, Some(old.uid()), Some(old.gid())).is_ok() {
            self.file.set_permissions(Permissions::from_mode(old.mode() & 0o777))?;
        }
        Ok(())
    }

    /// What is to be written to.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Puts it into its place, durable. Fails where something is there by now that it does not
    /// replace.
    pub fn finish(self) -> io::Result<()> {
        self.file.sync_all()?;
        match self.replaces {
            true => fs::rename(&self.path, &self.place)?,
            false => self.move_to_free_place()?,
        }
        let folder = self.place.parent().filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
    }

    fn move_to_free_place(&self) -> io::Result<()> {
        let moved = renameat2(AT_FDCWD, &self.path, AT_FDCWD, &self.place, RenameFlags::RENAME_NOREPLACE);
        match moved {
            // A file system that can't; a link to it can't replace anything either.
            Err(nix::Error::EINVAL) => {
                fs::hard_link(&self.path, &self.place).and_then(|()| fs::remove_file(&self.path))
            }
            moved => Ok(moved?),
        }
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        // Half a file would look like a whole one. One that is in its place has no longer this name.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn it_is_there_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("new");
        let names = || fs::read_dir(folder.path()).unwrap().count();
        let make = |replaces| {
            let new = NewFile::beside(&place, replaces).unwrap();
            new.file().write_all(b"whole").unwrap();
            new
        };
        drop(make(false));
        assert_eq!(names(), 0);
        let late = make(false);
        make(false).finish().unwrap();
        assert_eq!((names(), fs::read(&place).unwrap()), (2, b"whole".to_vec()));
        assert_eq!(late.finish().unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        fs::write(&place, "old").unwrap();
        drop(make(true));
        assert_eq!(fs::read(&place).unwrap(), b"old");
        make(true).finish().unwrap();
        assert_eq!((names(), fs::read(&place).unwrap()), (1, b"whole".to_vec()));
    }

    #[test]
    fn what_is_replaced_leaves_its_owner_and_permissions() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("old");
        let made = |replaces| {
            NewFile::beside(&place, replaces).unwrap().finish().unwrap();
            let found = fs::metadata(&place).unwrap();
            (found.mode() & 0o777, found.gid())
        };
        let own = nix::unistd::getegid().as_raw();
        assert_eq!(made(false), (0o600, own), "its owner's alone where there was none");
        let another = if nix::unistd::geteuid().is_root() { 7 } else { own };
        std::os::unix::fs::chown(&place, None, Some(another)).unwrap();
        fs::set_permissions(&place, Permissions::from_mode(0o640)).unwrap();
        assert_eq!(made(true), (0o640, another));
    }

    #[test]
    fn a_link_stays_one() {
        let folder = tempfile::tempdir().unwrap();
        let (link, file) = (folder.path().join("link"), folder.path().join("file"));
        fs::write(&file, "old").unwrap();
        std::os::unix::fs::symlink("file", &link).unwrap();
        NewFile::beside(&link, true).unwrap().finish().unwrap();
        assert!(link.is_symlink() && fs::read(&file).unwrap().is_empty());
    }
}

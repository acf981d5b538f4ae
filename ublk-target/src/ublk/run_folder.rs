//! libublk keeps a file of its own for each device, in a folder that it leaves writable for all.
//! What lies in that it writes to, changes and reads as root, links followed: so it is root's alone
//! here, and nobody else's entries are used.

use crate::failure::{Context, Exit, Failure, Outcome};
use libublk::ctrl::UblkCtrl;
use std::{
    fs,
    io::{self, ErrorKind},
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

/// libublk's file of a device.
pub(super) fn run_file(number: u32) -> PathBuf {
    PathBuf::from(format!("{}/{number:04}.json", UblkCtrl::run_dir()))
}

/// Makes the folder, or makes it ours alone.
pub fn secure_run_folder() -> Outcome {
    secure(Path::new(&UblkCtrl::run_dir()), nix::unistd::geteuid().as_raw())
}

fn secure(folder: &Path, owner: u32) -> Outcome {
    let what = || format!("can't make libublk's folder {} safe", folder.display());
    fs::DirBuilder::new().recursive(true).mode(0o755).create(folder).doing(what())?;
    let found = fs::symlink_metadata(folder).doing(what())?;
    if !found.is_dir() || found.uid() != owner {
        let message = format!("{}: it is not a folder of root's, remove it", what());
        return Err(Failure::new(Exit::Device, message));
    }
    if found.mode() & 0o022 != 0 {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).doing(what())?;
    }
    Ok(())
}

/// Removes what libublk must not touch from where it keeps its file of a device: all where the
/// device is `new`, and else what is not a plain file of ours. After the folder is ours alone:
/// nobody puts it back.
pub(super) fn make_way(number: u32, new: bool) -> Outcome {
    let file = run_file(number);
    clear(&file, new, nix::unistd::geteuid().as_raw()).doing(format_args!("{} is in the way", file.display()))
}

fn clear(file: &Path, new: bool, owner: u32) -> io::Result<()> {
    match fs::symlink_metadata(file) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        // A second link would be another name of a file that was root's before.
        Ok(found) if !new && found.is_file() && found.uid() == owner && found.nlink() == 1 => Ok(()),
        _ => fs::remove_file(file),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_folder_that_all_may_write_to_becomes_ours_and_others_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let us = nix::unistd::geteuid().as_raw();
        let folder = dir.path().join("run");
        fs::create_dir(&folder).unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
        secure(&folder, us).unwrap();
        assert_eq!(fs::metadata(&folder).unwrap().mode() & 0o777, 0o755);
        assert_eq!(secure(&folder, us + 1).unwrap_err().exit, Exit::Device);
        symlink(&folder, dir.path().join("link")).unwrap();
        assert_eq!(secure(&dir.path().join("link"), us).unwrap_err().exit, Exit::Device);
        secure(&dir.path().join("new"), us).unwrap();
    }

    #[test]
    fn what_somebody_has_put_there_is_removed_and_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let us = nix::unistd::geteuid().as_raw();
        let (file, precious) = (dir.path().join("0000.json"), dir.path().join("precious"));
        fs::write(&precious, "precious").unwrap();
        symlink(&precious, &file).unwrap();
        clear(&file, false, us).unwrap();
        assert!(fs::symlink_metadata(&file).is_err());
        fs::hard_link(&precious, &file).unwrap();
        clear(&file, false, us).unwrap();
        assert!(!file.exists());
        fs::write(&file, "another's").unwrap();
        clear(&file, false, us + 1).unwrap();
        assert!(!file.exists());
        fs::write(&file, "ours").unwrap();
        clear(&file, false, us).unwrap();
        assert!(file.exists(), "of the daemon before");
        clear(&file, true, us).unwrap();
        assert!(!file.exists(), "of a device before");
        fs::create_dir(&file).unwrap();
        assert!(clear(&file, true, us).is_err());
        assert_eq!(fs::read_to_string(&precious).unwrap(), "precious");
    }
}

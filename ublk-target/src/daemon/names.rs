//! A name is one device's: its daemon holds a lock on it for as long as it lives, and a device that waits for a daemon keeps it.

use super::{Origin, life, settings::Settings, state::State};
use crate::{
    failure::{Context, Exit, Failure, Outcome},
    name::DeviceName,
    run_dir::{FOLDER, make_folder},
    ublk::{self, Whose},
    wait::{LONGEST, Wait},
};
use nix::fcntl::Flock;
use std::{
    fs::{self, File},
    io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

/// A name that no other daemon can have as long as this lives.
pub(super) struct Name {
    path: PathBuf,
    _lock: Flock<File>,
}

impl Drop for Name {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Takes the name that the device shall have. Before anything else is touched.
pub(super) fn claim(settings: &Settings, origin: Origin) -> Outcome<Option<Name>> {
    let Some(name) = &settings.name else { return Ok(None) };
    let what = format!("can't keep the name {name} in {FOLDER}");
    make_folder().doing(&what)?;
    let claimed = claim_in(Path::new(FOLDER), name, origin).map_err(|e| match e.kind() {
        io::ErrorKind::WouldBlock => Failure::new(
            Exit::Busy,
            format_args!("{name} is the name of another device: `ublk-integrity list` shows it"),
        ),
        _ => Failure::io(&what, &e),
    })?;
    for state in State::all().into_iter().filter(|state| state.settings.name.as_ref() == Some(name)) {
        if origin != Origin::Recovered(state.id) && state.whose()? == Whose::Ours {
            let (id, remedy) = (state.id, state.remedy());
            let message = format!("{name} is the name of /dev/ublkb{id}, whose daemon is dead: {remedy}");
            return Err(Failure::new(Exit::Busy, message));
        }
    }
    Ok(Some(claimed))
}

fn claim_in(folder: &Path, name: &DeviceName, origin: Origin) -> io::Result<Name> {
    let path = folder.join(format!("name-{name}"));
    // One that was killed may hold it for a moment yet.
    let patience = if matches!(origin, Origin::New(_)) { Duration::ZERO } else { LONGEST };
    let lock = life::lock_current_within(&path, &mut Wait::up_to(patience, format_args!("the name {name}")))?;
    Ok(Name { path, _lock: lock })
}

/// Tells whoever looks at block devices that this one answers: udev looks again, and finds name and UUID in the state file.
/// Where there is no udev the link is made here.
pub(super) fn announce(number: u32, name: Option<&DeviceName>) {
    let _ = fs::write(format!("/sys/class/block/ublkb{number}/uevent"), "change");
    if let Some(name) = name.filter(|_| !has_udev()) {
        let _ = make_link(&name.link(), number);
    }
}

/// The device is gone: so is a link that was made here.
pub fn withdraw(number: u32, name: Option<&DeviceName>) {
    if let Some(name) = name.filter(|_| !has_udev()) {
        let link = name.link();
        if fs::read_link(&link).is_ok_and(|target| target == ublk::block_path(number)) {
            let _ = fs::remove_file(link);
        }
    }
}

fn has_udev() -> bool {
    Path::new("/run/udev/control").exists()
}

fn make_link(link: &Path, number: u32) -> io::Result<()> {
    link.parent().map_or(Ok(()), fs::create_dir_all)?;
    match fs::symlink_metadata(link) {
        // What is no link is none of ours.
        Ok(found) if found.is_symlink() => fs::remove_file(link)?,
        _ => {}
    }
    symlink(ublk::block_path(number), link)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_daemons_and_free_when_it_ends() {
        let folder = tempfile::tempdir().unwrap();
        let name: DeviceName = "home".parse().unwrap();
        let claim = |name: &DeviceName| claim_in(folder.path(), name, Origin::New(None));
        let held = claim(&name).unwrap();
        assert_eq!(claim(&name).err().map(|e| e.kind()), Some(io::ErrorKind::WouldBlock));
        assert!(claim(&"srv".parse().unwrap()).is_ok());
        drop(held);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        // A daemon that was killed leaves the file.
        fs::write(folder.path().join("name-home"), "").unwrap();
        assert!(claim(&name).is_ok());
    }

    #[test]
    fn a_link_is_made_anew_and_nothing_else_taken_away() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("links/home");
        make_link(&link, 3).unwrap();
        make_link(&link, 4).unwrap();
        assert_eq!(fs::read_link(&link).unwrap(), Path::new("/dev/ublkb4"));
        let file = folder.path().join("links/file");
        fs::write(&file, "precious").unwrap();
        assert!(make_link(&file, 5).is_err() && fs::read(&file).unwrap() == b"precious");
    }
}

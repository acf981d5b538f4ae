//! A name is one device's: its daemon holds a lock on it for as long as it lives, and a device that
//! waits for a daemon keeps it.

use super::{Origin, life, settings::Settings, state::State};
use crate::{
    failure::{Context, Exit, Failure, Outcome},
    name::DeviceName,
    run_dir::{FOLDER, make_folder},
    ublk::Whose,
    wait::{LONGEST, Wait},
};
use nix::fcntl::{Flock, FlockArg};
use std::{
    fs::{self, File},
    io,
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
    let mut wait = Wait::up_to(patience, format_args!("the name {name}"));
    let lock = life::lock_current_within(&path, FlockArg::LockExclusiveNonblock, &mut wait)?;
    Ok(Name { path, _lock: lock })
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
}

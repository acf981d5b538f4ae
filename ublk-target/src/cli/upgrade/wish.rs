//! A device whose daemon is the main process of a unit is handed over from within that unit's
//! reload. So long as a reload goes on, systemd does not mind that the main process ends; and both the new daemon and
//! the way back to the program of before have the unit's limits and credentials.
//!
//! ```text
//!   upgrade, resize ── wish in a file, locked ─> systemctl reload ─> ExecReload= upgrade --reload
//!          │                                                           │ takes the device over, tells systemd who serves
//!          └──────────── reads how it went <────────────────── same file
//! ```
//!
//! A reload that an administrator asks for finds no wish, and takes the program that is installed.

use super::{Device, Undone};
use crate::{
    daemon::life::lock_current_within,
    failure::{Context, Exit, Failure, Outcome},
    run_dir::FOLDER,
    wait::{LONGEST, Wait},
};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, Write},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

/// What somebody wants a reload to do, besides what it does anyway.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(super) struct Wish {
    /// The program that is to serve.
    pub(super) binary: Option<PathBuf>,
    /// Where the key is, as an option of a command.
    pub(super) key: Vec<String>,
    /// Bytes that the volume is to have from then on.
    pub(super) grow: Option<u64>,
}

/// How it went.
#[derive(Serialize, Deserialize)]
enum Answer {
    Done { waited: Duration },
    Undone { exit: u8, message: String, device: Device },
}

/// A wish that is waited for: the lock says so.
struct Asked {
    file: Flock<File>,
    path: PathBuf,
}

/// Has the unit of device `id` hand it over. How long requests waited.
pub(super) fn ask(unit: &str, id: u32, wish: &Wish) -> Result<Duration, Undone> {
    let mut asked = Asked::begin(Path::new(FOLDER), id, wish)?;
    let reload = Command::new("systemctl").args(["reload", unit]).output().doing("can't run systemctl")?;
    match asked.answer() {
        Some(Answer::Done { waited }) => Ok(waited),
        Some(Answer::Undone { exit, message, device }) => {
            Err(Undone { failure: Failure::new(Exit::from_code(exit), message), device })
        }
        // It has not come so far that it could say.
        None => {
            let said = String::from_utf8_lossy(&reload.stderr);
            let said = said.lines().next().unwrap_or("it has said nothing");
            let message = format!("`systemctl reload {unit}` has not begun ({said}): `journalctl -u {unit}` says more");
            Err(Failure::new(Exit::Device, message).into())
        }
    }
}

fn file_of(folder: &Path, id: u32) -> PathBuf {
    folder.join(format!("{id}.upgrade"))
}

impl Asked {
    fn begin(folder: &Path, id: u32, wish: &Wish) -> Outcome<Self> {
        let path = file_of(folder, id);
        let what = format!("can't ask for an upgrade in {}", path.display());
        let mut wait = Wait::up_to(LONGEST, format_args!("another upgrade, which holds {}", path.display()));
        let file = lock_current_within(&path, FlockArg::LockExclusiveNonblock, &mut wait).doing(&what)?;
        let mut asked = Self { file, path };
        rewrite(&mut asked.file, wish).doing(&what)?;
        Ok(asked)
    }

    /// `None` where nobody has answered.
    fn answer(&mut self) -> Option<Answer> {
        let mut text = String::new();
        self.file.rewind().and_then(|()| self.file.read_to_string(&mut text)).ok()?;
        serde_json::from_str(&text).ok()
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// A wish as the reload finds it.
pub(super) struct Wished(File);

impl Wished {
    /// That of device `id`, if there is one.
    pub(super) fn find(id: u32) -> Option<(Self, Wish)> {
        Self::find_in(Path::new(FOLDER), id)
    }

    /// One that somebody waits for: what is left of one who was killed counts for nothing.
    fn find_in(folder: &Path, id: u32) -> Option<(Self, Wish)> {
        let mut file = OpenOptions::new().read(true).write(true).open(file_of(folder, id)).ok()?;
        let probe = file.try_clone().ok()?;
        let is_held = Flock::lock(probe, FlockArg::LockSharedNonblock).is_err();
        let mut text = String::new();
        file.read_to_string(&mut text).ok().filter(|_| is_held)?;
        Some((Self(file), serde_json::from_str(&text).ok()?))
    }

    /// Says how long requests waited, or why they go on as before.
    pub(super) fn answer(mut self, done: Result<Duration, &Undone>) -> io::Result<()> {
        let answer = match done {
            Ok(waited) => Answer::Done { waited },
            Err(Undone { failure, device }) => {
                Answer::Undone { exit: failure.exit as u8, message: failure.message.clone(), device: *device }
            }
        };
        rewrite(&mut self.0, &answer)
    }
}

fn rewrite(file: &mut File, value: &impl Serialize) -> io::Result<()> {
    file.rewind()?;
    file.set_len(0)?;
    file.write_all(&serde_json::to_vec(value)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wish_is_heard_while_somebody_waits_for_it_and_is_answered() {
        let folder = tempfile::tempdir().unwrap();
        let wish = Wish { binary: Some("/p".into()), key: vec!["--key-file".into(), "/k".into()], grow: Some(4096) };
        let mut asked = Asked::begin(folder.path(), 7, &wish).unwrap();
        assert!(Wished::find_in(folder.path(), 8).is_none());
        let (found, heard) = Wished::find_in(folder.path(), 7).unwrap();
        assert_eq!(heard, wish);
        assert!(asked.answer().is_none(), "a wish is no answer");
        let failure = Failure::new(Exit::Busy, "it is busy");
        found.answer(Err(&Undone { failure, device: Device::Served })).unwrap();
        assert!(matches!(
            asked.answer(),
            Some(Answer::Undone { exit: 5, message, device: Device::Served }) if message == "it is busy"
        ));
        drop(asked);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        // Of one who was killed.
        fs::write(file_of(folder.path(), 7), serde_json::to_vec(&wish).unwrap()).unwrap();
        assert!(Wished::find_in(folder.path(), 7).is_none());
    }
}

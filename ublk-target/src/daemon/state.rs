//! What is known of devices outside their daemons: one JSON file each under /run.
//!
//! A daemon holds an exclusive lock on its file for as long as it lives. So whoever can lock the file
//! knows that the daemon is dead, whatever became of its pid.

use super::settings::Settings;
use crate::failure::{Context, Exit, Failure, Outcome};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use ublk_integrity::create::VolumeInfo;

/// Where what must outlive a daemon is.
pub const FOLDER: &str = "/run/ublk-integrity";

/// Makes it.
pub fn make_folder() -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o755).create(FOLDER)
}

/// A device as its state file describes it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct State {
    /// Number of the device.
    pub id: u32,
    /// The daemon.
    pub pid: u32,
    /// What it serves: another volume must never take its place.
    #[serde(flatten)]
    pub volume: Identity,
    /// Why the device ended otherwise than in good order: all that is left of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<String>,
    /// What it was asked to be.
    #[serde(flatten)]
    pub settings: Settings,
}

/// What makes a volume the one that a device was made of.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Identity {
    /// UUID in the usual text form.
    pub uuid: String,
    /// Usable size in bytes.
    pub size: u64,
    /// Unit of integrity in bytes.
    pub block_size: u32,
}

impl Identity {
    /// The identity of an open volume.
    pub fn of(volume: &VolumeInfo) -> Self {
        Self { uuid: volume.uuid.clone(), size: volume.size, block_size: volume.block_size }
    }
}

/// A daemon that lived when this was made. Stays bound to it even when the state file is removed.
pub struct Life(File);

impl Life {
    fn goes_on(self) -> Option<Self> {
        match Flock::lock(self.0, FlockArg::LockSharedNonblock) {
            Err((file, nix::Error::EWOULDBLOCK)) => Some(Self(file)),
            _ => None,
        }
    }

    /// Waits until the daemon has ended; `false` if it still lives then.
    pub fn wait_for_end(self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut life = self;
        while let Some(still) = life.goes_on() {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(20));
            life = still;
        }
        true
    }
}

/// The daemon's hold on its own state file. Removes the file when the device ends in an orderly way.
pub struct OwnState {
    file: Flock<File>,
    path: PathBuf,
    state: State,
}

fn file_of(id: u32, suffix: &str) -> PathBuf {
    PathBuf::from(FOLDER).join(format!("{id}.{suffix}"))
}

/// Where the daemon of device `id` listens.
pub fn socket_path(id: u32) -> PathBuf {
    file_of(id, "sock")
}

impl State {
    /// Writes the state down and takes the lock that says "alive".
    pub fn publish(self) -> Outcome<OwnState> {
        let what = format!("can't keep state in {FOLDER}");
        make_folder().doing(&what)?;
        let path = file_of(self.id, "json");
        let file = lock_current(&path).map_err(|e| Failure::io(&what, &e))?;
        let own = OwnState { file, path, state: self };
        own.write().doing(&what)?;
        Ok(own)
    }

    /// The device `id`, if it is ours.
    pub fn load(id: u32) -> Outcome<Self> {
        let path = file_of(id, "json");
        let text = fs::read(&path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => Failure::new(
                Exit::Device,
                format_args!("device {id} is not one of ours: `ublk-integrity list` shows them"),
            ),
            _ => Failure::io(format_args!("can't read {}", path.display()), &e),
        })?;
        serde_json::from_slice(&text).map_err(|e| Failure::new(Exit::Device, format_args!("{}: {e}", path.display())))
    }

    /// All devices, by number.
    pub fn all() -> Vec<Self> {
        Self::files().into_iter().filter(|state| state.ended.is_none()).collect()
    }

    fn files() -> Vec<Self> {
        let names = fs::read_dir(FOLDER).into_iter().flatten().flatten().map(|entry| entry.file_name());
        let ids = names.filter_map(|name| name.to_str()?.strip_suffix(".json")?.parse().ok());
        let mut all: Vec<Self> = ids.filter_map(|id| Self::load(id).ok()).collect();
        all.sort_by_key(|state| state.id);
        all
    }

    /// Whether its daemon lives.
    pub fn is_alive(&self) -> bool {
        self.watch().is_some()
    }

    /// The daemon's life, if it lives.
    pub fn watch(&self) -> Option<Life> {
        let file = File::open(file_of(self.id, "json")).ok()?;
        Life(file).goes_on()
    }

    /// What to do about a daemon that is dead.
    pub fn remedy(&self) -> String {
        let id = self.id;
        if self.settings.recovery { format!("`recover -n {id}` or `del -n {id}`") } else { format!("`del -n {id}`") }
    }

    /// Whether the file of this number still speaks of the same daemon.
    pub fn is_current(&self) -> bool {
        Self::load(self.id).is_ok_and(|now| now.pid == self.pid)
    }

    /// Forgets a device that is gone, unless its number has a new owner.
    pub fn remove(&self) {
        if self.is_current() {
            let _ = fs::remove_file(file_of(self.id, "json"));
            let _ = fs::remove_file(socket_path(self.id));
        }
    }
}

/// The state file, locked, and still the one that its name leads to: a daemon that ends removes its own, and
/// whoever waited for the lock would otherwise write into a file that nobody can find.
fn lock_current(path: &Path) -> io::Result<Flock<File>> {
    loop {
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o644).open(path)?;
        // Held for moments by readers, and until its end by a daemon whose device is gone already.
        let file = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| e)?;
        let there = fs::metadata(path);
        if there.is_ok_and(|there| file.metadata().is_ok_and(|ours| ours.ino() == there.ino())) {
            return Ok(file);
        }
    }
}

impl OwnState {
    /// Never empty nor half written for others: a new daemon needs the old one's word if this one fails.
    fn write(&self) -> io::Result<()> {
        let mut text = serde_json::to_vec_pretty(&self.state).expect("plain data");
        // In one write, over all that was there.
        let before = self.file.metadata()?.len() as usize;
        text.resize(before.max(text.len()), b' ');
        self.file.write_all_at(&text, 0)
    }

    /// The device is gone, and not in good order: whoever ends it shall be told why.
    pub fn ended(mut self, why: &str) {
        self.state.ended = Some(why.to_owned());
        let _ = fs::remove_file(self.path.with_extension("sock"));
        let _ = self.write();
        self.hold_until_exit();
    }

    /// The device is gone: so is its state. The lock goes with the process, after everything else.
    pub fn retire(self) {
        let _ = fs::remove_file(self.path.with_extension("sock"));
        let _ = fs::remove_file(&self.path);
        self.hold_until_exit();
    }

    /// Whoever waits for the lock waits for the end of everything that this process holds.
    fn hold_until_exit(self) {
        std::mem::forget(self.file);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_that_was_waited_for_is_on_the_file_that_others_find() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.json");
        let old = lock_current(&path).unwrap();
        std::thread::scope(|s| {
            let waiting = s.spawn(|| lock_current(&path).unwrap());
            std::thread::sleep(Duration::from_millis(100));
            // The end of a daemon whose number is free already.
            fs::remove_file(&path).unwrap();
            drop(old);
            let new = waiting.join().unwrap();
            assert_eq!(fs::metadata(&path).unwrap().ino(), new.metadata().unwrap().ino());
        });
    }
}

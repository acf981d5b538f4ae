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
    io::{Seek, Write},
    os::unix::fs::DirBuilderExt,
    path::PathBuf,
    time::{Duration, Instant},
};

const FOLDER: &str = "/run/ublk-integrity";

/// A device as its state file describes it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct State {
    /// Number of the device.
    pub id: u32,
    /// The daemon.
    pub pid: u32,
    /// What it was asked to be.
    #[serde(flatten)]
    pub settings: Settings,
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
    pub fn publish(&self) -> Outcome<OwnState> {
        let what = format!("can't keep state in {FOLDER}");
        fs::DirBuilder::new().recursive(true).mode(0o755).create(FOLDER).doing(&what)?;
        let path = file_of(self.id, "json");
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path).doing(&what)?;
        // Readers hold it for moments only.
        let mut file = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| Failure::io(&what, &e.into()))?;
        let text = serde_json::to_vec_pretty(self).expect("plain data");
        file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(&text)).doing(&what)?;
        Ok(OwnState { file, path })
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

    /// Forgets a device that is gone.
    pub fn remove(&self) {
        let _ = fs::remove_file(file_of(self.id, "json"));
        let _ = fs::remove_file(socket_path(self.id));
    }
}

impl OwnState {
    /// The device is gone: so is its state. The lock goes with the process, after everything else.
    pub fn retire(&self) {
        let _ = fs::remove_file(self.path.with_extension("sock"));
        let _ = fs::remove_file(&self.path);
        let _ = self.file.sync_all();
    }
}

//! Where an anchor is: `file:PATH`, or `unix:PATH` for an agent.

use super::{AgentAnchor, AnyAnchor, FileAnchor};
use crate::{
    daemon::state::State,
    device::stack,
    failure::{Context, Exit, Failure, Outcome},
    wait::Wait,
};
use serde::{Deserialize, Serialize};
use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};
use ublk_integrity::VolumeInfo;
use uuid::Uuid;

/// Where an anchor is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Place {
    /// In a file.
    File(PathBuf),
    /// With an agent that listens here.
    Agent(PathBuf),
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, path) = text.split_once(':').unwrap_or_default();
        let place = match kind {
            "file" => Self::File,
            "unix" => Self::Agent,
            _ => return Err("must be file:PATH, like file:/mnt/stick/home.anchor, or unix:PATH of an agent".into()),
        };
        // A daemon has another folder, and so has the next one.
        if path.starts_with('/') { Ok(place(path.into())) } else { Err("the path must begin with /".into()) }
    }
}

impl TryFrom<String> for Place {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Place> for String {
    fn from(place: Place) -> Self {
        place.to_string()
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Agent(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl Place {
    /// Its path.
    pub fn path(&self) -> &Path {
        let (Self::File(path) | Self::Agent(path)) = self;
        path
    }

    /// The file that it lies in. Where an agent keeps its anchors nobody can tell from here.
    pub fn file(&self) -> Option<&Path> {
        if let Self::File(path) = self { Some(path) } else { None }
    }

    /// Opens it. What is not there may come within so long: a stick, a mount, an agent that starts, or what that one asks about
    /// this `volume`. What is asked of it is answered within `timeout`, or not at all.
    pub fn open(&self, (wait, timeout): (Duration, Duration), volume: Option<&VolumeInfo>) -> Outcome<AnyAnchor> {
        let uuid = volume.and_then(|volume| volume.uuid.parse::<Uuid>().ok());
        let (patience, mut wait) = (wait, Wait::up_to(wait, format_args!("the anchor {self}")));
        loop {
            let opened = self.try_open(timeout).and_then(|anchor| {
                if let (AnyAnchor::Agent(agent), Some(uuid)) = (&anchor, &uuid) {
                    agent.answers(uuid.as_bytes()).map_err(|why| Failure::new(Exit::Device, why))?;
                }
                Ok(anchor)
            });
            match opened {
                Err(failure) if failure.exit == Exit::Device && wait.pause() => {}
                Err(failure) => return Err(failure.context(format_args!("the anchor {self}"))),
                Ok(AnyAnchor::Agent(agent)) => return Ok(AnyAnchor::Agent(agent.patient(patience))),
                opened => return opened,
            }
        }
    }

    fn try_open(&self, timeout: Duration) -> Outcome<AnyAnchor> {
        match self {
            Self::File(path) => FileAnchor::open(path, timeout).map(AnyAnchor::File),
            Self::Agent(path) => {
                let agent = AgentAnchor::at(path, timeout);
                agent.is_there().map(|()| AnyAnchor::Agent(agent)).map_err(|why| Failure::new(Exit::Device, why))
            }
        }
    }

    /// The same, and makes a file that holds nothing, if there is none: whether it did.
    pub fn make(&self, timeout: Duration) -> Outcome<(AnyAnchor, bool)> {
        match self {
            Self::File(path) => {
                FileAnchor::make(path, timeout).map(|(anchor, is_new)| (AnyAnchor::File(anchor), is_new))
            }
            Self::Agent(_) => self.try_open(timeout).map(|anchor| (anchor, false)),
        }
        .doing(format_args!("the anchor {self}"))
    }

    /// Removes a file that was made for nothing.
    pub fn unmake(&self) {
        self.file().into_iter().for_each(|path| drop(std::fs::remove_file(path)));
    }

    /// Refuses one that whoever can put back the volume's disk puts back with it.
    pub fn refuse_same_disk<'a>(&self, devices: impl IntoIterator<Item = &'a Path>) -> Outcome {
        let Some(path) = self.file() else { return Ok(()) };
        match devices.into_iter().find(|device| stack::share_a_disk(path, device, State::lies_on)) {
            None => Ok(()),
            Some(device) => {
                let message = format!(
                    "the anchor {self} is on the disk of {}: whoever puts that back puts back both. Name a place elsewhere, or say --anchor-same-disk to try things out",
                    device.display()
                );
                Err(Failure::new(Exit::Arguments, message))
            }
        }
    }

    /// Refuses one that lies on the device itself, which would wait for its own anchor.
    pub fn refuse_above(&self, number: u32) -> Outcome {
        // What a server has lies on nothing here, and it may be gone.
        let file = self.file().filter(|path| !stack::leads_to_server(path));
        // One that is not there yet would come to lie in its folder.
        let path = file.and_then(|path| path.ancestors().find(|path| path.exists()));
        if !path.is_some_and(|path| stack::lies_on_ublk(path, number, State::below)) {
            return Ok(());
        }
        let message = format!("the anchor {self} lies on /dev/ublkb{number} itself, which would wait for it");
        Err(Failure::new(Exit::Device, message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_a_file_with_an_absolute_path() {
        let place: Place = "file:/mnt/a b".parse().unwrap();
        assert_eq!((place.path(), place.to_string().as_str()), (Path::new("/mnt/a b"), "file:/mnt/a b"));
        for (text, word) in [
            ("/mnt/a", "file:PATH"),
            ("file:a", "begin with /"),
            ("unix:", "begin with /"),
            ("tpm:", "file:PATH"),
            ("", "file:PATH"),
        ] {
            assert!(text.parse::<Place>().unwrap_err().contains(word), "{text}");
        }
        assert_eq!("unix:/run/a".parse(), Ok(Place::Agent("/run/a".into())));
        assert_eq!(serde_json::from_str::<Place>("\"file:/a\"").unwrap(), "file:/a".parse().unwrap());
    }
}

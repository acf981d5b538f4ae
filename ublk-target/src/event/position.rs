//! How far somebody has come in the events of all volumes, in a file.

use super::Record;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fs, io, path::Path, process};

/// Where in a volume's files of events: which of them, and how many of its bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Place {
    pub(super) inode: u64,
    pub(super) offset: u64,
}

/// An event, and where in the files of its volume it ends.
#[derive(Debug)]
pub struct Told {
    /// The event.
    pub record: Record,
    pub(super) volume: String,
    pub(super) end: Place,
}

/// How far, by the volume's UUID. Nowhere yet by default.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct Position(BTreeMap<String, Place>);

impl Position {
    /// That which was saved in a file; the beginning where there is none.
    pub fn load(path: &Path) -> Self {
        fs::read(path).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
    }

    /// Whole or not at all, whoever else saves there.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let new = path.with_extension(format!("new-{}", process::id()));
        let saved = fs::write(&new, serde_json::to_vec(self)?).and_then(|()| fs::rename(&new, path));
        saved.inspect_err(|_| drop(fs::remove_file(&new)))
    }

    /// This event has been dealt with.
    pub fn note(&mut self, told: &Told) {
        self.set(&told.volume, told.end);
    }

    pub(super) fn of(&self, volume: &str) -> Option<Place> {
        self.0.get(volume).copied()
    }

    pub(super) fn set(&mut self, volume: &str, place: Place) {
        self.0.insert(volume.to_owned(), place);
    }
}

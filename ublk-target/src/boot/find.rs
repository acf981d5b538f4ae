//! From what a line of the table says of a device to the device.

use super::{
    probe::{self, Role},
    table::Place,
    unit,
};
use crate::{
    daemon::state::State,
    device::stack,
    failure::{Exit, Failure, Outcome},
    wait::Wait,
};
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};
use uuid::Uuid;

/// The path of the device, which may take so long to appear. Links stay links, as udev knows the
/// device by then.
pub fn device(place: &Place, patience: Duration) -> Outcome<PathBuf> {
    let node = unit::node(place);
    let mut wait = Wait::up_to(patience, node.display());
    loop {
        if node.exists() {
            return Ok(node);
        }
        // Where there is no udev to make the link we look ourselves.
        if let Place::Volume(uuid) = place {
            if let Some(path) = data_of(uuid, block_devices()) {
                return Ok(path);
            }
        }
        if !wait.pause() {
            return Err(missing(place, &node));
        }
    }
}

fn missing(place: &Place, node: &Path) -> Failure {
    let node = node.display();
    let message = match place {
        Place::Path(_) => format!("{node} is not there"),
        Place::Volume(uuid) => format!("no block device here holds the data of volume {uuid}"),
        _ => format!("{node} is not there: udev makes it"),
    };
    Failure::new(Exit::Device, message)
}

fn block_devices() -> Vec<PathBuf> {
    let entries = fs::read_dir("/sys/class/block").into_iter().flatten().flatten();
    let names = entries.filter(|entry| {
        // Drives without a disk in them, and loop devices without a file.
        fs::read_to_string(entry.path().join("size")).is_ok_and(|size| size.trim() != "0")
    });
    let paths = names.map(|entry| Path::new("/dev").join(entry.file_name()));
    // What lies on a device of ours that waits for its next daemon would have us wait, who may be
    // about to start that.
    let dead: Vec<_> = State::all().into_iter().filter(|state| !state.is_alive()).collect();
    let waits = |path: &PathBuf| dead.iter().any(|state| stack::lies_on_ublk(path, state.id, State::below));
    let mut paths: Vec<_> = paths.filter(|path| !waits(path)).collect();
    paths.sort();
    paths
}

/// The one that holds the data of the volume. A disk that can't be read is passed over:
/// another may be meant.
fn data_of(uuid: &Uuid, devices: impl IntoIterator<Item = PathBuf>) -> Option<PathBuf> {
    let uuid = uuid.to_string();
    devices.into_iter().find(|path| {
        let found = probe::probe(path).ok().flatten();
        found.is_some_and(|found| found.role != Role::Meta && found.uuid.as_ref() == Some(&uuid))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_is_named_when_the_time_is_up() {
        let place = Place::Path("/dev/no such disk".into());
        let failure = device(&place, Duration::from_millis(50)).unwrap_err();
        assert_eq!((failure.exit, failure.message.as_str()), (Exit::Device, "/dev/no such disk is not there"));
        let label = device(&Place::Label("no such/label".into()), Duration::ZERO).unwrap_err();
        assert!(label.message.contains(r"/dev/disk/by-label/no\x20such\x2flabel"), "{label}");
        assert_eq!(device(&Place::Path("/dev/null".into()), Duration::ZERO).unwrap(), Path::new("/dev/null"));
    }

    #[test]
    fn a_volume_is_found_by_its_uuid() {
        let (file, offline, _key) = crate::offline::scratch();
        drop(offline);
        let devices = || ["/dev/null".into(), "/nowhere".into(), file.path().to_owned()];
        let found = data_of(&Uuid::from_bytes([2; 16]), devices());
        assert_eq!(found.as_deref(), Some(file.path()));
        assert_eq!(data_of(&Uuid::from_bytes([3; 16]), devices()), None);
    }
}

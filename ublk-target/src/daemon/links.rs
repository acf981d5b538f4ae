//! Links from devices' names to the devices. Where there is udev, with our rules, it makes them, and
//! takes them away; else they are made here.

use crate::{
    name::{DeviceName, LINKS},
    ublk,
    wait::Wait,
};
use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

/// How long udev may take for a link.
const MADE_WITHIN: Duration = Duration::from_secs(10);

/// Tells whoever looks at block devices that this one answers: udev looks again, and finds name and
/// UUID in the state file, and makes the link. Where it does not it is made here. It is there then.
pub(super) fn announce(number: u32, name: Option<&DeviceName>) {
    let _ = fs::write(format!("/sys/class/block/ublkb{number}/uevent"), "change");
    let Some(link) = name.map(DeviceName::link) else { return };
    if !is_made_by_udev(Path::new("/")) {
        let _ = make(&link, number);
        return;
    }
    // Who hears next that the device answers may use its name at once.
    let mut wait = Wait::up_to(MADE_WITHIN, format_args!("udev to make {}", link.display()));
    while !link.canonicalize().is_ok_and(|device| device == ublk::block_path(number)) && wait.pause() {}
}

/// What a link that was made here says of this number is over: the device is gone, or is about to
/// be another of the name `now`, whose link stays.
pub(super) fn withdraw(number: u32, now: Option<&DeviceName>) {
    withdraw_in(Path::new(LINKS), number, now.map(DeviceName::as_str));
}

/// Whatever name it was: who has made the link may have left nothing else. Those of udev lead
/// elsewhere first.
fn withdraw_in(folder: &Path, number: u32, now: Option<&str>) {
    let links = fs::read_dir(folder).into_iter().flatten().flatten();
    let over = links.filter(|link| now.is_none_or(|now| link.file_name() != now)).map(|link| link.path());
    for link in over.filter(|link| leads_to(link, &ublk::block_path(number))) {
        let _ = fs::remove_file(link);
    }
}

fn leads_to(link: &Path, device: &PathBuf) -> bool {
    fs::read_link(link).is_ok_and(|target| target == *device)
}

/// Whether udev runs below this root, and has our rules.
fn is_made_by_udev(root: &Path) -> bool {
    let has_rules = |folder| root.join(folder).join("udev/rules.d/61-ublk-integrity.rules").exists();
    root.join("run/udev/control").exists() && ["usr/lib", "usr/local/lib", "etc", "run"].into_iter().any(has_rules)
}

fn make(link: &Path, number: u32) -> io::Result<()> {
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
    fn a_link_is_made_anew_and_nothing_else_taken_away() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("links/home");
        make(&link, 3).unwrap();
        make(&link, 4).unwrap();
        assert_eq!(fs::read_link(&link).unwrap(), Path::new("/dev/ublkb4"));
        let file = folder.path().join("links/file");
        fs::write(&file, "precious").unwrap();
        assert!(make(&file, 5).is_err() && fs::read(&file).unwrap() == b"precious");
    }

    #[test]
    fn udev_makes_links_where_it_runs_and_has_our_rules() {
        let root = tempfile::tempdir().unwrap();
        let put = |path: &str| {
            fs::create_dir_all(root.path().join(path).parent().unwrap()).unwrap();
            fs::write(root.path().join(path), "").unwrap();
        };
        put("usr/local/lib/udev/rules.d/61-ublk-integrity.rules");
        assert!(!is_made_by_udev(root.path()));
        put("run/udev/control");
        assert!(is_made_by_udev(root.path()));
        fs::remove_dir_all(root.path().join("usr")).unwrap();
        assert!(!is_made_by_udev(root.path()));
    }

    #[test]
    fn no_name_leads_to_a_number_that_is_anothers() {
        let folder = tempfile::tempdir().unwrap();
        let in_it = |name: &str| folder.path().join(name);
        for (name, number) in [("old", 4), ("home", 4), ("other", 44)] {
            make(&in_it(name), number).unwrap();
        }
        fs::write(in_it("file"), "precious").unwrap();
        // As udev makes them.
        symlink("../ublkb4", in_it("udevs")).unwrap();
        let left = || {
            let mut names: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
            names.sort();
            names
        };
        withdraw_in(folder.path(), 4, Some("home"));
        assert_eq!(left(), ["file", "home", "other", "udevs"]);
        withdraw_in(folder.path(), 4, None);
        assert_eq!(left(), ["file", "other", "udevs"]);
        withdraw_in(Path::new("/nowhere"), 4, None);
    }
}

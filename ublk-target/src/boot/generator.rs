//! What the table means in units of systemd: systemd.generator(7).
//!
//! All is decided from the table's text. No device is opened or looked for: they come later, and
//! systemd waits for them.

use super::{
    table::{Entry, Table},
    unit::{self, Surroundings},
};
use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::{OpenOptionsExt, symlink},
    path::Path,
};

/// A file or a link in the folder that systemd has given.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Made {
    /// Its path in there.
    pub path: String,
    /// What it is.
    pub content: Content,
}

/// What is in a file, or where a link leads.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Content {
    /// Text.
    Text(String),
    /// A path.
    Link(String),
}

/// Where systemd looks for credentials that are encrypted.
const ENCRYPTED: [&str; 3] = ["/etc/credstore.encrypted", "/run/credstore.encrypted", "/usr/lib/credstore.encrypted"];

/// Waits for all volumes that the boot needs.
const TARGET: &str = "\
# Made by ublk-integrity-generator

[Unit]
Description=Authenticated volumes
Documentation=man:ublk-integritytab(5)
DefaultDependencies=no
Before=sysinit.target
";

/// What systemd accounts for all units of a template in. Its own would end at a shutdown, and take with
/// it what is to stay until the machine stops.
const SLICE: (&str, &str) = (
    "system-ublk\\x2dintegrity.slice",
    "\
# Made by ublk-integrity-generator

[Unit]
Description=Authenticated volumes
Documentation=man:ublk-integritytab(5)
DefaultDependencies=no
",
);

/// Whether a credential of this name is there encrypted.
pub fn is_encrypted(name: &str) -> bool {
    ENCRYPTED.iter().any(|folder| Path::new(folder).join(name).exists())
}

/// All that the table means; `program` serves the volumes.
pub fn units(table: &Table, source: &Path, program: &Path, is_encrypted: &dyn Fn(&str) -> bool) -> Vec<Made> {
    let around = Surroundings { table: source, program, is_encrypted };
    let mut all: Vec<Made> = table.entries.iter().flat_map(|entry| of_entry(entry, &around)).collect();
    if !table.entries.is_empty() {
        all.push(Made { path: SLICE.0.into(), content: Content::Text(SLICE.1.into()) });
    }
    if table.entries.iter().any(|entry| !entry.options.netdev) {
        all.push(Made { path: "ublk-integrity.target".into(), content: Content::Text(TARGET.into()) });
        all.push(wanted("sysinit.target", "wants", "ublk-integrity.target"));
    }
    all
}

fn of_entry(entry: &Entry, around: &Surroundings<'_>) -> Vec<Made> {
    let name = unit::name(entry);
    let options = &entry.options;
    let mut all = vec![Made { path: name.clone(), content: Content::Text(unit::text(entry, around)) }];
    // Whoever wants the device, a mount for one, starts the unit; and waits for as long as that
    // takes.
    let device = unit::served_device(entry);
    all.push(wanted(&device, "requires", &name));
    all.push(drop_in(&device, "# The unit that serves it has a limit of its own\nJobRunningTimeoutSec=infinity"));
    if let Some(timeout) = options.timeout {
        let setting = format!("JobRunningTimeoutSec={}s", timeout.as_secs());
        all.extend(unit::backing_devices(entry).iter().map(|device| drop_in(device, &setting)));
    }
    // Not before it is served: of one that is not there there is nothing to verify.
    if options.scrub {
        let timer = unit::scrub_timer(entry);
        all.push(wanted(&name, "wants", &timer));
        // Nor when it is not served any more. It must not need the volume: the two would need each other, and systemd starts what
        // does so with whatever else it starts, also after a stop. What `del` has ended is left to a condition of its service.
        all.push(drop_in(&timer, &format!("PartOf={name}\nAfter={name}")));
    }
    if !options.noauto {
        all.push(wanted(unit::goal(entry), if options.nofail { "wants" } else { "requires" }, &name));
    }
    all
}

fn wanted(by: &str, how: &str, unit: &str) -> Made {
    Made { path: format!("{by}.{how}/{unit}"), content: Content::Link(format!("../{unit}")) }
}

fn drop_in(unit: &str, setting: &str) -> Made {
    let text = format!("# Made by ublk-integrity-generator\n\n[Unit]\n{setting}\n");
    Made { path: format!("{unit}.d/50-ublk-integrity.conf"), content: Content::Text(text) }
}

impl Made {
    /// Makes it in `folder`.
    pub fn write(&self, folder: &Path) -> io::Result<()> {
        let path = folder.join(&self.path);
        path.parent().map_or(Ok(()), fs::create_dir_all)?;
        let done = match &self.content {
            // What another generator has put there stays.
            Content::Text(text) => OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o644)
                .open(&path)
                .and_then(|mut file| file.write_all(text.as_bytes())),
            Content::Link(target) => symlink(target, &path),
        };
        match done {
            // Two volumes on one device, each with a timeout: the first counts.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && self.path.contains('/') => Ok(()),
            done => done,
        }
    }
}

#[cfg(test)]
mod tests;

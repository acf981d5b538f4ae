//! The text of a unit that serves one volume.

use super::{
    escape,
    table::{Entry, Key, Place},
};
use std::{
    fmt::Write,
    path::{Path, PathBuf},
};

/// What all of them have in common. The daemon must outlive what is mounted on its device, and what
/// is killed at the end of a shutdown; and nothing here may give it a mount namespace: what it
/// keeps in memory for its successor would go with that.
const SERVICE: &str = "\
Type=notify
NotifyAccess=exec
TimeoutStopSec=infinity
Restart=on-abnormal
RestartSec=500ms
KillMode=mixed
KillSignal=SIGTERM
SendSIGKILL=no
SurviveFinalKillSignal=yes
OOMScoreAdjust=-1000
ManagedOOMPreference=omit
LimitMEMLOCK=infinity
LimitCORE=0
NoNewPrivileges=yes
CapabilityBoundingSet=CAP_SYS_ADMIN CAP_IPC_LOCK CAP_SYS_RESOURCE CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_CHOWN CAP_KILL CAP_SYS_PTRACE
RestrictAddressFamilies=AF_UNIX
RestrictNamespaces=mnt
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
";

/// Seconds that a start may take beside the wait for disks; while the volume is opened the daemon
/// asks for more.
const START: u64 = 120;

/// What a unit's text depends on besides the line of the table.
pub(super) struct Surroundings<'a> {
    /// The table.
    pub(super) table: &'a Path,
    /// The program.
    pub(super) program: &'a Path,
    /// Whether a credential of this name is there encrypted.
    pub(super) is_encrypted: &'a dyn Fn(&str) -> bool,
}

/// The unit's name.
pub(super) fn name(entry: &Entry) -> String {
    format!("ublk-integrity@{}.service", escape::text(entry.name.as_str()))
}

/// The timer of its verification, of a template that is installed.
pub(super) fn scrub_timer(entry: &Entry) -> String {
    format!("ublk-integrity-scrub@{}.timer", escape::text(entry.name.as_str()))
}

/// Its device unit: what mounts of `/dev/ublk-integrity/NAME` wait for.
pub(super) fn served_device(entry: &Entry) -> String {
    format!("{}.device", escape::path(&entry.name.link()))
}

/// Where udev puts the device, or a link to it.
pub(super) fn node(place: &Place) -> PathBuf {
    let below = |folder: &str, name: &str| Path::new("/dev/disk").join(folder).join(name);
    match place {
        Place::Path(path) => path.clone(),
        Place::Volume(uuid) => below("by-uuid", &uuid.to_string()),
        Place::PartUuid(uuid) => below("by-partuuid", &escape::link(uuid)),
        Place::Label(label) => below("by-label", &escape::link(label)),
        Place::PartLabel(label) => below("by-partlabel", &escape::link(label)),
    }
}

/// The units of the devices that the volume lies on, those in files left out.
pub(super) fn backing_devices(entry: &Entry) -> Vec<String> {
    let nodes = places(entry).map(node).filter(|node| node.starts_with("/dev"));
    nodes.map(|node| format!("{}.device", escape::path(&node))).collect()
}

fn places(entry: &Entry) -> impl Iterator<Item = &Place> {
    std::iter::once(&entry.data).chain(&entry.options.meta)
}

/// All of the unit.
pub(super) fn text(entry: &Entry, around: &Surroundings<'_>) -> String {
    let mut unit = Text(String::new());
    unit.line("# Made by ublk-integrity-generator");
    unit.line("\n[Unit]");
    unit.set("Description", format_args!("Authenticated volume {}", entry.name));
    unit.set("Documentation", "man:ublk-integritytab(5) man:ublk-integrity(8)");
    unit.set("SourcePath", specifiers(around.table));
    unit.line("DefaultDependencies=no\nIgnoreOnIsolate=yes\nStartLimitIntervalSec=60\nStartLimitBurst=10");
    unit.line("Wants=modprobe@ublk_drv.service\nAfter=modprobe@ublk_drv.service systemd-udevd-kernel.socket");
    for device in backing_devices(entry) {
        unit.line(format_args!("BindsTo={device}\nAfter={device}"));
    }
    let target = format!("blockdev@{}.target", escape::path(&entry.name.link()));
    unit.line(format_args!("Wants={target}\nBefore={target}"));
    order(&mut unit, entry);
    for path in needed_files(entry) {
        unit.set("RequiresMountsFor", quoted(&path));
    }
    unit.line("\n[Service]");
    let program = quoted(around.program);
    // A name that begins with @ tells systemd-shutdown of before SurviveFinalKillSignal= to leave
    // the process alone.
    let table = if around.table == Path::new(super::table::TABLE) {
        String::new()
    } else {
        format!(" --table {}", argument(around.table))
    };
    unit.line(format_args!("ExecStart=@{program} @ublk-integrity attach --foreground{table} {}", entry.name));
    unit.line(format_args!("ExecReload={program} upgrade --reload -n {}", entry.name));
    match &entry.key {
        Key::Credential(name) if (around.is_encrypted)(name) => unit.set("LoadCredentialEncrypted", name),
        Key::Credential(name) => unit.set("LoadCredential", name),
        // A session keyring of the unit's own would not lead to what `keyctl padd user NAME @u` has
        // added.
        Key::Keyring(_) => unit.set("KeyringMode", "shared"),
        Key::File(_) => {}
    }
    unit.set("TimeoutStartSec", format_args!("{}s", start_limit(entry)));
    unit.0.push_str(SERVICE);
    unit.0
}

/// Seconds within which it must have started: `attach` waits as long as the line says
/// for each of its disks.
fn start_limit(entry: &Entry) -> u64 {
    let disks = places(entry).count() as u64;
    START + disks * entry.options.timeout.unwrap_or_default().as_secs()
}

/// When it starts and ends, beside others.
fn order(unit: &mut Text, entry: &Entry) {
    let options = &entry.options;
    // What the root file system lies on stays until the machine stops.
    if !options.initrd {
        unit.line("Conflicts=umount.target\nBefore=umount.target");
    }
    if options.netdev {
        unit.line("Wants=network-online.target\nAfter=network-online.target remote-fs-pre.target");
    }
    if !options.nofail {
        unit.set("Before", goal(entry));
    }
}

/// The target that wants it at boot.
pub(super) fn goal(entry: &Entry) -> &'static str {
    if entry.options.netdev { "remote-fs.target" } else { "ublk-integrity.target" }
}

/// Files whose file systems must be mounted before.
fn needed_files(entry: &Entry) -> Vec<PathBuf> {
    let key = if let Key::File(path) = &entry.key { Some(path.clone()) } else { None };
    let files = places(entry).filter_map(|place| match place {
        Place::Path(path) if !path.starts_with("/dev") => Some(path.clone()),
        _ => None,
    });
    let anchor = entry.options.anchor.as_ref().and_then(|place| place.file()).map(Path::to_owned);
    key.into_iter().chain(anchor).filter(|path| !path.starts_with("/dev")).chain(files).collect()
}

/// Lines of a unit.
struct Text(String);

impl Text {
    fn line(&mut self, line: impl std::fmt::Display) {
        writeln!(self.0, "{line}").expect("a string takes everything");
    }

    fn set(&mut self, name: &str, value: impl std::fmt::Display) {
        self.line(format_args!("{name}={value}"));
    }
}

fn specifiers(path: &Path) -> String {
    path.display().to_string().replace('%', "%%")
}

/// A path as one word of a unit, and as itself: without blanks, quotes or specifiers taken for more.
fn quoted(path: &Path) -> String {
    let text = specifiers(path);
    match text.contains(|c: char| c.is_whitespace() || "\"'\\".contains(c)) {
        true => format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"")),
        false => text,
    }
}

/// A path as an argument of a command, in which systemd puts variables. Nowhere else does it, not
/// even in the program's path.
fn argument(path: &Path) -> String {
    quoted(path).replace('$', "$$")
}

//! Whether the daemon of a device is the main process of a unit of systemd, and then which.

use std::{fs, process::Command};

/// The unit that a daemon is the main process of: systemd would take its end for the unit's, but for
/// where it has asked itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Unit {
    /// One of ours: `systemctl reload` has it run `upgrade --reload`.
    Reloads(String),
    /// Another, of which systemd starts the next daemon, too.
    Restarts(String),
}

impl Unit {
    /// That of a process.
    pub(super) fn of(pid: u32) -> Option<Self> {
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let unit = service_in(&groups)?;
        match shown(unit) {
            Some(shown) => main_of(unit, pid, &shown),
            // Where systemd does not answer, the words with which it was started say so.
            None => {
                let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                stays(&words).then(|| Self::Restarts(unit.to_owned()))
            }
        }
    }
}

/// The service whose control group that is.
fn service_in(groups: &str) -> Option<&str> {
    groups.lines().find_map(|line| line.rsplit('/').next().filter(|name| name.ends_with(".service")))
}

/// What systemd knows of a unit, as `NAME=VALUE` lines.
fn shown(unit: &str) -> Option<String> {
    let mut command = Command::new("systemctl");
    let shown = command.args(["show", "--property=MainPID,CanReload", unit]).output().ok()?;
    String::from_utf8(shown.stdout).ok().filter(|_| shown.status.success())
}

fn main_of(unit: &str, pid: u32, shown: &str) -> Option<Unit> {
    let says = |line: String| shown.lines().any(|shown| shown == line);
    if !says(format!("MainPID={pid}")) {
        return None;
    }
    let reloads = unit.starts_with("ublk-integrity@") && says("CanReload=yes".into());
    Some(if reloads { Unit::Reloads(unit.into()) } else { Unit::Restarts(unit.into()) })
}

/// Whether a command line is that of a daemon which has not left whoever started it.
fn stays(command_line: &[u8]) -> bool {
    command_line.split(|byte| *byte == 0).any(|word| word == b"--foreground")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_main_process_of_a_unit_is_one() {
        let unit = "ublk-integrity@a.service";
        let shown = "MainPID=7\nCanReload=yes\n";
        assert_eq!(main_of(unit, 7, shown), Some(Unit::Reloads(unit.into())));
        assert_eq!(main_of(unit, 8, shown), None, "it was started by one");
        assert_eq!(main_of(unit, 7, "MainPID=7\nCanReload=no\n"), Some(Unit::Restarts(unit.into())));
        assert_eq!(main_of("own.service", 7, shown), Some(Unit::Restarts("own.service".into())), "whatever it runs");
        assert_eq!(main_of(unit, 7, "MainPID=70\nCanReload=yes\n"), None);
    }

    #[test]
    fn a_service_is_told_from_a_session() {
        let group = "0::/system.slice/system-ublk.slice/ublk-integrity@a.service\n";
        assert_eq!(service_in(group), Some("ublk-integrity@a.service"));
        assert_eq!(service_in("0::/user.slice/session-1.scope\n"), None);
        assert!(stays(b"@ublk-integrity\0attach\0--foreground\0a\0"));
        assert!(!stays(b"ublk-integrity\0add\0"), "it has left its caller");
    }
}

//! The daemon that serves until now, and its program.

use super::Undone;
use crate::{
    daemon::{
        RESTS_WITHIN, client,
        life::Life,
        protocol::Request,
        state::{State, socket_path},
    },
    failure::{Context, Exit, Failure, Outcome},
    notice::Notice,
    output, ublk,
    wait::{LONGEST, WORD_AFTER},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    ffi::OsString,
    fs::{self, File},
    os::{fd::AsRawFd, unix::process::CommandExt},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// How long it may take to close the volume and end.
const ENDS_WITHIN: Duration = LONGEST;
/// Between two looks whether it is.
const PAUSE: Duration = Duration::from_millis(5);

/// A daemon that lives.
pub(super) struct DaemonBefore<'s> {
    state: &'s State,
    life: Life,
    /// Its program, which may have no name any more.
    program: File,
}

impl<'s> DaemonBefore<'s> {
    /// That of a device, if it can be followed by another.
    pub(super) fn of(state: &'s State) -> Outcome<Self> {
        let (id, pid) = (state.id, state.pid);
        let Some(life) = state.watch() else {
            let message = format!("its daemon (pid {pid}) is dead: {}", state.remedy());
            return Err(Failure::new(Exit::Device, message));
        };
        if !state.settings.recovery {
            let message =
                format!("it was added with --no-recovery, and ends with its daemon: `del -n {id}`, then `add`");
            return Err(Failure::new(Exit::Device, message));
        }
        if let Some(unit) = unit_of(pid) {
            let message = format!(
                "systemd started its daemon and starts the next one, too: `systemctl kill --signal=SIGKILL {unit}` has it do so, with the program that is installed"
            );
            return Err(Failure::new(Exit::Busy, message));
        }
        let program =
            File::open(format!("/proc/{pid}/exe")).doing(format_args!("can't open the program of pid {pid}"))?;
        Ok(Self { state, life, program })
    }

    /// The version of its program.
    pub(super) fn version(&self) -> &str {
        self.state.version.as_deref().unwrap_or("an older version")
    }

    /// What of the format its program says that it serves; older ones can't say.
    pub(super) fn known_format(&self) -> Option<String> {
        let known = self.command().arg("known-format").stdout(Stdio::piped()).stderr(Stdio::null()).output().ok()?;
        String::from_utf8(known.stdout).ok().filter(|_| known.status.success())
    }

    /// Has it end, and the device wait for the next: in good order, or by SIGKILL where it is too
    /// old for that.
    pub(super) fn end(&self) -> Result<(), Undone> {
        let (id, pid) = (self.state.id, self.state.pid);
        let device = ublk::block_path(id);
        let device = device.display();
        let limit = RESTS_WITHIN + ENDS_WITHIN;
        let (rests, ends) = (RESTS_WITHIN.as_secs(), ENDS_WITHIN.as_secs());
        let word = format!(
            "waiting for the requests of {device}, at most {rests} s, and for its daemon (pid {pid}) to close the volume, at most {ends} s"
        );
        let _word = Notice::after(WORD_AFTER, move || output::tell(word));
        let goes_on = |why: &str| Failure::new(Exit::Busy, format_args!("{device} goes on as before: {why}"));
        let unanswered = match client::answer(limit, &socket_path(id), &Request::HandOver {}) {
            Ok(answer) => match answer["error"].as_str() {
                Some(why) if !why.contains("knows no") => return Err(goes_on(why).into()),
                None if answer["closed"].is_boolean() => None,
                // One that knows no requests sends what it knows to whoever connects.
                _ => {
                    self.kill();
                    None
                }
            },
            Err(why) => Some(why),
        };
        // One that has not answered may be dying.
        if self.has_ended_within(ENDS_WITHIN) {
            return Ok(());
        }
        Err(match unanswered {
            Some(client::Unanswered::Failed(failure)) => goes_on(&failure.message).exiting(failure.exit).into(),
            _ => {
                let seconds = limit.as_secs();
                let message = format!(
                    "{device} waits for its daemon (pid {pid}), which has not closed the volume within {seconds} s: its disks may stand still; when it has ended: `recover -n {id}`"
                );
                Undone { failure: Failure::new(Exit::Device, message), waits: true }
            }
        })
    }

    fn kill(&self) {
        let (device, pid) = (ublk::block_path(self.state.id), self.state.pid);
        output::tell(format_args!(
            "the daemon of {} (pid {pid}) is too old to hand over: it is killed, and the device recovered; nothing is lost",
            device.display()
        ));
        // Still the one that holds the lock: nobody else has its number.
        if self.state.is_alive() {
            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
        }
    }

    fn has_ended_within(&self, limit: Duration) -> bool {
        let begun = Instant::now();
        while self.life.goes_on() {
            if begun.elapsed() >= limit {
                return false;
            }
            thread::sleep(PAUSE);
        }
        true
    }

    /// Has its program recover the device, with this key where one is given. What goes wrong has
    /// been said then.
    pub(super) fn recover(&self, key: &[OsString]) -> bool {
        let mut command = self.command();
        command.args(["recover", "-n", &self.state.id.to_string()]).args(key);
        command.stdout(Stdio::null()).status().is_ok_and(|status| status.success())
    }

    /// Its program, out of reach of the terminal's signals.
    fn command(&self) -> Command {
        let mut command = Command::new(format!("/proc/self/fd/{}", self.program.as_raw_fd()));
        command.stdin(Stdio::null()).process_group(0);
        command
    }
}

/// The unit that a daemon is the main process of: systemd would take its end for the unit's.
fn unit_of(pid: u32) -> Option<String> {
    let read = |what: &str| fs::read(format!("/proc/{pid}/{what}")).unwrap_or_default();
    unit_in(&read("environ"), &read("cmdline"), &String::from_utf8_lossy(&read("cgroup")))
}

fn unit_in(environment: &[u8], command_line: &[u8], groups: &str) -> Option<String> {
    let notifies = environment.split(|byte| *byte == 0).any(|variable| variable.starts_with(b"NOTIFY_SOCKET="));
    let stays = command_line.split(|byte| *byte == 0).any(|word| word == b"--foreground");
    let unit = groups.lines().find_map(|line| line.rsplit('/').next().filter(|name| name.ends_with(".service")))?;
    (notifies && stays).then(|| unit.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_main_process_of_a_unit_is_one() {
        let (environment, words) =
            (b"A=b\0NOTIFY_SOCKET=/run/systemd/notify\0", b"@ublk-integrity\0attach\0--foreground\0a\0");
        let group = "0::/system.slice/system-ublk.slice/ublk-integrity@a.service\n";
        assert_eq!(unit_in(environment, words, group).as_deref(), Some("ublk-integrity@a.service"));
        assert_eq!(unit_in(b"A=b\0", words, group), None, "nobody waits for its word");
        assert_eq!(unit_in(environment, b"ublk-integrity\0add\0", group), None, "it has left its caller");
        assert_eq!(unit_in(environment, words, "0::/user.slice/session-1.scope\n"), None);
    }
}

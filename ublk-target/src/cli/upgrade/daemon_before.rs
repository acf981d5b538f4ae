//! The daemon that serves until now, and its program.

use super::{
    super::{
        control_group::{self, Keeper},
        session,
    },
    Device, Undone, within,
};
use crate::{
    daemon::{
        RESTS_WITHIN,
        client::{self, Unanswered},
        life::Life,
        protocol::HandOver,
        state::{State, socket_path},
    },
    failure::{Context, Exit, Failure, Outcome},
    notice::Notice,
    os, output, ublk,
    wait::{LONGEST, WORD_AFTER},
};
use memmap2::Mmap;
use std::{
    ffi::{OsStr, OsString},
    fs::{self, File, Metadata},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::MetadataExt, process::CommandExt},
    },
    process::{Command, Stdio},
    time::Duration,
};

/// How long the requests under way may take, and the daemon to say so.
const ANSWERS_WITHIN: Duration = RESTS_WITHIN.saturating_add(Duration::from_secs(5));
/// How long it may take to close the volume and end, before the successor waits for that alone.
const ENDS_WITHIN: Duration = LONGEST;

/// A daemon that lives.
pub(super) struct DaemonBefore<'s> {
    state: &'s State,
    life: Life,
    process: OwnedFd,
    /// Its program, which may have no name any more.
    program: File,
}

impl<'s> DaemonBefore<'s> {
    /// That of a device.
    pub(super) fn of(state: &'s State) -> Outcome<Self> {
        let pid = state.pid;
        let dead = || Failure::new(Exit::Device, format_args!("its daemon (pid {pid}) is dead: {}", state.remedy()));
        let life = state.watch().ok_or_else(dead)?;
        let process = os::open_process(pid).doing(format_args!("can't open pid {pid}"))?;
        let program =
            File::open(format!("/proc/{pid}/exe")).doing(format_args!("can't open the program of pid {pid}"))?;
        // It lives yet, so nobody else has had its number when we opened these.
        if !life.goes_on() || !state.is_current() {
            return Err(dead());
        }
        Ok(Self { state, life, process, program })
    }

    /// Whether it runs this file.
    pub(super) fn runs(&self, file: &Metadata) -> bool {
        let runs = self.program.metadata();
        runs.is_ok_and(|runs| (runs.dev(), runs.ino()) == (file.dev(), file.ino()))
    }

    /// Refuses what no other daemon can follow, or must not.
    pub(super) fn refuse(&self) -> Outcome {
        let State { id, settings, .. } = self.state;
        if !settings.recovery {
            let message =
                format!("it was added with --no-recovery, and ends with its daemon: `del -n {id}`, then `add`");
            return Err(Failure::new(Exit::Device, message));
        }
        Ok(())
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

    /// Puts its successor where this one is accounted for and ends: not with whoever calls us, whose session or unit may
    /// end. Where this one is in a session itself, as those of older programs are, the successor gets a scope of its own. What
    /// keeps that place for whoever serves in the end.
    pub(super) fn make_room_for(&self, pid: u32) -> Option<Keeper> {
        let device = ublk::block_path(self.state.id);
        let device = device.display();
        let apart = session::of(self.state.pid).map(|session| (session::move_out(pid), session));
        let is_apart = matches!(apart, Some((Ok(()), _)));
        if let Some((Err(why), session)) = apart {
            output::warn(format_args!("the daemon of {device} goes on in {session}: {why}"));
        }
        let placed = if is_apart { Ok(()) } else { control_group::join(pid, self.state.pid) };
        let kept = placed.and_then(|()| Keeper::beside(pid));
        kept.inspect_err(|e| {
            output::warn(format_args!("the new daemon of {device} stays in the control group of this command: {e}"));
        })
        .ok()
    }

    /// Its program, in memory: where it lies on the device itself it can't be read when it is needed.
    pub(super) fn hold_program(&self) -> io::Result<Mmap> {
        os::hold_in_memory(&self.program)
    }

    /// Has it end, and the device wait for the next: in good order, or by SIGKILL where it is too
    /// old for that.
    pub(super) fn end(&self) -> Result<(), Undone> {
        let (id, pid) = (self.state.id, self.state.pid);
        let device = ublk::block_path(id);
        let device = device.display();
        let (rests, ends) = (RESTS_WITHIN.as_secs(), ENDS_WITHIN.as_secs());
        let word = format!(
            "waiting for the requests of {device}, at most {rests} s, and for its daemon (pid {pid}) to close the volume, at most {ends} s"
        );
        let _word = Notice::after(WORD_AFTER, move || output::tell(word));
        let goes_on = |why: &str| Failure::new(Exit::Busy, format_args!("{device} goes on as before: {why}"));
        let unanswered = match client::hand_over(ANSWERS_WITHIN, &socket_path(id), pid) {
            Ok(HandOver::Closing) => None,
            Ok(HandOver::Unknown) => {
                self.kill();
                None
            }
            Ok(HandOver::Refused(why)) => return Err(goes_on(&why).into()),
            // Nobody listens any more: it can't hand over later.
            Err(Unanswered::Late) => {
                let seconds = ANSWERS_WITHIN.as_secs();
                return Err(goes_on(&format!("its daemon (pid {pid}) has not answered within {seconds} s")).into());
            }
            // It may be dying.
            Err(Unanswered::Absent(failure) | Unanswered::Refused(failure)) => Some(failure),
        };
        if self.has_ended_within(ENDS_WITHIN) {
            return Ok(());
        }
        Err(match unanswered {
            Some(failure) => goes_on(&failure.message).exiting(failure.exit).into(),
            None => {
                let message = format!(
                    "{device} waits for its daemon (pid {pid}), which has not closed the volume within {ends} s: its disks may stand still. The new one follows by itself as soon as that ends; `kill -9 {pid}` ends it now, and nothing is lost"
                );
                Undone { failure: Failure::new(Exit::Device, message), device: Device::IsClosed }
            }
        })
    }

    fn kill(&self) {
        let (device, pid) = (ublk::block_path(self.state.id), self.state.pid);
        output::tell(format_args!(
            "the daemon of {} (pid {pid}) is too old to hand over: it is killed, and the device recovered; nothing is lost",
            device.display()
        ));
        // Gone already where that fails.
        let _ = os::kill_process(&self.process);
    }

    fn has_ended_within(&self, limit: Duration) -> bool {
        within(limit, || !self.life.goes_on())
    }

    /// Has its program recover the device, with this key where one is given, in the place that is kept. What goes wrong
    /// has been said then.
    pub(super) fn recover(&self, key: &[OsString], place: Option<&Keeper>) -> bool {
        let mut command = self.command();
        command.args(["recover", "-n", &self.state.id.to_string()]).args(key);
        if !command.stdout(Stdio::null()).status().is_ok_and(|status| status.success()) {
            return false;
        }
        if let (Some(place), Some(pid)) = (place, self.state.follower()) {
            if let Err(e) = place.joined_by(pid) {
                let device = ublk::block_path(self.state.id);
                let device = device.display();
                output::warn(format_args!("the daemon of {device} stays in the control group of this command: {e}"));
            }
        }
        true
    }

    /// Its program, out of reach of the terminal's signals.
    fn command(&self) -> Command {
        let mut command = Command::new(format!("/proc/self/fd/{}", self.program.as_raw_fd()));
        command.stdin(Stdio::null()).process_group(0);
        // By such a name systemd knows whom to spare at the end of a shutdown.
        let words = fs::read(format!("/proc/{}/cmdline", self.state.pid)).unwrap_or_default();
        if let Some(name) = words.split(|byte| *byte == 0).next().filter(|name| name.starts_with(b"@")) {
            command.arg0(OsStr::from_bytes(name));
        }
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{daemon::life::lock_current_within, wait::Wait};
    use nix::fcntl::FlockArg;

    #[test]
    fn a_program_is_known_by_its_file() {
        let mut state = State::of_test(u32::MAX);
        state.pid = std::process::id();
        let own = "/proc/self/exe";
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("0.lock");
        let mut wait = Wait::up_to(Duration::ZERO, "nothing");
        let _held = lock_current_within(&path, FlockArg::LockExclusiveNonblock, &mut wait).unwrap();
        let before = DaemonBefore {
            life: Life::of(&path, state.pid).expect("its lock is held"),
            process: os::open_process(state.pid).unwrap(),
            program: File::open(own).unwrap(),
            state: &state,
        };
        assert!(before.runs(&fs::metadata(own).unwrap()) && !before.runs(&fs::metadata("/proc/self/cmdline").unwrap()));
        assert!(!before.has_ended_within(Duration::from_millis(5)));
    }

    #[test]
    fn only_the_process_that_was_opened_is_killed() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let process = os::open_process(child.id()).unwrap();
        os::kill_process(&process).unwrap();
        assert!(!child.wait().unwrap().success());
        assert!(os::kill_process(&process).is_err(), "whoever has its number now");
    }
}

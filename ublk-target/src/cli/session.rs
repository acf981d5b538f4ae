//! A daemon that somebody starts by hand is in the control group of their login session. systemd kills that at shutdown,
//! where it does not wait for what is mounted on the device, or when the session ends. So the daemon gets a scope of its own in
//! system.slice, which ends as the unit of a device does: it is asked to when file systems are unmounted, and nobody kills it.

use super::control_group;
use crate::{output, random::random, wait::Wait};
use nix::{
    sys::wait::{Id, WaitPidFlag, WaitStatus, waitid},
    unistd::{Pid, geteuid},
};
use std::{
    env,
    ffi::OsString,
    fs,
    io::{self, Read},
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

/// What a daemon is called where systemd is the init: at the end of a shutdown that spares those of root whose name begins
/// so, and SIGTERM would be the second one, which does not wait for file systems.
pub(super) const STAYS: &str = "@ublk-integrity";

/// How long systemd may take to make a scope.
const WITHIN: Duration = Duration::from_secs(10);

/// Whether systemd is the init: sd_booted(3).
fn has_systemd() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// Runs this command once more, under the name by which systemd knows the daemon that it leaves behind. Where that fails it
/// goes on as it is.
pub(super) fn be_spared(args: &[OsString]) {
    let is_named = args.first().is_some_and(|name| name.as_encoded_bytes().starts_with(b"@"));
    if is_named || !geteuid().is_root() || !has_systemd() {
        return;
    }
    // By its own name processes are listed; one that was replaced has none any more.
    let program = env::current_exe().ok().filter(|path| path.exists());
    let program = program.unwrap_or_else(|| "/proc/self/exe".into());
    let _ = Command::new(program).arg0(STAYS).args(args.iter().skip(1)).exec();
}

/// The session that a process is in, if it is in one, and that is systemd's.
pub(super) fn of(pid: u32) -> Option<String> {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok().filter(|_| has_systemd())?;
    session_in(&groups).map(str::to_owned)
}

/// That of control groups as /proc/PID/cgroup has them: logind's sessions and the managers of users are below one slice.
fn session_in(groups: &str) -> Option<&str> {
    let of_systemd = |line: &&str| line.starts_with("0::") || line.contains(":name=systemd:");
    let groups = groups.lines().filter(of_systemd).filter_map(|line| line.splitn(3, ':').nth(2));
    let mut in_session = groups.filter(|group| group.split('/').any(|part| part == "user.slice"));
    in_session.find_map(|group| group.rsplit('/').next())
}

/// Takes a daemon, a child of ours, out of the session that it is in, if it is in one. Where that is not to be had it is
/// said what will come of it.
pub(super) fn take_out(pid: u32) {
    let Some(session) = of(pid) else { return };
    match move_out(pid) {
        Err(why) if !has_ended(pid) => output::warn(stays(pid, &session, &why)),
        _ => {}
    }
}

fn stays(pid: u32, session: &str, why: &str) -> String {
    format!(
        "the daemon (pid {pid}) stays in {session}: whoever ends that, as a shutdown does, may kill it below a mounted file system, and what was not synced is lost. Unmount and `del` before ({why})"
    )
}

/// A child that has failed has no need of a scope any more.
fn has_ended(pid: u32) -> bool {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    waitid(Id::Pid(Pid::from_raw(pid as i32)), flags).is_ok_and(|status| status != WaitStatus::StillAlive)
}

/// Puts a process into a scope of its own. systemd makes one for a process that it is asked by, so another goes first, and
/// takes the daemon after it: that needs no message bus.
pub(super) fn move_out(pid: u32) -> Result<(), String> {
    let what = format!("systemd, which is to take the daemon (pid {pid}) out of this session");
    let mut wait = Wait::up_to(WITHIN, what);
    let (unit, first) = under_a_free_name(pid, |unit| {
        let mut command = Command::new("systemd-run");
        command.args(scope(unit)).args(["--", "cat"]);
        First::run(command)?.gets_into(unit, &mut wait)
    })?;
    control_group::join(pid, first.0.id()).map_err(|e| format!("it can't be put into {unit}: {e}"))
}

/// Names that are tried: each is as good as unheard of.
const NAMES: usize = 3;

/// Makes a unit for process `pid` under a name that no other has. That of the process alone would not do: a daemon goes on in
/// the scope of the one before, and another process may have the number of that by now.
fn under_a_free_name<T>(pid: u32, mut make: impl FnMut(&str) -> Result<T, NotMade>) -> Result<(String, T), String> {
    let mut taken = String::new();
    for _ in 0..NAMES {
        let unit = name(pid, random().map_err(|failure| failure.message)?);
        match make(&unit) {
            Ok(made) => return Ok((unit, made)),
            Err(NotMade::NameTaken(said)) => taken = said,
            Err(NotMade::Other(why)) => return Err(why),
        }
    }
    Err(taken)
}

fn name(pid: u32, random: [u8; 4]) -> String {
    format!("ublk-integrity-{pid}-{:08x}.scope", u32::from_be_bytes(random))
}

/// Why there is no scope.
#[derive(Debug)]
enum NotMade {
    /// There is a unit of that name.
    NameTaken(String),
    Other(String),
}

/// The words that make the scope. It is stopped when file systems are unmounted, as the unit of a device is, and what is
/// mounted there keeps the daemon until then.
fn scope(unit: &str) -> impl Iterator<Item = String> {
    let properties = [
        "DefaultDependencies=no",
        "Conflicts=umount.target",
        "Before=umount.target",
        "SendSIGKILL=no",
        "ManagedOOMPreference=omit",
    ];
    let words = ["--quiet", "--scope", "--collect", "--no-ask-password", "--slice=system.slice"].map(str::to_owned);
    let named = [format!("--unit={unit}"), "--description=Daemon of an authenticated volume".into()];
    words.into_iter().chain(named).chain(properties.map(|property| format!("--property={property}")))
}

/// The process that has the scope first. It ends with this.
struct First(Child);

impl First {
    fn run(mut command: Command) -> Result<Self, NotMade> {
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).process_group(0);
        command.spawn().map(Self).map_err(|e| NotMade::Other(format!("systemd-run: {e}")))
    }

    /// Waits until it is in that unit.
    fn gets_into(mut self, unit: &str, wait: &mut Wait) -> Result<Self, NotMade> {
        while !self.is_in(unit) {
            if let Ok(Some(_)) = self.0.try_wait() {
                return Err(not_made(&self.said()));
            }
            if !wait.pause() {
                return Err(NotMade::Other(format!("systemd has not made a scope within {} s", WITHIN.as_secs())));
            }
        }
        Ok(self)
    }

    fn is_in(&self, unit: &str) -> bool {
        let groups = fs::read_to_string(format!("/proc/{}/cgroup", self.0.id())).unwrap_or_default();
        groups.lines().any(|line| line.rsplit('/').next() == Some(unit))
    }

    /// What it has said, once it has ended.
    fn said(&mut self) -> String {
        let mut said = String::new();
        let read = self.0.stderr.take().map_or(Ok(0), |mut pipe| pipe.read_to_string(&mut said));
        let line = said.lines().next().filter(|_| read.is_ok());
        line.map_or_else(|| "it has failed without a word".into(), str::to_owned)
    }
}

/// By what systemd-run has said.
fn not_made(said: &str) -> NotMade {
    let why = format!("systemd-run: {said}");
    // "Unit u.scope was already loaded or has a fragment file.", and of older ones "already exists."
    if said.contains(" already ") { NotMade::NameTaken(why) } else { NotMade::Other(why) }
}

impl Drop for First {
    fn drop(&mut self) {
        let _: io::Result<_> = self.0.kill().and_then(|()| self.0.wait());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_and_what_users_run_are_told_from_services() {
        assert_eq!(session_in("0::/user.slice/user-0.slice/session-3.scope\n"), Some("session-3.scope"));
        let desktop = "0::/user.slice/user-1000.slice/user@1000.service/app.slice/vte-spawn-1.scope\n";
        assert_eq!(session_in(desktop), Some("vte-spawn-1.scope"));
        assert_eq!(session_in("4:memory:/\n1:name=systemd:/user.slice/session-c1.scope\n"), Some("session-c1.scope"));
        for other in [
            "0::/system.slice/system-ublk\\x2dintegrity.slice/ublk-integrity@a.service\n",
            "0::/system.slice/ublk-integrity-7.scope\n",
            "0::/system.slice/cron.service\n",
            "4:memory:/user.slice\n0::/init.scope\n",
            "0::/\n",
            "",
        ] {
            assert_eq!(session_in(other), None, "{other}");
        }
    }

    #[test]
    fn what_stays_in_a_session_is_said_with_what_to_do() {
        let said = stays(7, "session-3.scope", "systemd-run: it is not there");
        for word in ["pid 7", "session-3.scope", "shutdown", "lost", "`del`", "it is not there"] {
            assert!(said.contains(word), "{said}");
        }
        assert!(!has_ended(std::process::id()), "it is no child of ours");
    }

    #[test]
    fn no_two_scopes_have_a_name_in_common() {
        assert_eq!(name(7, [0, 1, 2, 0xff]), "ublk-integrity-7-000102ff.scope");
        // One that lives yet, of a process that had this number before.
        let taken = "Failed to start transient scope unit: Unit u.scope was already loaded or has a fragment file.";
        let make = |frees: usize| {
            let mut asked = Vec::new();
            let made = under_a_free_name(7, |unit| {
                asked.push(unit.to_owned());
                if asked.len() >= frees { Ok(()) } else { Err(not_made(taken)) }
            });
            (made, asked)
        };
        let (made, asked) = make(2);
        assert_eq!(made.unwrap().0, asked[1]);
        assert!(
            asked.len() == 2 && asked[0] != asked[1] && asked.iter().all(|unit| session_of_none(unit)),
            "{asked:?}"
        );
        let (made, asked) = make(usize::MAX);
        assert!(made.unwrap_err().contains(taken) && asked.len() == NAMES);
        let other =
            under_a_free_name::<()>(7, |_| Err(not_made("Failed to connect to bus: No such file or directory")));
        assert_eq!(other.unwrap_err(), "systemd-run: Failed to connect to bus: No such file or directory");
    }

    fn session_of_none(unit: &str) -> bool {
        session_in(&format!("0::/system.slice/{unit}\n")).is_none()
    }

    #[test]
    fn who_makes_a_scope_and_fails_is_heard() {
        let command = |line: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", line]);
            First::run(command).unwrap()
        };
        let mut first = command("echo 'Failed to connect' >&2; echo more >&2; exit 1");
        assert!(!first.0.wait().unwrap().success());
        assert_eq!(first.said(), "Failed to connect");
        let mut silent = command("exit 1");
        let _ = silent.0.wait();
        assert_eq!(silent.said(), "it has failed without a word");
        let waits = command("cat");
        assert!(!waits.is_in("ublk-integrity-7.scope"));
        let pid = waits.0.id();
        drop(waits);
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "it ends with us");
    }

    #[test]
    fn the_scope_is_stopped_with_the_mounts_and_nobody_kills_it() {
        let words: Vec<_> = scope("u.scope").collect();
        let properties = ["Conflicts=umount.target", "SendSIGKILL=no", "ManagedOOMPreference=omit"];
        let properties = properties.map(|property| format!("--property={property}"));
        for word in properties.iter().chain([&"--unit=u.scope".to_owned()]) {
            assert!(words.iter().any(|has| has == word), "{word}");
        }
    }
}

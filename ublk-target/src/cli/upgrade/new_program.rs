//! The program that is to serve, and its daemons.

use super::{super::session, wish::Wish, within};
use crate::{
    daemon::{
        launch::{Listening, Silence},
        notify::Notify,
    },
    failure::{Context, Exit, Failure, Outcome},
    key::KeySource,
    ublk,
};
use nix::unistd::Pid;
use std::{
    ffi::OsString,
    fs::Metadata,
    os::{fd::OwnedFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

/// How long the successor may be silent until it is ready. It waits for a device for half of that at
/// most.
const READY: Silence = Silence { most: Duration::from_secs(60), late: "the new program was not ready" };
/// How long it may be silent until it serves, before the program of before gets the device.
const SERVES: Silence = Silence { most: Duration::from_secs(60), late: "the new program did not serve" };
/// How long it may take to end.
const ENDS_WITHIN: Duration = Duration::from_secs(10);

/// This very program, whatever has become of its file.
const OURSELVES: &str = "/proc/self/exe";

/// The program.
pub(super) struct NewProgram {
    /// What is started.
    path: PathBuf,
    /// What it is called.
    name: String,
    file: Metadata,
    /// Where the key is, as an option.
    key: Vec<OsString>,
    /// How many bytes the volume is to have from then on, where that is another size.
    grow: Option<u64>,
    /// systemd, where it is a unit's reload that hands the device over.
    manager: Option<Notify>,
}

impl NewProgram {
    /// That of a path; this one, where there is none.
    pub(super) fn of(path: Option<&Path>, key: Option<KeySource>) -> Outcome<Self> {
        let name = path.map_or_else(|| "the new program".into(), |path| path.display().to_string());
        let path = path.unwrap_or(Path::new(OURSELVES));
        let what = format!("can't use {}", path.display());
        let file = path.metadata().doing(&what)?;
        // One without a slash would be looked for elsewhere.
        Ok(Self {
            path: std::path::absolute(path).doing(&what)?,
            name,
            file,
            key: key_words(key)?,
            grow: None,
            manager: None,
        })
    }

    /// The same, which has the volume grow to so many bytes.
    pub(super) fn growing(self, size: u64) -> Self {
        Self { grow: Some(size), ..self }
    }

    /// That which somebody wants of a unit's reload.
    pub(super) fn wished(wish: &Wish) -> Outcome<Self> {
        let new = Self::of(wish.binary.as_deref(), None)?;
        Ok(Self { key: wish.key.iter().map(OsString::from).collect(), grow: wish.grow, ..new })
    }

    /// What a unit's reload is to do to have the same effect.
    pub(super) fn wish(&self) -> Outcome<Wish> {
        // This very program has a name of its own.
        let path = if self.path == Path::new(OURSELVES) { self.path.read_link() } else { Ok(self.path.clone()) };
        let path = path.doing("can't tell where this program is")?;
        let key = self.key.iter().map(|word| word.to_str().map(str::to_owned)).collect::<Option<_>>();
        let key = key.ok_or_else(|| {
            Failure::new(Exit::Arguments, "the key's path is not UTF-8 and can't be passed on: use a link to it")
        })?;
        // One that was replaced since it runs: the unit's own then.
        Ok(Wish { binary: Some(path).filter(|path| path.exists()), key, grow: self.grow })
    }

    /// The same, from within the reload of the unit whose main process the daemon is.
    pub(super) fn in_reload(self, manager: Notify) -> Self {
        Self { manager: Some(manager), ..self }
    }

    /// Whether a unit's reload hands the device over.
    pub(super) fn is_in_reload(&self) -> bool {
        self.manager.is_some()
    }

    /// Tells systemd in a reload that the daemon of device `id` is the unit's main process from now
    /// on.
    pub(super) fn say_who_serves(&self, id: u32, pid: u32) {
        let device = ublk::block_path(id);
        let say = |manager: &Notify| manager.say(&format!("MAINPID={pid}\nSTATUS=serving {}", device.display()));
        self.manager.iter().for_each(say);
    }

    /// What it is called.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Where the key is, as an option of a command.
    pub(super) fn key(&self) -> &[OsString] {
        &self.key
    }

    /// Its file.
    pub(super) fn file(&self) -> &Metadata {
        &self.file
    }

    /// Starts one that is to follow the daemon of device `id`, whose program knows so much of the
    /// format, where it can say.
    pub(super) fn start(&self, id: u32, known_format: Option<String>) -> Outcome<Successor> {
        let mut command = Command::new(&self.path);
        command.args(["recover", "--successor", "-n", &id.to_string()]).args(&self.key);
        command.args(self.grow.into_iter().flat_map(|size| ["--grow".into(), size.to_string()]));
        command.args(known_format.into_iter().flat_map(|known| ["--known-format".into(), known]));
        if self.is_in_reload() {
            command.arg("--foreground");
        }
        let started = command.arg0(session::STAYS).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = started.doing(format_args!("can't start {}", self.name))?;
        let pipe = child.stdout.take().expect("asked for");
        let listening = Listening::of(OwnedFd::from(pipe), Pid::from_raw(child.id() as i32));
        Ok(Successor { child, listening, name: self.name.clone() })
    }
}

/// Both programs may need it.
fn key_words(key: Option<KeySource>) -> Outcome<Vec<OsString>> {
    let Some(key) = key else { return Ok(Vec::new()) };
    if key.is_standard_input() {
        let message = "a key from a pipe is read once, and two programs may need it: give it with --key-file FILE";
        return Err(Failure::new(Exit::Arguments, message));
    }
    let (option, value) = key.option();
    Ok(vec![option.into(), value])
}

/// A daemon that is to follow another. Where this is dropped it asks that one by itself whether it
/// goes on, and ends if so.
pub(super) struct Successor {
    child: Child,
    listening: Listening,
    name: String,
}

impl Successor {
    /// Its process.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it has done all that can be done beforehand. The version of its program.
    pub(super) fn ready(&mut self) -> Outcome<String> {
        let name = &self.name;
        let ready = self.listening.ready(READY)?;
        ready.ok_or_else(|| {
            let message = format!("{name} ended before it was ready: is it a ublk-integrity that knows `upgrade`?");
            Failure::new(Exit::Device, message)
        })
    }

    /// Waits until it serves, now that the daemon before has ended. `what` it opens.
    pub(super) fn serve(&mut self, what: &str) -> Outcome {
        // It looks at once whether that is so.
        drop(self.child.stdin.take());
        self.listening.live(what, Some(SERVES)).map(drop)
    }

    /// Has it end: it does not serve, and is not to. Whether it has.
    pub(super) fn end(mut self) -> bool {
        drop(self.child.stdin.take());
        // One that has failed ends by itself, and gives the volume back in good order.
        if self.ends_within(ENDS_WITHIN) {
            return true;
        }
        let _ = self.child.kill();
        self.ends_within(ENDS_WITHIN)
    }

    /// Ends it at once, before it has had anything in hand.
    pub(super) fn dismiss(mut self) {
        let _ = self.child.kill();
        self.ends_within(ENDS_WITHIN);
    }

    fn ends_within(&mut self, limit: Duration) -> bool {
        within(limit, || !matches!(self.child.try_wait(), Ok(None)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_goes_to_both_programs_or_to_none() {
        let words = |key| key_words(key).map(|words| words.join(" ".as_ref())).map_err(|failure| failure.exit);
        assert_eq!(words(None).unwrap(), "");
        assert_eq!(words(Some(KeySource::File("/k".into()))).unwrap(), "--key-file /k");
        assert_eq!(words(Some(KeySource::Keyring("k".into()))).unwrap(), "--key keyring:k");
        assert_eq!(words(Some(KeySource::Stdin)), Err(Exit::Arguments));
    }

    /// A program that does what the shell is told.
    fn program(script: &str) -> (tempfile::TempDir, NewProgram) {
        use std::{fs, os::unix::fs::PermissionsExt};
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("program");
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let new = NewProgram::of(Some(&path), None).unwrap();
        (dir, new)
    }

    #[test]
    fn a_successor_is_heard_until_it_serves() {
        let (_dir, new) = program("echo \"R $*\"; read word; echo 'I it opens'; echo L 7");
        let mut successor = new.start(7, None).unwrap();
        assert_eq!(successor.ready().unwrap(), "recover --successor -n 7");
        successor.serve("it").unwrap();
        assert!(successor.end());
        let mut grows = new.growing(8192).start(7, None).unwrap();
        assert_eq!(grows.ready().unwrap(), "recover --successor -n 7 --grow 8192");
        grows.dismiss();
    }

    #[test]
    fn one_that_can_not_serve_says_why_or_is_found_out() {
        let ready = |script| {
            let (_dir, new) = program(script);
            let failure = new.start(7, None).unwrap().ready().unwrap_err();
            (failure.exit, failure.message)
        };
        assert_eq!(ready("echo F 2 wrong key; exit 2"), (Exit::KeyOrPermission, "wrong key".into()));
        let (exit, message) = ready("exit 3");
        assert!(exit == Exit::Device && message.contains("/program ended before it was ready"), "{message}");
        let (_dir, new) = program("echo R 1; read word; exit 1");
        let mut successor = new.start(7, None).unwrap();
        successor.ready().unwrap();
        assert_eq!(successor.serve("it").unwrap_err().exit, Exit::Device, "it has died without a word");
    }
}

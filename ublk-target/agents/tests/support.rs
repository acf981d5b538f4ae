//! What the tests of the agents share: processes that end with their test, and a client that does
//! about unknown outcomes what docs/anchor-protocol.md says.

use rustix::process::{Pid, Signal, kill_process};
use std::{
    fs,
    io::ErrorKind,
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};
use ublk_anchor_protocol::{Client, Error, Secret, Uuid};

/// How long anything may take on a busy machine. It only ends what hangs.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

pub(crate) const UUID: Uuid = Uuid([0x5a; 16]);

/// A process that ends with its test.
pub(crate) struct Process(Child);

impl Process {
    /// Starts it, or says that it is not installed.
    pub(crate) fn start(command: &mut Command) -> Option<Self> {
        match command.stdin(Stdio::null()).stdout(Stdio::null()).spawn() {
            Ok(child) => Some(Self(child)),
            Err(e) if e.kind() == ErrorKind::NotFound => {
                println!(
                    "skipped: {} is not installed; scripts/setup anchor does it",
                    command.get_program().to_string_lossy()
                );
                None
            }
            Err(e) => panic!("{command:?}: {e}"),
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }

    /// Stops it, and waits until it has stopped.
    pub(crate) fn stop(&self) {
        self.signal(Signal::STOP);
        wait_for("it stops", || self.status("State").starts_with('T'));
    }

    /// What the kernel says of it in a file of its own.
    pub(crate) fn file(&self, name: &str) -> String {
        fs::read_to_string(format!("/proc/{}/{name}", self.0.id())).unwrap()
    }

    /// One field of its status.
    pub(crate) fn status(&self, field: &str) -> String {
        let status = self.file("status");
        let value = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        value.unwrap_or_default().trim().to_owned()
    }

    pub(crate) fn go_on(&self) {
        self.signal(Signal::CONT);
    }

    /// Kills it: kill -9.
    pub(crate) fn kill(&mut self) {
        // One that has ended is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Waits for an event.
pub(crate) fn wait_for(what: &str, mut happened: impl FnMut() -> bool) {
    let since = Instant::now();
    while !happened() {
        assert!(since.elapsed() < LIMIT, "{what}: not within {LIMIT:?}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Two ports, one after the other, that nobody listens on now.
pub(crate) fn free_ports() -> [u16; 2] {
    loop {
        let first = TcpListener::bind("127.0.0.1:0").unwrap();
        let ports = [0, 1].map(|more| first.local_addr().unwrap().port().saturating_add(more));
        if TcpListener::bind(("127.0.0.1", ports[1])).is_ok() {
            return ports;
        }
    }
}

/// A client of an agent, which may start yet.
pub(crate) fn client(socket: &Path, secret: Option<Secret>, timeout: Duration) -> Client {
    let mut client = Client::new(socket, UUID, secret, timeout).unwrap();
    wait_for("the agent listens", || client.shape().is_ok());
    client
}

/// Asks what changes nothing until that is answered.
pub(crate) fn until_answered<T>(mut ask: impl FnMut() -> Result<T, Error>) -> T {
    let mut answer = None;
    wait_for("an answer", || match ask() {
        Ok(found) => {
            answer = Some(found);
            true
        }
        Err(Error::Away(_) | Error::Unknown(_)) => false,
        Err(e @ Error::Refused(_)) => panic!("{e}"),
    });
    answer.unwrap()
}

/// Runs a program of ours with bad arguments: its exit code, and what it says.
pub(crate) fn refused(program: &str, arguments: &[&str]) -> (i32, String) {
    let ended = Command::new(program).args(arguments).output().unwrap();
    let said = String::from_utf8(ended.stderr).unwrap();
    assert_eq!(said.lines().count(), 1, "{said}");
    (ended.status.code().unwrap(), said)
}

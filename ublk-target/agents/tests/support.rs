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
use ublk_anchor_protocol::{Body, Client, Error, Uuid};

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
        let status = format!("/proc/{}/status", self.0.id());
        wait_for("it stops", || fs::read_to_string(&status).is_ok_and(|status| status.contains("State:\tT")));
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

/// Ports that nobody listens on now.
pub(crate) fn free_ports<const N: usize>() -> [u16; N] {
    let listeners: [TcpListener; N] = std::array::from_fn(|_| TcpListener::bind("127.0.0.1:0").unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port())
}

/// A client of an agent, which may start yet.
pub(crate) fn client(socket: &Path, timeout: Duration) -> Client {
    let mut client = Client::new(socket, UUID, None, timeout).unwrap();
    wait_for("the agent listens", || client.shape().is_ok());
    client
}

pub(crate) fn body(number: u64) -> Body {
    let mut body = Body([0; Body::BYTES]);
    body.0[..8].copy_from_slice(&number.to_le_bytes());
    body
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

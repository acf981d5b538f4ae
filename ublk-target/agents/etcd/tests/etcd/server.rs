//! An etcd of one member on this machine, and agents of it.

use crate::{
    AGENT,
    support::{LIMIT, Process, client, free_ports},
};
use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};
use tempfile::TempDir;
use ublk_anchor_protocol::Client;

/// An etcd, and the folder of all that belongs to it.
pub(crate) struct Etcd {
    pub(crate) process: Process,
    pub(crate) ports: [u16; 2],
    tls: bool,
    pub(crate) dir: TempDir,
}

impl Etcd {
    /// Nothing where it is not installed.
    pub(crate) fn start() -> Option<Self> {
        Self::start_in(tempfile::tempdir().unwrap(), false)
    }

    pub(crate) fn start_in(dir: TempDir, tls: bool) -> Option<Self> {
        let ports = free_ports();
        let process = launch(dir.path(), ports, tls)?;
        Some(Self { process, ports, tls, dir })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("{}://localhost:{}", if self.tls { "https" } else { "http" }, self.ports[0])
    }

    pub(crate) fn restart(&mut self) {
        self.process.kill();
        self.process = launch(self.dir.path(), self.ports, self.tls).unwrap();
    }

    /// An agent of it, with a socket of that name, and a client; both wait long.
    pub(crate) fn agent(&self, name: &str, more: &[&str]) -> (Process, Client) {
        self.agent_that_waits(name, LIMIT / 2, more)
    }

    /// Both wait for a second or so: what stops is seen soon. On a busy machine anything may take longer.
    pub(crate) fn impatient_agent(&self, name: &str) -> (Process, Client) {
        self.agent_that_waits(name, Duration::from_secs(1), &[])
    }

    fn agent_that_waits(&self, name: &str, time: Duration, more: &[&str]) -> (Process, Client) {
        let (socket, seconds) = (self.path(name), time.as_secs().to_string());
        let mut command = Command::new(AGENT);
        command.arg("--socket").arg(&socket).args(["--endpoint", &self.endpoint(), "--timeout", &seconds]).args(more);
        let agent = Process::start(&mut command).unwrap();
        (agent, client(&socket, None, time + time / 2))
    }
}

fn launch(dir: &Path, [port, peers]: [u16; 2], tls: bool) -> Option<Process> {
    let mut command = Command::new("etcd");
    let url = format!("{}://127.0.0.1:{port}", if tls { "https" } else { "http" });
    let peers = format!("http://127.0.0.1:{peers}");
    command.arg("--data-dir").arg(dir.join("data")).args([
        "--name",
        "one",
        "--initial-cluster",
        &format!("one={peers}"),
    ]);
    command.args(["--listen-client-urls", &url, "--advertise-client-urls", &url]);
    command.args(["--listen-peer-urls", &peers, "--initial-advertise-peer-urls", &peers]);
    command.args(["--heartbeat-interval", "50", "--election-timeout", "500", "--log-level", "error"]);
    if tls {
        command.arg("--client-cert-auth");
        for (option, file) in
            [("--trusted-ca-file", "ca.crt"), ("--cert-file", "server.crt"), ("--key-file", "server.key")]
        {
            command.arg(option).arg(dir.join(file));
        }
    }
    // Elsewhere than on x86-64 it wants to be told that this is meant.
    command.env("ETCD_UNSUPPORTED_ARCH", std::env::consts::ARCH.replace("aarch64", "arm64"));
    Process::start(command.stderr(Stdio::null()))
}

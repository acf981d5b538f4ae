//! A TPM in software on this machine, and agents of it.

use crate::{
    AGENT, secret,
    support::{LIMIT, Process, client, free_ports},
};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Duration,
};
use tempfile::TempDir;
use ublk_anchor_protocol::Client;

/// A TPM, and the folder of all that belongs to it.
pub(crate) struct Tpm {
    pub(crate) process: Process,
    pub(crate) port: u16,
    pub(crate) dir: TempDir,
}

impl Tpm {
    /// Nothing where it, or its tools, are not installed.
    pub(crate) fn start() -> Option<Self> {
        // Its tools are needed as much.
        Process::start(Command::new("tpm2_getcap").arg("-v"))?;
        let dir = tempfile::tempdir().unwrap();
        let [port, _] = free_ports();
        let process = launch(dir.path(), port)?;
        Some(Self { process, port, dir })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn restart(&mut self) {
        self.process.kill();
        self.process = launch(self.dir.path(), self.port).unwrap();
    }

    pub(crate) fn tcti(&self) -> String {
        format!("swtpm:host=127.0.0.1,port={}", self.port)
    }

    /// An agent of it, with a socket of that name, and a client that waits long.
    pub(crate) fn agent(&self, name: &str, more: &[&str]) -> (Process, Client) {
        self.agent_for(name, LIMIT, more)
    }

    /// A client that waits for a second and a half: what stops is seen soon. On a busy machine
    /// anything may take longer.
    pub(crate) fn agent_for_an_impatient(&self, name: &str) -> (Process, Client) {
        self.agent_for(name, Duration::from_millis(1500), &["--wear-limit", "0"])
    }

    pub(crate) fn agent_for(&self, name: &str, timeout: Duration, more: &[&str]) -> (Process, Client) {
        let socket = self.path(name);
        let mut command = Command::new(AGENT);
        command.arg("--socket").arg(&socket).args(["--tcti", &self.tcti()]).args(more);
        let agent = Process::start(&mut command).unwrap();
        (agent, client(&socket, secret(), timeout))
    }

    /// What one of tpm2-tools says.
    pub(crate) fn tool(&self, command: &str) -> String {
        let done = self.try_tool(command);
        assert!(done.status.success(), "{command}: {}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).unwrap()
    }

    pub(crate) fn try_tool(&self, command: &str) -> Output {
        let mut words = command.split_whitespace();
        let mut tool = Command::new(words.next().unwrap());
        tool.args(words).env("TPM2TOOLS_TCTI", self.tcti()).current_dir(self.dir.path()).output().unwrap()
    }

    /// The indices that are defined, as `0x180abcd`.
    pub(crate) fn indices(&self) -> Vec<String> {
        let listed = self.tool("tpm2_nvreadpublic");
        listed.lines().filter(|line| line.starts_with("0x")).map(|line| line.trim_end_matches(':').to_owned()).collect()
    }
}

fn launch(dir: &Path, port: u16) -> Option<Process> {
    let state = dir.join("state");
    fs::create_dir_all(&state).unwrap();
    let mut command = Command::new("swtpm");
    command.args(["socket", "--tpm2", "--flags", "not-need-init,startup-clear"]);
    command.args(["--tpmstate", &format!("dir={}", state.display())]);
    // Its client and the tools take turns.
    command.args([
        "--server",
        &format!("type=tcp,port={port},disconnect"),
        "--ctrl",
        &format!("type=tcp,port={}", port + 1),
    ]);
    Process::start(command.stderr(Stdio::null()))
}

//! A folder with a key, and the program to run in it.

use serde_json::Value;
use std::{
    fs,
    io::Write,
    os::unix::fs::FileExt,
    path::PathBuf,
    process::{Command, Output, Stdio},
};

/// Exit codes, as the help lists them.
pub(crate) const DONE: i32 = 0;
pub(crate) const ARGUMENTS: i32 = 1;
pub(crate) const KEY: i32 = 2;
pub(crate) const MEMORY: i32 = 3;
pub(crate) const DEVICE: i32 = 4;
pub(crate) const BUSY: i32 = 5;
pub(crate) const INTEGRITY: i32 = 6;
pub(crate) const INTERRUPTED: i32 = 7;
pub(crate) const OUTPUT: i32 = 8;

/// A folder with a key, and the program to run in it.
pub(crate) struct Folder {
    pub(crate) dir: tempfile::TempDir,
}

/// What a run came back with.
pub(crate) struct Run {
    pub(crate) code: i32,
    pub(crate) out: Vec<u8>,
    pub(crate) err: String,
}

impl Folder {
    pub(crate) fn new() -> Self {
        let folder = Self { dir: tempfile::tempdir().unwrap() };
        folder.run("keygen key").expect(DONE);
        folder
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn command(&self, args: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ublk-integrity"));
        command.args(args.split_whitespace()).current_dir(self.dir.path()).stdin(Stdio::null());
        command
    }

    pub(crate) fn run(&self, args: &str) -> Run {
        Run::of(self.command(args).output().unwrap())
    }

    pub(crate) fn run_with_input(&self, args: &str, input: &[u8]) -> Run {
        let mut command = self.command(args);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // A program that fails early reads no input.
        let _ = child.stdin.take().unwrap().write_all(input);
        Run::of(child.wait_with_output().unwrap())
    }

    /// A volume of 8 MiB in the file "disk".
    pub(crate) fn with_volume() -> Self {
        let folder = Self::new();
        folder.run("format --data disk --create --size 8M --key-file key").expect(DONE);
        folder
    }

    /// Where the payload begins: behind everything else, as the file is only as large as it must be.
    pub(crate) fn payload_offset(&self, disk: &str, usable: u64) -> u64 {
        fs::metadata(self.path(disk)).unwrap().len() - usable
    }

    pub(crate) fn flip_bit(&self, file: &str, offset: u64) {
        let file = fs::OpenOptions::new().read(true).write(true).open(self.path(file)).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
    }
}

impl Run {
    pub(crate) fn of(output: Output) -> Self {
        Self {
            code: output.status.code().expect("ended by itself"),
            out: output.stdout,
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// A failure says so in one line, a success says nothing on standard error.
    #[track_caller]
    pub(crate) fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, code, "stderr: {}", self.err);
        let lines = self.err.lines().count();
        assert_eq!(lines, usize::from(code != DONE), "stderr: {}", self.err);
        assert!(code == DONE || self.err.starts_with("ublk-integrity: "), "stderr: {}", self.err);
        self
    }

    #[track_caller]
    pub(crate) fn says(self, what: &str) -> Self {
        assert!(self.err.contains(what), "stderr: {}", self.err);
        self
    }

    #[track_caller]
    pub(crate) fn prints(self, what: &str) -> Self {
        let out = String::from_utf8_lossy(&self.out);
        assert!(out.contains(what), "stdout: {out}");
        self
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.out).unwrap()
    }
}

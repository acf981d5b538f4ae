//! This program, started once more: what may never come back is done by a process of its own.

use std::{
    ffi::OsStr,
    io,
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
};

/// Runs it, out of reach of the caller's terminal.
pub fn run<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>, output: Stdio) -> io::Result<Child> {
    Command::new("/proc/self/exe")
        .args(args)
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
}

//! A process that the device it serves can rely on: it is not swapped out, and not the first to go
//! when memory runs out. Each step that fails is told with its consequence; none ends the agent, for
//! an anchor without it beats no anchor.

use crate::{Backend, Failure, Server};
use rustix::{
    mm::{MlockAllFlags, mlockall},
    net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sendto, socket_with},
    process::configure_io_flusher_behavior,
};
use std::{
    env,
    fmt::Display,
    fs,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::ExitCode,
};

/// What ends an agent: a line for people, and an exit code (docs/exit-codes.md).
#[derive(Debug)]
pub struct Ended {
    /// What is wrong, with which value or path, and what to do.
    pub why: String,
    /// The exit code.
    pub code: u8,
}

impl Ended {
    /// Bad arguments.
    pub fn arguments(why: impl Display) -> Self {
        Self { why: why.to_string(), code: 1 }
    }

    /// Says it in the name of `program`.
    pub fn told(&self, program: &str) -> ExitCode {
        eprintln!("{program}: {}", self.why);
        ExitCode::from(self.code)
    }
}

/// A file of the agent's configuration: the bytes of it.
///
/// # Errors
///
/// It can't be read: with its path, and what it is for.
pub fn configured(what: &str, path: &Path) -> Result<Vec<u8>, Ended> {
    fs::read(path).map_err(|e| {
        let code = if e.kind() == std::io::ErrorKind::PermissionDenied { 2 } else { 1 };
        Ended { why: format!("the {what} {} can't be read: {e}", path.display()), code }
    })
}

/// Serves `backend` on a socket at `path`, for as long as this process lives.
pub fn run(program: &str, path: &Path, backend: &mut Backend<'_>) -> ExitCode {
    let mut server = match Server::listen(path) {
        Ok(server) => server,
        Err(e) => return Ended { why: e.to_string(), code: e.exit_code() }.told(program),
    };
    let warn = |warning: String| eprintln!("{program}: {warning}");
    if let Backend::Counter(counter) = backend {
        if let Err(Failure::Away(why) | Failure::Refused(why)) = counter.begin() {
            warn(format!("{why}; it is tried again for each request"));
        }
    }
    harden(warn);
    ready();
    match server.serve(backend) {
        Ok(never) => match never {},
        Err(e) => Ended { why: format!("waiting for clients: {e}"), code: 4 }.told(program),
    }
}

/// The path of a socket that was given, or was not.
///
/// # Errors
///
/// It was not.
pub fn socket_path(given: Option<PathBuf>) -> Result<PathBuf, Ended> {
    given.ok_or_else(|| Ended::arguments("--socket PATH is missing: where the agent listens"))
}

/// Locks memory and says to the kernel what depends on this process. Before any thread is started.
fn harden(mut warn: impl FnMut(String)) {
    let mut check = |what: &str, consequence: &str, result: Result<(), &dyn Display>| {
        if let Err(error) = result {
            warn(format!("{what} failed ({error}): {consequence}"));
        }
    };
    let locked = mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE);
    check(
        "mlockall",
        "with swap on the device that waits for this agent it may answer too late; LimitMEMLOCK=infinity in its unit",
        locked.as_ref().map(drop).map_err(|e| e as &dyn Display),
    );
    let flusher = configure_io_flusher_behavior(true);
    check(
        "PR_SET_IO_FLUSHER",
        "when memory is short, this agent may wait for the device that waits for it",
        flusher.as_ref().map(drop).map_err(|e| e as &dyn Display),
    );
    let score = fs::write("/proc/self/oom_score_adj", "-1000");
    check(
        "setting oom_score_adj",
        "when memory runs out, the kernel may choose to kill this agent; OOMScoreAdjust=-1000 in its unit",
        score.as_ref().map(drop).map_err(|e| e as &dyn Display),
    );
}

/// Says to systemd that the socket is there: sd_notify(3). Nobody is waited for.
fn ready() {
    let Some(name) = env::var_os("NOTIFY_SOCKET") else { return };
    let address = match name.as_bytes() {
        [b'@', name @ ..] => SocketAddrUnix::new_abstract_name(name),
        path => SocketAddrUnix::new(path),
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None);
    if let (Ok(address), Ok(socket)) = (address, socket) {
        // Whoever does not hear it goes by Type=simple.
        let _ = sendto(&socket, b"READY=1", SendFlags::NOSIGNAL, &address);
    }
}

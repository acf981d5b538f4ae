//! Telling systemd how it goes: sd_notify(3), datagrams to the socket that it names.

use crate::{os::Blocked, threads::named};
use nix::sys::{
    signal::SigSet,
    socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, sendto, socket},
};
use std::{
    env,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    sync::Arc,
    thread,
    time::Duration,
};

/// How often systemd is told to wait on, and a third of how long it does.
const EXTEND_EVERY: Duration = Duration::from_secs(10);

/// Whoever waits for a word, if anybody does.
#[derive(Clone)]
pub struct Notify(Option<Arc<(OwnedFd, UnixAddr)>>);

impl Notify {
    /// Nobody.
    pub fn nobody() -> Self {
        Self(None)
    }

    /// The manager that has started this process.
    pub fn from_environment() -> Self {
        let address = env::var_os("NOTIFY_SOCKET").and_then(|name| address(name.as_bytes()));
        // To send never waits: nothing of ours may depend on who listens.
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = || socket(AddressFamily::Unix, SockType::Datagram, flags, None).ok();
        Self(address.and_then(|address| Some(Arc::new((socket()?, address)))))
    }

    /// Whether somebody listens.
    pub fn is_heard(&self) -> bool {
        self.0.is_some()
    }

    /// Says lines like `READY=1`.
    pub fn say(&self, lines: &str) {
        if let Some((socket, address)) = self.0.as_deref() {
            let _ = sendto(socket.as_raw_fd(), lines.as_bytes(), address, MsgFlags::MSG_NOSIGNAL);
        }
    }

    /// Has the manager wait on until something is done, or this process ends: how long that takes is up to disks.
    pub fn extend_until(&self, is_done: impl Fn() -> bool + Send + 'static) {
        if !self.is_heard() {
            return;
        }
        let this = self.clone();
        let extend = move || {
            while !is_done() {
                this.say(&format!("EXTEND_TIMEOUT_USEC={}", (3 * EXTEND_EVERY).as_micros()));
                thread::sleep(EXTEND_EVERY);
            }
        };
        // A signal that others hold back must not come to this thread, which is to begin with none.
        let _held = Blocked::hold(&SigSet::all());
        // Without a thread for it the unit's own limit counts.
        let _ = named("notify").spawn(extend);
    }

    /// What goes on, in one line for people.
    pub fn status(&self, line: &str) {
        self.say(&format!("STATUS={}", line.replace('\n', " ")));
    }
}

/// A path, or behind a @ a name without one.
fn address(name: &[u8]) -> Option<UnixAddr> {
    match name {
        [b'@', name @ ..] => UnixAddr::new_abstract(name).ok(),
        [b'/', ..] => UnixAddr::new(name).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixDatagram;

    #[test]
    fn what_is_said_arrives_and_nobody_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let listener = UnixDatagram::bind(&path).unwrap();
        let socket = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_NONBLOCK, None).unwrap();
        let notify = Notify(Some(Arc::new((socket, address(path.as_os_str().as_bytes()).unwrap()))));
        notify.status("serving\nit");
        let mut bytes = [0; 64];
        let len = listener.recv(&mut bytes).unwrap();
        assert_eq!(&bytes[..len], b"STATUS=serving it");
        notify.extend_until(|| false);
        let len = listener.recv(&mut bytes).unwrap();
        assert_eq!(&bytes[..len], b"EXTEND_TIMEOUT_USEC=30000000");
        // More than anybody takes.
        (0..10_000).for_each(|_| notify.say("READY=1"));
        drop(listener);
        notify.say("STOPPING=1");
        Notify::nobody().say("READY=1");
    }

    #[test]
    fn only_what_is_an_address_is_one() {
        assert!(address(b"@name").is_some() && address(b"/run/x").is_some());
        assert!(address(b"").is_none() && address(b"vsock:2:1").is_none());
    }
}

//! What the daemon has to say. Queue threads never write a line themselves: stderr, syslog or the
//! file system behind them may wait for this very device.

use crate::{
    threads::named,
    ublk::{Request, UnknownRequest},
};
use crossbeam_channel::{Receiver, Sender, TrySendError};
use nix::sys::signal::Signal;
use std::{
    fmt,
    io::{self, Write},
    os::unix::net::UnixDatagram,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};
use ublk_integrity::{BlockRange, Errno, Latched, ReadError, WriteError};

/// Events that may wait to be written.
const CAPACITY: usize = 1024;

/// How long the system log may take for a line, before that is given up.
const PATIENCE: Duration = Duration::from_millis(500);

/// Something worth a line. Plain values: the text is made by the thread that writes it.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    /// A read failed.
    Read(BlockRange, ReadError),
    /// Another request failed.
    Write(Request, WriteError),
    /// The kernel asked for what was not offered.
    UnknownRequest(UnknownRequest),
    /// The driver has not copied its bytes.
    NotCopied(Request, Errno),
    /// The volume has become read-only.
    Latched(Latched),
    /// The checkpoint thread has moved the superblock on.
    Checkpoint,
    /// A signal that does nothing here.
    SignalIgnored(Signal),
    /// Asked to stop while somebody uses the device.
    StopWaits,
    /// Asked to stop, and the kernel has not come back yet.
    StopIsSlow,
    /// Asked once more.
    StopsNow,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read(range, e) => write!(f, "read of blocks {range} failed: {e}"),
            Self::Write(request, e) => write!(f, "{request} failed: {e}"),
            Self::UnknownRequest(what) => write!(f, "request refused: {what:?}"),
            Self::NotCopied(request, e) => write!(f, "{request} failed: its bytes could not be copied: {e}"),
            Self::Latched(why) => write!(f, "the volume is read-only from now on: {why}"),
            Self::Checkpoint => f.write_str("checkpoint"),
            Self::SignalIgnored(signal) => write!(f, "{signal} changes nothing: SIGTERM stops the device"),
            Self::StopWaits => f.write_str(
                "the device is in use: it is stopped when its last user is gone; a second signal stops it now, and what its users have not written yet is lost",
            ),
            Self::StopIsSlow => f.write_str(
                "the kernel has not stopped the device yet: requests may wait for its disks; a third signal ends the daemon without them",
            ),
            Self::StopsNow => f.write_str("a second signal: the device is stopped, whoever uses it"),
        }
    }
}

/// The sending end. Telling never waits.
#[derive(Clone)]
pub struct Log {
    events: Sender<Event>,
    dropped: Arc<AtomicU64>,
}

impl Log {
    /// Starts the thread that writes, `first` where nobody has been told it yet. `words` puts into
    /// each line what the device is.
    pub fn start(sink: Sink, first: Vec<String>, words: impl Fn(&str) -> String + Send + 'static) -> io::Result<Self> {
        let (events, receiver) = crossbeam_channel::bounded(CAPACITY);
        let dropped = Arc::new(AtomicU64::new(0));
        let seen = Arc::clone(&dropped);
        named("log").spawn(move || {
            if !matches!(sink, Sink::Stderr) {
                first.iter().for_each(|line| sink.line(&words(line)));
            }
            write_lines(&receiver, &sink, &seen, words);
        })?;
        Ok(Self { events, dropped })
    }

    /// Leaves an event for the log, or counts it where there is no room.
    pub fn tell(&self, event: Event) {
        if let Err(TrySendError::Full(_)) = self.events.try_send(event) {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits a moment for what was told to be written.
    pub fn drain(&self) {
        for _ in 0..100 {
            if self.events.is_empty() {
                // The last line may be on its way.
                thread::sleep(Duration::from_millis(10));
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// How many events found no room.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

fn write_lines(events: &Receiver<Event>, sink: &Sink, dropped: &AtomicU64, words: impl Fn(&str) -> String) {
    let mut reported = 0;
    for event in events {
        sink.line(&words(&event.to_string()));
        let now = dropped.load(Ordering::Relaxed);
        if now > reported && events.is_empty() {
            sink.line(&words(&format!("{} more messages were dropped", now - reported)));
            reported = now;
        }
    }
}

/// Where lines go.
pub enum Sink {
    /// Standard error.
    Stderr,
    /// The system log, over its socket.
    Syslog {
        /// None where there is no system log.
        socket: Option<UnixDatagram>,
        /// Name and pid in front of each line.
        tag: String,
    },
}

impl Sink {
    /// The system log, lines marked with the device's name.
    pub fn syslog() -> Self {
        Self::socket(Path::new("/dev/log"))
    }

    fn socket(path: &Path) -> Self {
        let connect = || {
            let socket = UnixDatagram::unbound()?;
            // It may never read again: where it writes to our device, and that is what ails.
            socket.set_write_timeout(Some(PATIENCE))?;
            socket.connect(path)?;
            io::Result::Ok(socket)
        };
        Self::Syslog { socket: connect().ok(), tag: format!("ublk-integrity[{}]", std::process::id()) }
    }

    /// Writes one line; a failure has nowhere to be told.
    pub fn line(&self, what: &dyn fmt::Display) {
        /// Facility "daemon" (3), severity "warning" (4).
        const PRIORITY: u32 = 3 * 8 + 4;
        match self {
            // Unlike `eprintln`, no panic where nobody reads any more.
            Self::Stderr => drop(writeln!(io::stderr(), "ublk-integrity: {what}")),
            Self::Syslog { socket: Some(socket), tag } => {
                let _ = socket.send(format!("<{PRIORITY}>{tag}: {what}").as_bytes());
            }
            Self::Syslog { socket: None, .. } => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{sync::mpsc, time::Instant};

    #[test]
    fn each_line_of_the_system_log_names_the_device() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let system_log = UnixDatagram::bind(&path).unwrap();
        let named = |text: &str| {
            format!("/dev/a: {}", crate::failure::with_paths(text, Path::new("/dev/a"), Some(Path::new("/dev/b"))))
        };
        let log = Log::start(Sink::socket(&path), vec!["recovery of the data device".into()], named).unwrap();
        let (device, offset) = (ublk_integrity::Device::Meta, ublk_integrity::ByteOffset(4096));
        let failed = ublk_integrity::DeviceError { op: "write", device, offset, len: 512, errno: Errno::EIO };
        log.tell(Event::Latched(Latched::Device(failed)));
        log.tell(Event::StopsNow);
        let line = || {
            let mut bytes = [0; 1024];
            let len = system_log.recv(&mut bytes).unwrap();
            String::from_utf8(bytes[..len].to_vec()).unwrap()
        };
        assert!(line().ends_with("]: /dev/a: recovery of /dev/a"));
        assert!(
            line().contains("]: /dev/a: the volume is read-only from now on: write of 512 bytes at 4096 on /dev/b")
        );
        assert!(line().contains("]: /dev/a: a second signal"));
    }

    #[test]
    fn a_system_log_that_stands_still_holds_nobody_up() {
        let folder = tempfile::tempdir().unwrap();
        let _never_read = UnixDatagram::bind(folder.path().join("log")).unwrap();
        let sink = Sink::socket(&folder.path().join("log"));
        assert!(matches!(sink, Sink::Syslog { socket: Some(_), .. }));
        let (ended, end) = mpsc::channel();
        thread::spawn(move || {
            // As many as find room, and one that finds none.
            let waits = |_: &i32| {
                let begun = Instant::now();
                sink.line(&"text");
                begun.elapsed() > PATIENCE / 2
            };
            ended.send((0..1_000_000).find(waits)).unwrap();
        });
        let first = end.recv_timeout(Duration::from_secs(60)).expect("a line came back");
        assert!(first.is_some_and(|lines| lines > 0), "the socket was full at last");
    }
}

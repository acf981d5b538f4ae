//! Where the daemon's lines go: journald, the system log, or standard error.

use crate::event::{Class, Record, Severity};
use std::{
    env, fmt,
    io::{self, Write},
    os::unix::net::UnixDatagram,
    path::Path,
    time::Duration,
};

/// How long a log may take for a line, before that is given up.
const PATIENCE: Duration = Duration::from_millis(500);

/// Where journald takes fields beside the text.
const JOURNAL: &str = "/run/systemd/journal/socket";

/// What we are called there.
const IDENTIFIER: &str = "ublk-integrity";

/// Where lines go.
pub enum Sink {
    /// Standard error.
    Stderr,
    /// journald, by its own protocol.
    Journal(UnixDatagram),
    /// The system log, over its socket.
    Syslog {
        /// None where there is no system log.
        socket: Option<UnixDatagram>,
        /// Name and pid in front of each line.
        tag: String,
    },
}

impl Sink {
    /// journald where there is one, else the system log.
    pub fn system() -> Self {
        Self::journal(Path::new(JOURNAL)).unwrap_or_else(|_| Self::syslog(Path::new("/dev/log")))
    }

    /// Standard error, unless that leads to journald anyway.
    pub fn foreground() -> Self {
        match env::var_os("JOURNAL_STREAM") {
            Some(_) => Self::journal(Path::new(JOURNAL)).unwrap_or(Self::Stderr),
            None => Self::Stderr,
        }
    }

    pub(super) fn journal(path: &Path) -> io::Result<Self> {
        connected(path).map(Self::Journal)
    }

    pub(super) fn syslog(path: &Path) -> Self {
        Self::Syslog { socket: connected(path).ok(), tag: format!("{IDENTIFIER}[{}]", std::process::id()) }
    }

    /// Writes one event; a failure has nowhere to be told.
    pub fn write(&self, class: Class, record: &Record) {
        match self {
            Self::Journal(socket) => drop(socket.send(&fields(class, record))),
            other => other.line(class.severity(), &record.message),
        }
    }

    /// Writes one line that is no event.
    pub fn line(&self, severity: Severity, what: &dyn fmt::Display) {
        /// The facility "daemon".
        const DAEMON: u8 = 3;
        let severity = severity as u8;
        match self {
            // Unlike `eprintln`, no panic where nobody reads any more.
            Self::Stderr => drop(writeln!(io::stderr(), "ublk-integrity: {what}")),
            Self::Journal(socket) => {
                let mut text = Vec::new();
                field(&mut text, "MESSAGE", &what.to_string());
                field(&mut text, "PRIORITY", &severity.to_string());
                field(&mut text, "SYSLOG_IDENTIFIER", IDENTIFIER);
                let _ = socket.send(&text);
            }
            Self::Syslog { socket: Some(socket), tag } => {
                let priority = DAEMON * 8 + severity;
                let _ = socket.send(format!("<{priority}>{tag}: {what}").as_bytes());
            }
            Self::Syslog { socket: None, .. } => {}
        }
    }
}

fn connected(path: &Path) -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    // It may never read again: where it writes to our device, and that is what ails.
    socket.set_write_timeout(Some(PATIENCE))?;
    socket.connect(path)?;
    Ok(socket)
}

/// An event as journald takes it.
fn fields(class: Class, record: &Record) -> Vec<u8> {
    let mut text = Vec::new();
    let mut set = |name: &str, value: &str| field(&mut text, name, value);
    set("MESSAGE", &record.message);
    set("MESSAGE_ID", class.message_id());
    set("PRIORITY", &(class.severity() as u8).to_string());
    set("SYSLOG_IDENTIFIER", IDENTIFIER);
    set("UBLK_CLASS", &record.class);
    set("UBLK_VOLUME", &record.volume);
    set("UBLK_DATA", &record.data);
    set("UBLK_COUNT", &record.count.to_string());
    record.name.iter().for_each(|name| set("UBLK_NAME", name));
    record.first_block.iter().for_each(|block| set("UBLK_BLOCK", &block.to_string()));
    record.blocks.iter().for_each(|blocks| set("UBLK_BLOCKS", &blocks.to_string()));
    record.errno.iter().for_each(|errno| set("ERRNO", &errno.to_string()));
    text
}

/// One field. A value with a line end (a path may have one) goes with its length in front.
fn field(text: &mut Vec<u8>, name: &str, value: &str) {
    text.extend_from_slice(name.as_bytes());
    if value.contains('\n') {
        text.push(b'\n');
        text.extend_from_slice(&(value.len() as u64).to_le_bytes());
    } else {
        text.push(b'=');
    }
    text.extend_from_slice(value.as_bytes());
    text.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::About;
    use std::{sync::mpsc, thread, time::Instant};

    #[test]
    fn journald_gets_fields() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let journal = UnixDatagram::bind(&path).unwrap();
        let sink = Sink::journal(&path).unwrap();
        let about = About { volume: "u".into(), name: None, data: "/dev/odd\nname".into(), pid: 1 };
        let mut record = Record::new(Class::Mismatch, &about, "read failed".into());
        record.first_block = Some(7);
        sink.write(Class::Mismatch, &record);
        let mut bytes = [0; 2048];
        let len = journal.recv(&mut bytes).unwrap();
        let said = String::from_utf8_lossy(&bytes[..len]).into_owned();
        for line in
            ["MESSAGE=read failed", "PRIORITY=3", "UBLK_BLOCK=7", "UBLK_COUNT=1", "SYSLOG_IDENTIFIER=ublk-integrity"]
        {
            assert!(said.lines().any(|l| l == line), "no {line} in {said}");
        }
        assert!(said.contains(&format!("MESSAGE_ID={}\n", Class::Mismatch.message_id())));
        assert!(said.contains("UBLK_DATA\n\u{d}\0\0\0\0\0\0\0/dev/odd\nname\n"), "{said:?}");
        assert!(!said.contains("ERRNO") && !said.contains("UBLK_NAME"));
        sink.line(Severity::Crit, &"a panic");
        let len = journal.recv(&mut bytes).unwrap();
        assert!(bytes[..len].starts_with(b"MESSAGE=a panic\nPRIORITY=2\n"));
    }

    #[test]
    fn a_system_log_that_stands_still_holds_nobody_up() {
        let folder = tempfile::tempdir().unwrap();
        let _never_read = UnixDatagram::bind(folder.path().join("log")).unwrap();
        let sink = Sink::syslog(&folder.path().join("log"));
        assert!(matches!(sink, Sink::Syslog { socket: Some(_), .. }));
        let (ended, end) = mpsc::channel();
        thread::spawn(move || {
            // As many as find room, and one that finds none.
            let waits = |_: &i32| {
                let begun = Instant::now();
                sink.line(Severity::Notice, &"text");
                begun.elapsed() > PATIENCE / 2
            };
            ended.send((0..1_000_000).find(waits)).unwrap();
        });
        let first = end.recv_timeout(Duration::from_secs(60)).expect("a line came back");
        assert!(first.is_some_and(|lines| lines > 0), "the socket was full at last");
    }
}

//! What the daemon has to say. Queue threads never write a line themselves: stderr, syslog or the
//! file system behind them may wait for this very device.

use super::burst::Bursts;
pub use super::sink::Sink;
use crate::{
    event::{About, Class, EventFile, Record},
    run_dir::FOLDER,
    scrub_status::ScrubSummary,
    threads::named,
    ublk::{Request, UnknownRequest},
    write_back_file::writes,
};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TrySendError};
use nix::sys::signal::Signal;
use std::{
    fmt, io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};
use ublk_integrity::{BlockRange, Errno, Latched, ReadError, WriteError, check::BadRun, scrub::ScrubFinding};

/// Events that may wait to be written.
const CAPACITY: usize = 1024;

/// Something worth a line. Plain values, where a queue thread tells them: the text is made by the
/// thread that writes it.
#[derive(Clone, Debug)]
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
    /// Something is wrong with the anchor, or no more.
    Anchor(String),
    /// The checkpoint thread has moved the superblock on.
    Checkpoint,
    /// Checkpoints have lost so many pages more.
    PagesLost(u64),
    /// So many writes that were answered stay in memory at the end of the daemon.
    WritesKept(usize),
    /// Somebody has acknowledged findings.
    Cleared(String),
    /// A pass over the volume has found something.
    Scrub(ScrubFinding),
    /// Blocks were bad, and are no more.
    Healed(BlockRange),
    /// It has ended, or leaves with the daemon.
    ScrubEnded(ScrubSummary),
    /// One could not go on.
    ScrubFailed(ScrubSummary),
    /// One, or a block that is healed, is still there when the daemon ends.
    ScrubStays,
    /// A signal that does nothing here.
    SignalIgnored(Signal),
    /// Asked to stop while somebody uses the device.
    StopWaits,
    /// Asked to stop, and the kernel has not come back yet.
    StopIsSlow,
    /// Asked once more.
    StopsNow,
    /// Another daemon wants the device.
    HandOver,
    /// And does not get it: so much was under way all the time.
    TooBusy(u64),
    /// And does not get it, for another reason.
    NotHandedOver,
    /// And gets it, whatever becomes of whoever has asked.
    Left,
}

impl Event {
    /// What kind it is.
    fn class(&self) -> Class {
        match self {
            Self::Read(_, ReadError::Mismatch { .. }) => Class::Mismatch,
            Self::Read(_, ReadError::BadPage { .. }) => Class::BadPage,
            Self::Read(..) => Class::ReadFailed,
            Self::Write(..) | Self::NotCopied(..) => Class::WriteFailed,
            Self::UnknownRequest(_) => Class::Refused,
            Self::Latched(_) => Class::Latched,
            Self::Anchor(_) => Class::Anchor,
            Self::Checkpoint => Class::Checkpoint,
            Self::PagesLost(_) => Class::PagesLost,
            Self::WritesKept(_) => Class::WritesKept,
            Self::Cleared(_) => Class::Cleared,
            Self::Scrub(finding) if finding.is_bad() => Class::ScrubFound,
            Self::Scrub(_) => Class::ScrubMended,
            Self::Healed(_) => Class::Healed,
            Self::ScrubEnded(_) | Self::ScrubStays => Class::ScrubEnded,
            Self::ScrubFailed(_) => Class::ScrubFailed,
            Self::SignalIgnored(_) | Self::StopWaits | Self::StopIsSlow | Self::StopsNow => Class::Stopping,
            Self::HandOver | Self::TooBusy(_) | Self::NotHandedOver | Self::Left => Class::Stopping,
        }
    }

    /// Blocks that it is about.
    fn blocks(&self) -> Option<BlockRange> {
        match self {
            Self::Read(range, _) | Self::Scrub(ScrubFinding::Blocks(BadRun { range, .. })) | Self::Healed(range) => {
                Some(*range)
            }
            Self::Write(request, _) | Self::NotCopied(request, _) => request.range(),
            _ => None,
        }
    }

    fn errno(&self) -> Option<Errno> {
        match self {
            Self::Read(_, e) => Some(e.errno()),
            Self::Write(_, e) => Some(e.errno()),
            Self::NotCopied(_, e) => Some(*e),
            _ => None,
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read(range, e) => write!(f, "read of blocks {range} failed: {e}"),
            Self::Write(request, e) => write!(f, "{request} failed: {e}"),
            Self::UnknownRequest(what) => write!(f, "request refused: {what:?}"),
            Self::NotCopied(request, e) => write!(f, "{request} failed: its bytes could not be copied: {e}"),
            Self::Latched(why) => write!(f, "the volume is read-only from now on: {why}"),
            Self::Anchor(what) => write!(f, "the anchor: {what}"),
            Self::Checkpoint => f.write_str("checkpoint"),
            Self::PagesLost(pages) => {
                write!(f, "{pages} damaged pages lost: what hung on them reads as errors until it is written again")
            }
            Self::WritesKept(count) => {
                let kept = writes(*count);
                write!(f, "{kept} that were answered are not in place: in memory until the next `add`, and lost with the machine")
            }
            Self::Cleared(what) => write!(f, "findings cleared: {what}"),
            Self::Scrub(finding) => write!(f, "scrub: {finding}"),
            Self::Healed(range) => write!(f, "healed from a replica: blocks {range}"),
            Self::ScrubEnded(summary) => write!(f, "scrub: {summary}"),
            Self::ScrubFailed(summary) => write!(f, "scrub: {summary}: it can't go on: `scrub --status` says why"),
            Self::ScrubStays => f.write_str("scrub: a read has not come back for 10 s: the daemon ends without it"),
            Self::SignalIgnored(signal) => write!(f, "{signal} changes nothing: SIGTERM stops the device"),
            Self::StopWaits => f.write_str(
                "the device is in use: it is stopped when its last user is gone; a second signal stops it now, and what its users have not written yet is lost",
            ),
            Self::StopIsSlow => f.write_str(
                "the kernel has not stopped the device yet: requests may wait for its disks; a third signal ends the daemon without them",
            ),
            Self::StopsNow => f.write_str("a second signal: the device is stopped, whoever uses it"),
            Self::HandOver => f.write_str("the device is handed over: requests wait for the next daemon"),
            Self::Left => f.write_str("the volume is closed, for the next daemon to open it"),
            Self::NotHandedOver => f.write_str("not handed over: the device goes on as before"),
            Self::TooBusy(requests) => {
                write!(f, "too busy to be handed over, {requests} under way: the device goes on as before")
            }
        }
    }
}

/// The sending end. Telling never waits.
#[derive(Clone)]
pub struct Log {
    events: Sender<Event>,
    dropped: Arc<AtomicU64>,
}

#[cfg(test)]
impl Log {
    /// To standard error.
    pub fn of_test() -> Self {
        Self::start(Sink::Stderr, Vec::new(), str::to_owned).unwrap()
    }

    /// With a file of events in `folder`.
    pub fn of_test_in(folder: &Path) -> Self {
        let outlet = Outlet { sink: Sink::Stderr, about: About::default(), file: Some(EventFile::of(folder, "uuid")) };
        Self::start(outlet, Vec::new(), str::to_owned).unwrap()
    }
}

impl Log {
    /// Starts the thread that writes, `first` where nobody has been told it yet. `words` puts into
    /// each line what the device is.
    pub fn start(
        outlet: impl Into<Outlet>,
        first: Vec<(Class, String)>,
        words: impl Fn(&str) -> String + Send + 'static,
    ) -> io::Result<Self> {
        let (events, receiver) = crossbeam_channel::bounded(CAPACITY);
        let dropped = Arc::new(AtomicU64::new(0));
        let writer = Writer { outlet: outlet.into(), dropped: Arc::clone(&dropped), reported: 0, words };
        named("log").spawn(move || {
            first.iter().for_each(|(class, line)| writer.tell(*class, line, |_| {}));
            writer.run(&receiver);
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

/// Where lines go, and what they are about.
pub struct Outlet {
    sink: Sink,
    about: About,
    file: Option<EventFile>,
}

impl Outlet {
    /// Those of a volume's daemon.
    pub(super) fn of(sink: Sink, about: About) -> Self {
        let file = EventFile::of(Path::new(FOLDER), &about.volume);
        Self { sink, about, file: Some(file) }
    }
}

/// Of nothing in particular.
impl From<Sink> for Outlet {
    fn from(sink: Sink) -> Self {
        Self { sink, about: About::default(), file: None }
    }
}

/// What the thread has.
struct Writer<W> {
    outlet: Outlet,
    /// Events that found no room, and how many of them have been told.
    dropped: Arc<AtomicU64>,
    reported: u64,
    words: W,
}

impl<W: Fn(&str) -> String> Writer<W> {
    /// Writes until nobody can tell anything any more.
    fn run(mut self, events: &Receiver<Event>) {
        let mut bursts = Bursts::new();
        loop {
            let event = match bursts.due() {
                Some(due) => events.recv_deadline(due),
                None => events.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            let now = Instant::now();
            bursts.take_due(now).iter().for_each(|(count, last)| self.event(last, *count));
            match event {
                Ok(event) => bursts.admit(event.class(), event, now).iter().for_each(|event| self.event(event, 1)),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            self.count_dropped(events);
        }
        bursts.take_all().iter().for_each(|(count, last)| self.event(last, *count));
    }

    /// One event, or one for many.
    fn event(&self, event: &Event, count: u64) {
        let text = if count == 1 { event.to_string() } else { format!("{count} more like this: {event}") };
        self.tell(event.class(), &text, |record| {
            record.count = count;
            record.first_block = event.blocks().map(|range| range.first.0);
            record.blocks = event.blocks().map(|range| range.count);
            record.errno = event.errno().map(|errno| errno.0);
        });
    }

    fn count_dropped(&mut self, events: &Receiver<Event>) {
        let now = self.dropped.load(Ordering::Relaxed);
        if now > self.reported && events.is_empty() {
            let more = now - self.reported;
            self.tell(Class::Dropped, &format!("{more} more messages were dropped"), |record| record.count = more);
            self.reported = now;
        }
    }

    fn tell(&self, class: Class, text: &str, add: impl FnOnce(&mut Record)) {
        let mut record = Record::new(class, &self.outlet.about, (self.words)(text));
        add(&mut record);
        // Whoever looks at standard error has been told what was found at opening.
        let of_opening = matches!(class, Class::Opening | Class::Recovered | Class::WritesPlaced);
        if !of_opening || !matches!(self.outlet.sink, Sink::Stderr) {
            self.outlet.sink.write(class, &record);
        }
        self.outlet.file.iter().for_each(|file| file.add(&record));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixDatagram;

    #[test]
    fn each_line_of_the_system_log_names_the_device() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let system_log = UnixDatagram::bind(&path).unwrap();
        let named = |text: &str| {
            format!("/dev/a: {}", crate::failure::with_paths(text, Path::new("/dev/a"), Some(Path::new("/dev/b"))))
        };
        let first = vec![(Class::Recovered, "recovery of the data device".into())];
        let log = Log::start(Sink::syslog(&path), first, named).unwrap();
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
    fn a_flood_is_counted_in_the_file_of_events() {
        let folder = tempfile::tempdir().unwrap();
        let about = About { volume: "uuid".into(), name: Some("home".into()), data: "/dev/a".into(), pid: 7 };
        let outlet = Outlet { sink: Sink::Stderr, about, file: Some(EventFile::of(folder.path(), "uuid")) };
        let log = Log::start(outlet, Vec::new(), str::to_owned).unwrap();
        let block = ublk_integrity::BlockIndex(5);
        for _ in 0..500 {
            log.tell(Event::Read(BlockRange::new(block, 2), ReadError::Mismatch { block }));
        }
        log.tell(Event::StopsNow);
        // Its last line, with what has been held, comes when nobody has the sending end.
        drop(log);
        let records = || crate::event::Feed::of(folder.path()).take();
        let begun = Instant::now();
        while records().iter().map(|record| record.count).sum::<u64>() < 501 {
            assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", records());
            thread::sleep(Duration::from_millis(10));
        }
        let records = records();
        assert_eq!(records.len(), 10 + 1 + 1, "{records:?}");
        let last = records.last().unwrap();
        assert_eq!(
            (last.class.as_str(), last.count, last.first_block, last.blocks),
            ("mismatch", 490, Some(5), Some(2))
        );
        assert_eq!((last.errno, last.name.as_deref(), last.pid), (Some(libc::EILSEQ), Some("home"), 7));
    }
}

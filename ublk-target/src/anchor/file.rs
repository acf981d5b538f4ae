//! An anchor in a file. A thread of its own reads and writes it, for a disk may take for ever: whoever asks waits within a
//! limit, and does not get an answer that comes later.

use super::slots::SlotFile;
use crate::{
    failure::{Context, Exit, Failure, Outcome, plain},
    threads::named,
};
use crossbeam_channel::{Sender, bounded};
use nix::sys::signal::SigSet;
use std::{
    io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};
use ublk_integrity::anchor::{Anchor, AnchorBytes, Held, Replaced};

/// Something to do with the file.
type Job = Box<dyn FnOnce(&mut SlotFile) + Send>;

/// An open anchor file. Each call ends within a limit.
pub struct FileAnchor {
    path: PathBuf,
    timeout: Duration,
    at: Mutex<At>,
}

/// Who has the file.
enum At {
    /// Nobody has asked for anything yet.
    Opened(SlotFile),
    /// A thread, which takes a job when the one before is done. It ends with the last who asks, or when the disk lets go of it.
    Thread(Sender<Job>),
}

impl FileAnchor {
    /// Opens the file, which must be there. Whatever is asked of it, this included, takes so long at most.
    pub fn open(path: &Path, timeout: Duration) -> Outcome<Self> {
        Self::within(path, timeout, |path| Ok((SlotFile::open(path)?, false))).map(|(anchor, _)| anchor)
    }

    /// The same, and makes the file where there is none: whether it did.
    pub fn make(path: &Path, timeout: Duration) -> Outcome<(Self, bool)> {
        Self::within(path, timeout, SlotFile::make)
    }

    /// No thread is left behind: a process that goes on to set itself up has one. But where the disk hangs: that one takes no signal.
    fn within(path: &Path, timeout: Duration, open: fn(&Path) -> Outcome<(SlotFile, bool)>) -> Outcome<(Self, bool)> {
        let (opened, answered) = bounded(1);
        let name = path.to_owned();
        let work = move || {
            let _ = SigSet::all().thread_block();
            let _ = opened.send(open(&name));
        };
        let thread = named("anchor file").spawn(work).doing("can't start a thread")?;
        let late = || Err(Failure::new(Exit::Device, late(path, timeout)));
        let (file, is_new) = answered.recv_timeout(timeout).unwrap_or_else(|_| late())?;
        thread.join().unwrap_or_else(|_| std::process::abort());
        Ok((Self { path: path.into(), timeout, at: Mutex::new(At::Opened(file)) }, is_new))
    }

    fn jobs(&self) -> io::Result<Sender<Job>> {
        let mut at = self.at.lock().unwrap_or_else(PoisonError::into_inner);
        if let At::Thread(jobs) = &*at {
            return Ok(jobs.clone());
        }
        let (jobs, asked) = bounded::<Job>(0);
        let (give, given) = bounded(1);
        let serve = move || {
            if let Ok(mut file) = given.recv() {
                asked.iter().for_each(|job| job(&mut file));
            }
        };
        named("anchor file").spawn(serve)?;
        if let At::Opened(file) = std::mem::replace(&mut *at, At::Thread(jobs.clone())) {
            let _ = give.send(file);
        }
        Ok(jobs)
    }

    /// Has it done by the thread. Without an answer in time it may be done later, or never.
    fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut SlotFile, Instant) -> io::Result<T> + Send + 'static,
    ) -> Result<T, String> {
        let deadline = Instant::now() + self.timeout;
        let (answer, answered) = bounded(1);
        let job = Box::new(move |file: &mut SlotFile| drop(answer.send(work(file, deadline))));
        let done = self.jobs().and_then(|jobs| {
            let sent = jobs.send_deadline(job, deadline).ok();
            let done = sent.and_then(|()| answered.recv_deadline(deadline).ok());
            done.unwrap_or_else(|| Err(io::ErrorKind::TimedOut.into()))
        });
        done.map_err(|e| match e.kind() {
            io::ErrorKind::TimedOut => late(&self.path, self.timeout),
            _ => format!("{}: {}", self.path.display(), plain(&e)),
        })
    }
}

fn late(path: &Path, timeout: Duration) -> String {
    format!("{} was not opened, read or written within {} s", path.display(), timeout.as_secs_f32())
}

impl Anchor for FileAnchor {
    async fn load(&self, _: &[u8; 16]) -> Result<Held, String> {
        self.ask(SlotFile::load).map(Held::of)
    }

    async fn replace(&self, _: &[u8; 16], expected: u64, body: &AnchorBytes) -> Replaced {
        let body = *body;
        self.ask(move |file, until| file.replace(expected, &body, until)).unwrap_or_else(Replaced::Unknown)
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use crate::anchor::asked;

    const VOLUME: [u8; 16] = [1; 16];
    const TIMEOUT: Duration = Duration::from_millis(100);

    fn body(generation: u64) -> AnchorBytes {
        let mut body = [9; 512];
        body[32..40].copy_from_slice(&generation.to_le_bytes());
        body
    }

    /// Holds the thread up, as a disk does that stands still, until the sender is dropped, or for half a minute.
    fn hang(anchor: &FileAnchor) -> Sender<()> {
        let (held, released) = bounded::<()>(0);
        anchor
            .jobs()
            .unwrap()
            .send(Box::new(move |_| {
                let _ = released.recv_timeout(Duration::from_secs(30));
            }))
            .unwrap();
        held
    }

    #[test]
    fn a_disk_that_stands_still_is_told_in_time_and_asked_again_later() {
        let folder = tempfile::tempdir().unwrap();
        let (anchor, _) = FileAnchor::make(&folder.path().join("anchor"), TIMEOUT).unwrap();
        let held = hang(&anchor);
        let since = Instant::now();
        assert!(asked(anchor.load(&VOLUME)).unwrap_err().contains("written within 0.1 s"));
        assert!(
            matches!(asked(anchor.replace(&VOLUME, 0, &body(1))), Replaced::Unknown(why) if why.contains("within"))
        );
        assert!(since.elapsed() < Duration::from_secs(20), "{:?}", since.elapsed());
        drop(held);
        let anchor = FileAnchor { timeout: Duration::from_secs(20), ..anchor };
        assert_eq!(asked(anchor.load(&VOLUME)), Ok(Held::Nothing), "nobody waited for it any more");
        assert_eq!(asked(anchor.replace(&VOLUME, 0, &body(1))), Replaced::Done);
        assert_eq!(asked(anchor.load(&VOLUME)), Ok(Held::Body(body(1))));
    }
}

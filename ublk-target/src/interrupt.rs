//! Ctrl-C, where what has been found is to be told first, or what was begun taken away.

use crate::failure::{Context, Exit, Outcome};
use nix::sys::signal::{SigSet, Signal, raise};
use std::{
    fs,
    path::PathBuf,
    process,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

static STARTED: AtomicBool = AtomicBool::new(false);
static WATCHED: AtomicBool = AtomicBool::new(false);
static SEEN: AtomicBool = AtomicBool::new(false);
static TEMPORARY: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// To be called before any thread is started: one that does not block the signals would be ended by them. Until somebody
/// [watches](watch) they end the process as ever.
pub fn start() -> Outcome {
    if STARTED.swap(true, Ordering::Relaxed) {
        return Ok(());
    }
    let mut set = SigSet::empty();
    set.add(Signal::SIGINT);
    set.add(Signal::SIGTERM);
    set.thread_block().doing("can't block signals")?;
    let wait = move || {
        if let Ok(signal) = set.wait() {
            if !WATCHED.load(Ordering::Relaxed) {
                let _ = set.thread_unblock().and_then(|()| raise(signal));
            }
        }
        SEEN.store(true, Ordering::Relaxed);
        let _ = set.wait();
        for path in temporary().drain(..) {
            let _ = fs::remove_file(path);
        }
        process::exit(Exit::Interrupted as i32);
    };
    thread::Builder::new().name("signals".into()).spawn(wait).map(drop).doing("can't start a thread")
}

/// From now on the first of the signals is only noted. A second ends the process, for the work may wait for a device that never
/// answers.
pub fn watch() {
    WATCHED.store(true, Ordering::Relaxed);
}

/// Whether one has come.
pub fn seen() -> bool {
    SEEN.load(Ordering::Relaxed)
}

/// Takes the file away where the process ends before its time.
pub fn take_away(path: PathBuf) {
    temporary().push(path);
}

fn temporary() -> std::sync::MutexGuard<'static, Vec<PathBuf>> {
    TEMPORARY.lock().unwrap_or_else(PoisonError::into_inner)
}

//! Ctrl-C, where what has been found is to be told first, or what was begun taken away.

use crate::failure::{Context, Exit, Outcome};
use nix::sys::signal::{SigSet, Signal};
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

static WATCHED: AtomicBool = AtomicBool::new(false);
static SEEN: AtomicBool = AtomicBool::new(false);
static TEMPORARY: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Watches for SIGINT and SIGTERM from now on, until the process ends. The first is only noted; a second ends the process, for
/// the work may wait for a device that never answers.
pub fn watch() -> Outcome {
    if WATCHED.swap(true, Ordering::Relaxed) {
        return Ok(());
    }
    let mut set = SigSet::empty();
    set.add(Signal::SIGINT);
    set.add(Signal::SIGTERM);
    set.thread_block().doing("can't block signals")?;
    let wait = move || {
        let _ = set.wait();
        SEEN.store(true, Ordering::Relaxed);
        let _ = set.wait();
        for path in temporary().drain(..) {
            let _ = fs::remove_file(path);
        }
        process::exit(Exit::Interrupted as i32);
    };
    thread::Builder::new().name("signals".into()).spawn(wait).map(drop).doing("can't start a thread")
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

//! Ctrl-C in a command that uses devices without ublk: what is under way ends before the command
//! does.
//!
//! The I/O of a process that is killed is left to the kernel, which holds the devices until some
//! time after the process is gone: whoever comes next would find them in use.

use crate::{
    checkpoints::Stop,
    failure::{Context, Exit, Failure, Outcome},
    os, output,
    threads::named,
};
use nix::sys::signal::{SigSet, Signal, raise};
use std::{
    fs,
    future::pending,
    path::PathBuf,
    sync::{
        Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

/// How long the end may take: a device may never answer, and so may whoever is to give
/// or take the content.
const PATIENCE: Duration = Duration::from_secs(1);

static WATCHED: OnceLock<Interrupt> = OnceLock::new();
/// Files that go where the process ends before its time.
static TEMPORARY: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
/// What is to be said where the process ends before its time.
static UNFINISHED: Mutex<Option<String>> = Mutex::new(None);
static TOLD: AtomicBool = AtomicBool::new(false);

#[derive(Default)]
struct Interrupt {
    came: Stop,
    signal: OnceLock<Signal>,
}

/// From here on SIGINT, SIGTERM, SIGHUP and SIGQUIT end what runs in [`crate::offline`], and then
/// the process, unless they are ignored (nohup). Before any other thread is started.
pub fn watch() -> Outcome {
    let signals = os::heeded(&[Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT]);
    signals.thread_block().doing("can't block signals")?;
    expect();
    let (ready, started) = mpsc::channel();
    let wait = move || {
        let _ = ready.send(());
        let Ok(signal) = signals.wait() else { return };
        come(signal);
        thread::sleep(PATIENCE);
        die_of(signal);
    };
    named("signals").spawn(wait).doing("can't start the signal thread")?;
    // What the thread takes of the address space is known to whoever counts it next.
    let _ = started.recv();
    Ok(())
}

/// What runs in [`crate::offline`] from here on looks whether a signal has come, which somebody
/// says by [`come`].
pub fn expect() {
    WATCHED.get_or_init(Interrupt::default);
}

/// Whether somebody takes such signals in this process.
pub fn is_expected() -> bool {
    WATCHED.get().is_some()
}

/// Ends what looks for it.
pub fn come(signal: Signal) {
    let interrupt = WATCHED.get_or_init(Interrupt::default);
    let _ = interrupt.signal.set(signal);
    interrupt.came.set();
}

/// Ready when such a signal has come. One waiter at a time.
pub async fn came() {
    match WATCHED.get() {
        Some(interrupt) => interrupt.came.wait().await,
        None => pending().await,
    }
}

/// Whether one has come.
pub fn has_come() -> bool {
    signal().is_some()
}

/// Which.
pub fn signal() -> Option<Signal> {
    WATCHED.get().and_then(|interrupt| interrupt.signal.get().copied())
}

/// Takes the file away where nothing else can.
pub fn take_away(path: PathBuf) {
    temporary().push(path);
}

fn temporary() -> MutexGuard<'static, Vec<PathBuf>> {
    TEMPORARY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From here on something is half done, until [`finished`]: what a signal that comes meanwhile has
/// left.
pub fn unfinished(words: String) {
    *UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner) = Some(words);
}

/// It is done.
pub fn finished() {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner).take();
}

/// The command says itself that it was interrupted, and has an exit code for that.
pub fn told() {
    TOLD.store(true, Ordering::Relaxed);
}

/// What was not done to its end. Whoever sent the signal knows why.
pub fn failure() -> Failure {
    Failure::new(Exit::Device, "")
}

/// The end of the process, where such a signal has come: as if it had killed us, so that a shell
/// knows.
pub fn end() {
    if TOLD.load(Ordering::Relaxed) {
        return;
    }
    if let Some(signal) = signal() {
        die_of(signal);
    }
}

/// Ends the process as the signal would have, says what it leaves half done, and takes away what
/// nobody is to find.
pub fn die_of(signal: Signal) {
    if let Some(words) = UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner).take() {
        output::tell(words);
    }
    temporary().drain(..).for_each(|path| drop(fs::remove_file(path)));
    let _ = SigSet::from(signal).thread_unblock();
    let _ = raise(signal);
}

//! `stop`, not in the help: the kernel's STOP_DEV and nothing else, in a process of its own.
//!
//! STOP_DEV waits in the kernel for all requests, and can't be interrupted. A daemon with a thread in
//! there can't be killed any more: the process holds its descriptors as long as the thread lives, the
//! kernel gives requests back when the descriptors are closed, and the thread waits for the requests.

use crate::{
    daemon::state::State,
    device::{
        claim::{self, Claim},
        counters,
        users::{self, User},
    },
    failure::{Exit, Failure, Outcome},
    ourselves,
    ublk::{self, Proof},
};
use nix::unistd::getppid;
use std::{
    io::{self, Write},
    path::PathBuf,
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

#[derive(clap::Args)]
pub struct Args {
    /// The device: its number, or /dev/ublkbN
    #[arg(short, long, value_name = "N", value_parser = super::one_device::device_number)]
    number: u32,
    /// Only if nobody uses it
    #[arg(long, value_enum, default_value = "now")]
    when: When,
}

/// Whose use of the device counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum When {
    /// Nobody's
    Now,
    /// Everybody's: busy where it is in use
    Unused,
    /// Everybody's: waits for the last user, without limit, and says a line when it begins to
    Left,
}

impl When {
    fn name(self) -> &'static str {
        match self {
            Self::Now => "now",
            Self::Unused => "unused",
            Self::Left => "left",
        }
    }
}

/// How long a user may be a passing one.
const PASSING: Duration = Duration::from_secs(1);
/// Between two looks for the last user.
const PAUSE: Duration = Duration::from_millis(200);

pub fn run(args: &Args) -> Outcome {
    let state = State::load(args.number)?;
    let done = stop(state.proof(), args.when, state.is_alive());
    if let (When::Unused, Err(failure)) = (args.when, &done) {
        // Whoever started us tells it.
        let mut out = io::stdout();
        let _ = writeln!(out, "{}", failure.message);
    }
    done
}

/// Stops the device, as the kernel does it. `alive`: whether it has a daemon.
pub fn stop(device: Proof, when: When, alive: bool) -> Outcome {
    let names_users = when == When::Unused;
    let try_stop = || if alive { try_stop(device, names_users) } else { try_stop_dead(device) };
    match when {
        When::Now => device.stop(),
        When::Unused => {
            let deadline = Instant::now() + PASSING;
            stop_when(try_stop, || Instant::now() < deadline)
        }
        When::Left => {
            let mut told = false;
            let begun = Instant::now();
            let starter = getppid();
            stop_when(try_stop, || {
                // Its device is another's by now, or may be soon: what it asked for was for its own.
                if getppid() != starter {
                    return false;
                }
                if !told && begun.elapsed() >= PASSING {
                    told = true;
                    // Whoever started us, or nobody.
                    let mut out = io::stdout();
                    let _ = writeln!(out, "in use").and_then(|()| out.flush());
                }
                true
            })
        }
    }
}

/// Stops it as soon as nobody uses it, or fails where somebody does and there is no more patience.
fn stop_when(try_stop: impl Fn() -> Outcome, mut has_patience: impl FnMut() -> bool) -> Outcome {
    let mut done = try_stop();
    // Patience is asked for last before each try.
    while done.as_ref().is_err_and(|failure| failure.exit == Exit::Busy) {
        thread::sleep(PAUSE);
        if !has_patience() {
            break;
        }
        done = try_stop();
    }
    done
}

/// Stops a device that has a daemon, if nobody uses it. Where the kernel does not decide we look:
/// between the look and the stop somebody may still come.
fn try_stop(device: Proof, names_users: bool) -> Outcome {
    let users = || users::now(&ublk::block_path(device.number));
    match device.stop_unused() {
        Some(Err(failure)) if failure.exit == Exit::Busy && names_users => Err(in_use(device.number, &users())),
        Some(done) => done,
        None => stop_unless_used(device, &users()),
    }
}

/// The same of a device whose daemon is dead. The kernel decides under a lock that each open takes,
/// too, and may hold it until the device is stopped or has a new daemon. It asks for a claim before
/// the lock, so that one is seen all the same.
fn try_stop_dead(device: Proof) -> Outcome {
    let path = ublk::block_path(device.number);
    match claim::claim(&path) {
        Claim::Taken => Err(in_use(device.number, &users::of_claimed(&path))),
        Claim::HeldUp => stop_held_up(device),
        Claim::Free => match device.stop_unused() {
            Some(Err(failure)) if failure.exit == Exit::Busy => Err(in_use(device.number, &users::seen(&path))),
            Some(done) => done,
            None => stop_unless_used(device, &users::seen(&path)),
        },
    }
}

/// Stops a device that nobody can open, which ends what is held up, where nothing can be lost.
///
/// A new device is held up by the kernel's look for partitions, from its first block on: one read
/// at a time. Where the device has not answered a single request yet, and one is under way, it is
/// that look's: nobody had the device for longer than a moment before it. Anything else may be
/// what sync(2) or a last close waits for.
fn stop_held_up(device: Proof) -> Outcome {
    let number = device.number;
    if !counters::awaits_first_answer(&PathBuf::from(format!("/sys/block/ublkb{number}"))) {
        let message = format!(
            "/dev/ublkb{number} can't be opened, so nobody can tell who uses it: use `recover`, or --force and lose what is not written yet"
        );
        return Err(Failure::new(Exit::Busy, message));
    }
    stop_unless_used(device, &users::seen(&ublk::block_path(number)))
}

fn stop_unless_used(device: Proof, users: &[User]) -> Outcome {
    if users.is_empty() { device.stop() } else { Err(in_use(device.number, users)) }
}

fn in_use(number: u32, users: &[User]) -> Failure {
    let users = if users.is_empty() { "open".to_owned() } else { users::in_words(users) };
    let message =
        format!("/dev/ublkb{number} is in use: {users}. End that, or use --force and lose what is not written yet");
    Failure::new(Exit::Busy, message)
}

/// Starts `stop` for a device.
pub fn start(number: u32, when: When) -> io::Result<Child> {
    ourselves::run(["stop", "-n", &number.to_string(), "--when", when.name()], Stdio::piped())
}

/// Starts what the second signal to a daemon means: `del --force`.
pub fn start_forced_del(number: u32) -> io::Result<Child> {
    ourselves::run(["del", "--force", "-n", &number.to_string()], Stdio::null())
}

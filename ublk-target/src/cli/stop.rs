//! `stop`, not in the help: the kernel's STOP_DEV and nothing else, in a process of its own.
//!
//! STOP_DEV waits in the kernel for all requests, and can't be interrupted. A daemon with a thread in
//! there can't be killed any more: the process holds its descriptors as long as the thread lives, the
//! kernel gives requests back when the descriptors are closed, and the thread waits for the requests.

use crate::{
    daemon::state::State,
    device::users::{self, Claim, User},
    failure::{Exit, Failure, Outcome},
    ublk::{self, Proof},
};
use nix::unistd::getppid;
use std::{
    io::{self, Write},
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

#[derive(clap::Args)]
pub struct Args {
    /// The device: its number, or /dev/ublkbN
    #[arg(short, long, value_name = "N", value_parser = super::device_number)]
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
    stop(state.proof(), args.when, state.is_alive())
}

/// Stops the device, as the kernel does it. `alive`: whether it has a daemon.
pub fn stop(device: Proof, when: When, alive: bool) -> Outcome {
    let try_stop = || if alive || can_be_opened(device) { try_stop(device) } else { stop_held_up(device) };
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

/// Where the kernel does not decide we look: between the look and the stop somebody may still come.
fn try_stop(device: Proof) -> Outcome {
    if let Some(done) = device.stop_unused() {
        return done;
    }
    stop_unless_used(device, &users::now(&ublk::block_path(device.number)))
}

/// The kernel looks for partitions on a new device under a lock that each open takes, and the
/// kernel's decision whether it is in use. Where the daemon has died before that look was answered,
/// it waits for the next one or for the device to be stopped.
fn can_be_opened(device: Proof) -> bool {
    users::claim(&ublk::block_path(device.number)) != Claim::HeldUp
}

/// Stops a device that nobody can open, which ends what is held up. Whoever had it
/// open before is seen.
fn stop_held_up(device: Proof) -> Outcome {
    stop_unless_used(device, &users::seen(&ublk::block_path(device.number)))
}

fn stop_unless_used(device: Proof, users: &[User]) -> Outcome {
    if users.is_empty() { device.stop() } else { Err(Failure::new(Exit::Busy, users::in_words(users))) }
}

/// Starts `stop` for a device.
pub fn start(number: u32, when: When) -> io::Result<Child> {
    run_ourselves(&["stop", "-n", &number.to_string(), "--when", when.name()], Stdio::piped())
}

/// Starts what the second signal to a daemon means: `del --force`.
pub fn start_forced_del(number: u32) -> io::Result<Child> {
    run_ourselves(&["del", "--force", "-n", &number.to_string()], Stdio::null())
}

/// Runs this program once more, out of reach of the caller's terminal.
fn run_ourselves(args: &[&str], output: Stdio) -> io::Result<Child> {
    Command::new("/proc/self/exe")
        .args(args)
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
}

//! `recover --successor`, not in the help: the daemon that is to follow one which still serves.
//! `upgrade` has started it, hears it on its standard output, and holds its standard input open as
//! long as it is there. Where it is not, the daemon is asked: one that hands over is followed,
//! however long its volume takes to close. So whatever becomes of `upgrade`, a device that is handed
//! over has a daemon afterwards.
//!
//! All that can be done beside the other daemon is done before that is asked to end, so this is
//! `upgrade`'s preflight, too: by the program that is to serve, with what it is to serve with.

use super::recover::{self, Args};
use crate::{
    anchor::asked,
    daemon::{
        self, Start, client,
        launch::{self, Reporter},
        life::Life,
        lock_memory,
        log::Sink,
        protocol::Request,
        settings::{Settings, SyncLog},
        state::{Identity, State, socket_path},
    },
    device::Use,
    failure::{Context, Exit, Failure, Outcome},
    key::KeySource,
    offline::Offline,
    os, ublk, write_back_file,
};
use nix::{
    poll::{PollFd, PollFlags, poll},
    sys::wait::{WaitStatus, waitpid},
    unistd::ForkResult,
};
use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    process, thread,
    time::Duration,
};
use ublk_integrity::{
    Access, OpenOptions,
    open::{Grow, KnownFormat},
};

/// Milliseconds between two looks whether the other daemon has ended: requests wait.
const PAUSE: u8 = 2;
/// Between two questions to a daemon whether it hands over yet.
const BETWEEN_QUESTIONS: Duration = Duration::from_millis(50);

pub(super) fn run(args: &Args) -> Outcome {
    os::close_inherited().doing("can't close inherited descriptors")?;
    launch::leave_session()?;
    let reporter = Reporter::successor(args.foreground)?;
    let prepared = prepare(args, &reporter);
    let (number, start, life) = prepared.inspect_err(|failure| reporter.failed(failure)).map_err(Failure::told)?;
    // Requests wait from when we are ready on, those for our own pages among them.
    lock_memory(|warning| reporter.warn(&warning));
    reporter.ready();
    if !outlives(|| life.goes_on(), io::stdin().as_fd(), || serves_on(number)) {
        return Err(Failure::new(Exit::Interrupted, "").told());
    }
    launch::null_stdio()?;
    daemon::run(start, reporter, Sink::system()).map_err(Failure::told)
}

/// All that can be done and all that can fail before the daemon that serves has ended.
fn prepare(args: &Args, reporter: &Reporter) -> Outcome<(u32, Start, Life)> {
    ublk::need_driver()?;
    let number = args.device.number()?;
    let state = State::load(number)?;
    let life = state.watch().ok_or_else(|| state.daemon_is_dead())?;
    write_back_file::refuse_unknown(&state.open_id)?;
    let volume = state.volume.clone();
    let key = args.key.source()?;
    if key.as_ref().is_some_and(KeySource::is_standard_input) {
        return Err(Failure::new(Exit::Arguments, "the key can't come from a pipe here: give it with --key-file FILE"));
    }
    let mut start = recover::of(state, key)?;
    leave_readable(&mut start.settings, args.known_format.as_ref());
    start.settings.grow = args.grow.map(|size| Grow::To(size.0));
    // What it takes hangs on the size that it is to have.
    start.volume.iter_mut().zip(args.grow).for_each(|(volume, size)| volume.size = size.0);
    verify_elsewhere(&start, &volume, reporter)?;
    Ok((number, start, life))
}

/// Should this daemon fail, the program of before gets the volume back: nothing is set in it that that
/// does not know. One that can't say what it knows has told by what it has asked for itself.
fn leave_readable(settings: &mut Settings, before: Option<&KnownFormat>) {
    if before.is_some_and(|before| !before.serves_sync_log()) {
        settings.sync_log = SyncLog::Off;
    }
}

/// Whether the key is the volume's, and the volume of a format that this program serves: by a
/// process of its own, for one that has used a ring has threads of the kernel for a while.
fn verify_elsewhere(start: &Start, volume: &Identity, reporter: &Reporter) -> Outcome {
    match os::fork_single_threaded().doing("can't fork")? {
        ForkResult::Child => {
            let verified = os::guard_secrets().doing("can't guard the key").and_then(|()| verify(start, volume));
            process::exit(match verified {
                Ok(()) => 0,
                Err(failure) => {
                    reporter.failed(&failure);
                    failure.exit as i32
                }
            })
        }
        ForkResult::Parent { child } => match waitpid(child, None) {
            Ok(WaitStatus::Exited(_, 0)) => Ok(()),
            // It has told why.
            Ok(WaitStatus::Exited(_, code)) => Err(Failure::new(Exit::from_code(code as u8), "").told()),
            _ => Err(Failure::new(Exit::Device, "the process that was to look at the volume has died")),
        },
    }
}

fn verify(start: &Start, volume: &Identity) -> Outcome {
    look_at(start, volume, start.settings.grow).map(drop)
}

/// The size in bytes that the volume has once it has grown so, if it can. Beside the daemon that
/// serves it: nothing is locked, nothing written.
pub(super) fn look_at(start: &Start, volume: &Identity, grow: Option<Grow>) -> Outcome<u64> {
    let settings = &start.settings;
    let offline = Offline::open(&settings.data, settings.meta.as_deref(), Use::Unlocked)?;
    let options = OpenOptions {
        separate_meta: settings.meta.is_some(),
        expected_uuid: start.uuid,
        ..OpenOptions::new(Access::ReadOnly, [0; 32])
    };
    let named = |failure: Failure| Failure { message: settings.named(&failure.message), ..failure };
    let verified = offline.verify(&start.key, &options).map_err(named)?;
    // Without it neither program could open the volume, once the one that serves has closed it.
    if let Some(anchor) = &settings.anchor {
        let there = anchor.open(settings.paths(), start.volume.as_ref())?;
        offline.introduce(&verified, &there)?;
        asked(verified.show_anchor(&there)).map_err(|e| named(e.into()))?;
    }
    let found = Identity::of(&verified.info());
    // It may have grown since the daemon has opened it.
    if !volume.may_become(&found) {
        let path = settings.meta_path().display();
        return Err(Failure::new(
            Exit::Device,
            format_args!("{path} holds another volume than the one that is served"),
        ));
    }
    verified.size_when_grown(&offline.io(), grow.unwrap_or(Grow::To(found.size))).map_err(|e| named(e.into()))
}

/// Waits until the daemon lives no more. `false` where it goes on, and whoever has started us is gone
/// or wants no successor any more. As long as a daemon does not say that it goes on, it may not.
fn outlives(lives: impl Fn() -> bool, starter: BorrowedFd<'_>, serves_on: impl Fn() -> bool) -> bool {
    let mut is_there = true;
    loop {
        if is_there {
            let waits = poll(&mut [PollFd::new(starter, PollFlags::POLLIN)], PAUSE);
            is_there = matches!(waits, Ok(0) | Err(nix::Error::EINTR));
        }
        // After that look: where both have come, the device has no daemon.
        if !lives() {
            return true;
        }
        if !is_there {
            if serves_on() {
                return false;
            }
            thread::sleep(BETWEEN_QUESTIONS);
        }
    }
}

/// Whether the daemon says that it serves the device, and hands nothing over.
fn serves_on(number: u32) -> bool {
    client::ask(&socket_path(number), &Request::Status {}).is_ok_and(|status| status["handing_over"] != true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{cell::Cell, os::unix::net::UnixStream};

    #[test]
    fn a_daemon_that_hands_over_is_followed_whatever_becomes_of_who_has_started_us() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let after = |looks: u32| {
            let left = Cell::new(looks);
            move || left.replace(left.get().saturating_sub(1)) > 0
        };
        assert!(outlives(after(3), ours.as_fd(), || panic!("asked though `upgrade` is there")));
        drop(theirs);
        assert!(outlives(after(3), ours.as_fd(), || false), "it is closing, or does not answer");
        assert!(outlives(|| false, ours.as_fd(), || panic!("asked though it is dead")));
        let hands_over = after(2);
        assert!(!outlives(|| true, ours.as_fd(), || !hands_over()), "it has given that up, and goes on");
    }

    #[test]
    fn nothing_is_set_in_the_volume_that_the_program_of_before_does_not_know() {
        let own = KnownFormat::own();
        let with = |before: Option<&KnownFormat>| {
            let mut settings = State::of_test(0).settings;
            settings.sync_log = SyncLog::Auto;
            leave_readable(&mut settings, before);
            settings.sync_log
        };
        assert_eq!(with(Some(&own)), SyncLog::Auto);
        assert_eq!(with(None), SyncLog::Auto, "it has asked for it");
        assert_eq!(with(Some(&KnownFormat { versions: vec![1], ..own })), SyncLog::Off);
    }
}

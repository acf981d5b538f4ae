//! `recover`: a new daemon for a device whose own has died.

use super::{
    OneDevice,
    add::{launch, refuse_unstorable},
    anchored::AnchorArgs,
};
use crate::{
    daemon::{Origin, Start, peek::peek, refuse_own_stack, settings::SyncLog, state::State},
    failure::{Context, Exit, Failure, Outcome},
    key::{KeySource, OptionalKeyArgs},
    size::Size,
    ublk,
};
use nix::sys::signal::SigSet;
use ublk_integrity::open::KnownFormat;
use uuid::Uuid;

/// Give a device whose daemon has died a new one; requests that waited go on
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub(super) device: OneDevice,
    #[command(flatten)]
    pub(super) key: OptionalKeyArgs,
    /// Take the newest tag of a block that recovery can't read, instead of opening
    /// read-only until it can
    #[arg(long)]
    decide_unreadable: bool,
    /// Whether small writes that must be durable at once lie in the log with their data [default:
    /// what `add` was told]
    #[arg(long, value_name = "WHEN", value_enum)]
    sync_log: Option<SyncLog>,
    #[command(flatten)]
    anchor: AnchorArgs,
    /// Stay in the foreground, and log to standard error
    #[arg(long)]
    pub(super) foreground: bool,
    /// What `upgrade` starts: follow the daemon that the device has, when that has ended
    #[arg(long, hide = true)]
    pub(super) successor: bool,
    /// What of the format the program of that daemon serves, as its `known-format` says
    #[arg(long, value_name = "JSON", requires = "successor", value_parser = known_format, hide = true)]
    pub(super) known_format: Option<KnownFormat>,
    /// How large the volume is to be from then on
    #[arg(long, value_name = "SIZE", requires = "successor", hide = true)]
    pub(super) grow: Option<Size>,
}

fn known_format(text: &str) -> Result<KnownFormat, String> {
    serde_json::from_str(text).map_err(|e| e.to_string())
}

pub fn run(args: &Args) -> Outcome {
    // `upgrade` holds signals back when it calls the program of before.
    SigSet::empty().thread_set_mask().doing("can't let signals through")?;
    launch(prepare(args)?, args.foreground)
}

/// Checks what can be checked before there is a daemon.
pub fn prepare(args: &Args) -> Outcome<Start> {
    let mut start = start(args.device.number()?, args.key.source()?, args.decide_unreadable)?;
    start.settings.sync_log = args.sync_log.unwrap_or(start.settings.sync_log);
    start.settings.anchor = args.anchor.instead_of(start.settings.anchor.take());
    Ok(start)
}

/// The same for a device of this number, with the key from `key` where that is given.
pub(super) fn start(number: u32, key: Option<KeySource>, decide_unreadable: bool) -> Outcome<Start> {
    ublk::need_driver()?;
    let state = State::load(number)?;
    if state.is_alive() {
        return Err(Failure::new(Exit::Busy, format_args!("the daemon of device {number} (pid {}) lives", state.pid)));
    }
    if !ublk::exists(number) {
        state.remove();
    }
    let mut start = of(state, key)?;
    start.settings.decide_unreadable = decide_unreadable;
    Ok(start)
}

/// What a daemon needs that follows another, dead or not.
pub(super) fn of(state: State, key: Option<KeySource>) -> Outcome<Start> {
    let number = state.id;
    if !ublk::exists(number) {
        return Err(Failure::new(Exit::Device, format_args!("device {number} is gone: `add` makes a new one")));
    }
    let uuid = state.volume.uuid.parse::<Uuid>().ok().map(Uuid::into_bytes);
    let mut settings = state.settings;
    if !settings.recovery {
        return Err(Failure::new(
            Exit::Device,
            format_args!("device {number} was added with --no-recovery: `del -n {number}`, then `add`"),
        ));
    }
    if let Some(source) = key {
        settings.key = source;
        refuse_unstorable(&settings)?;
    } else if settings.key.is_standard_input() {
        return Err(Failure::new(Exit::Arguments, "the key came from a pipe: give it again with --key-file"));
    }
    let key = settings.key.load()?;
    refuse_own_stack(&settings, number)?;
    let volume = peek(settings.meta_path())?;
    Ok(Start { settings, may_shrink: true, origin: Origin::Recovered(number), volume, key, uuid })
}

//! `key`: who opens a volume that has key slots.

use super::{DeviceArgs, anchored::AnchorArgs};
use crate::{
    anchor::note,
    daemon::{
        client::{self, Conversation},
        protocol::Request,
        state::{Change, State, socket_path},
    },
    device::{Use, is_same_device},
    failure::{Exit, Failure, Outcome},
    key::{KeyArgs, KeySource},
    offline::Offline,
    os,
    output::{self, Output},
    random::random,
    size::Size,
};
use serde::Serialize;
use std::{
    io::IsTerminal,
    path::{Path, PathBuf},
};
use ublk_integrity::{
    Credential,
    anchor::{KeyAreaMark, KeyAreaStep},
    create::Label,
    key_slots::{GuessCost, KEY_SLOTS, LockedSlots, NewSlot, SlotError, SlotInfo, SlotKind, UnlockedSlots},
};

/// Say who opens a volume that has key slots (`format --key-slots`); it may be in use
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(clap::Subcommand)]
enum Verb {
    /// Show the slots in use; needs no key
    List(ListArgs),
    /// Have the volume opened by one more key or passphrase
    Add(NewArgs),
    /// Have the slot that the given key opens opened by another
    Change(NewArgs),
    /// Empty a slot; not the one that the given key opens
    Remove(RemoveArgs),
}

#[derive(clap::Args)]
struct ListArgs {
    #[command(flatten)]
    devices: DeviceArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
struct NewArgs {
    #[command(flatten)]
    devices: DeviceArgs,
    #[command(flatten)]
    key: KeyArgs,
    #[command(flatten)]
    anchor: AnchorArgs,
    #[command(flatten)]
    new: NewKeyArgs,
    /// Name of the slot, for people: at most 32 bytes
    #[arg(long, value_name = "TEXT")]
    label: Option<Label>,
    #[command(flatten)]
    cost: CostArgs,
}

/// What a guess at a new passphrase costs (argon2id, RFC 9106), and each open of the volume with it. The options are named as
/// those of cryptsetup.
#[derive(Clone, Copy, clap::Args)]
pub struct CostArgs {
    /// For a passphrase: memory that a guess takes [default: 256M]
    #[arg(long, value_name = "SIZE", value_parser = guess_memory)]
    pbkdf_memory: Option<u32>,
    /// For a passphrase: passes over that memory [default: 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16))]
    pbkdf_force_iterations: Option<u32>,
}

/// In KiB.
fn guess_memory(text: &str) -> Result<u32, String> {
    let Size(bytes) = text.parse()?;
    let fits = (8 << 20..=1 << 30).contains(&bytes);
    if fits { Ok((bytes >> 10) as u32) } else { Err("must be from 8M to 1G".into()) }
}

impl CostArgs {
    fn cost(self) -> GuessCost {
        let usual = GuessCost::default();
        GuessCost {
            memory_kib: self.pbkdf_memory.unwrap_or(usual.memory_kib),
            passes: self.pbkdf_force_iterations.unwrap_or(usual.passes),
            ..usual
        }
    }
}

/// The options that name another key.
#[derive(clap::Args)]
#[group(required = true, multiple = false)]
struct NewKeyArgs {
    /// File that holds the new key (32 bytes or more); `keygen` makes one
    #[arg(long, value_name = "FILE")]
    new_key_file: Option<PathBuf>,
    /// File that holds the new passphrase (a newline at its end does not count); "-" asks at the
    /// terminal, or reads a pipe
    #[arg(long, value_name = "FILE")]
    new_passphrase_file: Option<PathBuf>,
}

#[derive(clap::Args)]
struct RemoveArgs {
    #[command(flatten)]
    devices: DeviceArgs,
    #[command(flatten)]
    key: KeyArgs,
    #[command(flatten)]
    anchor: AnchorArgs,
    /// The slot, as `key list` shows it
    #[arg(long, value_name = "N")]
    slot: usize,
}

#[derive(Serialize)]
struct Report {
    slots: Vec<SlotInfo>,
    copies_agree: bool,
}

pub fn run(args: &Args) -> Outcome {
    match &args.verb {
        Verb::List(args) => list(args),
        Verb::Add(args) => fill(args, true),
        Verb::Change(args) => fill(args, false),
        Verb::Remove(args) => remove(args),
    }
}

fn list(args: &ListArgs) -> Outcome {
    let offline = args.devices.open(Use::Unlocked)?;
    let slots = read(&offline, &args.devices)?;
    let report = Report { slots: slots.list(), copies_agree: slots.copies_agree() };
    let out = if args.json { Output::json(&report) } else { lines(&report) };
    out.print()
}

fn lines(report: &Report) -> Output {
    let mut out = Output::new();
    for SlotInfo { slot, kind, label, .. } in &report.slots {
        let kind = match kind {
            SlotKind::KeyFile => "key file".to_owned(),
            SlotKind::Passphrase(GuessCost { memory_kib, passes, lanes }) => {
                format!("passphrase (argon2id, {} MiB, {passes} passes, {lanes} lanes)", memory_kib >> 10)
            }
        };
        let label = if label.is_empty() { String::new() } else { format!(", \"{label}\"") };
        out.line(format_args!("slot {slot}        {kind}{label}"));
    }
    if !report.copies_agree {
        out.line("note          one of the two copies is older or damaged: the next change writes both");
    }
    out
}

fn fill(args: &NewArgs, one_more: bool) -> Outcome {
    let (old, new) = (args.key.source()?, args.new.source()?);
    if old.is_standard_input() && new.is_standard_input() && !std::io::stdin().is_terminal() {
        return Err(Failure::new(Exit::Arguments, "one pipe can't give both keys: name a file for one of them"));
    }
    // Before anything is held: somebody may have to type them.
    let (old, new) = (old.load()?, new.load_new()?);
    let slot = new_slot(args.label, args.cost)?;
    let (number, done) = Slots::change((&args.devices, &args.anchor), &old, |slots| match one_more {
        true => Ok((slots.add(&new, &slot)?, "in use")),
        false => slots.change(&new, &slot).map(|()| (slots.opened(), "changed")),
    })?;
    output::line(format_args!("slot {number}        {done}"))
}

fn remove(args: &RemoveArgs) -> Outcome {
    let key = args.key.load()?;
    Slots::change((&args.devices, &args.anchor), &key, |slots| slots.remove(args.slot))?;
    output::line(format_args!("slot {}        empty", args.slot))
}

/// A fresh slot, named so.
pub fn new_slot(label: Option<Label>, cost: CostArgs) -> Outcome<NewSlot> {
    let (made_seconds, label) = (os::since_1970().as_secs(), label.unwrap_or_default());
    Ok(NewSlot { cost: cost.cost(), made_seconds, label, salt: random()?, nonce: random()? })
}

impl NewKeyArgs {
    fn source(&self) -> Outcome<KeySource> {
        let named = KeySource::named(self.new_key_file.as_deref(), None, self.new_passphrase_file.as_deref())?;
        Ok(named.expect("one is required"))
    }
}

/// Where a volume's slots lie, for nobody else to change meanwhile.
struct Slots {
    offline: Offline,
    /// Where a daemon serves the volume: nobody ends it, or gives the device another one.
    _change: Option<Change>,
    /// That device, if its daemon tells an anchor.
    anchored: Option<u32>,
}

impl Slots {
    /// Opens the slots with a key, changes them, and writes them.
    fn change<T>(
        (devices, anchor): (&DeviceArgs, &AnchorArgs),
        key: &Credential,
        change: impl FnOnce(&mut UnlockedSlots) -> Result<T, SlotError>,
    ) -> Outcome<T> {
        let slots = Self::hold(devices)?;
        let mut unlocked = read(&slots.offline, devices)?.unlock(key)?;
        let done = change(&mut unlocked);
        // A removal that was cut short is made once more, finds nothing to remove, and is to end all the same.
        if matches!(done, Ok(_) | Err(SlotError::Empty(..KEY_SLOTS))) {
            slots.write(unlocked, devices, anchor).map_err(|failure| devices.failure(failure))?;
        }
        Ok(done?)
    }

    /// To its end, whatever asks us to stop: it is two or three writes, and two to an anchor.
    fn write(&self, unlocked: UnlockedSlots, devices: &DeviceArgs, anchor: &AnchorArgs) -> Outcome {
        let (offline, io) = (&self.offline, self.offline.io());
        let prepared = offline.run_to_its_end(unlocked.prepare(&io, devices.meta.is_some()))??;
        if let Some(device) = self.anchored {
            let keep = async |found, step| has_kept(device, found, step);
            return Ok(offline.run_to_its_end(prepared.write_kept(&io, keep))??);
        }
        match anchor.open(devices)? {
            Some(anchor) => {
                offline.introduce(prepared.volume(), &anchor)?;
                Ok(offline.run_to_its_end(prepared.write_anchored(&io, (&anchor, &note())))??)
            }
            None => Ok(offline.run_to_its_end(prepared.write(&io))??),
        }
    }

    fn hold(devices: &DeviceArgs) -> Outcome<Self> {
        let path = devices.meta_path();
        let change = served(path).map(|state| Change::follow(state.id)).transpose()?;
        // It may have ended before that.
        let serving = change.as_ref().and_then(|_| served(path));
        let offline = devices.open(if serving.is_some() { Use::Beside } else { Use::Exclusive })?;
        // A daemon that dies meanwhile leaves the volume to whoever comes.
        offline.backings().lock_key_area()?;
        let change = change.filter(|_| serving.is_some());
        let anchored = serving.filter(|state| state.settings.anchor.is_some()).map(|state| state.id);
        Ok(Self { offline, _change: change, anchored })
    }
}

/// Has the daemon tell its anchor: nobody else writes to that.
fn has_kept(device: u32, found: KeyAreaMark, step: KeyAreaStep) -> Outcome {
    let path = socket_path(device);
    Conversation::begin(&path, &Request::key_area(found, step))
        .map(drop)
        .map_err(|why| client::not_conversed(&path, why))
}

/// The device of ours that has it in use, whose daemon lives: it never touches the key area once it
/// serves.
fn served(path: &Path) -> Option<State> {
    let same = |state: &State| is_same_device(state.settings.meta_path(), path).unwrap_or(false);
    State::all().into_iter().find(|state| same(state) && state.is_alive())
}

fn read(offline: &Offline, devices: &DeviceArgs) -> Outcome<LockedSlots> {
    let slots = offline.run(LockedSlots::read(&offline.io()))??;
    slots.ok_or_else(|| {
        let path = devices.meta_path().display();
        let message = format!(
            "{path} holds no volume with key slots: `format --key-slots` makes one, `export` and `import` fill it"
        );
        Failure::new(Exit::Device, message)
    })
}

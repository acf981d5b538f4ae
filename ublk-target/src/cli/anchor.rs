//! `anchor`: where a volume's newest state is held outside its disk.

use super::{DeviceArgs, anchored::AnchorArgs};
use crate::{
    anchor::{AnyAnchor, Place, asked, note},
    checkpoints::AtStop,
    device::Use,
    failure::{Exit, Failure, Outcome},
    key::KeyArgs,
    offline::{Offline, Opening},
    output::{self, Output},
};
use ublk_integrity::{
    Access, Credential, OpenOptions,
    anchor::{Anchor, AnchorPurpose, AnchorStatus, MoveError},
    open::VerifiedVolume,
};
use uuid::Uuid;

/// Have a place outside a volume's disk hold how new it is: an older copy of all of the disk is refused then
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(clap::Subcommand)]
enum Verb {
    /// Begin: from then on the volume is opened with this anchor alone
    Init(OnVolume),
    /// Show what the anchor holds
    Show(ShowArgs),
    /// Accept the state that the devices hold, though it is older than the anchor says: after a backup was restored
    Reset(ResetArgs),
    /// Move what the anchor holds to another place; the old one says so from then on
    Move(MoveArgs),
    /// End: the volume is opened without an anchor from then on
    Remove(OnVolume),
}

#[derive(clap::Args)]
struct OnVolume {
    #[command(flatten)]
    devices: DeviceArgs,
    #[command(flatten)]
    key: KeyArgs,
    #[command(flatten)]
    anchor: AnchorArgs,
}

#[derive(clap::Args)]
struct ShowArgs {
    #[command(flatten)]
    volume: OnVolume,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
struct ResetArgs {
    #[command(flatten)]
    volume: OnVolume,
    /// Say that an older state is what you want
    #[arg(long, required = true)]
    accept_rollback: bool,
    /// The volume's UUID, so that no other is reset
    #[arg(long, value_name = "UUID")]
    uuid: Uuid,
}

#[derive(clap::Args)]
struct MoveArgs {
    #[command(flatten)]
    volume: OnVolume,
    /// Where it is from then on
    #[arg(long, value_name = "URI")]
    to: Place,
}

pub fn run(args: &Args) -> Outcome {
    let (Verb::Init(volume) | Verb::Remove(volume)) = &args.verb else {
        let (of, done) = match &args.verb {
            Verb::Show(args) => (&args.volume, show(args)),
            Verb::Reset(args) => (&args.volume, reset(args)),
            Verb::Move(args) => (&args.volume, move_to(args)),
            Verb::Init(of) | Verb::Remove(of) => (of, Ok(())),
        };
        return done.map_err(|failure| of.devices.failure(failure));
    };
    let done = if matches!(args.verb, Verb::Init(_)) { init(volume) } else { remove(volume) };
    done.map_err(|failure| volume.devices.failure(failure))
}

impl OnVolume {
    /// The devices, for nobody else meanwhile, and the key.
    fn open(&self, purpose: Use) -> Outcome<(Offline, Credential)> {
        self.anchor.needed()?;
        // Before anything is held: somebody may have to type it.
        let key = self.key.load()?;
        Ok((self.devices.open(purpose)?, key))
    }

    fn chosen(&self) -> Outcome<AnyAnchor> {
        self.anchor.needed()?;
        Ok(self.anchor.open(&self.devices)?.expect("one is named"))
    }

    fn verify(&self, offline: &Offline, key: &Credential) -> Outcome<VerifiedVolume> {
        let separate_meta = self.devices.meta.is_some();
        offline.verify(key, &OpenOptions { separate_meta, ..OpenOptions::new(Access::ReadOnly, [0; 32]) })
    }
}

/// Opens the volume for `purpose`, and closes it.
fn open_and_close(
    (offline, key): (&Offline, &Credential),
    chosen: &AnyAnchor,
    purpose: AnchorPurpose,
    uuid: Option<Uuid>,
) -> Outcome<(AnchorStatus, Uuid)> {
    let how = Opening { purpose, ..Opening::new(Access::ReadWrite, uuid) };
    let (volume, keeper) = offline.open_anchored(key, how, Some(chosen))?;
    let mut keeper = keeper.expect("an anchor was named");
    super::check::refuse_latched(&volume)?;
    offline.run_with_checkpoints(&volume, AtStop::Close, async { Ok(()) })?;
    if purpose != AnchorPurpose::End {
        asked(keeper.finish(&volume, (chosen, &note())))?;
    }
    let uuid = volume.info().uuid.parse().expect("it is one");
    Ok((keeper.status(), uuid))
}

fn init(args: &OnVolume) -> Outcome {
    let (offline, key) = args.open(Use::Exclusive)?;
    offline.backings().lock_key_area()?;
    begin(&offline, &key, &args.anchor, &args.devices)?;
    output::line(format_args!("anchor        {}", args.anchor.needed()?))
}

/// The first body of a volume: what `format --anchor` does, too.
pub fn begin(offline: &Offline, key: &Credential, anchor: &AnchorArgs, devices: &DeviceArgs) -> Outcome {
    let (chosen, is_new) = anchor.make(devices)?;
    let begun = open_and_close((offline, key), &chosen, AnchorPurpose::Begin, None);
    begun.map(drop).inspect_err(|_| {
        // A file that nothing was written to is in nobody's way.
        if is_new && asked(chosen.holds_nothing()) {
            anchor.anchor.iter().for_each(Place::unmake);
        }
    })
}

fn show(args: &ShowArgs) -> Outcome {
    let (offline, key) = args.volume.open(Use::Unlocked)?;
    let chosen = args.volume.chosen()?;
    let verified = args.volume.verify(&offline, &key)?;
    offline.introduce(&verified, &chosen)?;
    let status = asked(verified.show_anchor(&chosen))?;
    let out = if args.json { Output::json(&status) } else { lines(&status) };
    out.print()
}

fn lines(status: &AnchorStatus) -> Output {
    let AnchorStatus {
        state,
        generation,
        record,
        written_seconds,
        host,
        resets,
        reset_seconds,
        key_area_generation,
        next_key_area_generation,
    } = status;
    let mut out = Output::new();
    out.line(format_args!("state         {}", state.replace('_', " ")));
    out.line(format_args!("generation    {generation}"));
    out.line(format_args!("record        {record} is the next of the log"));
    out.line(format_args!("written       {} by {host}", crate::event::time(*written_seconds)));
    out.line(match resets {
        0 => "resets        none".into(),
        resets => format!("resets        {resets}, the last {}", crate::event::time(*reset_seconds)),
    });
    if let Some(generation) = key_area_generation {
        out.line(format_args!("key area      of generation {generation}: no older one opens the volume"));
    }
    // What is only ended is the same twice.
    if let Some(next) = next_key_area_generation.filter(|_| next_key_area_generation != key_area_generation) {
        out.line(format_args!(
            "              or {next}, which a change of the slots has not ended: the next `key` command ends it"
        ));
    }
    out
}

fn reset(args: &ResetArgs) -> Outcome {
    let (offline, key) = args.volume.open(Use::Exclusive)?;
    offline.backings().lock_key_area()?;
    let verified = args.volume.verify(&offline, &key)?;
    let found: Option<Uuid> = verified.info().uuid.parse().ok();
    if found != Some(args.uuid) {
        let message = format!("the metadata device holds volume {}, not {}", verified.info().uuid, args.uuid);
        return Err(Failure::new(Exit::Device, message));
    }
    let (chosen, _) = args.volume.anchor.make(&args.volume.devices)?;
    offline.introduce(&verified, &chosen)?;
    if let Ok(before) = asked(verified.show_anchor(&chosen)) {
        let written = crate::event::time(before.written_seconds);
        output::tell(format_args!(
            "the anchor was written {written} by {}: record {} was the next; what the devices hold counts from now on",
            before.host, before.record
        ));
    }
    drop(verified);
    let (status, _) = open_and_close((&offline, &key), &chosen, AnchorPurpose::Reset, Some(args.uuid))?;
    // Beside what the anchor said.
    output::line(format_args!("record        {} is the next of the log", status.record))?;
    output::line(format_args!("resets        {}", status.resets))
}

fn move_to(args: &MoveArgs) -> Outcome {
    let (offline, key) = args.volume.open(Use::Exclusive)?;
    let from = args.volume.chosen()?;
    let place = AnchorArgs { anchor: Some(args.to.clone()), ..args.volume.anchor.clone() };
    if args.to == *args.volume.anchor.needed()? {
        return Err(Failure::new(Exit::Arguments, "--to is where the anchor is already: name another place"));
    }
    let verified = args.volume.verify(&offline, &key)?;
    let (to, is_new) = place.make(&args.volume.devices)?;
    offline.introduce(&verified, &from)?;
    offline.introduce(&verified, &to)?;
    let moved = asked(verified.move_anchor((&from, &to), &note()));
    moved.map_err(|e| {
        if is_new && asked(to.holds_nothing()) {
            args.to.unmake();
        }
        let was_moved = matches!(e, MoveError::Both(_));
        let failure = Failure::from(e);
        if was_moved { failure } else { failure.context("nothing was moved") }
    })?;
    output::line(format_args!("anchor        {}", args.to))
}

fn remove(args: &OnVolume) -> Outcome {
    let (offline, key) = args.open(Use::Exclusive)?;
    let chosen = args.chosen()?;
    let (ended, uuid) = open_and_close((&offline, &key), &chosen, AnchorPurpose::End, None)?;
    // A chip has room for few. Where it stays it says that it has ended.
    if let Err(why) = asked(chosen.retire(uuid.as_bytes(), ended.generation)) {
        output::tell(format_args!("the counter stays, and is used by nobody any more: {why}"));
    }
    output::line("anchor        none")
}

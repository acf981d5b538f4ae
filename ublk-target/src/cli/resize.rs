//! `resize`: a volume becomes larger, in its place.
//!
//! One that is not in use is opened to grow, and closed. One in use is handed over, as by `upgrade`, to
//! a daemon that opens it so; and that tells the kernel, once it serves.

use super::{
    DeviceArgs, ExpectedArgs, OneDevice, anchored::AnchorArgs, check::refuse_latched, recover, successor, upgrade,
};
use crate::{
    checkpoints::AtStop,
    daemon::state::State,
    device::Use,
    failure::{Exit, Failure, Outcome},
    key::OptionalKeyArgs,
    offline::{Offline, Opening},
    output::Output,
    size::Size,
    ublk,
};
use serde::Serialize;
use std::{path::PathBuf, time::Duration};
use ublk_integrity::open::{self, Access, Grow};

/// Make a volume larger, on a data device that has become so: not in use (--data), or by its device
#[derive(clap::Args)]
#[command(mut_group("device", |group| group.arg("data")))]
pub struct Args {
    /// Device, partition or file that holds the data of a volume that is not in use
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// Where its metadata is, if not on the data device
    #[arg(long, value_name = "PATH", requires = "data", conflicts_with_all = ["named", "number"])]
    meta: Option<PathBuf>,
    #[command(flatten)]
    device: Option<OneDevice>,
    #[command(flatten)]
    key: OptionalKeyArgs,
    #[command(flatten)]
    expected: ExpectedArgs,
    #[command(flatten)]
    anchor: AnchorArgs,
    /// Usable size that it shall have [default: what the data device and --max-size of `format` allow]
    #[arg(long)]
    size: Option<Size>,
    /// For programs
    #[arg(long)]
    json: bool,
}

/// How it went.
#[derive(Serialize)]
struct Grown {
    /// The device, or where the data is of a volume that is not in use.
    path: String,
    /// Usable bytes until then.
    size_before: u64,
    /// Usable bytes now.
    size: u64,
    /// How long requests waited; `None` where nobody served them, or serves them otherwise now.
    waited_seconds: Option<f64>,
}

impl Args {
    /// Whether it does I/O to the devices of a volume by itself.
    pub fn is_offline(&self) -> bool {
        self.data.is_some()
    }

    fn grow(&self) -> Grow {
        self.size.map_or(Grow::AllThatFits, |size| Grow::To(size.0))
    }
}

pub fn run(args: &Args) -> Outcome {
    let grown = match (&args.data, &args.device) {
        (Some(data), _) => {
            let devices = DeviceArgs { data: data.clone(), meta: args.meta.clone() };
            not_in_use(args, &devices).map_err(|failure| devices.failure(failure))
        }
        (None, Some(device)) => in_use(args, device.number()?),
        (None, None) => unreachable!("one is required"),
    }?;
    let out = if args.json { Output::json(&grown) } else { grown.line() };
    out.print()
}

fn not_in_use(args: &Args, devices: &DeviceArgs) -> Outcome<Grown> {
    let missing =
        || Failure::new(Exit::Arguments, "no key given: --key-file FILE, --key keyring:NAME or --passphrase-file FILE");
    let source = args.key.source()?.ok_or_else(missing)?;
    let offline = devices.open(Use::Exclusive)?;
    let key = source.load()?;
    // For the words alone.
    let before = offline.run(open::dump(&offline.io()))?.ok().and_then(|dump| dump.volume).map(|volume| volume.size);
    let how = Opening { grow: Some(args.grow()), ..Opening::new(Access::ReadWrite, args.expected.uuid) };
    let anchor = args.anchor.open(devices)?;
    let (volume, keeper) = offline.open_anchored(&key, how, anchor.as_ref())?;
    refuse_latched(&volume)?;
    offline.run_with_checkpoints(&volume, AtStop::Close, async { Ok(()) })?;
    Offline::finish(&volume, keeper, anchor.as_ref())?;
    let size = volume.info().size;
    Ok(Grown {
        path: devices.data.display().to_string(),
        size_before: before.unwrap_or(size),
        size,
        waited_seconds: None,
    })
}

fn in_use(args: &Args, number: u32) -> Outcome<Grown> {
    let state = State::load(number)?;
    ublk::need_driver()?;
    let device = ublk::block_path(number).display().to_string();
    if args.expected.uuid.is_some_and(|uuid| state.volume.uuid.parse() != Ok(uuid)) {
        let message = format!("{device} is of volume {}: nothing was done", state.volume.uuid);
        return Err(Failure::new(Exit::Device, message));
    }
    if !ublk::resizes_in_use() {
        let message = format!(
            "this kernel can't resize a device in use (Linux 6.16 can): `del -n {number}`, `resize --data …`, `add`; nothing was done"
        );
        return Err(Failure::new(Exit::Device, message));
    }
    if state.settings.read_only {
        let message = format!(
            "{device} is read-only, and a volume that grows is written to: `del -n {number}`, `resize --data …`, `add`; nothing was done"
        );
        return Err(Failure::new(Exit::Device, message));
    }
    let before = state.volume.size;
    let grown = |size, waited: Option<Duration>| Grown {
        path: device.clone(),
        size_before: before,
        size,
        waited_seconds: waited.map(|waited| waited.as_secs_f64()),
    };
    let (volume, source) = (state.volume.clone(), args.key.source()?);
    let start = recover::of(state, source.clone())?;
    let size = successor::look_at(&start, &volume, Some(args.grow()))?;
    // Its key is no longer needed here: the successor has its own.
    drop(start);
    // A kernel that did not take the size is asked again.
    if size == before && ublk::disk_size(number).is_none_or(|disk| disk >= size) {
        return Ok(grown(size, None));
    }
    let has_grown = || State::load(number).is_ok_and(|state| state.volume.size == size);
    let waited = upgrade::serve_larger(number, source, size).map_err(|failure| match has_grown() {
        true => failure.context(format_args!("the volume of {device} has {size} bytes now, but")),
        false => failure,
    })?;
    if State::load(number)?.volume.size != size {
        let message =
            format!("{device} has not grown: nothing can be written to its volume; `status -n {number}` says why");
        return Err(Failure::new(Exit::Device, message));
    }
    if let Some(disk) = ublk::disk_size(number).filter(|disk| *disk < size) {
        let message = format!(
            "the volume has {size} bytes now, and {device} still {disk}: the kernel did not take the new size; `del` and `add` make a device of that size"
        );
        return Err(Failure::new(Exit::Device, message));
    }
    Ok(grown(size, waited))
}

impl Grown {
    fn line(&self) -> Output {
        let Self { path, size_before, size, waited_seconds } = self;
        let mut out = Output::new();
        let waited = waited_seconds
            .map_or_else(String::new, |seconds| format!(", {}", upgrade::in_words(Duration::from_secs_f64(seconds))));
        out.line(match size == size_before {
            true => format!("{path}: {} ({size} bytes) as before", Size(*size)),
            false => format!("{path}: {} → {} ({size} bytes){waited}", Size(*size_before), Size(*size)),
        });
        out
    }
}

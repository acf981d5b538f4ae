//! The commands and their options.

mod add;
mod anchor;
mod anchored;
mod attach;
mod bad_runs;
mod benchmark;
mod check;
pub mod claimed;
mod clear;
mod completions;
mod control_group;
mod del;
mod detach;
mod doctor;
mod dump;
mod events;
mod export;
mod format;
mod generator;
mod import;
mod key;
mod keygen;
mod known_format;
mod list;
mod manual;
mod metrics;
mod monitor;
mod names;
mod new_file;
mod progress;
mod recover;
mod replica;
mod resize;
mod scrub;
mod status;
pub mod stop;
mod successor;
mod tag_name;
mod terminal;
mod top;
mod ublksrv;
mod udev_probe;
mod upgrade;

use crate::{
    daemon::state::State,
    device::{Use, is_same},
    failure::{Context, Exit, Failure, Outcome, with_paths},
    hashing, interrupt,
    name::DeviceName,
    offline::Offline,
    output,
};
use clap::{Args, CommandFactory, Parser, Subcommand, error::ErrorKind};
use std::{
    ffi::OsString,
    fs::Metadata,
    path::{Path, PathBuf},
    process::ExitCode,
};

/// An authenticated block device: every read returns what was last written there, or an error.
#[derive(Parser)]
#[command(name = "ublk-integrity", version, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "\
Sizes are binary: 64M, 1T. Exit codes: 0 done, 1 bad arguments, 2 wrong key or no permission,
3 out of memory, 4 wrong or foreign device or no ublk in the kernel, 5 busy or exists,
6 integrity failure found, 7 interrupted, 8 output can't be written.";

#[derive(Subcommand)]
enum Command {
    Keygen(keygen::Args),
    Key(key::Args),
    Anchor(anchor::Args),
    Format(format::Args),
    #[command(visible_alias = "open")]
    Add(add::Args),
    #[command(visible_alias = "close")]
    Del(del::Args),
    Attach(attach::Args),
    Detach(detach::Args),
    List(list::Args),
    Status(status::Args),
    Top(top::Args),
    Metrics(metrics::Args),
    Clear(clear::Args),
    Events(events::Args),
    Monitor(monitor::Args),
    #[command(hide = true)]
    Stop(stop::Args),
    #[command(hide = true)]
    Claimed(claimed::Args),
    Recover(recover::Args),
    Scrub(scrub::Args),
    Doctor(doctor::Args),
    Upgrade(upgrade::Args),
    #[command(hide = true)]
    KnownFormat,
    Dump(dump::Args),
    #[command(visible_alias = "verify")]
    Check(check::Args),
    Export(export::Args),
    Import(import::Args),
    Resize(resize::Args),
    Benchmark(benchmark::Args),
    Completions(completions::Args),
    #[command(hide = true)]
    Manual(manual::Args),
    #[command(hide = true)]
    Generator(generator::Args),
    #[command(hide = true)]
    UdevProbe(udev_probe::Args),
}

/// The devices of a volume.
#[derive(Args, Clone, Debug)]
pub struct DeviceArgs {
    /// Device, partition or file that holds the data
    #[arg(long, value_name = "PATH")]
    pub data: PathBuf,
    /// Where the metadata is, if not on the data device
    #[arg(long, value_name = "PATH")]
    pub meta: Option<PathBuf>,
}

impl DeviceArgs {
    /// Where the metadata is.
    pub fn meta_path(&self) -> &Path {
        self.meta.as_ref().unwrap_or(&self.data)
    }
}

/// One of our devices.
#[derive(Args, Debug)]
#[group(id = "device", required = true, multiple = false)]
pub struct OneDevice {
    /// The device: its number, its path like /dev/ublkb0, its name, or the UUID of its volume
    #[arg(value_name = "DEVICE", value_parser = named_device)]
    named: Option<NamedDevice>,
    /// The same
    #[arg(short, long, value_name = "DEVICE", value_parser = named_device)]
    number: Option<NamedDevice>,
}

/// One of our devices, or all.
#[derive(Args, Debug)]
#[group(id = "device", multiple = false)]
pub struct AnyDevice {
    /// The device: its number, its path like /dev/ublkb0, its name, or the UUID of its volume; all where none is named
    #[arg(value_name = "DEVICE", value_parser = named_device)]
    named: Option<NamedDevice>,
    /// The same
    #[arg(short, long, value_name = "DEVICE", value_parser = named_device)]
    number: Option<NamedDevice>,
}

/// How it is named.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NamedDevice {
    Number(u32),
    Name(DeviceName),
    Volume(uuid::Uuid),
}

impl OneDevice {
    /// Its number. Of a volume, that of the one device that is made of it.
    pub fn number(&self) -> Outcome<u32> {
        self.named.as_ref().or(self.number.as_ref()).expect("one is required").number(State::all())
    }
}

/// The commands below one that are in the help: the others are for programs.
fn in_help(command: &clap::Command) -> impl Iterator<Item = &clap::Command> {
    command.get_subcommands().filter(|command| !command.is_hide_set())
}

/// The number of the device that is named; `None` for all of them. Where `all` is in the same group
/// there may be a device without a name.
fn one_or_all(device: Option<&OneDevice>, all: bool) -> Outcome<Option<u32>> {
    device.filter(|_| !all).map(OneDevice::number).transpose()
}

impl AnyDevice {
    /// The number of the one that is named.
    pub fn number(&self) -> Outcome<Option<u32>> {
        self.named.as_ref().or(self.number.as_ref()).map(|device| device.number(State::all())).transpose()
    }
}

impl NamedDevice {
    fn number(&self, all: Vec<State>) -> Outcome<u32> {
        let uuid = match self {
            Self::Number(number) => return Ok(*number),
            Self::Name(name) => return names::of(name, all).map(|state| state.id),
            Self::Volume(uuid) => uuid,
        };
        let of_it = all.iter().filter(|state| state.volume.uuid.parse() == Ok(*uuid)).map(|state| state.id);
        match of_it.collect::<Vec<_>>()[..] {
            [number] => Ok(number),
            [] => {
                let message = format!("no device here is of volume {uuid}: `ublk-integrity list` shows them");
                Err(Failure::new(Exit::Device, message))
            }
            ref several => {
                let paths: Vec<_> = several.iter().map(|number| format!("/dev/ublkb{number}")).collect();
                let message = format!("volume {uuid} is in several devices: name one of {}", paths.join(", "));
                Err(Failure::new(Exit::Arguments, message))
            }
        }
    }
}

fn named_device(text: &str) -> Result<NamedDevice, String> {
    match uuid::Uuid::try_parse(text) {
        Ok(uuid) if text.contains('-') => Ok(NamedDevice::Volume(uuid)),
        _ => match (device_number(text), text.parse()) {
            (Ok(number), _) => Ok(NamedDevice::Number(number)),
            (Err(_), Ok(name)) => Ok(NamedDevice::Name(name)),
            (Err(e), Err(_)) => Err(format!("{e}, or its name, or the UUID of its volume")),
        },
    }
}

/// Which volume it must be.
#[derive(Args, Clone, Debug)]
pub struct ExpectedArgs {
    /// The UUID that the volume must have: without, any volume of this key passes for any other
    #[arg(long, value_name = "UUID")]
    pub uuid: Option<uuid::Uuid>,
}

impl DeviceArgs {
    /// Opens the devices.
    fn open(&self, purpose: Use) -> Outcome<Offline> {
        Offline::open(&self.data, self.meta.as_deref(), purpose)
    }

    fn failure(&self, failure: Failure) -> Failure {
        Failure { message: self.named(&failure.message), ..failure }
    }

    /// The text with the paths in place of the library's words for the devices.
    fn named(&self, text: &str) -> String {
        with_paths(text, &self.data, self.meta.as_deref())
    }

    /// Refuses `other` if it is one of the devices: a volume can't be copied onto itself.
    fn refuse_itself(&self, other: &Metadata, path: &Path) -> Outcome {
        for device in std::iter::once(&self.data).chain(&self.meta) {
            let device = device.metadata().doing(format_args!("can't use {}", device.display()))?;
            if is_same(&device, other) {
                return Err(Failure::new(Exit::Arguments, format_args!("{} is the volume itself", path.display())));
            }
        }
        Ok(())
    }
}

/// A device as its number or its path. Minor numbers have 20 bits; larger ones would reach the
/// kernel as negative, which means any number.
fn device_number(text: &str) -> Result<u32, String> {
    let path = text.contains('/').then(|| std::fs::canonicalize(text).ok()).flatten();
    let name = path.as_deref().and_then(Path::to_str).unwrap_or(text);
    let digits = name.strip_prefix("/dev/").unwrap_or(name);
    let digits = digits.strip_prefix("ublkb").unwrap_or(digits);
    let number = digits.parse().ok().filter(|number| *number < 1 << 20 && digits.bytes().all(|b| b.is_ascii_digit()));
    number.ok_or_else(|| "a device is a number from 0 to 1048575, or its path, like /dev/ublkb0".into())
}

/// Runs the command that the arguments name.
pub fn run(args: &[OsString]) -> ExitCode {
    if ublksrv::is_caller(args) {
        return ublksrv::run(args);
    }
    if generator::is_caller(args) {
        return generator::run_for_systemd(args);
    }
    output::expects_json(args.iter().any(|arg| arg.to_str() == Some("--json")));
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(e) => return usage(&e),
    };
    let watched = if cli.command.is_offline() { interrupt::watch() } else { Ok(()) };
    let done = watched.and_then(|()| cli.command.run());
    let code = exit_code(done);
    interrupt::end();
    code
}

impl Command {
    fn run(&self) -> Outcome {
        if self.hashes_blocks() {
            hashing::choose();
        }
        match self {
            Self::Keygen(args) => keygen::run(args),
            Self::Key(args) => key::run(args),
            Self::Anchor(args) => anchor::run(args),
            Self::Format(args) => format::run(args).map_err(|failure| args.devices.failure(failure)),
            Self::Add(args) => attach::add(args),
            Self::Del(args) => del::run(args),
            Self::Attach(args) => attach::run(args),
            Self::Detach(args) => detach::run(args),
            Self::List(args) => list::run(args),
            Self::Status(args) => status::run(args),
            Self::Top(args) => top::run(args),
            Self::Metrics(args) => metrics::run(args),
            Self::Clear(args) => clear::run(args),
            Self::Events(args) => events::run(args),
            Self::Monitor(args) => monitor::run(args),
            Self::Stop(args) => stop::run(args),
            Self::Claimed(args) => claimed::run(args),
            Self::Recover(args) if args.successor => successor::run(args),
            Self::Recover(args) => recover::run(args),
            Self::Scrub(args) => scrub::run(args),
            Self::Doctor(args) => doctor::run(args),
            Self::Upgrade(args) => upgrade::run(args),
            Self::KnownFormat => known_format::run(),
            Self::Dump(args) => dump::run(args).map_err(|failure| args.devices.failure(failure)),
            Self::Check(args) => check::run(args).map_err(|failure| args.devices.failure(failure)),
            Self::Export(args) => export::run(args).map_err(|failure| args.devices.failure(failure)),
            Self::Import(args) => import::run(args).map_err(|failure| args.devices.failure(failure)),
            Self::Resize(args) => resize::run(args),
            Self::Benchmark(args) => benchmark::run(args),
            Self::Completions(args) => completions::run(args, &Cli::command()),
            Self::Manual(args) => manual::run(args, Cli::command()),
            Self::Generator(args) => generator::run(args),
            Self::UdevProbe(args) => udev_probe::run(args),
        }
    }

    /// Whether it makes or checks tags of many blocks, itself or in the daemon that it forks.
    fn hashes_blocks(&self) -> bool {
        matches!(
            self,
            Self::Add(_)
                | Self::Attach(_)
                | Self::Recover(_)
                | Self::Check(_)
                | Self::Export(_)
                | Self::Import(_)
                | Self::Resize(_)
                | Self::Benchmark(_)
        )
    }

    /// Whether it does I/O to the devices of a volume by itself.
    fn is_offline(&self) -> bool {
        match self {
            Self::Format(_) | Self::Dump(_) | Self::Check(_) | Self::Export(_) | Self::Import(_) => true,
            Self::Resize(args) => args.is_offline(),
            _ => false,
        }
    }
}

fn exit_code(done: Outcome) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if !failure.message.is_empty() {
                output::tell(&failure);
                output::tell_json(&failure);
            }
            failure.exit.into()
        }
    }
}

/// Help goes to stdout as it is; an error becomes one line and our own exit code.
fn usage(e: &clap::Error) -> ExitCode {
    if !e.use_stderr() {
        return exit_code(e.print().map_err(|e| output::unwritable("standard output", &e)));
    }
    exit_code(Err(Failure::new(Exit::Arguments, usage_line(e))))
}

/// A usage error in one line.
fn usage_line(e: &clap::Error) -> String {
    let text = e.render().to_string();
    let mut lines = text.lines().map(str::trim);
    let what = match e.kind() {
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => "a command is needed".to_owned(),
        _ => {
            let said = lines
                .by_ref()
                .map_while(|line| match line.starts_with("For more information") {
                    true => None,
                    false => Some(line.replacen("tip:", ";", 1)),
                })
                .take_while(|line| !line.starts_with("Usage:"));
            said.filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ").replace(" ; ", "; ")
        }
    };
    // The usage names the command that was meant.
    let usage = text.lines().find_map(|line| line.trim().strip_prefix("Usage: ")).unwrap_or_default();
    let command: Vec<_> =
        usage.split(' ').take_while(|word| word.starts_with(|c: char| c.is_ascii_lowercase())).collect();
    let command = if command.is_empty() { "ublk-integrity".into() } else { command.join(" ") };
    format!("{} (see `{command} --help`)", what.trim_start_matches("error: "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_a_number_or_a_path() {
        for text in ["7", "ublkb7", "/dev/ublkb7"] {
            assert_eq!(device_number(text), Ok(7), "{text}");
        }
        for text in ["", "-1", "+7", "1048576", "4294967295", "/dev/sda", "/dev/ublkb0p1", "ublkc0", "ublkb"] {
            assert!(device_number(text).unwrap_err().contains("/dev/ublkb0"), "{text}");
        }
    }

    #[test]
    fn a_device_is_also_known_by_its_volume() {
        let uuid = uuid::Uuid::from_u128(7);
        assert_eq!(named_device(&uuid.to_string()), Ok(NamedDevice::Volume(uuid)));
        assert_eq!(named_device("/dev/ublkb7"), Ok(NamedDevice::Number(7)));
        assert!(named_device("/dev/sda").unwrap_err().contains("UUID"));
        let state = |id, uuid: uuid::Uuid| {
            let mut state = State::of_test(id);
            state.volume.uuid = uuid.to_string();
            state
        };
        let other = uuid::Uuid::from_u128(8);
        let all = || vec![state(1, other), state(2, uuid), state(3, other)];
        assert_eq!(NamedDevice::Volume(uuid).number(all()).unwrap(), 2);
        let name: DeviceName = "home".parse().unwrap();
        assert_eq!(named_device("home"), Ok(NamedDevice::Name(name.clone())));
        let mut named = state(4, other);
        named.settings.name = Some(name.clone());
        assert_eq!(NamedDevice::Name(name.clone()).number(vec![state(1, other), named]).unwrap(), 4);
        assert!(NamedDevice::Name(name).number(all()).unwrap_err().message.contains("home"));
        let several = NamedDevice::Volume(other).number(all()).unwrap_err();
        assert!(several.message.contains("/dev/ublkb1, /dev/ublkb3"), "{several}");
        assert_eq!(NamedDevice::Volume(uuid).number(Vec::new()).unwrap_err().exit, Exit::Device);
        for line in [
            "status",
            "status 7",
            "status -n 7",
            "recover /dev/ublkb7",
            "upgrade -n 7",
            "upgrade -a --binary x",
            "resize -n 7 --size 2T",
            "resize --data x --meta y --key-file k",
            "del 7",
            "del -n ublkb7",
            "del -a",
            "clear 7",
            "clear -a",
            "scrub 7",
            "scrub -n 7 --rate 20M --wait --json",
            "scrub 7 --status --json",
            "scrub 7 --pause",
        ] {
            let args = format!("ublk-integrity {line}");
            assert!(Cli::try_parse_from(args.split(' ')).is_ok(), "{line}");
        }
        for line in [
            "status 7 -n 7",
            "del",
            "clear",
            "clear 7 -a",
            "del 7 -a",
            "del 7 -n 7",
            "recover",
            "upgrade",
            "upgrade 7 -a",
            "scrub",
            "scrub 7 --pause --stop",
            "scrub 7 --status --wait",
            "scrub 7 --stop --rate 1M",
            "scrub 7 --rate 0",
        ] {
            let args = format!("ublk-integrity {line}");
            assert!(Cli::try_parse_from(args.split(' ')).is_err(), "{line}");
        }
    }

    #[test]
    fn a_wrong_word_is_told_with_the_right_one() {
        let line = |args: &str| Cli::try_parse_from(args.split(' ')).err().map(|e| usage_line(&e)).unwrap_or_default();
        let said = line("ublk-integrity format --dta x");
        assert!(said.contains("'--data'") && said.ends_with("(see `ublk-integrity format --help`)"), "{said}");
        let said = line("ublk-integrity del");
        assert!(said.contains("--all") && said.contains("--number"), "{said}");
        let said = line("ublk-integrity formt");
        assert!(said.contains("'format'") && said.ends_with("(see `ublk-integrity --help`)"), "{said}");
    }

    #[test]
    fn the_options_are_consistent() {
        Cli::command().debug_assert();
    }
}

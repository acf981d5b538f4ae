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
pub mod list;
mod manual;
mod metrics;
mod monitor;
mod names;
mod one_device;
mod progress;
mod recover;
mod replica;
mod resize;
mod scrub;
mod session;
pub mod status;
pub mod stop;
mod successor;
mod tag_name;
mod terminal;
mod top;
mod ublksrv;
mod udev_probe;
mod upgrade;

use crate::{
    device::{Use, is_same},
    failure::{Context, Exit, Failure, Outcome, with_paths},
    hashing, interrupt,
    offline::Offline,
    output,
};
use clap::{Args, CommandFactory, Parser, Subcommand, error::ErrorKind};
use one_device::{AnyDevice, OneDevice, one_or_all};
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

/// The commands below one that are in the help: the others are for programs.
fn in_help(command: &clap::Command) -> impl Iterator<Item = &clap::Command> {
    command.get_subcommands().filter(|command| !command.is_hide_set())
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
    if cli.command.leaves_a_daemon() {
        session::be_spared(args);
    }
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

    /// Whether it ends, and a daemon goes on that it has forked.
    fn leaves_a_daemon(&self) -> bool {
        match self {
            Self::Add(args) => !args.foreground,
            Self::Attach(args) => !args.foreground,
            Self::Recover(args) => !args.foreground && !args.successor,
            _ => false,
        }
    }

    /// Whether it does I/O to the devices of a volume by itself.
    fn is_offline(&self) -> bool {
        match self {
            Self::Format(_)
            | Self::Key(_)
            | Self::Anchor(_)
            | Self::Dump(_)
            | Self::Check(_)
            | Self::Export(_)
            | Self::Import(_) => true,
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
    fn a_wrong_word_is_told_with_the_right_one() {
        let line = |args: &str| Cli::try_parse_from(args.split(' ')).err().map(|e| usage_line(&e)).unwrap_or_default();
        let said = line("ublk-integrity format --dta x");
        assert!(said.contains("'--data'") && said.ends_with("(see `ublk-integrity format --help`)"), "{said}");
        let said = line("ublk-integrity del");
        assert!(said.contains("--all") && said.contains("--number"), "{said}");
        let said = line("ublk-integrity formt");
        assert!(said.contains("'format'") && said.ends_with("(see `ublk-integrity --help`)"), "{said}");
    }

    /// What is cut short in the middle of its I/O leaves the devices in use for a while.
    #[test]
    fn what_writes_to_devices_by_itself_ends_what_is_under_way() {
        let is_offline = |args: &str| Cli::try_parse_from(args.split(' ')).map(|cli| cli.command.is_offline()).unwrap();
        assert!(is_offline("ublk-integrity anchor init --data /d --key-file k --anchor file:/a"));
        assert!(is_offline("ublk-integrity key remove --data /d --key-file k --slot 1"));
        assert!(!is_offline("ublk-integrity status"));
    }

    #[test]
    fn the_options_are_consistent() {
        Cli::command().debug_assert();
    }
}

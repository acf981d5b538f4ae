//! The commands and their options.

mod add;
mod benchmark;
mod check;
mod del;
mod dump;
mod export;
mod format;
mod import;
mod keygen;
mod list;
mod progress;
mod recover;
mod status;
pub mod stop;
mod ublksrv;

use crate::{
    device::is_same,
    failure::{Context, Exit, Failure, Outcome},
    interrupt,
};
use clap::{Args, Parser, Subcommand, builder::RangedU64ValueParser, error::ErrorKind};
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
6 integrity failure found.";

#[derive(Subcommand)]
enum Command {
    Keygen(keygen::Args),
    Format(format::Args),
    Add(add::Args),
    Del(del::Args),
    List(list::Args),
    Status(status::Args),
    #[command(hide = true)]
    Stop(stop::Args),
    Recover(recover::Args),
    Dump(dump::Args),
    Check(check::Args),
    Export(export::Args),
    Import(import::Args),
    Benchmark(benchmark::Args),
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

/// Which volume it must be.
#[derive(Args, Clone, Debug)]
pub struct ExpectedArgs {
    /// The UUID that the volume must have: without, any volume of this key passes for any other
    #[arg(long, value_name = "UUID")]
    pub uuid: Option<uuid::Uuid>,
}

impl DeviceArgs {
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

/// The numbers that a ublk device can have: minor numbers of 20 bits. Larger ones would reach the kernel as negative, which
/// means any number.
fn device_number() -> RangedU64ValueParser<u32> {
    RangedU64ValueParser::new().range(0..1 << 20)
}

/// Runs the command that the arguments name.
pub fn run(args: &[OsString]) -> ExitCode {
    if ublksrv::is_caller(args) {
        return ublksrv::run(args);
    }
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
        match self {
            Self::Keygen(args) => keygen::run(args),
            Self::Format(args) => format::run(args),
            Self::Add(args) => add::run(args),
            Self::Del(args) => del::run(args),
            Self::List(args) => list::run(args),
            Self::Status(args) => status::run(args),
            Self::Stop(args) => stop::run(args),
            Self::Recover(args) => recover::run(args),
            Self::Dump(args) => dump::run(args),
            Self::Check(args) => check::run(args),
            Self::Export(args) => export::run(args),
            Self::Import(args) => import::run(args),
            Self::Benchmark(args) => benchmark::run(args),
        }
    }

    /// Whether it does I/O to the devices of a volume by itself.
    fn is_offline(&self) -> bool {
        matches!(self, Self::Format(_) | Self::Dump(_) | Self::Check(_) | Self::Export(_) | Self::Import(_))
    }
}

fn exit_code(done: Outcome) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if !failure.message.is_empty() {
                eprintln!("ublk-integrity: {failure}");
            }
            failure.exit.into()
        }
    }
}

/// Help goes to stdout as it is; an error becomes one line and our own exit code.
fn usage(e: &clap::Error) -> ExitCode {
    if !e.use_stderr() {
        let _ = e.print();
        return ExitCode::SUCCESS;
    }
    exit_code(Err(Failure::new(Exit::Arguments, usage_line(e))))
}

/// A usage error in one line.
fn usage_line(e: &clap::Error) -> String {
    let text = e.render().to_string();
    let what = match e.kind() {
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => "a command is needed".to_owned(),
        _ => {
            let lines = text.lines().map(str::trim);
            let said =
                lines.take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"));
            said.filter(|line| !line.is_empty() && !line.starts_with("tip:")).collect::<Vec<_>>().join(" ")
        }
    };
    format!("{} (see `ublk-integrity --help`)", what.trim_start_matches("error: "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_options_are_consistent() {
        Cli::command().debug_assert();
    }
}

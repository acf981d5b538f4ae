//! `ublk add -t integrity …`: ublksrv's tool runs us under the name `ublk.integrity`, with its own
//! arguments and a descriptor on which it waits for the device's number.
//!
//! It has forked already: this process is the daemon.

use super::{add, recover, session, usage_line};
use crate::{
    daemon::{
        self,
        launch::{self, Reporter},
        log::Sink,
    },
    failure::{Exit, Failure, Outcome},
    hashing, os,
};
use clap::{CommandFactory, Parser, Subcommand};
use std::{
    ffi::OsString,
    path::Path,
    process::{self, ExitCode},
};

/// The name under which the tool runs us.
const NAME: &str = "ublk.integrity";

#[derive(Parser)]
#[command(name = NAME, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// A device from a volume
    Add {
        #[command(flatten)]
        args: add::Args,
        #[command(flatten)]
        standard: Standard,
    },
    /// A new daemon for a device whose own has died
    Recover {
        #[command(flatten)]
        args: recover::Args,
        #[command(flatten)]
        standard: Standard,
        /// As many as before
        #[arg(short = 'T', long = "threads_per_queue", hide = true)]
        threads_per_queue: Option<u16>,
    },
    /// The options of `add`
    Help {
        #[command(flatten)]
        standard: Standard,
    },
}

/// The tool's options that every target takes. Those that ask for another way to move data change
/// nothing here.
#[derive(clap::Args)]
#[allow(dead_code)] // accepted and passed over
struct Standard {
    /// Always "integrity"
    #[arg(short, long)]
    r#type: Option<String>,
    /// Where the number of the device is expected
    #[arg(long, value_name = "FD")]
    eventfd: Option<i32>,
    /// 0: end the device with its daemon
    #[arg(short = 'r', long = "user_recovery", alias = "user-recovery")]
    user_recovery: Option<u8>,
    #[arg(short = 'i', long = "user_recovery_reissue", alias = "user-recovery-reissue", hide = true)]
    user_recovery_reissue: Option<u8>,
    #[arg(short = 'e', long = "user_recovery_fail_io", alias = "user-recovery-fail-io", hide = true)]
    user_recovery_fail_io: Option<u8>,
    #[arg(short = 'u', long = "uring_comp", alias = "uring-comp", hide = true)]
    uring_comp: Option<u8>,
    #[arg(short = 'g', long = "need_get_data", alias = "need-get-data", hide = true)]
    need_get_data: Option<u8>,
    #[arg(short = 'z', long = "zerocopy", aliases = ["zero_copy", "zero-copy"], hide = true)]
    zero_copy: bool,
    #[arg(short = 'S', long = "seq_tags", hide = true)]
    seq_tags: bool,
    #[arg(short = 'b', long = "batch-io", hide = true)]
    batch_io: bool,
    #[arg(long = "debug_mask", hide = true)]
    debug_mask: Option<String>,
    #[arg(long, hide = true)]
    quiet: bool,
    #[arg(long, hide = true)]
    usercopy: bool,
    #[arg(long, hide = true)]
    unprivileged: bool,
}

/// Whether it is ublksrv's tool that runs us.
pub fn is_caller(args: &[OsString]) -> bool {
    args.first().is_some_and(|name| Path::new(name).file_name() == Some(NAME.as_ref()))
}

/// Does what the tool wants, and tells it how that went.
pub fn run(args: &[OsString]) -> ExitCode {
    hashing::choose();
    // Before anything can fail, for the tool waits.
    let listener = eventfd(args).and_then(os::adopt_descriptor);
    let reporter = listener.map_or_else(Reporter::terminal, Reporter::ublksrv);
    match Cli::try_parse_from(args) {
        Ok(Cli { command: Command::Help { .. } }) => {
            let _ = Cli::command().find_subcommand_mut("add").map(clap::Command::print_help);
            ExitCode::SUCCESS
        }
        Ok(cli) => super::exit_code(serve(cli.command, reporter)),
        Err(e) if !e.use_stderr() => {
            let _ = e.print();
            ExitCode::SUCCESS
        }
        Err(e) => {
            reporter.failed(&Failure::new(Exit::Arguments, usage_line(&e)));
            Exit::Arguments.into()
        }
    }
}

fn serve(command: Command, reporter: Reporter) -> Outcome {
    let prepared = match &command {
        Command::Add { args, standard } => add::prepare(args).map(|mut start| {
            start.settings.recovery &= standard.user_recovery != Some(0);
            start
        }),
        Command::Recover { args, .. } => recover::prepare(args),
        Command::Help { .. } => return Ok(()),
    };
    let started = prepared.and_then(|start| launch::leave_session().map(|()| start));
    match started.inspect(|_| session::take_out(process::id())) {
        Ok(start) => daemon::run(start, reporter, Sink::system()),
        Err(failure) => {
            reporter.failed(&failure);
            Err(failure)
        }
    }
    // Told by the reporter.
    .map_err(Failure::told)
}

/// The value of `--eventfd`, looked up without the rest making sense.
fn eventfd(args: &[OsString]) -> Option<i32> {
    let mut args = args.iter().filter_map(|arg| arg.to_str());
    let value = args.find_map(|arg| match arg.strip_prefix("--eventfd") {
        Some("") => Some(None),
        Some(rest) => Some(rest.strip_prefix('=')),
        None => None,
    })?;
    value.or_else(|| args.next())?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::size::Size;

    fn args(text: &str) -> Vec<OsString> {
        text.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn the_descriptor_is_found_in_any_command_line() {
        assert_eq!(eventfd(&args("ublk.integrity add --nonsense --eventfd 7")), Some(7));
        assert_eq!(eventfd(&args("ublk.integrity add --eventfd=8 -t integrity")), Some(8));
        assert_eq!(eventfd(&args("ublk.integrity add --eventfd")), None);
        assert_eq!(eventfd(&args("ublk.integrity add")), None);
    }

    #[test]
    fn the_tools_options_are_understood() {
        Cli::command().debug_assert();
        let line = "ublk.integrity add -t integrity -n 3 -q 2 -d 64 -u 0 -g 0 -r 1 -i 1 -e 0 -z --debug_mask 0x1 --data a --key-file k --eventfd 5";
        assert!(Cli::try_parse_from(args(line)).is_ok());
    }

    #[test]
    fn the_tools_long_options_are_understood_as_it_spells_them() {
        let line = "ublk.integrity add --type integrity --number 3 --queues 2 --depth 64 --uring_comp 0 --need_get_data 0 --user_recovery 0 --user_recovery_reissue 1 --user_recovery_fail_io 0 --zerocopy --threads_per_queue 1 --seq_tags --debug_mask 0x1 --unprivileged --usercopy --quiet --foreground --max_io_buf_bytes 1048576 --data a --key-file k --eventfd 5";
        let Ok(Cli { command: Command::Add { args: add, standard } }) = Cli::try_parse_from(args(line)) else {
            panic!("{line}")
        };
        assert_eq!(standard.user_recovery, Some(0));
        assert_eq!(add.sizes.max_io, Some(Size(1 << 20)));
        for spelling in ["--zero_copy", "--zero-copy", "--user-recovery 0", "--max-io 1M"] {
            let line = format!("ublk.integrity add {spelling} --data a --key-file k");
            assert!(Cli::try_parse_from(args(&line)).is_ok(), "{line}");
        }
    }

    #[test]
    fn the_name_decides() {
        assert!(is_caller(&args("/usr/bin/ublk.integrity add")));
        assert!(!is_caller(&args("ublk-integrity add")));
    }
}

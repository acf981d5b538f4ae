//! `completions`: what a shell needs to complete our commands and options.

use crate::{failure::Outcome, output};
use clap_complete::{Shell, generate};

/// Print completions for a shell
#[derive(clap::Args)]
pub struct Args {
    shell: Shell,
}

pub fn run(args: &Args, all: &clap::Command) -> Outcome {
    // Commands that are not in the help are for programs.
    let visible = all.get_subcommands().filter(|command| !command.is_hide_set()).cloned();
    let name = all.get_name();
    let mut command = clap::Command::new("ublk-integrity")
        .version(env!("CARGO_PKG_VERSION"))
        .args(all.get_arguments().cloned())
        .subcommands(visible);
    let mut text = Vec::new();
    generate(args.shell, &mut command, name, &mut text);
    output::bytes(&text)
}

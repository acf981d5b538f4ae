//! `completions`: what a shell needs to complete our commands and options.

use crate::{failure::Outcome, output};
use clap_complete::{Shell, generate};

/// Print completions for a shell
#[derive(clap::Args)]
pub struct Args {
    shell: Shell,
}

pub fn run(args: &Args, all: &clap::Command) -> Outcome {
    output::bytes(&script(args.shell, all))
}

fn script(shell: Shell, all: &clap::Command) -> Vec<u8> {
    // Commands that are not in the help are for programs.
    let visible = all.get_subcommands().filter(|command| !command.is_hide_set()).cloned();
    let name = all.get_name();
    let mut command = clap::Command::new("ublk-integrity")
        .version(env!("CARGO_PKG_VERSION"))
        .args(all.get_arguments().cloned())
        .subcommands(visible);
    let mut text = Vec::new();
    generate(shell, &mut command, name, &mut text);
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn each_command_that_is_in_the_help_is_completed_and_no_other() {
        let all = crate::cli::Cli::command();
        let text = String::from_utf8(script(Shell::Fish, &all)).unwrap();
        for command in all.get_subcommands() {
            let offered = text.contains(&format!("-a \"{}\"", command.get_name()));
            assert_eq!(offered, !command.is_hide_set(), "{}", command.get_name());
        }
    }
}

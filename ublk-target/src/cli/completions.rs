//! `completions`: what a shell needs to complete our commands and options.

use super::in_help;
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
    let mut command = visible(all).version(env!("CARGO_PKG_VERSION"));
    let mut text = Vec::new();
    generate(shell, &mut command, all.get_name(), &mut text);
    text
}

/// Commands and options that are not in the help are for programs.
fn visible(command: &clap::Command) -> clap::Command {
    clap::Command::new(command.get_name().to_owned())
        .about(command.get_about().cloned().unwrap_or_default())
        .visible_aliases(command.get_visible_aliases().map(str::to_owned).collect::<Vec<_>>())
        .args(command.get_arguments().filter(|option| !option.is_hide_set()).cloned())
        .groups(command.get_groups().cloned())
        .subcommands(in_help(command).map(visible))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{CommandFactory, ValueEnum};

    #[test]
    fn each_option_that_is_in_the_help_is_completed_and_no_other() {
        let all = crate::cli::Cli::command();
        let text = String::from_utf8(script(Shell::Fish, &all)).unwrap();
        let completed: Vec<_> = text.split(" -l ").skip(1).filter_map(|rest| rest.split_whitespace().next()).collect();
        let commands = || in_help(&all);
        let options = |hidden: bool| {
            let all = commands().flat_map(clap::Command::get_arguments).filter(move |one| one.is_hide_set() == hidden);
            all.filter_map(clap::Arg::get_long).collect::<Vec<_>>()
        };
        let offered = |option: &&str| completed.contains(option);
        assert_eq!(options(true).into_iter().find(|option| !options(false).contains(option) && offered(option)), None);
        assert!(options(false).iter().all(offered) && options(true).contains(&"successor"));
    }

    #[test]
    fn each_shell_has_its_script() {
        let all = crate::cli::Cli::command();
        for shell in Shell::value_variants() {
            assert!(!script(*shell, &all).is_empty(), "{shell}");
        }
    }

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

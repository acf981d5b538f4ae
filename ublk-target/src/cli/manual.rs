//! `manual`, not in the help: the manual pages, one for each command, made from the same words as
//! `--help`. Packages are made with it.

use super::in_help;
use crate::failure::{Context, Outcome};
use clap_mangen::Man;
use std::{
    fmt::Write,
    fs, io,
    path::{Path, PathBuf},
};

/// Write the manual pages into a folder
#[derive(clap::Args)]
pub struct Args {
    /// The folder, which must be there
    folder: PathBuf,
}

pub fn run(args: &Args, program: clap::Command) -> Outcome {
    let mut program = program.disable_help_subcommand(true);
    program.build();
    write_pages(&args.folder, &program, "")
}

/// A page for a command and for each below it; `of` is what is typed before its name.
fn write_pages(folder: &Path, command: &clap::Command, of: &str) -> Outcome {
    let words = format!("{of}{}", command.get_name());
    let (name, text) = page(command, &words).doing("can't make a page")?;
    let path = folder.join(name);
    fs::write(&path, text).doing(format_args!("can't write {}", path.display()))?;
    // The program's own name is not typed before those of its commands, in the list of examples.
    let before = if command.get_name() == "ublk-integrity" { String::new() } else { words + " " };
    in_help(command)
        .filter(|command| command.get_name() != "help")
        .try_for_each(|command| write_pages(folder, command, &before))
}

/// The page of the command that is typed so, and the name of its file.
fn page(command: &clap::Command, words: &str) -> io::Result<(PathBuf, Vec<u8>)> {
    let source = concat!("ublk-integrity ", env!("CARGO_PKG_VERSION"));
    let man = Man::new(command.clone()).section("8").source(source).manual("System Administration");
    let mut text = Vec::new();
    man.render_title(&mut text)?;
    man.render_name_section(&mut text)?;
    man.render_synopsis_section(&mut text)?;
    man.render_description_section(&mut text)?;
    man.render_options_section(&mut text)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut text)?;
    }
    text.extend(more(words).into_bytes());
    Ok((Path::new(&man.get_filename()).to_owned(), text))
}

/// What each page ends with.
fn more(command: &str) -> String {
    let mut text = String::from(".SH \"EXIT STATUS\"\n");
    for (code, meaning) in EXIT_CODES {
        writeln!(text, ".TP\n.B {code}\n{}", escaped(meaning)).expect("a string takes everything");
    }
    if let Some((_, lines)) = EXAMPLES.iter().find(|(name, _)| *name == command) {
        let lines: Vec<_> = lines.iter().map(|line| escaped(line)).collect();
        writeln!(text, ".SH EXAMPLES\n.nf\n{}\n.fi", lines.join("\n")).expect("a string takes everything");
    }
    text += FILES_AND_OTHERS;
    text
}

/// Text as roff shows it: with hyphens that can be copied, and no line taken for a request.
fn escaped(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-");
    if text.starts_with(['.', '\'']) { format!("\\&{text}") } else { text }
}

const EXIT_CODES: &[(u8, &str)] = &[
    (0, "Done."),
    (1, "Bad arguments."),
    (2, "Wrong key, or no permission."),
    (3, "Out of memory."),
    (4, "Wrong or foreign device, one that fails, or no ublk in the kernel."),
    (5, "Busy, or exists."),
    (6, "Integrity failure found."),
    (7, "Interrupted."),
    (8, "Output can't be written."),
];

const FILES_AND_OTHERS: &str = ".SH FILES
.TP
.I /etc/ublk\\-integritytab
Volumes that are there from boot on.
.TP
.I /run/ublk\\-integrity
State files and control sockets of the devices that are served.
.TP
.I /dev/ublk\\-integrity
Links to devices by their names.
.SH \"SEE ALSO\"
.BR ublk\\-integrity (8),
.BR ublk\\-integritytab (5),
.I /usr/share/doc/ublk\\-integrity
";

/// The lines of an example, by command.
const EXAMPLES: &[(&str, &[&str])] = &[
    (
        "ublk-integrity",
        &[
            "ublk-integrity keygen demo.key",
            "ublk-integrity format --data /dev/vda --key-file demo.key",
            "ublk-integrity add --data /dev/vda --key-file demo.key",
            "mkfs.ext4 /dev/ublkb0 && mount /dev/ublkb0 /mnt",
            "umount /mnt && ublk-integrity del 0",
        ],
    ),
    ("keygen", &["ublk-integrity keygen /etc/ublk-integrity-keys.d/home.key"]),
    (
        "anchor",
        &[
            "ublk-integrity format --data /dev/vdb --key-file home.key --anchor file:/mnt/stick/home.anchor",
            "ublk-integrity add --data /dev/vdb --key-file home.key --anchor file:/mnt/stick/home.anchor",
        ],
    ),
    (
        "anchor init",
        &["ublk-integrity anchor init --data /dev/vdb --key-file home.key --anchor file:/mnt/stick/home.anchor"],
    ),
    (
        "anchor show",
        &["ublk-integrity anchor show --data /dev/vdb --key-file home.key --anchor file:/mnt/stick/home.anchor"],
    ),
    (
        "anchor reset",
        &[
            "ublk-integrity anchor reset --accept-rollback --uuid baef170f-1036-4f2e-9acd-204d711f4c6a --data /dev/vdb --key-file home.key --anchor file:/mnt/stick/home.anchor",
        ],
    ),
    (
        "anchor move",
        &[
            "ublk-integrity anchor move --data /dev/vdb --key-file home.key --anchor file:/mnt/stick/home.anchor --to file:/mnt/nfs/home.anchor",
        ],
    ),
    (
        "anchor remove",
        &["ublk-integrity anchor remove --data /dev/vdb --key-file home.key --anchor file:/mnt/stick/home.anchor"],
    ),
    (
        "key",
        &[
            "ublk-integrity key add --data /dev/vdb --key-file home.key --new-passphrase-file - --label rescue",
            "ublk-integrity key list --data /dev/vdb",
        ],
    ),
    ("key list", &["ublk-integrity key list --data /dev/vdb"]),
    ("key add", &["ublk-integrity key add --data /dev/vdb --key-file home.key --new-passphrase-file - --label rescue"]),
    ("key change", &["ublk-integrity key change --data /dev/vdb --key-file home.key --new-key-file new.key"]),
    ("key remove", &["ublk-integrity key remove --data /dev/vdb --key-file home.key --slot 1"]),
    (
        "format",
        &[
            "ublk-integrity format --data /dev/vdb --key-file home.key --label home",
            "ublk-integrity format --data disk.img --create --size 1G --key-file home.key",
        ],
    ),
    ("add", &["ublk-integrity add --data /dev/vdb --key-file home.key --name home --or-recover"]),
    ("del", &["ublk-integrity del home", "ublk-integrity del --all"]),
    ("attach", &["ublk-integrity attach --all"]),
    ("detach", &["ublk-integrity detach home"]),
    ("list", &["ublk-integrity list --json"]),
    ("status", &["ublk-integrity status home", "ublk-integrity status -x || mail -s integrity root"]),
    ("top", &["ublk-integrity top", "ublk-integrity top --once --delay 10"]),
    (
        "metrics",
        &[
            "ublk-integrity metrics --listen 127.0.0.1:9926",
            "ublk-integrity metrics --textfile /var/lib/prometheus/node-exporter/ublk-integrity.prom",
        ],
    ),
    ("clear", &["ublk-integrity clear home"]),
    ("events", &["ublk-integrity events --follow --class mismatch"]),
    (
        "monitor",
        &[
            "ublk-integrity monitor --command /etc/ublk-integrity/on-event --test",
            "systemctl enable --now ublk-integrity-monitor",
        ],
    ),
    ("recover", &["ublk-integrity recover home --key-file home.key"]),
    (
        "scrub",
        &[
            "ublk-integrity scrub home --wait",
            "ublk-integrity scrub home --rate 20M",
            "ublk-integrity scrub home --status",
        ],
    ),
    ("upgrade", &["ublk-integrity upgrade home", "ublk-integrity upgrade --all"]),
    ("doctor", &["ublk-integrity doctor"]),
    ("dump", &["ublk-integrity dump --data /dev/vdb --json"]),
    ("check", &["ublk-integrity check --data /dev/vdb --key-file home.key"]),
    ("export", &["ublk-integrity export --data /dev/vdb --key-file home.key content.img"]),
    ("import", &["ublk-integrity import --data /dev/vdb --key-file home.key content.img"]),
    (
        "resize",
        &[
            "lvextend --size +100G /dev/vg/data && ublk-integrity resize home && resize2fs /dev/ublk-integrity/home",
            "ublk-integrity resize --data /dev/vdb --key-file home.key --size 2T",
        ],
    ),
    ("benchmark", &["ublk-integrity benchmark --data ."]),
    ("completions", &["ublk-integrity completions bash >/etc/bash_completion.d/ublk-integrity"]),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::Exit;
    use clap::CommandFactory;

    #[test]
    fn what_is_no_request_is_none() {
        assert_eq!(escaped(".so x"), "\\&.so x");
        assert_eq!(escaped("a \\ --b"), "a \\e \\-\\-b");
    }

    #[test]
    fn each_command_that_is_in_the_help_has_an_example() {
        let program = crate::cli::Cli::command();
        for command in in_help(&program) {
            let name = command.get_name();
            let below = in_help(command).map(|below| format!("{name} {}", below.get_name()));
            for words in below.chain([name.to_owned()]) {
                let lines = EXAMPLES.iter().find(|(of, _)| **of == words).map_or(&[][..], |(_, lines)| lines);
                assert!(lines.iter().all(|line| line.contains(&words)) && !lines.is_empty(), "{words}");
            }
        }
    }

    #[test]
    fn each_exit_code_is_there() {
        for (code, _) in EXIT_CODES.iter().skip(1) {
            assert_eq!(Exit::from_code(*code) as u8, *code);
        }
        assert_eq!(EXIT_CODES.len(), Exit::Output as usize + 1);
    }
}

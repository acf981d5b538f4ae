//! `generator`, not in the help: what systemd runs under the name `ublk-integrity-generator` when
//! it reads its units.

use super::attach::TableArgs;
use crate::{
    boot::{
        generator::{self, Content, Made},
        table::{TABLE, Table},
    },
    failure::{Context, Exit, Failure, Outcome, plain},
    output::{self, Output},
};
use std::{
    env,
    ffi::OsString,
    fs::{self, OpenOptions},
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
    process::{self, ExitCode},
};

/// The name under which systemd runs us.
const NAME: &str = "ublk-integrity-generator";

/// Make systemd's units of the table
#[derive(clap::Args)]
pub struct Args {
    /// Where the units go; systemd gives two more folders
    #[arg(value_name = "FOLDER", num_args = 1..=3, required_unless_present = "dry_run")]
    folders: Vec<PathBuf>,
    /// Print them instead; fails where a line of the table is bad
    #[arg(long, conflicts_with = "folders")]
    dry_run: bool,
    #[command(flatten)]
    table: TableArgs,
}

pub fn run(args: &Args) -> Outcome {
    match args.folders.first() {
        Some(folder) => {
            generate(folder, args.table.path());
            Ok(())
        }
        None => print(args),
    }
}

/// Whether it is systemd that runs us.
pub fn is_caller(args: &[OsString]) -> bool {
    args.first().is_some_and(|name| Path::new(name).file_name() == Some(NAME.as_ref()))
}

/// What goes wrong here must not stop the machine from booting.
pub fn run_for_systemd(args: &[OsString]) -> ExitCode {
    match args.get(1) {
        Some(folder) => generate(Path::new(folder), Path::new(TABLE)),
        None => log("no folder given: it is called as systemd.generator(7) says"),
    }
    ExitCode::SUCCESS
}

fn generate(folder: &Path, path: &Path) {
    let table = match fs::read(path) {
        Ok(bytes) => Table::parse(&bytes),
        // Most machines have none.
        Err(e) if e.kind() == ErrorKind::NotFound => return,
        Err(e) => return log(&format!("can't read {}: {}", path.display(), plain(&e))),
    };
    table.bad.iter().for_each(|bad| log(&format!("{}: {bad}: passed over", path.display())));
    match units(&table, path) {
        Ok(units) => units.iter().for_each(|made| {
            if let Err(e) = made.write(folder) {
                log(&format!("can't make {} in {}: {}", made.path, folder.display(), plain(&e)));
            }
        }),
        Err(failure) => log(&failure.message),
    }
}

fn units(table: &Table, path: &Path) -> Outcome<Vec<Made>> {
    let program = env::current_exe().doing("can't tell where this program is")?;
    let path = std::path::absolute(path).doing(format_args!("can't use {}", path.display()))?;
    Ok(generator::units(table, &path, &program, &generator::is_encrypted))
}

fn print(args: &Args) -> Outcome {
    let table = args.table.read()?;
    let mut out = Output::new();
    for made in units(&table, args.table.path())? {
        match &made.content {
            Content::Text(text) => out.line(format_args!("=== {}\n{text}", made.path)),
            Content::Link(target) => out.line(format_args!("=== {} -> {target}\n", made.path)),
        }
    }
    out.print_with(verdict(args, &table))
}

/// The last bad line is the failure; those before it are told.
fn verdict(args: &Args, table: &Table) -> Outcome {
    let Some((last, before)) = table.bad.split_last() else { return Ok(()) };
    before.iter().for_each(|bad| output::tell(args.table.named(bad)));
    Err(Failure::new(Exit::Arguments, args.table.named(last)))
}

/// A line in the kernel's log: there is no other this early.
fn log(line: &str) {
    const ERROR: u8 = 3;
    let line = format!("<{ERROR}>{NAME}[{}]: {line}\n", process::id());
    let _ = OpenOptions::new().write(true).open("/dev/kmsg").and_then(|mut kmsg| kmsg.write_all(line.as_bytes()));
}

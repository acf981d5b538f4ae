//! `keygen`: a new key file.

use crate::{
    failure::{Context, Exit, Failure, Outcome},
    os, output,
    random::random,
};
use std::{
    fs::{self, OpenOptions},
    io::{self, IsTerminal, Write},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
};
use zeroize::Zeroizing;

/// Write a new random key (32 bytes, mode 0600) to a file that does not exist yet
#[derive(clap::Args)]
pub struct Args {
    /// The new file, or "-" for standard output
    file: PathBuf,
}

pub fn run(args: &Args) -> Outcome {
    if args.file.as_os_str() == "-" {
        return to_standard_output();
    }
    let what = format!("can't make key file {}", args.file.display());
    os::guard_secrets().doing("can't keep the key out of core dumps")?;
    let key = Zeroizing::new(random::<32>()?);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&args.file).doing(&what)?;
    let written = file.write_all(&*key).and_then(|()| file.sync_all());
    if written.is_err() {
        // Part of a key would be taken for one, or stand in the way of the next try.
        let _ = fs::remove_file(&args.file);
    }
    written.doing(&what)
}

fn to_standard_output() -> Outcome {
    if io::stdout().is_terminal() {
        return Err(Failure::new(
            Exit::Arguments,
            "the key would be shown on a terminal: name a file, or a program after |",
        ));
    }
    os::guard_secrets().doing("can't keep the key out of core dumps")?;
    let key = Zeroizing::new(random::<32>()?);
    output::bytes(&*key)
}

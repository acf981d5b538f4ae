//! `keygen`: a new key file.

use crate::{
    failure::{Context, Outcome},
    offline::random,
    os,
};
use std::{
    fs::{self, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
};
use zeroize::Zeroizing;

/// Write a new random key (32 bytes, mode 0600) to a file that does not exist yet
#[derive(clap::Args)]
pub struct Args {
    /// The new file
    file: PathBuf,
}

pub fn run(args: &Args) -> Outcome {
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

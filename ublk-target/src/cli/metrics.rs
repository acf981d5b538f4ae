//! `metrics`: what programs that watch machines collect.

use crate::{
    failure::{Context, Outcome},
    new_file::NewFile,
    output,
    watch::{
        self, Dialect,
        http::{Address, Server},
    },
};
use std::{
    fs::Permissions,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

/// Print metrics of all devices as OpenMetrics text, or serve them to programs of this machine
#[derive(clap::Args)]
pub struct Args {
    /// Serve `GET /metrics` there until a signal comes: unix:PATH, or a loopback address like 127.0.0.1:9926
    #[arg(long, value_name = "ADDRESS", conflicts_with = "textfile")]
    listen: Option<Address>,
    /// Put them into a file, whole or not at all, as node_exporter's textfile collector reads them
    #[arg(long, value_name = "FILE")]
    textfile: Option<PathBuf>,
}

pub fn run(args: &Args) -> Outcome {
    match (&args.listen, &args.textfile) {
        (Some(address), _) => Server::bind(address)?.run(watch::exposition),
        (None, Some(file)) => write(file).doing(format_args!("can't write {}", file.display())),
        (None, None) => output::bytes(watch::exposition(Dialect::OpenMetrics).as_bytes()),
    }
}

/// Its reader may be another user, and never reads half of it.
fn write(place: &Path) -> Outcome {
    let replaces = place.exists();
    let new = NewFile::beside(place, replaces)?;
    if !replaces {
        new.file().set_permissions(Permissions::from_mode(0o644)).doing("can't let others read it")?;
    }
    new.file().write_all(watch::exposition(Dialect::Prometheus).as_bytes()).doing("the new file")?;
    new.finish().doing("the new file")
}

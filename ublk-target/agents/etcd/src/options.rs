//! The command line.

use lexopt::{Arg, Parser, ValueExt};
use std::{path::PathBuf, time::Duration};
use ublk_anchor_protocol::process::{self, Ended};

pub(crate) const HELP: &str = "\
Keeps the anchors of ublk-integrity in an etcd cluster (version 3).

Usage: ublk-anchor-etcd --socket PATH --endpoint URL... [OPTIONS]

  --socket PATH     the socket to listen on; root may ask
  --endpoint URL    a member, as https://etcd1.example:2379; once for each. http is for this machine alone
  --ca FILE         PEM certificates of who signs the members'
  --cert FILE       PEM certificate of this agent, which the members ask for (--client-cert-auth)
  --key FILE        PEM private key of it
  --prefix TEXT     what keys begin with [/ublk-integrity/anchor/]
  --timeout SECONDS how long a request may take, 1 to 60 [4]; less than what the client waits
  --help, --version
";

/// What the command line asks for.
pub(crate) enum Run {
    Help,
    Version,
    Serve(Options),
}

/// How to serve.
pub(crate) struct Options {
    pub(crate) socket: PathBuf,
    pub(crate) endpoints: Vec<String>,
    pub(crate) files: Files,
    pub(crate) prefix: String,
    pub(crate) timeout: Duration,
}

/// For TLS.
#[derive(Default)]
pub(crate) struct Files {
    pub(crate) ca: Option<PathBuf>,
    pub(crate) cert: Option<PathBuf>,
    pub(crate) key: Option<PathBuf>,
}

pub(crate) fn parse(mut parser: Parser) -> Result<Run, Ended> {
    let (mut socket, mut endpoints, mut files) = (None, Vec::new(), Files::default());
    let (mut prefix, mut timeout) = ("/ublk-integrity/anchor/".to_owned(), 4);
    while let Some(argument) = parser.next().map_err(Ended::arguments)? {
        match argument {
            Arg::Long("help") | Arg::Short('h') => return Ok(Run::Help),
            Arg::Long("version") | Arg::Short('V') => return Ok(Run::Version),
            Arg::Long("socket") => socket = Some(path(&mut parser)?),
            Arg::Long("ca") => files.ca = Some(path(&mut parser)?),
            Arg::Long("cert") => files.cert = Some(path(&mut parser)?),
            Arg::Long("key") => files.key = Some(path(&mut parser)?),
            Arg::Long("endpoint") => endpoints.push(text(&mut parser)?),
            Arg::Long("prefix") => prefix = text(&mut parser)?,
            Arg::Long("timeout") => timeout = parser.value().and_then(|v| v.parse()).map_err(Ended::arguments)?,
            other => return Err(Ended::arguments(format!("{}; --help shows what there is", other.unexpected()))),
        }
    }
    let socket = process::socket_path(socket)?;
    if endpoints.is_empty() {
        return Err(Ended::arguments("--endpoint URL is missing: where a member of the cluster is"));
    }
    if !(1..=60).contains(&timeout) {
        return Err(Ended::arguments(format!("--timeout {timeout}: it is 1 to 60 seconds")));
    }
    if files.cert.is_some() != files.key.is_some() {
        return Err(Ended::arguments("--cert and --key go together: a certificate and the private key of it"));
    }
    Ok(Run::Serve(Options { socket, endpoints, files, prefix, timeout: Duration::from_secs(timeout) }))
}

fn path(parser: &mut Parser) -> Result<PathBuf, Ended> {
    parser.value().map(PathBuf::from).map_err(Ended::arguments)
}

fn text(parser: &mut Parser) -> Result<String, Ended> {
    parser.value().and_then(ValueExt::string).map_err(Ended::arguments)
}

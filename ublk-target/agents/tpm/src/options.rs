//! The command line.

use lexopt::{Arg, Parser, ValueExt};
use std::{
    path::{Path, PathBuf},
    str::FromStr,
};
use tss_esapi::TctiNameConf;
use ublk_anchor_protocol::{
    Secret,
    process::{self, Ended, configured},
};

pub(crate) const HELP: &str = "\
Keeps the anchors of ublk-integrity in a TPM 2.0: for each volume an NV counter, which never goes back.

Usage: ublk-anchor-tpm --socket PATH [OPTIONS]

  --socket PATH           the socket to listen on; root may ask
  --tcti NAME             the TPM [device:/dev/tpmrm0]; as libtss2 names it, swtpm:host=127.0.0.1,port=2321
  --secret-file FILE      64 hex digits that every counter here has for a secret; else clients say theirs
  --owner-auth-file FILE  the owner's password, if there is one; read at init and retire alone
  --wear-limit N          increments a day, for all volumes together, 0 for no limit [100]
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
    pub(crate) tcti: TctiNameConf,
    pub(crate) secret: Option<Secret>,
    pub(crate) owner_auth: Option<PathBuf>,
    /// Increments a day.
    pub(crate) wear_limit: u32,
}

pub(crate) fn parse(mut parser: Parser) -> Result<Run, Ended> {
    let (mut socket, mut secret, mut owner_auth) = (None, None, None);
    let (mut tcti, mut wear_limit) = ("device:/dev/tpmrm0".to_owned(), 100);
    while let Some(argument) = parser.next().map_err(Ended::arguments)? {
        match argument {
            Arg::Long("help") | Arg::Short('h') => return Ok(Run::Help),
            Arg::Long("version") | Arg::Short('V') => return Ok(Run::Version),
            Arg::Long("socket") => socket = Some(path(&mut parser)?),
            Arg::Long("secret-file") => secret = Some(read_secret(&path(&mut parser)?)?),
            Arg::Long("owner-auth-file") => owner_auth = Some(path(&mut parser)?),
            Arg::Long("tcti") => tcti = parser.value().and_then(ValueExt::string).map_err(Ended::arguments)?,
            Arg::Long("wear-limit") => wear_limit = parser.value().and_then(|v| v.parse()).map_err(Ended::arguments)?,
            other => return Err(Ended::arguments(format!("{}; --help shows what there is", other.unexpected()))),
        }
    }
    let socket = process::socket_path(socket)?;
    let tcti = TctiNameConf::from_str(&tcti)
        .map_err(|_| Ended::arguments(format!("--tcti {tcti}: it is device:PATH or swtpm:host=ADDRESS,port=PORT")))?;
    Ok(Run::Serve(Options { socket, tcti, secret, owner_auth, wear_limit }))
}

fn path(parser: &mut Parser) -> Result<PathBuf, Ended> {
    parser.value().map(PathBuf::from).map_err(Ended::arguments)
}

fn read_secret(path: &Path) -> Result<Secret, Ended> {
    let text = configured("secret", path)?;
    let text = text.strip_suffix(b"\n").unwrap_or(&text);
    Secret::parse(text).map_err(|e| Ended::arguments(format!("--secret-file {}: {e}", path.display())))
}

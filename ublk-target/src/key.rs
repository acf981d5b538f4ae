//! Where the key or the passphrase comes from that opens a volume. It is held in memory that is zeroized, and never shown.

use crate::{
    device::is_same,
    failure::{Context, Exit, Failure, Outcome},
    interrupt, key_hint, os, output,
};
use serde::{Deserialize, Serialize};
use std::{
    ffi::OsString,
    fs::{File, Metadata},
    io::{IsTerminal, Read},
    path::{Path, PathBuf},
};
use ublk_integrity::{
    Credential, MAX_KEY_BYTES, MIN_KEY_BYTES, MasterKey,
    key_slots::{MAX_PASSPHRASE_BYTES, Passphrase},
};
use zeroize::Zeroizing;

/// The place of a key; may be shown and stored.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeySource {
    /// All of a file.
    File(PathBuf),
    /// All of standard input: a pipe.
    Stdin,
    /// A "user" key of the kernel's keyrings, by description.
    Keyring(String),
    /// A passphrase: all of a file, without a newline at its end.
    PassphraseFile(PathBuf),
    /// A passphrase, asked for at a terminal or read from a pipe.
    PassphraseStdin,
}

/// The options that name a key.
#[derive(clap::Args, Clone, Debug)]
#[group(required = true, multiple = false)]
pub struct KeyArgs {
    /// File that holds the key (32 bytes or more, all of them used); "-" reads a pipe, or a line
    /// from a terminal
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// Key from the kernel's keyrings, as added by `keyctl padd user NAME @u`
    #[arg(long, value_name = "keyring:NAME", value_parser = keyring_name)]
    key: Option<String>,
    /// File that holds a passphrase, where the volume has key slots (a newline at its end does not
    /// count); "-" asks at the terminal, or reads a pipe
    #[arg(long, value_name = "FILE")]
    passphrase_file: Option<PathBuf>,
}

/// The same where the key's place may be known already.
#[derive(clap::Args, Clone, Debug)]
#[group(multiple = false)]
pub struct OptionalKeyArgs {
    /// File that holds the key, if it is not where `add` found it; "-" reads a pipe
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// Key from the kernel's keyrings
    #[arg(long, value_name = "keyring:NAME", value_parser = keyring_name)]
    key: Option<String>,
    /// File that holds a passphrase, where the volume has key slots (a newline at its end does not
    /// count); "-" asks at the terminal, or reads a pipe
    #[arg(long, value_name = "FILE")]
    passphrase_file: Option<PathBuf>,
}

fn keyring_name(text: &str) -> Result<String, String> {
    match text.strip_prefix("keyring:") {
        Some(name) if !name.is_empty() => Ok(name.to_owned()),
        _ => Err("must be keyring:NAME".into()),
    }
}

impl KeyArgs {
    /// The place that the options name.
    pub fn source(&self) -> Outcome<KeySource> {
        let named = KeySource::named(self.key_file.as_deref(), self.key.as_deref(), self.passphrase_file.as_deref())?;
        Ok(named.expect("one is required"))
    }

    /// The key itself.
    pub fn load(&self) -> Outcome<Credential> {
        self.source()?.load()
    }

    /// Refuses `other` if it is the file that the key is in: nothing else may get into its place.
    pub fn refuse_itself(&self, other: &Metadata) -> Outcome {
        match self.key_file.as_ref().or(self.passphrase_file.as_ref()) {
            Some(path) if path.metadata().is_ok_and(|key| is_same(&key, other)) => {
                Err(Failure::new(Exit::Arguments, format_args!("{} is the key file", path.display())))
            }
            _ => Ok(()),
        }
    }
}

impl OptionalKeyArgs {
    /// The place that the options name, if any.
    pub fn source(&self) -> Outcome<Option<KeySource>> {
        KeySource::named(self.key_file.as_deref(), self.key.as_deref(), self.passphrase_file.as_deref())
    }
}

fn absolute(path: &Path) -> Outcome<PathBuf> {
    std::path::absolute(path).map_err(|e| unreadable(path, &e))
}

impl KeySource {
    /// What options name: a key file, a key of a keyring, a passphrase file.
    pub fn named(file: Option<&Path>, keyring: Option<&str>, passphrase: Option<&Path>) -> Outcome<Option<Self>> {
        Ok(match (keyring, file, passphrase) {
            (Some(name), ..) => Some(KeySource::Keyring(name.to_owned())),
            (None, Some(path), _) if path.as_os_str() == "-" => Some(KeySource::Stdin),
            (None, None, Some(path)) if path.as_os_str() == "-" => Some(KeySource::PassphraseStdin),
            // The daemon leaves the current folder, and `recover` may be called from another. Links
            // stay: a pipe of the shell's (/dev/fd/63) is one that leads to no path.
            (None, Some(path), _) => Some(KeySource::File(absolute(path)?)),
            (None, None, Some(path)) => Some(KeySource::PassphraseFile(absolute(path)?)),
            (None, None, None) => None,
        })
    }

    /// Whether it can be read but once.
    pub fn is_standard_input(&self) -> bool {
        matches!(self, Self::Stdin | Self::PassphraseStdin)
    }

    /// The file that it is in, if it is in one.
    pub fn file(&self) -> Option<&PathBuf> {
        match self {
            Self::File(path) | Self::PassphraseFile(path) => Some(path),
            Self::Stdin | Self::Keyring(_) | Self::PassphraseStdin => None,
        }
    }

    /// The option that names it, and its value.
    pub fn option(&self) -> (&'static str, OsString) {
        match self {
            Self::File(path) => ("--key-file", path.into()),
            Self::Stdin => ("--key-file", "-".into()),
            Self::Keyring(name) => ("--key", format!("keyring:{name}").into()),
            Self::PassphraseFile(path) => ("--passphrase-file", path.into()),
            Self::PassphraseStdin => ("--passphrase-file", "-".into()),
        }
    }

    /// Reads it.
    pub fn load(&self) -> Outcome<Credential> {
        self.read(&[self.what()])
    }

    /// The same of a new one. A passphrase that is typed is asked for twice: nothing opens a volume
    /// whose only passphrase is mistyped.
    pub fn load_new(&self) -> Outcome<Credential> {
        match self {
            Self::PassphraseStdin => self.read(&["new passphrase", "same once more"]),
            _ => self.read(&[self.what()]),
        }
    }

    /// With so many words as it is asked for at a terminal, one after the other.
    fn read(&self, asked: &[&str]) -> Outcome<Credential> {
        os::guard_secrets().doing("can't keep the key out of core dumps")?;
        let bytes = match self {
            Self::File(path) | Self::PassphraseFile(path) => {
                File::open(path).and_then(read_all).map_err(|e| unreadable(path, &e))?
            }
            Self::Stdin | Self::PassphraseStdin => {
                // Not through `stdin()` itself, whose buffer would keep a copy.
                let input = nix::unistd::dup(std::io::stdin()).map(File::from).map_err(std::io::Error::from);
                let read = input.and_then(|input| read_typed_or_piped(input, asked));
                let read = read.doing("can't read the key from standard input")?;
                let differ = "what was typed was not the same twice: nothing was done";
                read.ok_or_else(|| Failure::new(Exit::KeyOrPermission, differ))?
            }
            Self::Keyring(name) => {
                let what = format!("no readable key \"{name}\" in the kernel's keyrings");
                let bytes = os::read_user_key(name, MAX_KEY_BYTES + 1).doing(what);
                bytes.map_err(|failure| failure.exiting(Exit::KeyOrPermission))?
            }
        };
        if matches!(self, Self::PassphraseFile(_) | Self::PassphraseStdin) {
            return self.passphrase(&bytes);
        }
        if bytes.len() > MAX_KEY_BYTES {
            return Err(self.too_long());
        }
        key_hint::note(bytes.ends_with(b"\n"));
        let key = MasterKey::new(&bytes).map(Credential::Key);
        key.map_err(|e| Failure::new(Exit::KeyOrPermission, format_args!("{self}: {e}")))
    }

    /// Without the newline that an editor or `echo` has added: nobody can type one.
    fn passphrase(&self, bytes: &[u8]) -> Outcome<Credential> {
        let passphrase = Passphrase::new(bytes.strip_suffix(b"\n").unwrap_or(bytes));
        let failure = |e| match bytes.len() > MAX_KEY_BYTES {
            true => format!("{self}: the passphrase has more than {MAX_PASSPHRASE_BYTES} bytes"),
            false => format!("{self}: {e}"),
        };
        passphrase.map(Credential::Passphrase).map_err(|e| Failure::new(Exit::KeyOrPermission, failure(e)))
    }

    fn what(&self) -> &'static str {
        if *self == Self::PassphraseStdin { "passphrase" } else { "key" }
    }

    /// No more was read than says so: its size is that of the file, where it is one.
    fn too_long(&self) -> Failure {
        let file = if let Self::File(path) = self { path.metadata().ok().filter(Metadata::is_file) } else { None };
        let size = file.map_or_else(|| format!("more than {MAX_KEY_BYTES}"), |file| file.len().to_string());
        let message = format!("{self}: the key has {size} bytes; must be from {MIN_KEY_BYTES} to {MAX_KEY_BYTES}");
        Failure::new(Exit::KeyOrPermission, message)
    }
}

impl std::fmt::Display for KeySource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => write!(f, "key file {}", path.display()),
            Self::Stdin => f.write_str("key from standard input"),
            Self::Keyring(name) => write!(f, "key keyring:{name}"),
            Self::PassphraseFile(path) => write!(f, "passphrase file {}", path.display()),
            Self::PassphraseStdin => f.write_str("passphrase from standard input"),
        }
    }
}

/// All of a pipe; of a terminal a line for each of these words, without what ends it, and nobody
/// sees it. `None` where the lines are not the same.
fn read_typed_or_piped(input: File, asked: &[&str]) -> std::io::Result<Option<Zeroizing<Vec<u8>>>> {
    if !input.is_terminal() {
        return read_all(input).map(Some);
    }
    let typed: Vec<_> = asked.iter().map(|what| read_typed(&input, what)).collect::<std::io::Result<_>>()?;
    let same = typed.iter().all(|line| *line == typed[0]);
    Ok(typed.into_iter().next().filter(|_| same))
}

fn read_typed(mut input: &File, what: &str) -> std::io::Result<Zeroizing<Vec<u8>>> {
    output::tell(format_args!("the {what}, which is not shown, and then Enter:"));
    os::without_echo(input, interrupt::has_come, || {
        // A terminal gives one line at a time.
        let mut line = Zeroizing::new(vec![0; MAX_KEY_BYTES + 1]);
        let len = input.read(&mut line)?;
        let len = if line[..len].ends_with(b"\n") { len - 1 } else { len };
        line.truncate(len);
        Ok(line)
    })
}

fn unreadable(path: &Path, e: &std::io::Error) -> Failure {
    Failure::io(format_args!("can't read key file {}", path.display()), e).exiting(Exit::KeyOrPermission)
}

/// All of `from`, but no more than tells that it is too long.
fn read_all(mut from: impl Read) -> std::io::Result<Zeroizing<Vec<u8>>> {
    // Its full size from the start: growing would leave copies of the key behind.
    let mut bytes = Zeroizing::new(vec![0; MAX_KEY_BYTES + 1]);
    // All there is for a user who may not lock more.
    let _ = os::lock_pages(&bytes);
    let mut filled = 0;
    while filled < bytes.len() {
        match from.read(&mut bytes[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    bytes.truncate(filled);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_of_a_key_does_not_depend_on_the_folder() {
        let Some(KeySource::File(path)) = KeySource::named(Some(Path::new("some/key")), None, None).unwrap() else {
            panic!("no file")
        };
        assert!(path.is_absolute() && path.ends_with("some/key"));
        assert_eq!(KeySource::named(Some(Path::new("-")), None, None).unwrap(), Some(KeySource::Stdin));
    }
}

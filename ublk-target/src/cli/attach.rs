//! `attach`: devices of the table, as the boot makes them.

use super::{add, control_group, names, recover};
use crate::{
    boot::{
        find,
        table::{BadLine, Entry, Key, Options, Place, TABLE, Table},
    },
    daemon::{
        notify::Notify,
        state::{Change, State},
    },
    failure::{Context, Exit, Failure, Outcome},
    key::KeySource,
    name::DeviceName,
    output, ublk,
};
use clap::Parser;
use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{self, Command},
    time::Duration,
};

/// Start a device as /etc/ublk-integritytab says; one that waits for a daemon is recovered
#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("volumes").required(true).args(["name", "all"]))]
pub struct Args {
    /// The name in the table's first field
    name: Option<DeviceName>,
    /// All that are not marked noauto, in their order; those that are there already stay as they are
    #[arg(short, long, conflicts_with = "foreground")]
    all: bool,
    #[command(flatten)]
    table: TableArgs,
    /// Stay in the foreground, and log to standard error
    #[arg(long)]
    pub(super) foreground: bool,
}

/// Which table.
#[derive(clap::Args)]
pub(super) struct TableArgs {
    /// The table
    #[arg(long, value_name = "FILE", default_value = TABLE)]
    table: PathBuf,
}

impl TableArgs {
    pub(super) fn path(&self) -> &Path {
        &self.table
    }

    pub(super) fn read(&self) -> Outcome<Table> {
        let bytes = fs::read(&self.table).doing(format_args!("can't read {}", self.table.display()))?;
        Ok(Table::parse(&bytes))
    }

    /// A line that can't be used, with its file.
    pub(super) fn named(&self, bad: &BadLine) -> String {
        format!("{}: {bad}", self.table.display())
    }
}

pub fn run(args: &Args) -> Outcome {
    let table = args.table.read()?;
    match &args.name {
        Some(name) => attach(name, &table, args),
        None => attach_all(&table, args),
    }
}

/// `add`, which may find that the device is there and only its daemon is gone.
pub fn add(args: &add::Args) -> Outcome {
    match args.name.as_ref().filter(|_| args.or_recover).and_then(names::find) {
        None => add::run(args),
        Some(state) if state.is_alive() => Err(there_already(&state)),
        Some(state) => {
            args.keep.refuse_contradiction()?;
            let mut start = recover::start(state.id, Some(args.key.source()?), args.decide_unreadable)?;
            start.settings.anchor = args.anchor.instead_of(start.settings.anchor.take());
            if args.keep.anchor_mode.holds_flushes && !start.settings.anchor.as_ref().is_some_and(|of| of.holds_flushes)
            {
                let message = format!(
                    "device {} was added with another --anchor-mode, which it keeps: `del -n {0}`, then `add`",
                    state.id
                );
                return Err(Failure::new(Exit::Arguments, message));
            }
            add::launch(start, args.foreground)
        }
    }
}

fn there_already(state: &State) -> Failure {
    let (path, pid) = (ublk::block_path(state.id), state.pid);
    let name = state.settings.name.as_ref().map_or("it", DeviceName::as_str);
    Failure::new(Exit::Busy, format_args!("{name} is there already: {} (pid {pid})", path.display()))
}

fn attach(name: &DeviceName, table: &Table, args: &Args) -> Outcome {
    let Some(entry) = table.get(name) else {
        // Perhaps it is there, and wrong.
        table.bad.iter().for_each(|bad| output::warn(args.table.named(bad)));
        let message = format!("{} has no volume {name}", args.table.path().display());
        return Err(Failure::new(Exit::Arguments, message));
    };
    let manager = Notify::from_environment();
    if let Some(state) = names::find(name) {
        if args.foreground && manager.is_heard() {
            if adopt(state.id, &manager)? {
                return Ok(());
            }
        } else if state.is_alive() {
            return Err(there_already(&state));
        }
    }
    let mut words = words(entry)?;
    if args.foreground {
        words.push("--foreground".into());
    }
    add(&parse(words)?)
}

/// How long an `upgrade` may take that gives the device another daemon.
const TAKES_OVER_WITHIN: Duration = Duration::from_secs(180);

/// Has systemd take the daemon that serves the device for the main process of the unit that it has
/// started us for. It was started by hand, or by an `upgrade` whose end systemd has not heard of.
/// `false` where none serves it.
fn adopt(id: u32, manager: &Notify) -> Outcome<bool> {
    // Who serves it is not known while that changes.
    let _change = Change::follow_within(id, TAKES_OVER_WITHIN)?;
    let Some(state) = State::load(id).ok().filter(State::is_alive) else { return Ok(false) };
    let (pid, device) = (state.pid, ublk::block_path(id));
    let device = device.display();
    if let Err(e) = control_group::join(pid, process::id()) {
        output::warn(format_args!("the daemon of {device} (pid {pid}) stays in the control group that it was in: {e}"));
    }
    manager.say(&format!("MAINPID={pid}\nREADY=1\nSTATUS=serving {device}"));
    output::tell(format_args!("{device} is served already, by pid {pid}: this unit is its daemon's from now on"));
    Ok(true)
}

/// Each by a process of its own: what one leaves behind is nothing to the next, and what has forked
/// a daemon goes with it.
fn attach_all(table: &Table, args: &Args) -> Outcome {
    let mut failed = (!table.bad.is_empty()).then_some(Exit::Arguments);
    table.bad.iter().for_each(|bad| output::tell(args.table.named(bad)));
    for entry in table.entries.iter().filter(|entry| !entry.options.noauto) {
        if names::find(&entry.name).is_some_and(|state| state.is_alive()) {
            continue;
        }
        let mut command = Command::new("/proc/self/exe");
        command.args(["attach", entry.name.as_str(), "--table"]).arg(args.table.path());
        let status = command.status().doing("can't start a process")?;
        if status.success() || entry.options.nofail {
            continue;
        }
        // It has said why.
        let code = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(Exit::Device as u8);
        failed.get_or_insert(Exit::from_code(code));
    }
    failed.map_or(Ok(()), |exit| Err(Failure::new(exit, "").told()))
}

/// The options of `add`.
#[derive(Parser)]
#[command(no_binary_name = true)]
struct AddLine {
    #[command(flatten)]
    args: add::Args,
}

/// By way of the words that a person would type: one grammar, one set of defaults and limits.
fn parse(words: Vec<OsString>) -> Outcome<add::Args> {
    match AddLine::try_parse_from(words) {
        Ok(line) => Ok(line.args),
        Err(e) => Err(Failure::new(Exit::Arguments, super::usage_line(&e))),
    }
}

/// What `add` is told of a line of the table.
fn words(entry: &Entry) -> Outcome<Vec<OsString>> {
    let options = &entry.options;
    let patience = options.timeout.unwrap_or_default();
    let mut words: Vec<OsString> = ["--or-recover", "--name", entry.name.as_str(), "--data"].map(OsString::from).into();
    words.push(find::device(&entry.data, patience)?.into());
    if let Some(meta) = &options.meta {
        words.extend(["--meta".into(), find::device(meta, patience)?.into()]);
    }
    if let Place::Volume(uuid) = &entry.data {
        words.extend(["--uuid".into(), uuid.to_string().into()]);
    }
    words.extend(key_words(&entry.key)?);
    words.extend(option_words(options));
    Ok(words)
}

fn key_words(key: &Key) -> Outcome<[OsString; 2]> {
    let source = match key {
        Key::File(path) => KeySource::File(path.clone()),
        Key::Keyring(name) => KeySource::Keyring(name.clone()),
        Key::Credential(name) => {
            let folder = env::var_os("CREDENTIALS_DIRECTORY").ok_or_else(|| {
                let message = format!(
                    "credential:{name} is had from systemd alone, and CREDENTIALS_DIRECTORY is not set: start the unit"
                );
                Failure::new(Exit::KeyOrPermission, message)
            })?;
            KeySource::File(Path::new(&folder).join(name))
        }
    };
    let (option, value) = source.option();
    Ok([option.into(), value])
}

fn option_words(options: &Options) -> Vec<OsString> {
    let flags = [("--read-only", options.read_only), ("--no-discard", options.no_discard)];
    let values = [
        ("--cache", options.cache.map(|size| size.0.to_string())),
        ("--queues", options.queues.map(|count| count.to_string())),
        ("--write-back", options.write_back.map(|count| count.to_string())),
        ("--sync-log", options.sync_log.map(|when| when.as_str().into())),
        ("--anchor", options.anchor.as_ref().map(ToString::to_string)),
    ];
    let flags = flags.into_iter().filter(|(_, wanted)| *wanted).map(|(word, _)| OsString::from(word));
    let values = values.into_iter().filter_map(|(word, value)| Some([word.into(), OsString::from(value?)]));
    let anchored = options.anchor_options.iter().flat_map(|(word, value)| {
        [Some(OsString::from(*word)), value.as_ref().map(OsString::from)].into_iter().flatten()
    });
    flags.chain(values.flatten()).chain(anchored).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_option_of_the_table_is_one_of_add() {
        let line = "home /dev/null /k read-only,no-discard,cache=64M,queues=2,write-back=0,sync-log=off,meta=/dev/zero,anchor-mode=flush,anchor=file:/a,anchor-timeout=9,anchor-wait=0,anchor-grace=7,anchor-lost=readonly,anchor-wear-ok";
        let table = Table::parse(line.as_bytes());
        let words = words(&table.entries[0]).unwrap();
        let expected = "--or-recover --name home --data /dev/null --meta /dev/zero --key-file /k --read-only --no-discard --cache 67108864 --queues 2 --write-back 0 --sync-log off --anchor file:/a --anchor-mode flush --anchor-timeout 9 --anchor-wait 0 --anchor-grace 7 --anchor-lost readonly --anchor-wear-ok";
        assert_eq!(words.join(" ".as_ref()), expected);
        let args = parse(words).unwrap();
        assert!(args.or_recover && args.name.is_some_and(|name| name.as_str() == "home"));
    }

    #[test]
    fn keys_are_named_as_add_wants_them() {
        let words = |key| key_words(&key).map(|words| words.join(" ".as_ref())).map_err(|failure| failure.exit);
        assert_eq!(words(Key::Keyring("k".into())).unwrap(), "--key keyring:k");
        // No test runs as a unit with credentials.
        assert_eq!(words(Key::Credential("c".into())), Err(Exit::KeyOrPermission));
    }
}

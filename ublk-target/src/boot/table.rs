//! `/etc/ublk-integritytab`: which volumes the machine has, one in a line; docs/ublk-integritytab.md.

use crate::{anchor, daemon::settings::SyncLog, name::DeviceName, size::Size};
use clap::ValueEnum;
use std::{
    collections::HashMap,
    fmt,
    path::{Component, Path, PathBuf},
    time::Duration,
};
use uuid::Uuid;

/// Where the table is.
pub const TABLE: &str = "/etc/ublk-integritytab";

/// Where the key of a volume is whose line names none: `NAME.key` in here.
pub const KEYS: &str = "/etc/ublk-integrity-keys.d";

/// What the lines of a table say, and which of them say nothing that makes sense.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Table {
    /// The lines, in their order.
    pub entries: Vec<Entry>,
    /// Those that are passed over.
    pub bad: Vec<BadLine>,
}

/// A line that can't be used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BadLine {
    /// Its number, from 1 on.
    pub number: usize,
    /// Which word is wrong, and how it should be.
    pub why: String,
}

/// A volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// What its device is called.
    pub name: DeviceName,
    /// Where its data is.
    pub data: Place,
    /// Where its key is.
    pub key: Key,
    /// What else was said.
    pub options: Options,
}

/// Where a device is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Place {
    /// Here.
    Path(PathBuf),
    /// Wherever the data of this volume is.
    Volume(Uuid),
    /// In the partition of this UUID.
    PartUuid(String),
    /// On the device with this label.
    Label(String),
    /// In the partition with this label.
    PartLabel(String),
}

/// Where a key is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Key {
    /// In a file.
    File(PathBuf),
    /// In the kernel's keyrings.
    Keyring(String),
    /// Among what systemd hands to the unit.
    Credential(String),
}

/// The words of the fourth field.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Options {
    /// Where the metadata is, if not with the data.
    pub meta: Option<Place>,
    /// Write nothing.
    pub read_only: bool,
    /// Offer no discard.
    pub no_discard: bool,
    /// Bytes of memory for verified tag pages.
    pub cache: Option<Size>,
    /// Queues.
    pub queues: Option<u16>,
    /// Slots of each thread in the write-back file.
    pub write_back: Option<u16>,
    /// Whether small writes that must be durable at once lie in the log with their data.
    pub sync_log: Option<SyncLog>,
    /// Where the volume's anchor is.
    pub anchor: Option<anchor::Place>,
    /// How the daemon keeps it told: options of `add` with their values, as they are written.
    pub anchor_options: Vec<(&'static str, Option<String>)>,
    /// Not by itself at boot, nor by `attach --all`.
    pub noauto: bool,
    /// The boot goes on without it.
    pub nofail: bool,
    /// Its devices come with the network.
    pub netdev: bool,
    /// It is served in the initramfs already, and until the very end.
    pub initrd: bool,
    /// All of it is verified once a month.
    pub scrub: bool,
    /// How long its devices may take to appear.
    pub timeout: Option<Duration>,
}

impl fmt::Display for BadLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.number, self.why)
    }
}

impl Table {
    /// From the bytes of the file.
    pub fn parse(bytes: &[u8]) -> Self {
        let mut table = Self::default();
        let mut lines_of = HashMap::new();
        for (number, line) in (1..).zip(bytes.split(|byte| *byte == b'\n')) {
            let entry = match parse_line(line) {
                Ok(None) => continue,
                Ok(Some(entry)) => match lines_of.get(&entry.name) {
                    None => Ok(entry),
                    Some(before) => Err(format!("{} is the name on line {before} already", entry.name)),
                },
                Err(why) => Err(why),
            };
            match entry {
                Ok(entry) => {
                    lines_of.insert(entry.name.clone(), number);
                    table.entries.push(entry);
                }
                Err(why) => table.bad.push(BadLine { number, why }),
            }
        }
        table
    }

    /// The line of this name.
    pub fn get(&self, name: &DeviceName) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.name == *name)
    }
}

fn parse_line(line: &[u8]) -> Result<Option<Entry>, String> {
    let line = std::str::from_utf8(line).map_err(|_| "it is not UTF-8")?.trim_matches(is_blank);
    if line.is_empty() || line.starts_with('#') {
        return Ok(None);
    }
    let words = line.split(is_blank).filter(|word| !word.is_empty()).map(unescape).collect::<Result<Vec<_>, _>>()?;
    let (name, data, more) = match &words[..] {
        [name, data, more @ ..] if more.len() <= 2 => (name, data, more),
        [_] => return Err("it has one field, and needs NAME and DATA at least".into()),
        _ => {
            let (count, last) = (words.len(), &words[4]);
            return Err(format!(
                "it has {count} fields, at most NAME DATA KEY OPTIONS make sense: {last:?} is too much"
            ));
        }
    };
    let name: DeviceName = name.parse()?;
    let options = match more.get(1).map(String::as_str) {
        None | Some("-") => Options::default(),
        Some(words) => parse_options(words)?,
    };
    let key = Key::parse(more.first().map_or("-", String::as_str), &name)?;
    Ok(Some(Entry { data: Place::parse("data device", data)?, key, options, name }))
}

fn is_blank(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\r')
}

/// A word with three octal digits behind a backslash for what can't stand in one. Nothing
/// in it is a control character: no path needs one, and a line's end could begin a line
/// of its own in a unit.
fn unescape(word: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(word.len());
    let mut rest = word.as_bytes();
    while let Some((first, more)) = rest.split_first() {
        rest = more;
        if *first != b'\\' {
            bytes.push(*first);
            continue;
        }
        let digits = rest.get(..3).filter(|digits| digits.iter().all(|digit| (b'0'..=b'7').contains(digit)));
        let value = digits.map(|digits| digits.iter().fold(0, |value, digit| value * 8 + u32::from(digit - b'0')));
        let byte = value.and_then(|value| u8::try_from(value).ok());
        bytes.push(
            byte.ok_or_else(|| format!("{word:?}: behind a backslash stand three octal digits, \\040 is a blank"))?,
        );
        rest = &rest[3..];
    }
    let text = String::from_utf8(bytes).map_err(|_| format!("{word:?} is not UTF-8"))?;
    match text.chars().any(char::is_control) {
        true => Err(format!("{word:?} has a control character")),
        false => Ok(text),
    }
}

/// A path that is the same from wherever it is looked at, and as a unit's name.
fn absolute(what: &str, text: &str) -> Result<PathBuf, String> {
    let path = Path::new(text);
    if !path.is_absolute() || path.components().any(|part| part == Component::ParentDir) {
        return Err(format!("the {what} {text:?} must be a path that begins with / and has no .. in it"));
    }
    Ok(path.to_owned())
}

impl Place {
    fn parse(what: &str, text: &str) -> Result<Self, String> {
        let Some((tag, value)) = text.split_once('=').filter(|_| !text.starts_with('/')) else {
            return absolute(what, text).map(Self::Path);
        };
        let named = || match value {
            "" => Err(format!("the {what} {text:?} names nothing")),
            _ => Ok(value.to_owned()),
        };
        match tag {
            "UUID" => value.parse().map(Self::Volume).map_err(|e| format!("the {what} {text:?}: {e}")),
            "PARTUUID" => named().map(|uuid| Self::PartUuid(uuid.to_lowercase())),
            "LABEL" => named().map(Self::Label),
            "PARTLABEL" => named().map(Self::PartLabel),
            _ => Err(format!("the {what} {text:?}: only UUID=, PARTUUID=, LABEL=, PARTLABEL= and paths are known")),
        }
    }
}

impl Key {
    fn parse(text: &str, name: &DeviceName) -> Result<Self, String> {
        let named = |value: &str| match value {
            "" => Err(format!("the key {text:?} names nothing")),
            _ => Ok(value.to_owned()),
        };
        if text == "-" {
            return Ok(Self::File(Path::new(KEYS).join(format!("{name}.key"))));
        }
        if let Some(name) = text.strip_prefix("keyring:") {
            return named(name).map(Self::Keyring);
        }
        let Some(credential) = text.strip_prefix("credential:") else {
            return absolute("key file", text).map(Self::File);
        };
        let known = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
        match named(credential)? {
            name if name.chars().all(known) && !name.starts_with('.') => Ok(Self::Credential(name)),
            _ => Err(format!("the key {text:?}: a credential's name is made of letters, digits and -._")),
        }
    }
}

const KNOWN: &str = "meta=, read-only, discard, no-discard, cache=, queues=, write-back=, sync-log=, anchor=, anchor-mode=, anchor-wait=, anchor-timeout=, anchor-grace=, anchor-lost=, anchor-wear-ok, on-mismatch=fail, noauto, nofail, _netdev, x-initrd.attach, scrub and timeout=";

fn parse_options(words: &str) -> Result<Options, String> {
    let mut options = Options::default();
    let mut seen: Vec<&str> = Vec::new();
    for word in words.split(',').filter(|word| !word.is_empty()) {
        let (name, value) = word.split_once('=').map_or((word, None), |(name, value)| (name, Some(value)));
        // They are one, and each says the opposite of the other.
        let once = if name == "no-discard" { "discard" } else { name };
        if seen.contains(&once) {
            return Err(format!("option {word:?}: {once} is there twice"));
        }
        seen.push(once);
        options.set(name, value).map_err(|why| format!("option {word:?}: {why}"))?;
    }
    match seen.iter().find(|word| word.starts_with("anchor-")).filter(|_| options.anchor.is_none()) {
        Some(word) => Err(format!("option {word:?}: there is no anchor=")),
        None => Ok(options),
    }
}

impl Options {
    fn set(&mut self, name: &str, value: Option<&str>) -> Result<(), String> {
        let flag = match name {
            "read-only" => &mut self.read_only,
            "no-discard" => &mut self.no_discard,
            "noauto" => &mut self.noauto,
            "nofail" => &mut self.nofail,
            "_netdev" => &mut self.netdev,
            "x-initrd.attach" => &mut self.initrd,
            "scrub" => &mut self.scrub,
            // What is done anyway.
            "discard" => &mut false,
            _ => return self.set_value(name, value),
        };
        *flag = true;
        if value.is_some() { Err("takes no value".into()) } else { Ok(()) }
    }

    fn set_value(&mut self, name: &str, value: Option<&str>) -> Result<(), String> {
        let given = value.filter(|value| !value.is_empty());
        let value = || given.ok_or("needs a value");
        match name {
            "meta" => self.meta = Some(meta(value()?)?),
            "cache" => self.cache = Some(value()?.parse()?),
            "queues" => self.queues = Some(count(value()?, 1, 4096)?),
            "write-back" => self.write_back = Some(count(value()?, 0, 1024)?),
            "sync-log" => self.sync_log = Some(sync_log(value()?)?),
            "anchor" => self.anchor = Some(value()?.parse()?),
            "anchor-wear-ok" if value().is_ok() => return Err("takes no value".into()),
            name if name.starts_with("anchor-") => self.anchor_options.push(anchor_option(name, given)?),
            "on-mismatch" if value()? == "fail" => {}
            "on-mismatch" => return Err("only fail is allowed here: `add --on-mismatch` is for rescue".into()),
            "timeout" => self.timeout = Some(seconds(value()?)?),
            _ => return Err(format!("not known: there are {KNOWN}")),
        }
        Ok(())
    }
}

/// One of `add`, checked as that does.
fn anchor_option(name: &str, value: Option<&str>) -> Result<(&'static str, Option<String>), String> {
    let needed = || value.ok_or("needs a value");
    let option = match name {
        "anchor-wear-ok" => return Ok(("--anchor-wear-ok", None)),
        "anchor-mode" => needed()?.parse::<anchor::Mode>().map(|_| "--anchor-mode")?,
        "anchor-lost" => anchor::Lost::from_str(needed()?, false)
            .map(|_| "--anchor-lost")
            .map_err(|_| "must be readonly or continue")?,
        "anchor-timeout" => count(needed()?, 1, 60).map(|_| "--anchor-timeout")?,
        "anchor-wait" => {
            needed()?.parse::<u32>().map(|_| "--anchor-wait").map_err(|_| "must be a number of seconds")?
        }
        "anchor-grace" => {
            needed()?.parse::<u32>().map(|_| "--anchor-grace").map_err(|_| "must be a number of seconds")?
        }
        _ => return Err(format!("not known: there are {KNOWN}")),
    };
    Ok((option, value.map(Into::into)))
}

fn meta(text: &str) -> Result<Place, String> {
    match Place::parse("metadata device", text)? {
        Place::Volume(_) => Err("UUID= names where the data is: give the metadata's path or PARTUUID=".into()),
        place => Ok(place),
    }
}

fn count(text: &str, least: u16, most: u16) -> Result<u16, String> {
    let count = text.parse().ok().filter(|count| (least..=most).contains(count));
    count.ok_or_else(|| format!("must be a number from {least} to {most}"))
}

fn sync_log(text: &str) -> Result<SyncLog, String> {
    SyncLog::from_str(text, false).map_err(|_| "must be auto, on or off".into())
}

fn seconds(text: &str) -> Result<Duration, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let unit = match unit {
        "" | "s" => Some(1),
        "min" => Some(60),
        "h" => Some(3600),
        _ => None,
    };
    // No longer than fits in what waits for it.
    let seconds = number.parse::<u32>().ok().zip(unit).and_then(|(number, unit)| number.checked_mul(unit));
    let seconds = seconds.ok_or("must be a time like 30, 30s, 2min or 1h")?;
    Ok(Duration::from_secs(seconds.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const UUID: &str = "baef170f-1036-4f2e-9acd-204d711f4c6a";

    /// The only entry of a table without a bad line.
    fn entry(line: &str) -> Entry {
        let table = Table::parse(line.as_bytes());
        assert_eq!(table.bad, [], "{line}");
        let [entry] = <[Entry; 1]>::try_from(table.entries).unwrap();
        entry
    }

    fn bad(line: &str) -> String {
        let table = Table::parse(line.as_bytes());
        assert_eq!(table.entries, [], "{line}");
        table.bad[0].to_string()
    }

    #[test]
    fn a_line_has_two_to_four_fields() {
        let home = entry("  home\t/dev/sda1  ");
        assert_eq!((home.name.as_str(), &home.data), ("home", &Place::Path("/dev/sda1".into())));
        assert_eq!(home.key, Key::File("/etc/ublk-integrity-keys.d/home.key".into()));
        assert_eq!(home.options, Options::default());
        assert_eq!(entry("home /dev/sda1 - -\r"), home);
        assert_eq!(entry("h /dev/a keyring:k").key, Key::Keyring("k".into()));
        assert_eq!(entry("h /dev/a credential:k.1").key, Key::Credential("k.1".into()));
        assert_eq!(entry(r"h /dev/a /media/my\040stick/\303\244").key, Key::File("/media/my stick/ä".into()));
        assert!(bad("home").contains("one field"));
        assert!(bad("home /dev/a - - more").contains("\"more\""));
    }

    #[test]
    fn devices_are_paths_or_tags() {
        assert_eq!(entry(&format!("h UUID={UUID}")).data, Place::Volume(UUID.parse().unwrap()));
        assert_eq!(entry("h PARTUUID=AB-01").data, Place::PartUuid("ab-01".into()));
        assert_eq!(entry(r"h LABEL=my\040disk").data, Place::Label("my disk".into()));
        assert_eq!(entry("h PARTLABEL=a=b").data, Place::PartLabel("a=b".into()));
        assert_eq!(entry("h /dev/disk/by-id/a=b").data, Place::Path("/dev/disk/by-id/a=b".into()));
        for (line, word) in [
            ("h sda", "\"sda\""),
            ("h /dev/../etc", "\"/dev/../etc\""),
            ("h UUID=1", "\"UUID=1\""),
            ("h LABEL=", "\"LABEL=\""),
            ("h ID=1", "\"ID=1\""),
            ("h /dev/a key", "\"key\""),
            ("h /dev/a keyring:", "\"keyring:\""),
            ("h /dev/a credential:a/b", "\"credential:a/b\""),
            ("a/b /dev/a", "\"a/b\""),
            ("7 /dev/a", "\"7\""),
            (r"h /dev/a\40", r"\\40"),
            (r"h /dev/a\012b", "control"),
            (r"h /dev/a\777", "octal"),
            (r"h /dev/a\377", "UTF-8"),
        ] {
            let said = bad(line);
            assert!(said.starts_with("line 1: ") && said.contains(word), "{line}: {said}");
        }
    }

    #[test]
    fn options_are_known_words() {
        let all = "meta=PARTLABEL=m,read-only,no-discard,,cache=64M,queues=2,write-back=0,sync-log=off,anchor=file:/mnt/a,anchor-mode=interval:60,anchor-wear-ok,on-mismatch=fail,noauto,nofail,_netdev,x-initrd.attach,scrub,timeout=2min";
        let expected = Options {
            meta: Some(Place::PartLabel("m".into())),
            read_only: true,
            no_discard: true,
            cache: Some(Size(64 << 20)),
            queues: Some(2),
            write_back: Some(0),
            sync_log: Some(SyncLog::Off),
            anchor: Some("file:/mnt/a".parse().unwrap()),
            anchor_options: vec![("--anchor-mode", Some("interval:60".into())), ("--anchor-wear-ok", None)],
            noauto: true,
            nofail: true,
            netdev: true,
            initrd: true,
            scrub: true,
            timeout: Some(Duration::from_secs(120)),
        };
        assert_eq!(entry(&format!("h /dev/a - {all}")).options, expected);
        assert_eq!(entry("h /dev/a - discard").options, Options::default());
        for word in [
            "raed-only",
            "read-only=1",
            "cache",
            "cache=",
            "cache=1.5G",
            "anchor=/mnt/a",
            "anchor-wear-ok",
            "anchor=file:/a,anchor-mode=fluhs",
            "anchor=file:/a,anchor-mode",
            "anchor=file:/a,anchor-lost=never",
            "anchor=file:/a,anchor-timeout=0",
            "anchor=file:/a,anchor-grace=1h",
            "anchor=file:/a,anchor-wear-ok=1",
            "anchor=file:/a,anchor-same-disk",
            "queues=0",
            "queues=4097",
            "write-back=-1",
            "sync-log=yes",
            "on-mismatch=fix",
            "on-mismatch=zero",
            "timeout=soon",
            "timeout=99999999999",
            "timeout=4294967295h",
            "meta=m",
            "meta=UUID=baef170f-1036-4f2e-9acd-204d711f4c6a",
            "discard,no-discard",
            "queues=1,queues=2",
        ] {
            let (said, last) = (bad(&format!("h /dev/a - {word}")), word.rsplit(',').next().unwrap());
            assert!(said.contains(&format!("option {last:?}")), "{word}: {said}");
        }
    }

    #[test]
    fn a_bad_line_harms_no_other() {
        let table = Table::parse(b"# a comment\n\nhome /dev/a\nwrong\n\xff\nhome /dev/b\n   # more\nsrv /dev/c\n");
        let names: Vec<_> = table.entries.iter().map(|entry| entry.name.as_str()).collect();
        assert_eq!(names, ["home", "srv"]);
        let bad: Vec<_> = table.bad.iter().map(|bad| bad.number).collect();
        assert_eq!(bad, [4, 5, 6]);
        assert!(table.bad[2].why.contains("line 3"));
        assert_eq!(table.get(&"srv".parse().unwrap()), Some(&table.entries[1]));
    }

    /// Words that lines are made of, among what makes no sense.
    fn word() -> impl Strategy<Value = String> {
        prop_oneof![
            Just("home".to_owned()),
            Just("-".to_owned()),
            "/[a-z\\\\0-7%=]{0,6}",
            "(UUID|LABEL|PARTUUID|ID|meta|cache|timeout|queues)=[0-9a-f\\\\,-]{0,8}",
            "(keyring|credential):[a-z./]{0,4}",
            "(nofail|noauto|_netdev|read-only|discard|no-discard|,){0,4}",
            ".{0,6}",
        ]
    }

    proptest! {
        #[test]
        fn whatever_the_file_holds_each_line_is_an_entry_or_one_error(
            lines in prop::collection::vec(prop::collection::vec(word(), 0..6), 0..6),
            noise in prop::collection::vec(any::<u8>(), 0..16),
        ) {
            let text = lines.iter().map(|words| words.join(" ")).collect::<Vec<_>>().join("\n");
            let bytes = [text.as_bytes(), b"\n", &noise].concat();
            let table = Table::parse(&bytes);
            prop_assert!(table.entries.len() + table.bad.len() <= bytes.split(|b| *b == b'\n').count());
            for bad in &table.bad {
                prop_assert!(!bad.to_string().contains('\n'), "{bad}");
            }
            for entry in &table.entries {
                let text = format!("{entry:?}");
                prop_assert!(!text.contains("\\n"), "{text}");
            }
        }
    }
}

//! The udev rules, walked as udev does, as far as they go here: what is asked of which device.

use std::collections::HashMap;

const RULES: &str = include_str!("../../../dist/udev/61-ublk-integrity.rules");

type Properties = HashMap<String, String>;

/// What the rules have done for a device.
#[derive(Default)]
struct Done {
    imports: Vec<String>,
    links: Vec<String>,
}

/// A shell pattern, of those that the rules have.
fn fits(pattern: &str, value: &str) -> bool {
    pattern.split('|').any(|pattern| match pattern {
        "?*" => !value.is_empty(),
        _ => pattern.strip_suffix('*').map_or(value == pattern, |begin| value.starts_with(begin)),
    })
}

/// The key of a term, its operator and its value.
fn term(term: &str) -> (&str, &str, &str) {
    let (left, value) = term.strip_suffix('"').unwrap().split_once('"').unwrap();
    let key = left.trim_end_matches(['=', '!', '+']);
    (key, &left[key.len()..], value)
}

/// Walks all rules for a device of this name. What `udev-probe` says of it is in `probed`.
fn walk(kernel: &str, mut properties: Properties, probed: &[(&str, &str)]) -> Done {
    let mut done = Done::default();
    let lines = RULES.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let mut until = None;
    for line in lines {
        if let Some(label) = &until {
            if line == format!("LABEL=\"{label}\"") {
                until = None;
            }
            continue;
        }
        for (key, operator, value) in line.split(", ").map(term) {
            let name = key.strip_prefix("ENV{").map(|name| name.trim_end_matches('}'));
            if matches!(operator, "==" | "!=") {
                let is = match (key, name) {
                    ("SUBSYSTEM", _) => "block",
                    ("KERNEL", _) => kernel,
                    ("ATTR{size}", _) => "2048",
                    ("ACTION", _) => "change",
                    (_, Some(name)) => properties.get(name).map_or("", String::as_str),
                    _ => panic!("{key} is not known here: {line}"),
                };
                if fits(value, is) != (operator == "==") {
                    break;
                }
                continue;
            }
            match (key, name) {
                ("GOTO", _) => until = Some(value.to_owned()),
                ("IMPORT{program}" | "IMPORT{builtin}", _) => {
                    done.imports.push(value.to_owned());
                    let said = probed.iter().filter(|_| key == "IMPORT{program}");
                    properties.extend(said.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
                }
                ("SYMLINK", _) => {
                    let mut link = value.to_owned();
                    for (name, value) in &properties {
                        link = link.replace(&format!("$env{{{name}}}"), value);
                    }
                    done.links.push(link);
                }
                (_, Some(name)) => drop(properties.insert(name.to_owned(), value.to_owned())),
                _ => {}
            }
        }
    }
    done
}

fn properties(all: &[(&str, &str)]) -> Properties {
    all.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

const PROBE: &str = "/usr/bin/ublk-integrity udev-probe $devnode";

#[test]
fn what_nobody_knows_is_probed_a_partition_too() {
    let volume = [("ID_FS_TYPE", "ublk_integrity"), ("ID_FS_USAGE", "crypto"), ("ID_FS_UUID_ENC", "u-u-i-d")];
    // As the rules of systemd leave them: a partition has its disk's properties, but what is in it.
    for (kernel, known) in [
        ("vda", &[("DEVTYPE", "disk")][..]),
        ("vda1", &[("DEVTYPE", "partition")]),
        ("vda1", &[("DEVTYPE", "partition"), ("ID_PART_TABLE_TYPE", "gpt"), ("ID_PART_ENTRY_NUMBER", "1")]),
    ] {
        let done = walk(kernel, properties(known), &volume);
        assert_eq!(done.imports, [PROBE], "{kernel}: {known:?}");
        assert_eq!(done.links, ["disk/by-uuid/u-u-i-d"], "{kernel}: {known:?}");
    }
    for known in [
        &[("DEVTYPE", "disk"), ("ID_PART_TABLE_TYPE", "gpt")][..],
        &[("DEVTYPE", "disk"), ("ID_FS_TYPE", "ext4")],
        &[("DEVTYPE", "partition"), ("ID_PART_TABLE_TYPE", "gpt"), ("ID_FS_TYPE", "ext4")],
    ] {
        assert!(walk("vda", properties(known), &volume).imports.is_empty(), "{known:?}");
    }
}

#[test]
fn what_is_on_a_served_device_is_looked_for_in_its_partitions_too() {
    let served = [("DEVTYPE", "partition"), ("UBLK_INTEGRITY_UUID", "u"), ("UBLK_INTEGRITY_NAME", "home")];
    for table in [&[][..], &[("ID_PART_TABLE_TYPE", "dos")]] {
        let known = [&served[..], table].concat();
        let done = walk("ublkb0p1", properties(&known), &[]);
        assert_eq!(done.imports, ["blkid", PROBE], "{table:?}");
        assert!(done.links.contains(&"ublk-integrity/home-part%n".to_owned()));
    }
}

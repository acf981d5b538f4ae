//! Names of units from paths and names, as systemd-escape(1) makes them, and of links below
//! /dev/disk, as udev does.

use std::{
    fmt::Write,
    path::{Component, Path},
};

/// A text as a part of a unit's name, its instance for one.
pub fn text(text: &str) -> String {
    let mut name = String::with_capacity(text.len());
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'/' => name.push('-'),
            b'.' if at == 0 => name.push_str("\\x2e"),
            b':' | b'_' | b'.' => name.push(char::from(byte)),
            _ if byte.is_ascii_alphanumeric() => name.push(char::from(byte)),
            _ => write!(name, "\\x{byte:02x}").expect("a string takes everything"),
        }
    }
    name
}

/// A path as a part of a unit's name. It has no `..`, and is text.
pub fn path(path: &Path) -> String {
    let parts = path.components().filter_map(|part| match part {
        Component::Normal(name) => name.to_str(),
        _ => None,
    });
    match parts.collect::<Vec<_>>().join("/") {
        root if root.is_empty() => "-".into(),
        path => text(&path),
    }
}

/// A label as the name of a link in /dev/disk/by-label.
pub fn link(label: &str) -> String {
    let mut name = String::with_capacity(label.len());
    for c in label.chars() {
        if c.is_ascii_alphanumeric() || "#+-.:=@_".contains(c) || !c.is_ascii() {
            name.push(c);
        } else {
            write!(name, "\\x{:02x}", u32::from(c)).expect("a string takes everything");
        }
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::process::Command;

    #[test]
    fn known_names() {
        assert_eq!(path(Path::new("/dev/disk/by-uuid/a-b")), "dev-disk-by\\x2duuid-a\\x2db");
        assert_eq!(path(Path::new("//dev/./sda/")), "dev-sda");
        assert_eq!(path(Path::new("/")), "-");
        assert_eq!(path(Path::new("/.a/.b")), "\\x2ea-.b");
        assert_eq!(text("vm-1@x"), "vm\\x2d1\\x40x");
        assert_eq!(link("my disk/ä"), "my\\x20disk\\x2fä");
    }

    /// What systemd-escape says, or nothing where it is not installed.
    fn systemd(args: &[&str]) -> Option<String> {
        let output = Command::new("systemd-escape").args(args).output().ok()?;
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap().trim_end_matches('\n').to_owned())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn as_systemd_escape_does(name in "[ -~äß]{1,20}", parts in prop::collection::vec("[!-.0-~ä]{1,8}", 0..4)) {
            if let Some(theirs) = systemd(&["--", &name]) {
                prop_assert_eq!(text(&name), theirs);
            }
            let whole = format!("/{}", parts.join("/"));
            if let Some(theirs) = systemd(&["--path", "--", &whole]) {
                prop_assert_eq!(path(Path::new(&whole)), theirs);
            }
        }
    }
}

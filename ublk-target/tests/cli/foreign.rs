//! Volumes that another program has written: named, shown as far as they are known, and left alone.

use crate::harness::*;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::fs;

/// A superblock as another program may write it: its checksum is right.
fn made_elsewhere(f: &Folder, at: usize, value: u32) {
    let mut disk = fs::read(f.path("disk")).unwrap();
    for copy in [0, 512 << 10] {
        disk[copy + at..copy + at + 4].copy_from_slice(&value.to_le_bytes());
        let sum = Sha256::digest(&disk[copy..copy + 448]);
        disk[copy + 448..copy + 480].copy_from_slice(&sum);
    }
    fs::write(f.path("disk"), disk).unwrap();
}

#[test]
fn what_a_newer_program_made_is_named_and_left_alone() {
    let cases = [
        (8, 3, "format version 3 is not known"),
        (12, 1 << 9, "format feature 9 is not known"),
        (36, 7 | 32 << 16, "tag algorithm 7 is not known"),
    ];
    for (at, value, says) in cases {
        let f = Folder::with_volume();
        made_elsewhere(&f, at, value);
        let before = fs::read(f.path("disk")).unwrap();
        f.run("dump --data disk").expect(DEVICE).says(says);
        let dump = f.run("dump --data disk --json").expect(DEVICE).json();
        assert!(dump["unknown"].as_str().unwrap().starts_with(says));
        assert_eq!((&dump["copies"][1]["state"], &dump["volume"]), (&"unknown".into(), &Value::Null));
        f.run("format --data disk --key-file key").expect(BUSY).says(says).says("--force");
        if at == 8 {
            // Only of a version is the name known without the MAC, which nobody here can make.
            f.run("check --data disk --key-file key").expect(DEVICE).says(says);
            f.run("export --data disk --key-file key out").expect(DEVICE).says(says);
        }
        assert!(fs::read(f.path("disk")).unwrap() == before, "{says}");
        f.run("format --data disk --key-file key --force").expect(DONE);
        f.run("check --data disk --key-file key").expect(DONE);
    }
}

#[test]
fn dump_shows_version_2() {
    let f = Folder::with_volume();
    made_elsewhere(&f, 8, 2);
    made_elsewhere(&f, 12, 1 << 1 | 1 << 7);
    made_elsewhere(&f, 352, u32::from_le_bytes(*b"home"));
    let run = f.run("dump --data disk").expect(DONE);
    let text = String::from_utf8(run.out).unwrap();
    assert!(["version 2", "anchored, sync log", "label         home"].iter().all(|s| text.contains(s)), "{text}");
    let dump = f.run("dump --data disk --json").expect(DONE).json();
    assert_eq!(dump["copies"][0]["features"], serde_json::json!(["anchored", "sync_log"]));
    assert_eq!((&dump["version2"]["label"], &dump["unknown"]), (&"home".into(), &Value::Null));
    f.run("format --data disk --key-file key").expect(BUSY).says("--force");
}

//! What the lines of failures say: what is wrong, with which value and path, and what to do.

use crate::harness::*;
use serde_json::Value;
use std::{collections::BTreeSet, ffi::OsStr, fs, os::unix::ffi::OsStrExt, process::Command};

#[test]
fn a_block_size_is_a_size() {
    let f = Folder::new();
    for (text, bytes) in [("4K", 4096), ("1K", 1024), ("512", 512), ("2KiB", 2048)] {
        f.run(&format!("format --data {text} --create --size 8M --block-size {text} --key-file key")).expect(DONE);
        assert_eq!(f.run(&format!("dump --data {text} --json")).expect(DONE).json()["volume"]["block_size"], bytes);
    }
    let said = f.run("format --data 512 --force --block-size 512 --key-file key").expect(DONE).out;
    let said = String::from_utf8(said).unwrap();
    assert!(
        said.lines().last().is_some_and(|line| line.starts_with("note ") && line.contains("4096-byte blocks")),
        "{said}"
    );
}

#[test]
fn a_benchmark_of_a_wrong_folder_measures_nothing() {
    let f = Folder::new();
    let begin = std::time::Instant::now();
    f.run("benchmark --data nowhere --time 600").expect(DEVICE);
    assert!(begin.elapsed().as_secs() < 60);
}

#[test]
fn a_path_that_can_not_be_stored_is_refused_by_add() {
    let f = Folder::with_volume();
    let odd = f.dir.path().join(OsStr::from_bytes(b"d\xffsk"));
    fs::copy(f.path("disk"), &odd).unwrap();
    fs::copy(f.path("key"), f.dir.path().join(OsStr::from_bytes(b"k\xffy"))).unwrap();
    let run = |args: &[&OsStr]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ublk-integrity"));
        Run::of(command.args(args).current_dir(f.dir.path()).output().unwrap())
    };
    let text = |s: &'static str| OsStr::new(s);
    let (disk, key) = (odd.as_os_str(), OsStr::from_bytes(b"k\xffy"));
    run(&[text("add"), text("--data"), disk, text("--key-file"), text("key")]).expect(ARGUMENTS).says("not UTF-8");
    run(&[text("add"), text("--data"), text("disk"), text("--key-file"), key]).expect(ARGUMENTS).says("not UTF-8");
    run(&[text("check"), text("--data"), disk, text("--key-file"), key]).expect(DONE);
}

#[test]
fn a_file_that_takes_no_writes_is_said_to() {
    // A mount that is read-only, in a namespace of root's.
    if !nix::unistd::geteuid().is_root() {
        println!("SKIPPED: needs root");
        return;
    }
    let f = Folder::with_volume();
    fs::write(f.path("in"), vec![1; 8 << 20]).unwrap();
    let program = env!("CARGO_BIN_EXE_ublk-integrity");
    let line = format!(
        "mount --bind . . && mount -o remount,bind,ro . && cd \"$PWD\" && {program} import --data disk --key-file key in"
    );
    let output = Command::new("unshare").args(["-m", "sh", "-c", &line]).current_dir(f.dir.path()).output().unwrap();
    Run::of(output).expect(DEVICE).says("disk is read-only");
}

/// The names of all fields, at any depth.
fn fields(value: &Value, into: &mut BTreeSet<String>) {
    match value {
        Value::Object(object) => object.iter().for_each(|(name, value)| {
            into.insert(name.clone());
            fields(value, into);
        }),
        Value::Array(all) => all.iter().for_each(|value| fields(value, into)),
        _ => {}
    }
}

#[test]
fn the_json_is_what_its_page_says() {
    let page = include_str!("../../../docs/json.md");
    let f = Folder::new();
    let mut found = BTreeSet::new();
    let mut look = |args: &str, code| fields(&f.run(args).expect(code).json(), &mut found);
    look("format --data disk --create --size 8M --key-file key --json", DONE);
    look("dump --data disk --json", DONE);
    look("dump --data nowhere --json", DEVICE);
    f.run("format --data slots --create --size 8M --key-file key --key-slots").expect(DONE);
    fs::write(f.path("word"), "a passphrase").unwrap();
    f.run("key add --data slots --key-file key --new-passphrase-file word").expect(DONE);
    look("key list --data slots --json", DONE);
    look("resize --data disk --key-file key --json", DONE);
    fs::write(f.path("in"), vec![7; 8 << 20]).unwrap();
    f.run("import --data disk --key-file key in").expect(DONE);
    let payload = f.payload_offset("disk", 8 << 20);
    f.flip_bit("disk", payload);
    look("check --data disk --key-file key --json", INTEGRITY);
    look("check --data disk --key-file key --repair-from in --json", DONE);
    let place = f.path("anchor").display().to_string();
    let anchored = format!("--data slots --key-file key --anchor file:{place} --anchor-same-disk");
    f.run(&format!("anchor init {anchored}")).expect(DONE);
    look(&format!("anchor show {anchored} --json"), DONE);
    look("benchmark --data . --size 8M --time 0.02 --json", DONE);
    fields(&serde_json::from_slice(&f.command("doctor --json").output().unwrap().stdout).unwrap(), &mut found);
    for name in &found {
        assert!(page.contains(&format!("`{name}`")), "`{name}` is not in docs/json.md");
    }
    // And nothing that is not there: all names in back quotes that look like fields. Those of a device that is served are held
    // against the program where its answers are made.
    let (before, rest) = page.split_once("`status` and `list` have").unwrap();
    let (_, behind) = rest.split_once("`status` also has `anchor`").unwrap();
    let page = format!("{before}{behind}");
    let words = page.split('`').skip(1).step_by(2).filter(|word| word.contains('_') && !word.contains('-'));
    let of_status = ["begun_seconds", "ended_seconds", "verified_blocks", "unsettled_blocks"];
    let of_anchor = [
        "fresh_seconds",
        "age_seconds",
        "lag_records",
        "holds_flushes",
        "interval_seconds",
        "grace_seconds",
        "anchor_option",
        "wait_seconds",
        "timeout_seconds",
        "every_milliseconds",
        "same_disk",
        "wear_ok",
        "without_anchor",
        "moved_away",
    ];
    let of_scrub = [
        "under_way",
        "resumed_at",
        "held_at",
        "unlisted_runs",
        "bad_metadata",
        "unlisted_metadata",
        "mended_metadata",
        "unmended_metadata",
        "waiting_metadata",
        "tree_page",
        "healed_blocks",
    ];
    let not_here = ["bad_page", "key_file", "may_be_older", "not_in_place", "key_or_permission"];
    let elsewhere = [&of_status[..], &of_anchor, &of_scrub, &not_here].concat();
    for word in words.filter(|word| !elsewhere.contains(word)) {
        assert!(found.contains(word), "docs/json.md has `{word}`, which nothing prints");
    }
}

#[test]
fn programs_are_told_of_failures_too() {
    let f = Folder::with_volume();
    f.run("keygen other").expect(DONE);
    fs::write(f.path("short"), "short").unwrap();
    for (args, code, kind) in [
        ("check --json --data disk --key-file other", KEY, "key_or_permission"),
        ("check --json --data nowhere --key-file key", DEVICE, "device"),
        ("dump --json", ARGUMENTS, "arguments"),
        ("format --json --data disk --key-file key", BUSY, "busy"),
        ("status --json -n 4999", DEVICE, "device"),
        ("resize --json 4999", DEVICE, "device"),
        ("resize --json --data disk --key-file key --size 1T", ARGUMENTS, "arguments"),
        ("nonsense --json", ARGUMENTS, "arguments"),
    ] {
        let run = f.run(args).expect(code);
        let said = run.json();
        assert_eq!(said["schema"], 1, "{args}");
        assert_eq!((&said["error"]["exit"], &said["error"]["kind"]), (&code.into(), &kind.into()), "{args}");
        let message = said["error"]["message"].as_str().unwrap();
        assert_eq!(run.err, format!("ublk-integrity: {message}\n"), "{args}");
    }
    // One object in all: where there is a report it says what was found.
    f.flip_bit("disk", f.payload_offset("disk", 8 << 20));
    fs::write(f.path("in"), vec![7; 8 << 20]).unwrap();
    f.run("import --data disk --key-file key in").expect(DONE);
    f.flip_bit("disk", f.payload_offset("disk", 8 << 20));
    let report = f.run("check --json --data disk --key-file key").expect(INTEGRITY).json();
    assert_eq!((&report["schema"], &report["bad_blocks"]), (&1.into(), &1.into()));
    assert!(f.run("check --data nowhere --key-file key").expect(DEVICE).out.is_empty(), "people are told once");
}

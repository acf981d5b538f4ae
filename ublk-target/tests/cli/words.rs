//! What the lines of failures say: what is wrong, with which value and path, and what to do.

use crate::harness::*;
use serde_json::Value;
use std::{collections::BTreeSet, ffi::OsStr, fs, os::unix::ffi::OsStrExt, process::Command};

#[test]
fn every_failure_names_value_path_and_what_to_do() {
    let f = Folder::with_volume();
    f.run("format --data d1 --meta m1 --create --size 8M --key-file key").expect(DONE);
    f.run("format --data d2 --meta m2 --create --size 8M --key-file key").expect(DONE);
    f.run("keygen other").expect(DONE);
    fs::write(f.path("empty"), "").unwrap();
    fs::write(f.path("short"), "short").unwrap();
    let cut = |from: &str, to: &str, len: u64| {
        fs::copy(f.path(from), f.path(to)).unwrap();
        fs::OpenOptions::new().write(true).open(f.path(to)).unwrap().set_len(len).unwrap();
    };
    cut("disk", "cut", 2 << 20);
    cut("m1", "cut-meta", 1 << 20);
    fs::write(f.path("zeros"), vec![0; 4 << 20]).unwrap();
    fs::write(f.path("newline"), "a key of more than thirty-two letters\n").unwrap();
    let mut damaged = fs::read(f.path("disk")).unwrap();
    for at in [100, (512 << 10) + 100] {
        damaged[at] ^= 1;
    }
    fs::write(f.path("damaged"), damaged).unwrap();
    let table: &[(&str, i32, &[&str])] = &[
        // Sizes name what they must be.
        (
            "format --data x --create --size 1048577 --key-file key",
            ARGUMENTS,
            &["1048577 bytes", "multiple of the block size, 4096"],
        ),
        (
            "format --data x --create --size 8M --log-size 65K --key-file key",
            ARGUMENTS,
            &["66560 bytes", "multiple of 4096"],
        ),
        (
            "format --data x --create --size 8M --block-size 3 --key-file key",
            ARGUMENTS,
            &["3 bytes", "512, 1024, 2048 or 4096"],
        ),
        ("format --data x --create --size 8M --block-size 8G --key-file key", ARGUMENTS, &["512, 1024"]),
        ("format --data x --create --size 1.5G --key-file key", ARGUMENTS, &["1.5G", "--size"]),
        ("benchmark --data . --size 1000", ARGUMENTS, &["1000 bytes", "1M"]),
        // Devices: the path of the one that it is.
        ("check --data empty --key-file key", DEVICE, &["empty is empty (0 bytes)"]),
        ("dump --data empty", DEVICE, &["empty is empty"]),
        ("check --data short --key-file key", DEVICE, &["short has 5 bytes", "too short"]),
        ("check --data zeros --key-file key", DEVICE, &["no ublk-integrity volume on zeros"]),
        ("check --data d1 --meta zeros --key-file key", DEVICE, &["d1 holds the data of volume", "--meta"]),
        ("check --data cut --key-file key", DEVICE, &["cut has 2097152 bytes, the volume needs "]),
        ("check --data d1 --meta cut-meta --key-file key", DEVICE, &["cut-meta has 1048576 bytes, the volume needs "]),
        ("check --data damaged --key-file key", DEVICE, &["superblock copies on damaged are damaged"]),
        ("check --data m1 --key-file key", DEVICE, &["m1 holds the metadata of volume", "--meta", "--data"]),
        ("check --data d1 --key-file key", DEVICE, &["d1 holds the data of volume", "--meta"]),
        ("check --data d2 --meta m1 --key-file key", DEVICE, &["d2 belongs to volume", "m1 to volume"]),
        ("check --data d1 --meta disk --key-file key", DEVICE, &["on one device", "--meta"]),
        ("check --data m1 --meta d1 --key-file key", DEVICE, &["the other way round", "--data d1", "--meta m1"]),
        ("check --data nowhere --key-file key", DEVICE, &["nowhere", "No such file"]),
        ("check --data . --key-file key", DEVICE, &[". is neither"]),
        ("format --data zeros --size 1G --key-file key", DEVICE, &["zeros has 4194304 bytes, the volume needs "]),
        ("format --data disk --key-file key", BUSY, &["disk holds ublk-integrity", "--force"]),
        // Keys.
        ("check --data disk --key-file other", KEY, &["wrong key for volume"]),
        ("check --data disk --key-file newline", KEY, &["wrong key", "ends in a newline"]),
        ("check --data disk --key-file short", KEY, &["key file", "short", "5 bytes"]),
        ("check --data disk --key-file nowhere", KEY, &["nowhere"]),
        // Arguments: the word that was meant, and where help is.
        ("format --dat disk", ARGUMENTS, &["--dat", "'--data'", "`ublk-integrity format --help`"]),
        ("del", ARGUMENTS, &["--number", "--all"]),
        ("status -n /dev/sda", ARGUMENTS, &["/dev/sda", "/dev/ublkb0"]),
        ("status -n /dev/ublkb4999", DEVICE, &["4999"]),
        ("del -n ublkb4999", DEVICE, &["4999"]),
        ("benchmark --data nowhere", DEVICE, &["nowhere"]),
        ("benchmark --data key", DEVICE, &["key is no folder"]),
        ("benchmark --time 0", ARGUMENTS, &["--time 0", "0.01"]),
        ("add --data disk --key-file key --max-io 5000", ARGUMENTS, &["5000 bytes", "multiple of 4K"]),
    ];
    for (args, code, words) in table {
        let run = f.run(args).expect(*code);
        words.iter().for_each(|word| assert!(run.err.contains(word), "{args}: no \"{word}\" in {}", run.err));
    }
}

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
    fs::write(f.path("in"), vec![7; 8 << 20]).unwrap();
    f.run("import --data disk --key-file key in").expect(DONE);
    let payload = f.payload_offset("disk", 8 << 20);
    f.flip_bit("disk", payload);
    look("check --data disk --key-file key --json", INTEGRITY);
    look("benchmark --data . --size 8M --time 0.02 --json", DONE);
    for name in &found {
        assert!(page.contains(&format!("`{name}`")), "`{name}` is not in docs/json.md");
    }
    // And nothing that is not there: all names in back quotes that look like fields.
    let words = page.split('`').skip(1).step_by(2).filter(|word| word.contains('_') && !word.contains('-'));
    let only_when_bad = ["bad_page", "may_be_older", "not_in_place"];
    for word in words.filter(|word| !only_when_bad.contains(word)) {
        assert!(found.contains(word), "docs/json.md has `{word}`, which nothing prints");
    }
}

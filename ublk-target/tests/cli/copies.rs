//! `import` and `export`: content goes into volumes and comes back, whatever has happened to them.

use crate::harness::*;
use std::{
    fs,
    os::unix::fs::{FileExt, MetadataExt},
    process::{Command, Stdio},
};

/// Bytes that differ from block to block, with zeros between.
pub(crate) fn content(len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len).map(|i| (i / 7 + i / 4096 * 31) as u8 | 1).collect();
    let hole = len / 3 / 4096 * 4096..len / 2 / 4096 * 4096;
    bytes[hole].fill(0);
    bytes
}

#[test]
fn content_comes_back_as_it_went_in() {
    let f = Folder::with_volume();
    let input = content(5_000_001);
    fs::write(f.path("in"), &input).unwrap();
    f.run("import --data disk --key-file key in").expect(DONE);
    f.run("export --data disk --key-file key out").expect(DONE);
    let mut whole = input.clone();
    whole.resize(8 << 20, 0);
    assert!(fs::read(f.path("out")).unwrap() == whole);
    assert!(f.run("export --data disk --key-file key -").expect(DONE).out == whole);
    let report = f.run("check --data disk --key-file key --json").expect(DONE).json();
    assert_eq!((report["blocks"].as_u64(), report["bad_blocks"].as_u64()), (Some(2048), Some(0)));

    // Through pipes, over what was there: the rest becomes zeros.
    f.run_with_input("import --data disk --key-file key -", &input[..100_000]).expect(DONE);
    let out = f.run("export --data disk --key-file key -").expect(DONE).out;
    assert!(out[..100_000] == input[..100_000] && out[100_000..].iter().all(|b| *b == 0));
}

#[test]
fn holes_in_the_input_are_not_read() {
    let f = Folder::new();
    f.run("format --data disk --size 1T --key-file key").expect(DONE);
    let file = fs::File::create(f.path("in")).unwrap();
    file.set_len(1 << 40).unwrap();
    for at in [5_000, 1 << 30, (1 << 40) - 10_000] {
        file.write_all_at(&content(9_999), at).unwrap();
    }
    // Reading it all would take minutes.
    f.run("import --data disk --key-file key in").expect(DONE);
    f.run("export --data disk --key-file key out").expect(DONE);
    let out = fs::File::open(f.path("out")).unwrap();
    for at in [5_000, 1 << 30, (1 << 40) - 10_000] {
        let mut bytes = vec![0; 9_999];
        out.read_exact_at(&mut bytes, at).unwrap();
        assert!(bytes == content(9_999), "at {at}");
    }
    assert!(out.metadata().unwrap().blocks() * 512 < 1 << 20);
}

#[test]
fn input_that_is_too_large_is_refused() {
    let f = Folder::with_volume();
    fs::File::create(f.path("in")).unwrap().set_len((8 << 20) + 1).unwrap();
    f.run("import --data disk --key-file key in").expect(ARGUMENTS).says("8388609");
    f.run_with_input("import --data disk --key-file key -", &vec![7; (8 << 20) + 1]).expect(ARGUMENTS);
    f.run("import --data disk --key-file key nowhere").expect(DEVICE);
}

#[test]
fn small_blocks_serve_too() {
    let f = Folder::new();
    f.run("format --data disk --size 3M --block-size 512 --key-file key").expect(DONE);
    let input = content(1_000_001);
    fs::write(f.path("in"), &input).unwrap();
    f.run("import --data disk --key-file key in").expect(DONE);
    let out = f.run("export --data disk --key-file key -").expect(DONE).out;
    assert!(out.len() == 3 << 20 && out[..input.len()] == input);
}

#[test]
fn either_tag_algorithm_serves() {
    let f = Folder::new();
    let input = content(100_000);
    for tag in ["hmac-sha256", "blake3"] {
        f.run(&format!("format --data {tag} --size 2M --tag {tag} --key-file key")).expect(DONE);
        assert_eq!(f.run(&format!("dump --data {tag} --json")).expect(DONE).json()["volume"]["tag"], tag);
        f.run_with_input(&format!("import --data {tag} --key-file key -"), &input).expect(DONE);
        assert!(f.run(&format!("export --data {tag} --key-file key -")).expect(DONE).out[..input.len()] == input);
    }
    f.run("format --data x --size 2M --tag md5 --key-file key").expect(ARGUMENTS);
}

#[test]
fn a_fresh_volume_is_sparse_and_reads_as_zeros() {
    let f = Folder::new();
    f.run("format --data disk --size 1T --key-file key").expect(DONE);
    let meta = fs::metadata(f.path("disk")).unwrap();
    assert!(meta.len() > 1 << 40 && meta.blocks() * 512 < 4 << 20, "{} sectors taken", meta.blocks());
    f.run("check --data disk --key-file key").expect(DONE);
    f.run("export --data disk --key-file key out").expect(DONE);
    let out = fs::metadata(f.path("out")).unwrap();
    assert_eq!((out.len(), out.blocks()), (1 << 40, 0));
}

#[test]
fn a_flipped_bit_is_found_and_everything_else_rescued() {
    let f = Folder::with_volume();
    let input = content(8 << 20);
    fs::write(f.path("in"), &input).unwrap();
    f.run("import --data disk --key-file key in").expect(DONE);
    f.flip_bit("disk", f.payload_offset("disk", 8 << 20) + 5 * 4096 + 17);

    let report = f.run("check --data disk --key-file key --json").expect(INTEGRITY).json();
    assert_eq!(report["bad_blocks"], 1);
    assert_eq!(report["bad_runs"][0]["range"]["first"], 5);
    let run = f.run("export --data disk --key-file key out");
    assert_eq!(run.code, INTEGRITY);
    assert!(run.err.contains("block 5 "), "{}", run.err);
    let mut expected = input;
    expected[5 * 4096..6 * 4096].fill(0);
    assert!(fs::read(f.path("out")).unwrap() == expected);
}

#[test]
fn export_overwrites_only_when_forced() {
    let f = Folder::with_volume();
    fs::write(f.path("out"), b"precious").unwrap();
    f.run("export --data disk --key-file key out").expect(BUSY).says("--force");
    assert_eq!(fs::read(f.path("out")).unwrap(), b"precious");
    f.run("export --data disk --key-file key out --force").expect(DONE);
    assert_eq!(fs::metadata(f.path("out")).unwrap().len(), 8 << 20);
}

#[test]
fn a_volume_is_not_copied_onto_itself() {
    let f = Folder::with_volume();
    f.run("format --data d --meta m --size 8M --key-file key").expect(DONE);
    fs::hard_link(f.path("disk"), f.path("same")).unwrap();
    std::os::unix::fs::symlink("m", f.path("link")).unwrap();
    let of = |names: [&str; 3]| names.map(|name| fs::read(f.path(name)).unwrap());
    let before = of(["disk", "d", "m"]);
    for (devices, other) in [
        ("--data disk", "disk"),
        ("--data disk", "same"),
        ("--data d --meta m", "d"),
        ("--data d --meta m", "m"),
        ("--data d --meta m", "link"),
    ] {
        f.run(&format!("export {devices} --key-file key {other} --force")).expect(ARGUMENTS).says("itself");
        f.run(&format!("import {devices} --key-file key {other}")).expect(ARGUMENTS).says("itself");
    }
    let into_itself = fs::OpenOptions::new().append(true).open(f.path("disk")).unwrap();
    let export = f.command("export --data disk --key-file key -").stdout(into_itself).status().unwrap();
    assert_eq!(export.code(), Some(ARGUMENTS));
    assert!(of(["disk", "d", "m"]) == before);
}

#[test]
fn standard_input_is_the_key_or_the_content() {
    let f = Folder::with_volume();
    fs::write(f.path("in"), content(100_000)).unwrap();
    f.run("import --data disk --key-file key in").expect(DONE);
    let key = fs::read(f.path("key")).unwrap();
    f.run_with_input("import --data disk --key-file - -", &key).expect(ARGUMENTS);
    let out = f.run("export --data disk --key-file key -").expect(DONE).out;
    assert!(out[..100_000] == content(100_000), "what was there is there");
    f.run_with_input("import --data disk --key-file - in", &key).expect(DONE);
    // As a shell's `<(command)` names a pipe.
    f.run_with_input("check --data disk --key-file /dev/fd/0", &key).expect(DONE);
}

#[test]
fn what_could_not_be_finished_is_not_left() {
    let f = Folder::with_volume();
    fs::write(f.path("in"), content(5_000_000)).unwrap();
    f.run("import --data disk --key-file key in").expect(DONE);
    // A limit of the file size, in the place of a full disk.
    let limited = |args: &str| {
        let mut command = Command::new("sh");
        command.args(["-c", "trap '' XFSZ; ulimit -f 0; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_ublk-integrity")]);
        Run::of(command.args(args.split(' ')).current_dir(f.dir.path()).stdin(Stdio::null()).output().unwrap())
    };
    limited("export --data disk --key-file key out").expect(DEVICE).says("out");
    limited("export --data disk --key-file key out --force").expect(DEVICE);
    limited("keygen new").expect(DEVICE).says("new");
    assert!(!f.path("out").exists() && !f.path("new").exists());
    fs::write(f.path("out"), "there before").unwrap();
    limited("export --data disk --key-file key out --force").expect(DEVICE);
    assert!(f.path("out").exists());
}

//! `import` and `export`: content goes into volumes and comes back, whatever has happened to them.

use crate::harness::*;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    fs,
    io::Write,
    os::unix::{
        fs::{FileExt, MetadataExt, PermissionsExt},
        process::ExitStatusExt,
    },
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
    f.run("import --data disk --key-file key --zero-rest in").expect(DONE);
    f.run("export --data disk --key-file key out").expect(DONE);
    let mut whole = input.clone();
    whole.resize(8 << 20, 0);
    assert!(fs::read(f.path("out")).unwrap() == whole);
    assert!(f.run("export --data disk --key-file key -").expect(DONE).out == whole);
    let report = f.run("check --data disk --key-file key --json").expect(DONE).json();
    assert_eq!((report["blocks"].as_u64(), report["bad_blocks"].as_u64()), (Some(2048), Some(0)));

    // Through pipes, over what was there: the rest becomes zeros.
    f.run_with_input("import --data disk --key-file key --force --zero-rest -", &input[..100_000]).expect(DONE);
    let out = f.run("export --data disk --key-file key -").expect(DONE).out;
    assert!(out[..100_000] == input[..100_000] && out[100_000..].iter().all(|b| *b == 0));
}

#[test]
fn holes_in_the_input_are_not_read() {
    let f = Folder::new();
    f.run("format --data disk --create --size 1T --key-file key").expect(DONE);
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
    f.run("format --data disk --create --size 3M --block-size 512 --key-file key").expect(DONE);
    let input = content(1_000_001);
    fs::write(f.path("in"), &input).unwrap();
    f.run("import --data disk --key-file key --zero-rest in").expect(DONE);
    let out = f.run("export --data disk --key-file key -").expect(DONE).out;
    assert!(out.len() == 3 << 20 && out[..input.len()] == input);
}

#[test]
fn every_tag_algorithm_serves() {
    let f = Folder::new();
    let input = content(100_000);
    for tag in ["hmac-sha256", "blake3", "aegis-128x2"] {
        f.run(&format!("format --data {tag} --create --size 2M --tag {tag} --key-file key")).expect(DONE);
        assert_eq!(f.run(&format!("dump --data {tag} --json")).expect(DONE).json()["volume"]["tag"], tag);
        f.run_with_input(&format!("import --data {tag} --key-file key --zero-rest -"), &input).expect(DONE);
        assert!(f.run(&format!("export --data {tag} --key-file key -")).expect(DONE).out[..input.len()] == input);
    }
    f.run("format --data x --create --size 2M --tag md5 --key-file key").expect(ARGUMENTS);
}

#[test]
fn a_fresh_volume_is_sparse_and_reads_as_zeros() {
    let f = Folder::new();
    f.run("format --data disk --create --size 1T --key-file key").expect(DONE);
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
    assert!(run.err.contains("bad: blocks 5 (bytes 20480..24576), exported as zeros: mismatch"), "{}", run.err);
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
    f.run("format --data d --meta m --create --size 8M --key-file key").expect(DONE);
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
    f.run("import --data disk --key-file key --zero-rest in").expect(DONE);
    let key = fs::read(f.path("key")).unwrap();
    f.run_with_input("import --data disk --key-file - -", &key).expect(ARGUMENTS);
    let out = f.run("export --data disk --key-file key -").expect(DONE).out;
    assert!(out[..100_000] == content(100_000), "what was there is there");
    f.run_with_input("import --data disk --key-file - --force --zero-rest in", &key).expect(DONE);
    // As a shell's `<(command)` names a pipe.
    f.run_with_input("check --data disk --key-file /dev/fd/0", &key).expect(DONE);
}

#[test]
fn what_could_not_be_finished_is_not_left() {
    let f = Folder::with_volume();
    fs::write(f.path("in"), content(5_000_000)).unwrap();
    f.run("import --data disk --key-file key --zero-rest in").expect(DONE);
    // A limit of the file size, in the place of a full disk.
    let limited = |args: &str| {
        let mut command = Command::new("sh");
        command.args(["-c", "ulimit -f 0; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_ublk-integrity")]);
        Run::of(command.args(args.split(' ')).current_dir(f.dir.path()).stdin(Stdio::null()).output().unwrap())
    };
    limited("export --data disk --key-file key out").expect(DEVICE).says("out");
    limited("export --data disk --key-file key out --force").expect(DEVICE);
    limited("keygen new").expect(DEVICE).says("new");
    assert!(!f.path("out").exists() && !f.path("new").exists());
    fs::write(f.path("out"), "there before").unwrap();
    limited("export --data disk --key-file key out --force").expect(DEVICE);
    assert_eq!(fs::read(f.path("out")).unwrap(), b"there before");
    assert_eq!(fs::read_dir(f.dir.path()).unwrap().count(), 4, "key, disk, in and out");
}

#[test]
fn an_input_without_a_byte_is_none() {
    let f = Folder::with_volume();
    fs::write(f.path("in"), content(8 << 20)).unwrap();
    f.run("import --data disk --key-file key in").expect(DONE);
    let before = fs::read(f.path("disk")).unwrap();
    fs::write(f.path("empty"), b"").unwrap();
    for force in ["", "--force --zero-rest", "--force --zero-rest --expect 0"] {
        f.run(&format!("import --data disk --key-file key empty {force}")).expect(ARGUMENTS).says("empty is empty");
        f.run_with_input(&format!("import --data disk --key-file key - {force}"), b"")
            .expect(ARGUMENTS)
            .says("standard input");
    }
    assert!(fs::read(f.path("disk")).unwrap() == before);
}

#[test]
fn a_short_input_is_told_with_both_sizes() {
    let f = Folder::with_volume();
    fs::write(f.path("in"), content(5_000_000)).unwrap();
    f.run("import --data disk --key-file key in").expect(ARGUMENTS).says("5000000").says("8388608").says("--zero-rest");
    for expected in ["5000001", "5M", "8M"] {
        let line = format!("import --data disk --key-file key --zero-rest --expect {expected} in");
        f.run(&line).expect(ARGUMENTS).says("5000000");
    }
    f.run("import --data disk --key-file key --expect 9M in").expect(ARGUMENTS).says("9437184");
    f.run("import --data disk --key-file key --expect 5000000 in").expect(ARGUMENTS).says("--zero-rest");
    let report = f.run("check --data disk --key-file key --json").expect(DONE).json();
    assert_eq!(report["data_blocks"], 0, "refused before anything is written");
    let piped = |args: &str, len: usize| {
        f.run("format --data disk --force --key-file key").expect(DONE);
        f.run_with_input(&format!("import --data disk --key-file key {args} -"), &content(len))
    };
    piped("", 5_000_000).expect(ARGUMENTS).says("5000000").says("8388608").says("may hold part");
    piped("--expect 8M", 5_000_000).expect(ARGUMENTS).says("8388608 were expected");
    piped("--zero-rest --expect 5000000", 8 << 20).expect(ARGUMENTS).says("5000000 were expected");
    piped("--zero-rest --expect 5000000", 5_000_000).expect(DONE);
    assert!(f.run("export --data disk --key-file key -").expect(DONE).out[..5_000_000] == content(5_000_000));
    piped("--expect 8M", 8 << 20).expect(DONE);
    piped("", 8 << 20).expect(DONE);
}

#[test]
fn a_volume_that_holds_data_is_not_overwritten_unasked() {
    let f = Folder::with_volume();
    let mut one = vec![0; 8 << 20];
    fs::write(f.path("zeros"), &one).unwrap();
    one[(8 << 20) - 1] = 1;
    fs::write(f.path("one"), &one).unwrap();
    fs::write(f.path("in"), content(8 << 20)).unwrap();
    // Zeros are no data, not even where a page of tags says so.
    f.run("import --data disk --key-file key zeros").expect(DONE);
    f.run("import --data disk --key-file key one").expect(DONE);
    f.run("import --data disk --key-file key in").expect(BUSY).says("holds data").says("--force");
    assert!(f.run("export --data disk --key-file key -").expect(DONE).out == one);
    f.run("import --data disk --key-file key --force zeros").expect(DONE);
    f.run("import --data disk --key-file key in").expect(DONE);
    // What can't be read counts as data.
    f.run("import --data disk --key-file key --force one").expect(DONE);
    f.flip_bit("disk", f.payload_offset("disk", 8 << 20) + (8 << 20) - 1);
    f.run("import --data disk --key-file key in").expect(BUSY);
}

#[test]
fn export_takes_nothing_of_its_own_and_no_terminal() {
    let f = Folder::with_volume();
    let key = fs::read(f.path("key")).unwrap();
    fs::hard_link(f.path("key"), f.path("same")).unwrap();
    for out in ["key", "same"] {
        f.run(&format!("export --data disk --key-file key {out} --force")).expect(ARGUMENTS).says("key file");
    }
    let onto_key = fs::OpenOptions::new().append(true).open(f.path("key")).unwrap();
    let export = f.command("export --data disk --key-file key -").stdout(onto_key).status().unwrap();
    assert_eq!(export.code(), Some(ARGUMENTS));
    assert!(fs::read(f.path("key")).unwrap() == key);
    let terminal = nix::pty::openpty(None, None).unwrap();
    let run =
        f.command("export --data disk --key-file key -").stdout(terminal.slave.try_clone().unwrap()).output().unwrap();
    let name = nix::unistd::ttyname(&terminal.slave).unwrap();
    Run::of(run).expect(ARGUMENTS).says("terminal");
    let line = format!("export --data disk --key-file key {} --force", name.display());
    f.run(&line).expect(ARGUMENTS).says("terminal");
}

#[test]
fn what_is_exported_is_its_owners_alone() {
    let f = Folder::with_volume();
    fs::write(f.path("old"), "x").unwrap();
    std::os::unix::fs::symlink("old", f.path("link")).unwrap();
    fs::set_permissions(f.path("old"), fs::Permissions::from_mode(0o640)).unwrap();
    for out in ["new", "link --force"] {
        f.run(&format!("export --data disk --key-file key {out}")).expect(DONE);
    }
    for (name, mode) in [("new", 0o600), ("old", 0o640)] {
        let meta = fs::metadata(f.path(name)).unwrap();
        assert_eq!((meta.mode() & 0o777, meta.len()), (mode, 8 << 20), "{name}");
    }
    assert!(f.path("link").is_symlink());
    f.run("export --data disk --key-file key nowhere/out").expect(DEVICE).says("nowhere/out");
}

#[test]
fn an_import_that_is_interrupted_says_what_the_volume_holds() {
    let f = Folder::with_volume();
    let mut import = f.command("import --data disk --key-file key -");
    let mut import = import.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut input = import.stdin.take().unwrap();
    // More than a pipe holds: a part is in place, or nearly, and it waits for more.
    input.write_all(&content(4 << 20)).unwrap();
    kill(Pid::from_raw(import.id() as i32), Signal::SIGTERM).unwrap();
    let ended = import.wait_with_output().unwrap();
    drop(input);
    let said = String::from_utf8(ended.stderr).unwrap();
    assert_eq!(ended.status.signal(), Some(Signal::SIGTERM as i32), "{said}");
    for words in ["interrupted", "on disk", "holds a part of standard input", "import --force"] {
        assert!(said.contains(words) && said.lines().count() == 1, "{said}");
    }
}

#[test]
fn an_input_that_changes_while_it_is_read_is_refused() {
    let f = Folder::new();
    f.run("format --data disk --create --size 128M --key-file key").expect(DONE);
    fs::write(f.path("in"), content(128 << 20)).unwrap();
    let input = fs::OpenOptions::new().write(true).open(f.path("in")).unwrap();
    for change in [(128 << 20) + 1, 5 << 20] {
        let mut import = f.command("import --data disk --key-file key --force in");
        let import = import.stderr(Stdio::piped()).spawn().unwrap();
        let (pid, fds) = (Pid::from_raw(import.id() as i32), format!("/proc/{}/fd", import.id()));
        let is_reading = || {
            let mut all = fs::read_dir(&fds).into_iter().flatten().flatten();
            let open = all.find(|fd| fs::read_link(fd.path()).is_ok_and(|to| to == f.path("in")));
            let info = open.map(|fd| fds.replace("/fd", "/fdinfo/") + fd.file_name().to_str().unwrap());
            let info = info.and_then(|path| fs::read_to_string(path).ok()).unwrap_or_default();
            info.lines().find_map(|line| line.strip_prefix("pos:")?.trim().parse().ok()).unwrap_or(0_u64) > 0
        };
        while !is_reading() {}
        // Whatever it does then it does after the change.
        kill(pid, Signal::SIGSTOP).unwrap();
        input.set_len(change).unwrap();
        kill(pid, Signal::SIGCONT).unwrap();
        let before = 128 << 20;
        let run = Run::of(import.wait_with_output().unwrap()).expect(ARGUMENTS);
        run.says(&format!("had {before} bytes and has {change} by now")).says("the volume may hold part of it");
        input.set_len(before).unwrap();
    }
}

#[test]
fn a_rescue_looks_at_all_three_places_before_it_writes() {
    let f = Folder::with_volume();
    f.run("format --data d --meta m --create --size 8M --key-file key").expect(DONE);
    let rescue = "export --rescue --data d --meta m --key-file key";
    let names = || fs::read_dir(f.dir.path()).unwrap().count();
    for (place, own, why) in [
        ("out.map", "m", "the volume itself"),
        ("out.may-be-older", "d", "the volume itself"),
        ("out", "d", "the volume itself"),
        ("out.map", "key", "is the key file"),
    ] {
        let before = fs::read(f.path(own)).unwrap();
        fs::hard_link(f.path(own), f.path(place)).unwrap();
        let count = names();
        f.run(&format!("{rescue} out --force")).expect(ARGUMENTS).says(why);
        f.run(&format!("{rescue} out")).expect(BUSY).says(place).says("--force");
        assert!(names() == count && fs::read(f.path(own)).unwrap() == before, "{place}");
        fs::remove_file(f.path(place)).unwrap();
    }
    fs::create_dir(f.path("out.map")).unwrap();
    f.run(&format!("{rescue} out --force")).expect(ARGUMENTS).says("out.map is no file");
    fs::remove_dir(f.path("out.map")).unwrap();
    // Of an older rescue, of another volume perhaps: it says nothing of this OUT.
    for name in ["out", "out.map", "out.may-be-older"] {
        fs::write(f.path(name), "old").unwrap();
    }
    f.run(&format!("{rescue} out --force")).expect(DONE);
    assert_eq!(fs::metadata(f.path("out")).unwrap().len(), 8 << 20);
    assert!(!f.path("out.map").exists() && !f.path("out.may-be-older").exists());
}

#[test]
fn bad_blocks_are_told_as_runs() {
    let f = Folder::with_volume();
    fs::write(f.path("in"), content(8 << 20)).unwrap();
    f.run("import --data disk --key-file key in").expect(DONE);
    let payload = f.payload_offset("disk", 8 << 20);
    for block in (0..600).chain([700]) {
        f.flip_bit("disk", payload + block * 4096);
    }
    let run = f.run("export --data disk --key-file key out");
    let lines: Vec<_> = run.err.lines().collect();
    assert_eq!(lines.len(), 3, "{}", run.err);
    assert!(lines[0].contains("blocks 0-599 (bytes 0..2457600)") && lines[1].contains("blocks 700 "), "{}", run.err);
    assert!(lines[2].contains("601 blocks are bad"), "{}", run.err);
}

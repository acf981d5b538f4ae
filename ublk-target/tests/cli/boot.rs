//! The table, the generator and the probe, without ublk.

use crate::harness::*;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    fs,
    io::{BufRead, BufReader, Read},
    os::unix::process::ExitStatusExt,
    process::{Command, Stdio},
};

fn properties(f: &Folder, file: &str) -> Vec<String> {
    let out = f.run(&format!("udev-probe {file}")).expect(DONE).out;
    String::from_utf8(out).unwrap().lines().map(str::to_owned).collect()
}

fn uuid(f: &Folder, args: &str) -> String {
    let dump = f.run(&format!("dump {args} --json")).expect(DONE).json();
    dump["volume"]["uuid"].as_str().unwrap().to_owned()
}

#[test]
fn udev_is_told_what_a_disk_holds() {
    let f = Folder::with_volume();
    let whole = uuid(&f, "--data disk");
    let expected = |kind: &str, uuid: &str, sub: &str, version: bool| {
        let lines = [
            Some(format!("ID_FS_TYPE={kind}")),
            Some("ID_FS_USAGE=crypto".into()),
            Some(format!("ID_FS_UUID{sub}={uuid}")),
            Some(format!("ID_FS_UUID{sub}_ENC={uuid}")),
            version.then(|| "ID_FS_VERSION=1".into()),
        ];
        lines.into_iter().flatten().collect::<Vec<_>>()
    };
    assert_eq!(properties(&f, "disk"), expected("ublk_integrity", &whole, "", true));
    f.run("format --data d1 --meta m1 --create --size 8M --key-file key").expect(DONE);
    let split = uuid(&f, "--data d1 --meta m1");
    assert_eq!(properties(&f, "m1"), expected("ublk_integrity_meta", &split, "_SUB", true));
    assert_eq!(properties(&f, "d1"), expected("ublk_integrity_data", &split, "", false));
    for (file, bytes) in
        [("zeros", vec![0; 2 << 20]), ("noise", vec![7; 2 << 20]), ("short", vec![1; 5]), ("none", vec![])]
    {
        fs::write(f.path(file), bytes).unwrap();
        f.run(&format!("udev-probe {file}")).expect(DEVICE).says(file);
    }
    f.run("udev-probe nowhere").expect(DEVICE).says("nowhere");
}

#[test]
fn a_damaged_volume_is_not_blank_to_udev() {
    let f = Folder::with_volume();
    let whole = uuid(&f, "--data disk");
    f.flip_bit("disk", 100);
    assert!(properties(&f, "disk").contains(&format!("ID_FS_UUID={whole}")), "the other copy knows");
    f.flip_bit("disk", (512 << 10) + 100);
    let left = properties(&f, "disk");
    assert!(left.contains(&"ID_FS_TYPE=ublk_integrity".into()) && !left.iter().any(|l| l.contains("UUID")), "{left:?}");
}

#[test]
fn a_dry_run_prints_the_units_and_names_bad_lines() {
    let f = Folder::new();
    fs::write(f.path("tab"), "home /dev/a\n\nsrv\nx /dev/b - raed-only\nvar /dev/c - noauto\n").unwrap();
    let run = f.run("generator --dry-run --table tab");
    assert_eq!(run.code, ARGUMENTS);
    let said: Vec<_> = run.err.lines().collect();
    assert!(said[0].starts_with("ublk-integrity: tab: line 3: "), "{said:?}");
    assert!(said[1].starts_with("ublk-integrity: tab: line 4: option \"raed-only\""), "{said:?}");
    let out = String::from_utf8(run.out).unwrap();
    assert!(out.contains("=== ublk-integrity@home.service\n") && out.contains("=== ublk-integrity@var.service\n"));
    assert!(out.contains(&format!("--table {}", f.path("tab").display())), "{out}");
    f.run("generator --dry-run --table nowhere").expect(DEVICE).says("nowhere");
    f.run("generator").expect(ARGUMENTS);
}

#[test]
fn the_generator_never_fails_and_never_speaks() {
    let f = Folder::new();
    fs::write(f.path("tab"), "home /dev/a\nwrong\n").unwrap();
    fs::create_dir(f.path("units")).unwrap();
    f.run("generator units early late --table tab").expect(DONE);
    assert!(f.path("units/ublk-integrity@home.service").exists());
    assert!(f.path("units/ublk-integrity.target.requires/ublk-integrity@home.service").exists());
    // Once more, into a folder that holds all of it; one that is not there; no table.
    f.run("generator units early late --table tab").expect(DONE);
    f.run("generator /proc/nowhere early late --table tab").expect(DONE);
    f.run("generator units early late --table nowhere").expect(DONE);
    // As systemd calls it.
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_ublk-integrity"), f.path("ublk-integrity-generator")).unwrap();
    for args in [&["new", "early", "late"][..], &[]] {
        let mut command = Command::new(f.path("ublk-integrity-generator"));
        Run::of(command.args(args).current_dir(f.dir.path()).output().unwrap()).expect(DONE);
    }
}

#[test]
fn attach_and_detach_name_what_is_wrong() {
    let f = Folder::with_volume();
    let disk = f.path("disk");
    let lines = format!(
        "home {} {}\nsrv /dev/nowhere-1\nold\nsealed {} credential:x\n",
        disk.display(),
        f.path("nokey").display(),
        disk.display()
    );
    fs::write(f.path("tab"), lines).unwrap();
    for (args, code, words) in [
        ("attach", ARGUMENTS, &["--all"][..]),
        ("attach home --all", ARGUMENTS, &["--all"]),
        ("attach a/b --table tab", ARGUMENTS, &["a/b"]),
        ("attach srv --table tab", DEVICE, &["/dev/nowhere-1 is not there"]),
        ("attach home --table nowhere", DEVICE, &["can't read nowhere"]),
        ("attach sealed --table tab", KEY, &["credential:x", "CREDENTIALS_DIRECTORY"]),
        ("detach home", DEVICE, &["no device here has the name home", "`ublk-integrity list`"]),
        ("detach --all --table nowhere", DEVICE, &["nowhere"]),
        ("status -n home", DEVICE, &["home", "list"]),
        ("add --data disk --key-file key --name 7", ARGUMENTS, &["\"7\"", "number"]),
        ("add --data disk --key-file key --or-recover", ARGUMENTS, &["--name"]),
    ] {
        let run = f.run(args).expect(code);
        words.iter().for_each(|word| assert!(run.err.contains(word), "{args}: no {word:?} in {}", run.err));
    }
    f.run("detach --all --table tab").expect(DONE);
    // What is not there may be the bad line.
    let run = f.run("attach old --table tab");
    assert_eq!(run.code, ARGUMENTS);
    let said: Vec<_> = run.err.lines().collect();
    assert!(said[0].contains("warning: tab: line 3: ") && said[1].contains("tab has no volume old"), "{said:?}");
    // With --all each says why, and the first decides.
    fs::write(f.path("tab"), "srv /dev/nowhere-1\ntwo /dev/nowhere-2 - nofail\nthree /dev/nowhere-3 - noauto\n")
        .unwrap();
    let run = f.run("attach --all --table tab");
    assert_eq!((run.code, run.err.lines().count()), (DEVICE, 2), "{}", run.err);
    fs::write(f.path("tab"), "two /dev/nowhere-2 - nofail\n").unwrap();
    assert_eq!(f.run("attach --all --table tab").code, DONE);
}

#[test]
fn a_signal_that_ends_a_wait_has_it_say_what_for() {
    let f = Folder::new();
    fs::write(f.path("tab"), "srv /dev/nowhere-1 - timeout=1h\n").unwrap();
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut child = f.command("attach srv --table tab").stderr(Stdio::piped()).spawn().unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        said.read_line(&mut line).unwrap();
        assert_eq!(line, "ublk-integrity: waiting for /dev/nowhere-1, at most 3600 s\n");
        kill(Pid::from_raw(child.id() as i32), signal).unwrap();
        line.clear();
        said.read_to_string(&mut line).unwrap();
        assert_eq!(line, format!("ublk-integrity: {signal} came while waiting for /dev/nowhere-1\n"));
        assert_eq!(child.wait().unwrap().signal(), Some(signal as i32));
    }
}

//! What the package does when it is taken away, with doubles of the program and of systemd, in a mount namespace.

use crate::harness::*;
use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
    process::Command,
};

/// A script in place of a program.
fn double(folder: &Path, name: &str, script: &str) {
    fs::write(folder.join(name), format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(folder.join(name), fs::Permissions::from_mode(0o755)).unwrap();
}

/// `prerm remove`, where /run has these files and the program lists so.
fn removal(list: &str, run: &[&str]) -> Option<(Folder, Run)> {
    if !nix::unistd::geteuid().is_root() || !Path::new("/etc/systemd/system").is_dir() {
        println!("skipped: needs root for a mount namespace, and /etc/systemd/system");
        return None;
    }
    let f = Folder::new();
    for folder in
        ["bin", "run", "run/systemd", "run/systemd/system", "run/ublk-integrity", "etc", "etc/timers.target.wants"]
    {
        fs::create_dir(f.path(folder)).unwrap();
    }
    run.iter().for_each(|name| fs::write(f.path("run/ublk-integrity").join(name), "{}").unwrap());
    for instance in ["home", "a\\x2db"] {
        let link = f.path("etc/timers.target.wants").join(format!("ublk-integrity-scrub@{instance}.timer"));
        symlink("/usr/lib/systemd/system/ublk-integrity-scrub@.timer", link).unwrap();
    }
    double(&f.path("bin"), "ublk-integrity", list);
    double(&f.path("bin"), "systemctl", &format!("echo \"$@\" >>{}", f.path("told").display()));
    let prerm = Path::new(env!("CARGO_MANIFEST_DIR")).join("../dist/debian/prerm");
    let script =
        "mount --bind run /run && mount --bind etc /etc/systemd/system && PATH=$PWD/bin:$PATH exec sh \"$0\" remove";
    let mut command = Command::new("unshare");
    let output =
        command.args(["-m", "sh", "-c", script]).arg(prerm).current_dir(f.dir.path()).env_remove("DPKG_ROOT").output();
    Some((f, Run::of(output.unwrap())))
}

#[test]
fn the_package_stays_while_it_serves_or_may() {
    for (list, run, names) in [
        ("echo /dev/ublkb0: home", &["0.json"][..], "/dev/ublkb0: home"),
        ("exit 1", &["12.json", "12.lock"], "12.json"),
        ("exit 127", &["0.json"], "0.json"),
    ] {
        let Some((f, run)) = removal(list, run) else { return };
        assert_eq!(run.code, 1, "{list}: {}", run.err);
        assert!(run.err.contains("'ublk-integrity del -a'") && run.err.contains(names), "{}", run.err);
        assert!(!f.path("told").exists(), "nothing was disabled");
    }
}

#[test]
fn what_is_removed_leaves_no_timer() {
    for (list, run) in [("true", &[][..]), ("exit 1", &["memory"])] {
        let Some((f, run)) = removal(list, run) else { return };
        assert_eq!(run.code, 0, "{}", run.err);
        let told = fs::read_to_string(f.path("told")).unwrap();
        let mut told: Vec<_> = told.lines().collect();
        told.sort_unstable();
        let expected = [
            "disable --now ublk-integrity-metrics.service ublk-integrity-monitor.service",
            "disable --now ublk-integrity-scrub@a\\x2db.timer",
            "disable --now ublk-integrity-scrub@home.timer",
            "stop ublk-integrity-scrub@*.timer",
        ];
        assert_eq!(told, expected);
    }
}

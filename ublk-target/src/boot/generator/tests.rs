use super::*;
use std::process::Command;

const UUID: &str = "baef170f-1036-4f2e-9acd-204d711f4c6a";

fn made(lines: &str) -> Vec<Made> {
    let table = Table::parse(lines.as_bytes());
    assert_eq!(table.bad, []);
    units(&table, Path::new(super::super::table::TABLE), Path::new("/usr/bin/ublk-integrity"), &|name| name == "sealed")
}

fn text(made: &[Made], path: &str) -> String {
    match made.iter().find(|made| made.path == path).map(|made| &made.content) {
        Some(Content::Text(text)) => text.clone(),
        other => panic!("{path}: {other:?} in {made:#?}"),
    }
}

fn link(made: &[Made], path: &str) -> Option<String> {
    match &made.iter().find(|made| made.path == path)?.content {
        Content::Link(target) => Some(target.clone()),
        Content::Text(_) => None,
    }
}

#[test]
fn a_volume_is_a_unit_that_is_compared_word_for_word() {
    let made = made(&format!("home UUID={UUID} /etc/keys/home"));
    let unit = text(&made, "ublk-integrity@home.service");
    assert_eq!(unit, include_str!("home.service"));
    let names: Vec<_> = made.iter().map(|made| made.path.as_str()).collect();
    assert_eq!(
        names,
        [
            "ublk-integrity@home.service",
            r"dev-ublk\x2dintegrity-home.device.requires/ublk-integrity@home.service",
            r"dev-ublk\x2dintegrity-home.device.d/50-ublk-integrity.conf",
            "ublk-integrity.target.requires/ublk-integrity@home.service",
            r"system-ublk\x2dintegrity.slice",
            "ublk-integrity.target",
            "sysinit.target.wants/ublk-integrity.target",
        ]
    );
    assert_eq!(link(&made, names[3]).as_deref(), Some("../ublk-integrity@home.service"));
}

#[test]
fn a_name_is_escaped_and_each_device_bound() {
    let made = made("vm-1 /dev/mapper/a-b - meta=PARTLABEL=m");
    let unit = text(&made, r"ublk-integrity@vm\x2d1.service");
    for line in [
        r"BindsTo=dev-mapper-a\x2db.device",
        r"After=dev-mapper-a\x2db.device",
        r"BindsTo=dev-disk-by\x2dpartlabel-m.device",
        r"Before=blockdev@dev-ublk\x2dintegrity-vm\x2d1.target",
        "RequiresMountsFor=/etc/ublk-integrity-keys.d/vm-1.key",
    ] {
        assert!(unit.lines().any(|l| l == line), "{line} is not in\n{unit}");
    }
    assert!(unit.contains("attach --foreground vm-1\n"), "{unit}");
}

#[test]
fn options_decide_who_wants_it_and_for_how_long() {
    let made = made(
        "n1 /dev/a - noauto\nn2 /dev/b - nofail,timeout=90\nn3 /dev/c - _netdev\nn4 /dev/d - x-initrd.attach\nn5 /dev/e - _netdev,nofail",
    );
    let wanted = |path: &str| link(&made, path).is_some();
    assert!(!wanted("ublk-integrity.target.requires/ublk-integrity@n1.service"));
    assert!(wanted("dev-ublk\\x2dintegrity-n1.device.requires/ublk-integrity@n1.service"));
    assert!(wanted("ublk-integrity.target.wants/ublk-integrity@n2.service"));
    assert!(wanted("remote-fs.target.requires/ublk-integrity@n3.service"));
    assert!(wanted("remote-fs.target.wants/ublk-integrity@n5.service"));
    assert!(text(&made, "dev-b.device.d/50-ublk-integrity.conf").contains("JobRunningTimeoutSec=90s"));
    let unit = |n: u32| text(&made, &format!("ublk-integrity@n{n}.service"));
    assert!(!unit(2).contains("Before=ublk-integrity.target") && unit(1).contains("Before=ublk-integrity.target"));
    assert!(unit(3).contains("After=network-online.target remote-fs-pre.target\nBefore=remote-fs.target"));
    assert!(!unit(4).contains("umount.target") && unit(1).contains("Conflicts=umount.target"));
    // Nor may what systemd puts it in end before the machine stops.
    assert!(text(&made, r"system-ublk\x2dintegrity.slice").contains("\nDefaultDependencies=no\n"));
}

#[test]
fn one_that_is_to_be_verified_starts_the_timer_of_that_and_ends_it() {
    let made = made("vm-1 /dev/a - scrub\nn2 /dev/b - nofail");
    let path = r"ublk-integrity@vm\x2d1.service.wants/ublk-integrity-scrub@vm\x2d1.timer";
    assert_eq!(link(&made, path).as_deref(), Some(r"../ublk-integrity-scrub@vm\x2d1.timer"));
    let bound = text(&made, r"ublk-integrity-scrub@vm\x2d1.timer.d/50-ublk-integrity.conf");
    let volume = r"ublk-integrity@vm\x2d1.service";
    assert!(bound.ends_with(&format!("[Unit]\nPartOf={volume}\nAfter={volume}\n")), "{bound}");
    assert_eq!(made.iter().filter(|made| made.path.contains("scrub")).count(), 2);
}

#[test]
fn only_volumes_of_the_network_need_no_target_of_ours() {
    let made = made("n /dev/a - _netdev");
    assert!(made.iter().all(|made| !made.path.contains("ublk-integrity.target")), "{made:#?}");
    assert_eq!(units(&Table::default(), Path::new("/t"), Path::new("/p"), &|_| false), []);
}

#[test]
fn keys_come_as_the_unit_can_have_them() {
    let made =
        made("a /dev/a credential:plain\nb /dev/b credential:sealed\nc /dev/c keyring:k\nd /srv/d.img /my\\040keys/%d");
    let unit = |name: &str| text(&made, &format!("ublk-integrity@{name}.service"));
    assert!(unit("a").contains("\nLoadCredential=plain\n"));
    assert!(unit("b").contains("\nLoadCredentialEncrypted=sealed\n"));
    assert!(unit("c").contains("\nKeyringMode=shared\n") && !unit("c").contains("RequiresMountsFor"));
    assert!(
        unit("d").contains("\nRequiresMountsFor=\"/my keys/%%d\"\nRequiresMountsFor=/srv/d.img\n"),
        "{}",
        unit("d")
    );
    assert!(!unit("d").contains("BindsTo"));
}

/// systemd 252 shows with `systemd --user --test` what it takes these lines for.
#[test]
fn paths_are_taken_for_themselves() {
    let wanted = |line: &str| {
        let unit = text(&made(line), "ublk-integrity@h.service");
        unit.lines().filter_map(|line| line.strip_prefix("RequiresMountsFor=")).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(wanted("h /srv/$a%b /k"), ["/k", "/srv/$a%%b"]);
    assert_eq!(wanted(r#"h /a\040"b /k\134'$"#), [r#""/k\\'$""#, r#""/a \"b""#]);
    // In an argument of a command, and there alone, a dollar is a variable's.
    let table = Table::parse(b"h /dev/a");
    let made = units(&table, Path::new("/run/$tab%"), Path::new("/opt/$u%"), &|_| false);
    let unit = text(&made, "ublk-integrity@h.service");
    assert!(
        unit.contains("ExecStart=@/opt/$u%% @ublk-integrity attach --foreground --table /run/$$tab%% h\n"),
        "{unit}"
    );
    assert!(unit.contains("\nSourcePath=/run/$tab%%\n"), "{unit}");
}

#[test]
fn a_start_may_take_as_long_as_its_disks() {
    let limit = |line: &str| {
        let unit = text(&made(line), "ublk-integrity@h.service");
        unit.lines().find_map(|line| line.strip_prefix("TimeoutStartSec=")).unwrap().to_owned()
    };
    assert_eq!(limit("h /dev/a"), "120s");
    assert_eq!(limit("h /dev/a - timeout=10min"), "720s");
    assert_eq!(limit("h /srv/a - meta=/srv/b,timeout=1h"), "7320s", "each of them");
    // As long as a line can say; systemd counts microseconds in 64 bits.
    assert_eq!(limit("h /dev/a - timeout=4294967295"), "4294967415s");
}

#[test]
fn another_table_is_named_to_the_program() {
    let table = Table::parse(b"h /dev/a");
    let made = units(&table, Path::new("/run/my table"), Path::new("/opt/a b/u"), &|_| false);
    let unit = text(&made, "ublk-integrity@h.service");
    let line = "ExecStart=@\"/opt/a b/u\" @ublk-integrity attach --foreground --table \"/run/my table\" h\n";
    assert!(unit.contains(line), "{unit}");
}

#[test]
fn what_is_there_already_stays_and_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let made = made("h /dev/a - timeout=1\ni /dev/a - timeout=2");
    made.iter().try_for_each(|made| made.write(folder.path())).unwrap();
    let conf = fs::read_to_string(folder.path().join("dev-a.device.d/50-ublk-integrity.conf")).unwrap();
    assert!(conf.contains("=1s"), "{conf}");
    let link = folder.path().join("ublk-integrity.target.requires/ublk-integrity@i.service");
    assert!(fs::canonicalize(link).unwrap().starts_with(folder.path().canonicalize().unwrap()));
    assert_eq!(made[0].write(folder.path()).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
}

/// systemd's own opinion, where it is installed.
#[test]
fn systemd_understands_the_units() {
    let folder = tempfile::tempdir().unwrap();
    // The program must be there, or that is all that systemd says.
    let program = std::env::current_exe().unwrap();
    let table = Table::parse(
        b"home UUID=baef170f-1036-4f2e-9acd-204d711f4c6a credential:sealed meta=/dev/b,timeout=2min\nvm-1 /srv/a\\040b.img keyring:k _netdev,nofail\n",
    );
    let made = units(&table, Path::new("/etc/my tab"), &program, &|_| true);
    made.iter().try_for_each(|made| made.write(folder.path())).unwrap();
    let services = made.iter().map(|made| &made.path).filter(|path| path.ends_with(".service") && !path.contains('/'));
    let services: Vec<_> = services.map(|path| folder.path().join(path)).collect();
    assert_eq!(services.len(), 2);
    let Ok(said) = Command::new("systemd-analyze").args(["verify", "--man=no"]).args(&services).output() else {
        println!("skipped: systemd-analyze is not installed");
        return;
    };
    let said = String::from_utf8(said.stderr).unwrap();
    // Of ours, not of units that this machine happens to have; and not what only newer versions know.
    let ours =
        said.lines().filter(|line| line.contains(&*folder.path().to_string_lossy()) || line.contains("ublk-integrity"));
    let wrong: Vec<_> = ours.filter(|line| !line.contains("SurviveFinalKillSignal")).collect();
    assert_eq!(wrong, [""; 0]);
}

/// A drop-in has a volume wait for the agent of its anchor: the units of `contrib/systemd`, as docs/anchor-agents.md has it.
/// systemd takes a unit out of a circle by not starting it.
#[test]
fn a_volume_and_the_agent_that_it_waits_for_do_not_wait_for_each_other() {
    let tpm = include_str!("../../../../contrib/systemd/ublk-anchor-tpm.service");
    let etcd = include_str!("../../../../contrib/systemd/ublk-anchor-etcd.service");
    let circle = |agent: &str, text: &str, options: &str| -> Option<bool> {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let program = std::env::current_exe().unwrap();
        let table = Table::parse(format!("home UUID={UUID} keyring:k anchor=unix:/run/a/socket{options}\n").as_bytes());
        let made = units(&table, Path::new("/etc/my tab"), &program, &|_| true);
        made.iter().try_for_each(|made| made.write(folder.path())).unwrap();
        fs::write(path(agent), text).unwrap();
        fs::create_dir_all(path("ublk-integrity@home.service.d")).unwrap();
        let drop_in = format!("[Unit]\nWants={agent}\nAfter={agent}\n");
        fs::write(path("ublk-integrity@home.service.d/agent.conf"), drop_in).unwrap();
        // What is mounted on it, as the generator of fstab orders it.
        let (before, of_network) = match options.contains("_netdev") {
            true => ("remote-fs.target", "Options=_netdev\n"),
            false => ("local-fs.target", ""),
        };
        let device = r"dev-ublk\x2dintegrity-home.device";
        let mount = format!(
            "[Unit]\nBefore={before}\nRequires={device}\nAfter={device}\n[Mount]\nWhat=/dev/ublk-integrity/home\nWhere=/home\n{of_network}"
        );
        fs::write(path("home.mount"), mount).unwrap();
        fs::create_dir_all(path(&format!("{before}.requires"))).unwrap();
        std::os::unix::fs::symlink("../home.mount", path(&format!("{before}.requires/home.mount"))).unwrap();
        // As at boot: what waits for the volume, and what the agent may wait for, are to be started, too.
        let all = format!("[Unit]\nRequires=sysinit.target {before} ublk-integrity@home.service\n");
        fs::write(path("all.target"), all).unwrap();
        let mut verify = Command::new("systemd-analyze");
        verify.args(["verify", "--man=no"]).arg(path("all.target"));
        // The folder alone, and then all that systemd has.
        let folders = format!("{}:", folder.path().display());
        let said = verify.env("SYSTEMD_UNIT_PATH", folders).output().ok()?;
        Some(String::from_utf8_lossy(&said.stderr).contains("ordering cycle"))
    };
    let with_defaults = tpm.replace("DefaultDependencies=no\n", "");
    let Some(is_one) = circle("ublk-anchor-tpm.service", &with_defaults, "") else {
        println!("skipped: systemd-analyze is not installed");
        return;
    };
    assert!(is_one, "the test shows nothing");
    let with_folder = tpm.replace("InaccessiblePaths=-/tmp -/var/tmp", "PrivateTmp=yes");
    assert_eq!(circle("ublk-anchor-tpm.service", &with_folder, ""), Some(true));
    assert_eq!(circle("ublk-anchor-tpm.service", tpm, ""), Some(false));
    // What needs the network comes after what is local.
    assert_eq!(circle("ublk-anchor-etcd.service", etcd, ",_netdev"), Some(false));
    assert_eq!(circle("ublk-anchor-etcd.service", etcd, ""), Some(true));
}

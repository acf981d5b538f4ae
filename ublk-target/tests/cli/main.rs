//! The program without ublk and without root: exit codes, one line for each failure,
//! and volumes in files.

mod anchors;
mod boot;
mod copies;
mod errors;
mod events;
mod foreign;
mod format;
mod harness;
mod heal;
mod keys;
mod manual;
mod output;
mod packages;
mod resize;
mod udev_rules;
mod watch;
mod words;

use copies::content;
use harness::*;
use nix::{sys::signal::Signal, unistd::Pid};
use std::{
    fs,
    os::unix::{
        fs::{FileExt, PermissionsExt},
        process::ExitStatusExt,
    },
    path::Path,
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

#[test]
fn bad_arguments_are_one_line_and_exit_1() {
    let f = Folder::new();
    for args in [
        "",
        "nonsense",
        "format",
        "format --data disk",
        "format --data disk --key-file key --nonsense",
        "add --data disk --key-file key -n 4294967295",
        "add --data disk --key-file key -n 1048576",
        "recover -n 4294967295",
        "del -n 4294967295",
        "status -n 1048576",
        "format --data disk --key-file key --create --size 1.5G",
        "format --data disk --key-file key --create --size 8M --block-size 1000",
        "format --data disk --key-file key --create --size 8M --block-size 8192",
        "format --data disk --key-file key --create --size 1K",
        "format --data disk --key-file key --create --size 8M --log-size 1",
        "format --data disk --key-file key --create --size 100T",
        "format --data disk --key-file key --key keyring:x --create --size 8M",
        "format --data disk --key x --create --size 8M",
        "del",
        "del -n 1 -a",
        "status -x --json",
        "status --watch=0",
        "metrics --listen 0.0.0.0:9926",
        "metrics --listen unix:x --textfile x",
        "keygen",
    ] {
        f.run(args).expect(ARGUMENTS);
        assert!(!f.path("disk").exists(), "{args} left a file behind");
    }
    f.run("--help").expect(DONE);
    f.run("format --help").expect(DONE);
    f.run("--version").expect(DONE);
}

#[test]
fn keygen_makes_a_private_key_and_never_overwrites_one() {
    let f = Folder::new();
    let meta = fs::metadata(f.path("key")).unwrap();
    assert_eq!((meta.len(), meta.permissions().mode() & 0o777), (32, 0o600));
    let key = fs::read(f.path("key")).unwrap();
    f.run("keygen key").expect(BUSY).says("key");
    assert_eq!(fs::read(f.path("key")).unwrap(), key);
    f.run("keygen other").expect(DONE);
    assert_ne!(fs::read(f.path("other")).unwrap(), key);
    f.run("keygen missing/key").expect(DEVICE);
}

#[test]
fn a_key_that_cannot_be_used_is_exit_2() {
    let f = Folder::with_volume();
    f.run("keygen other").expect(DONE);
    f.run("check --data disk --key-file other").expect(KEY).says("wrong key");
    f.run("check --data disk --key-file nowhere").expect(KEY).says("nowhere");
    fs::write(f.path("short"), [1; 31]).unwrap();
    f.run("check --data disk --key-file short").expect(KEY).says("31");
    fs::write(f.path("long"), vec![1; 4097]).unwrap();
    f.run("check --data disk --key-file long").expect(KEY).says("long").says("4097 bytes");
    fs::File::create(f.path("long")).unwrap().set_len(16 << 20).unwrap();
    f.run("check --data disk --key-file long").expect(KEY).says("16777216 bytes").says("4096");
    f.run_with_input("check --data disk --key-file -", &[1; 8192]).expect(KEY).says("more than 4096 bytes");
    f.run("check --data disk --key keyring:no-such-key-of-ours").expect(KEY).says("no-such-key-of-ours");
    let key = fs::read(f.path("key")).unwrap();
    f.run_with_input("check --data disk --key-file -", &key).expect(DONE);
    f.run_with_input("check --data disk --key-file -", &key[..20]).expect(KEY);
}

#[test]
fn looking_writes_nothing() {
    let f = Folder::with_volume();
    let before = fs::read(f.path("disk")).unwrap();
    f.run("dump --data disk").expect(DONE);
    f.run("check --data disk --key-file key").expect(DONE);
    f.run("export --data disk --key-file key out").expect(DONE);
    assert!(fs::read(f.path("disk")).unwrap() == before);
}

#[test]
fn dump_needs_no_key() {
    let f = Folder::with_volume();
    let dump = f.run("dump --data disk --json").expect(DONE).json();
    assert_eq!(dump["volume"]["size"], 8 << 20);
    assert_eq!(dump["volume"]["block_size"], 4096);
    assert_eq!(dump["copies"].as_array().unwrap().len(), 2);
    fs::write(f.path("noise"), vec![3; 1 << 20]).unwrap();
    f.run("dump --data noise").expect(DEVICE);
}

#[test]
fn format_destroys_nothing_unasked() {
    let f = Folder::with_volume();
    f.run("format --data disk --key-file key").expect(BUSY).says("--force");
    f.run("format --data disk --key-file key --force").expect(DONE);
    let other = fs::File::create(f.path("ext4")).unwrap();
    other.set_len(16 << 20).unwrap();
    other.write_all_at(b"\x53\xef", 0x438).unwrap();
    f.run("format --data ext4 --key-file key").expect(BUSY).says("ext");
    f.run("check --data ext4 --key-file key").expect(DEVICE);
    f.run("format --data ext4 --key-file key --force").expect(DONE);
    f.run("check --data ext4 --key-file key").expect(DONE);
}

#[test]
fn a_wrong_device_is_exit_4() {
    let f = Folder::new();
    f.run("format --data disk --key-file key").expect(DEVICE).says("--size");
    f.run("check --data disk --key-file key").expect(DEVICE);
    f.run("format --data . --key-file key").expect(DEVICE);
    f.run("check --data /dev/null --key-file key").expect(DEVICE);
    fs::File::create(f.path("tiny")).unwrap().set_len(4096).unwrap();
    f.run("format --data tiny --key-file key").expect(DEVICE).says("4096");
    f.run("check --data tiny --key-file key").expect(DEVICE);
    f.run("status -n 4999").expect(DEVICE);
    f.run("del -n 4999").expect(DEVICE);
}

#[test]
fn metadata_on_a_device_of_its_own_is_bound_to_its_data() {
    let f = Folder::new();
    f.run("format --data d1 --meta m1 --create --size 8M --key-file key").expect(DONE);
    f.run("format --data d2 --meta m2 --create --size 8M --key-file key").expect(DONE);
    let input = content(1 << 20);
    f.run_with_input("import --data d1 --meta m1 --key-file key --zero-rest -", &input).expect(DONE);
    let out = f.run("export --data d1 --meta m1 --key-file key -").expect(DONE).out;
    assert!(out[..input.len()] == input);
    f.run("check --data d2 --meta m1 --key-file key").expect(DEVICE);
    f.run("check --data m1 --meta d1 --key-file key").expect(DEVICE);
    f.run("check --data d1 --key-file key").expect(DEVICE);
    for command in ["format --create --size 8M --force", "check", "import d2", "export out", "export out --force"] {
        f.run(&format!("{command} --data d1 --meta d1 --key-file key")).expect(ARGUMENTS).says("leave --meta out");
    }
    f.run("dump --data d1 --meta d1").expect(ARGUMENTS);
    assert!(!f.path("out").exists());
    f.run("dump --data d1").expect(DONE);
}

#[test]
fn a_device_in_use_is_exit_5_and_readers_share() {
    use nix::fcntl::{Flock, FlockArg};
    let f = Folder::with_volume();
    let open = || fs::File::open(f.path("disk")).unwrap();
    let held = Flock::lock(open(), FlockArg::LockExclusive).unwrap();
    f.run("check --data disk --key-file key").expect(BUSY).says("in use");
    f.run("format --data disk --key-file key --force").expect(BUSY);
    f.run("dump --data disk").expect(DONE);
    // As udev holds one, for a moment.
    let moment = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(700));
        drop(held);
    });
    f.run("check --data disk --key-file key").expect(DONE);
    moment.join().unwrap();
    let _shared = Flock::lock(open(), FlockArg::LockShared).unwrap();
    f.run("check --data disk --key-file key").expect(DONE);
    f.run_with_input("import --data disk --key-file key -", b"x").expect(BUSY);
}

#[test]
fn damage_is_told_from_a_wrong_key() {
    let f = Folder::with_volume();
    // One superblock copy: the other serves. Both: damaged.
    let zeros = |offset: u64| {
        let file = fs::OpenOptions::new().write(true).open(f.path("disk")).unwrap();
        file.write_all_at(&[0xff; 512], offset).unwrap();
    };
    let dump = f.run("dump --data disk --json").expect(DONE).json();
    let offsets: Vec<u64> = dump["copies"].as_array().unwrap().iter().map(|c| c["offset"].as_u64().unwrap()).collect();
    zeros(offsets[0]);
    f.run("check --data disk --key-file key").expect(DONE);
    zeros(offsets[1]);
    f.run("check --data disk --key-file key").expect(DEVICE);
}

#[test]
fn the_benchmark_measures_and_leaves_nothing_behind() {
    let f = Folder::new();
    let report = f.run("benchmark --data . --size 8M --time 0.05 --json").expect(DONE).json();
    let speeds = |part: &str, value: &str| -> Vec<f64> {
        report[part].as_array().unwrap().iter().map(|speed| speed[value].as_f64().unwrap()).collect()
    };
    assert!(speeds("tags", "bytes_per_second").iter().all(|s| *s > 0.0));
    assert!(speeds("disk", "verified").iter().chain(&speeds("disk", "plain")).all(|s| *s > 0.0));
    let rows = |what: &str| -> Vec<serde_json::Value> {
        let rows = report["disk"].as_array().unwrap().iter();
        rows.filter(|row| row["pattern"].as_str().unwrap().contains(what)).cloned().collect()
    };
    let synced = rows("fsync");
    assert_eq!(synced.len(), 4);
    assert!(synced.iter().all(|row| row["written_per_byte"].as_f64().unwrap() > 1.0), "{synced:?}");
    let cold = &rows("cold")[0];
    assert!(cold["metadata_reads_per_read"].as_f64().unwrap() > 0.5, "{cold:?}");
    assert!(cold["written_per_byte"].is_null(), "{cold:?}");
    assert_eq!(fs::read_dir(f.dir.path()).unwrap().count(), 1, "only the key is there");
    f.run("benchmark --data nowhere").expect(DEVICE);
    f.run("benchmark --time 0").expect(ARGUMENTS);
    f.run("benchmark --data . --size 1K --time 0.01").expect(ARGUMENTS);
}

#[test]
fn a_benchmark_that_is_killed_leaves_nothing_either() {
    let f = Folder::new();
    let mut child = f.command("benchmark --data . --size 8M --time 1").stdout(Stdio::null()).spawn().unwrap();
    let fds = format!("/proc/{}/fd", child.id());
    let has_nameless_file = || {
        let links = fs::read_dir(&fds).unwrap().filter_map(|fd| fs::read_link(fd.unwrap().path()).ok());
        links
            .map(|to| to.to_string_lossy().into_owned())
            .any(|to| to.contains("ublk-integrity-benchmark.") && to.ends_with(" (deleted)"))
    };
    let begin = Instant::now();
    while !has_nameless_file() {
        assert!(begin.elapsed() < Duration::from_secs(60), "no scratch file without a name");
        sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(fs::read_dir(f.dir.path()).unwrap().count(), 1, "only the key is there");
}

#[test]
fn more_memory_than_the_machine_has_is_exit_3() {
    let f = Folder::with_volume();
    for sizes in ["-q 4096 -d 4096 --max-io 32M", "--cache 100T", "--cache 1P", "--cache 16383P"] {
        f.run(&format!("add --data disk --key-file key {sizes}")).expect(MEMORY).says("--cache");
    }
}

#[test]
fn whatever_memory_there_is_opening_ends_in_order() {
    let f = Folder::new();
    f.run("format --data disk --create --size 2G --log-size 1G --key-file key").expect(DONE);
    let mut codes = Vec::new();
    for megabytes in [60, 100, 150, 200, 300, 500, 700, 1000, 1100, 1200, 2000] {
        let mut limited = Command::new("sh");
        limited.args(["-c", &format!("ulimit -v {}; exec \"$@\"", megabytes << 10), "sh"]);
        limited.arg(env!("CARGO_BIN_EXE_ublk-integrity")).args("check --data disk --key-file key".split(' '));
        let run = Run::of(limited.current_dir(f.dir.path()).output().unwrap());
        codes.push(run.code);
        match run.code {
            DONE => run.expect(DONE),
            _ => run.expect(MEMORY).says("memory"),
        };
    }
    assert_eq!((codes.first(), codes.last()), (Some(&MEMORY), Some(&DONE)), "{codes:?}");
}

/// A loop device on a file of 64 MiB.
struct Loop(String);

impl Loop {
    fn new(f: &Folder) -> Option<Self> {
        fs::File::create(f.path("loop")).unwrap().set_len(64 << 20).unwrap();
        let made = Command::new("losetup").args(["--find", "--show"]).arg(f.path("loop")).output().ok()?;
        made.status.success().then(|| Self(String::from_utf8(made.stdout).unwrap().trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn a_device_is_free_when_a_command_has_returned() {
    let f = Folder::new();
    let Some(device) = Loop::new(&f) else {
        println!("skipped: no loop device to be had");
        return;
    };
    for _ in 0..20 {
        f.run(&format!("format --data {} --key-file key --force", device.0)).expect(DONE);
        f.run_with_input(&format!("import --data {} --key-file key --zero-rest -", device.0), b"content").expect(DONE);
        // O_EXCL: refused while anything of that holds the device.
        f.run(&format!("format --data {} --key-file key", device.0)).expect(BUSY).says("--force destroys it");
    }
    fs::write(f.path("content"), vec![7; 40 << 20]).unwrap();
    for i in 0..10 {
        let mut import = f
            .command(&format!("import --data {} --key-file key --zero-rest --force content", device.0))
            .spawn()
            .unwrap();
        sleep(Duration::from_millis(20 + 7 * i));
        nix::sys::signal::kill(Pid::from_raw(import.id() as i32), Signal::SIGINT).unwrap();
        let ended = import.wait().unwrap();
        assert!(ended.signal() == Some(Signal::SIGINT as i32) || ended.success(), "{ended:?}");
        f.run(&format!("format --data {} --key-file key", device.0)).expect(BUSY).says("--force destroys it");
    }
}

#[test]
fn without_ublk_add_says_what_to_do() {
    if Path::new("/dev/ublk-control").exists() {
        println!("skipped: this kernel has ublk");
        return;
    }
    let f = Folder::with_volume();
    f.run("add --data disk --key-file key").expect(DEVICE).says("modprobe");
    f.run("add --data disk --key-file key --foreground").expect(DEVICE);
    f.run("add --data nowhere --key-file key").expect(DEVICE).says("nowhere");
    f.run("list").expect(DONE);
    f.run("del --all").expect(DONE);
}

#[test]
fn ublksrvs_tool_hears_of_a_failure() {
    use std::{io::Read, os::fd::AsRawFd};
    let f = Folder::with_volume();
    let name = f.path("ublk.integrity");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_ublk-integrity"), &name).unwrap();
    // A plain pipe is inherited, as the tool's is.
    let (read, write) = nix::unistd::pipe().unwrap();
    let descriptor = write.as_raw_fd().to_string();
    let status = Command::new(&name)
        .args("add -t integrity --data nowhere --key-file key -q 1 -d 32 --eventfd".split(' '))
        .arg(descriptor)
        .current_dir(f.dir.path())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    drop(write);
    let mut answer = Vec::new();
    fs::File::from(read).read_to_end(&mut answer).unwrap();
    assert_eq!(status.code(), Some(DEVICE));
    assert_eq!(answer, (u64::MAX - 1).to_ne_bytes());
}

/// What a process has locked in memory, in KiB, and whether it may lock without limit.
fn locked(pid: u32) -> (u64, bool) {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let value = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
    let capabilities = u64::from_str_radix(&value("CapEff:"), 16).unwrap();
    (value("VmLck:").trim_end_matches(" kB").parse().unwrap(), capabilities >> 14 & 1 == 1)
}

#[test]
fn memory_is_locked_before_a_key_is_read_in_every_command_that_reads_one() {
    if !locked(std::process::id()).1 {
        println!("skipped: no permission to lock memory");
        return;
    }
    let f = Folder::with_volume();
    let key = fs::read(f.path("key")).unwrap();
    for command in [
        "check --data disk",
        "export --data disk out",
        "import --data disk --zero-rest key",
        "format --data new --create --size 8M",
    ] {
        let mut child = f.command(&format!("{command} --key-file -")).stdin(Stdio::piped()).spawn().unwrap();
        // It waits for the key.
        let begin = Instant::now();
        while locked(child.id()).0 == 0 {
            assert!(begin.elapsed() < Duration::from_secs(60), "{command}: nothing is locked");
            sleep(Duration::from_millis(5));
        }
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), &key).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(DONE), "{command}");
    }
}

//! The program without ublk and without root: exit codes, one line for each failure, and volumes in files.

use serde_json::Value;
use std::{
    fs,
    io::Write,
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

/// Exit codes, as the help lists them.
const DONE: i32 = 0;
const ARGUMENTS: i32 = 1;
const KEY: i32 = 2;
const MEMORY: i32 = 3;
const DEVICE: i32 = 4;
const BUSY: i32 = 5;
const INTEGRITY: i32 = 6;

/// A folder with a key, and the program to run in it.
struct Folder {
    dir: tempfile::TempDir,
}

/// What a run came back with.
struct Run {
    code: i32,
    out: Vec<u8>,
    err: String,
}

impl Folder {
    fn new() -> Self {
        let folder = Self { dir: tempfile::tempdir().unwrap() };
        folder.run("keygen key").expect(DONE);
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, args: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ublk-integrity"));
        command.args(args.split_whitespace()).current_dir(self.dir.path()).stdin(Stdio::null());
        command
    }

    fn run(&self, args: &str) -> Run {
        Run::of(self.command(args).output().unwrap())
    }

    fn run_with_input(&self, args: &str, input: &[u8]) -> Run {
        let mut command = self.command(args);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // A program that fails early reads no input.
        let _ = child.stdin.take().unwrap().write_all(input);
        Run::of(child.wait_with_output().unwrap())
    }

    /// A volume of 8 MiB in the file "disk".
    fn with_volume() -> Self {
        let folder = Self::new();
        folder.run("format --data disk --size 8M --key-file key").expect(DONE);
        folder
    }

    /// Where the payload begins: behind everything else, as the file is only as large as it must be.
    fn payload_offset(&self, disk: &str, usable: u64) -> u64 {
        fs::metadata(self.path(disk)).unwrap().len() - usable
    }

    fn flip_bit(&self, file: &str, offset: u64) {
        let file = fs::OpenOptions::new().read(true).write(true).open(self.path(file)).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
    }
}

impl Run {
    fn of(output: Output) -> Self {
        Self {
            code: output.status.code().expect("ended by itself"),
            out: output.stdout,
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// A failure says so in one line, a success says nothing on standard error.
    #[track_caller]
    fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, code, "stderr: {}", self.err);
        let lines = self.err.lines().count();
        assert_eq!(lines, usize::from(code != DONE), "stderr: {}", self.err);
        assert!(code == DONE || self.err.starts_with("ublk-integrity: "), "stderr: {}", self.err);
        self
    }

    #[track_caller]
    fn says(self, what: &str) -> Self {
        assert!(self.err.contains(what), "stderr: {}", self.err);
        self
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.out).unwrap()
    }
}

/// Bytes that differ from block to block, with zeros between.
fn content(len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len).map(|i| (i / 7 + i / 4096 * 31) as u8 | 1).collect();
    let hole = len / 3 / 4096 * 4096..len / 2 / 4096 * 4096;
    bytes[hole].fill(0);
    bytes
}

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
        "format --data disk --key-file key --size 1.5G",
        "format --data disk --key-file key --size 8M --block-size 1000",
        "format --data disk --key-file key --size 8M --block-size 8192",
        "format --data disk --key-file key --size 1K",
        "format --data disk --key-file key --size 8M --log-size 1",
        "format --data disk --key-file key --size 100T",
        "format --data disk --key-file key --key keyring:x --size 8M",
        "format --data disk --key x --size 8M",
        "del",
        "del -n 1 -a",
        "status",
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
    f.run("check --data disk --key-file long").expect(KEY);
    f.run("check --data disk --key keyring:no-such-key-of-ours").expect(KEY).says("no-such-key-of-ours");
    let key = fs::read(f.path("key")).unwrap();
    f.run_with_input("check --data disk --key-file -", &key).expect(DONE);
    f.run_with_input("check --data disk --key-file -", &key[..20]).expect(KEY);
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
    f.run("format --data d1 --meta m1 --size 8M --key-file key").expect(DONE);
    f.run("format --data d2 --meta m2 --size 8M --key-file key").expect(DONE);
    let input = content(1 << 20);
    f.run_with_input("import --data d1 --meta m1 --key-file key -", &input).expect(DONE);
    let out = f.run("export --data d1 --meta m1 --key-file key -").expect(DONE).out;
    assert!(out[..input.len()] == input);
    f.run("check --data d2 --meta m1 --key-file key").expect(DEVICE);
    f.run("check --data m1 --meta d1 --key-file key").expect(DEVICE);
    f.run("check --data d1 --key-file key").expect(DEVICE);
    for command in ["format --size 8M --force", "check", "import d2", "export out", "export out --force"] {
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
    assert_eq!(fs::read_dir(f.dir.path()).unwrap().count(), 1, "only the key is there");
    f.run("benchmark --data nowhere").expect(DEVICE);
    f.run("benchmark --time 0").expect(ARGUMENTS);
    f.run("benchmark --data . --size 1K --time 0.01").expect(ARGUMENTS);
}

#[test]
fn more_memory_than_the_machine_has_is_exit_3() {
    let f = Folder::with_volume();
    for sizes in ["-q 4096 -d 4096 --max-io 32M", "--cache 100T", "--cache 1P", "--cache 16383P"] {
        f.run(&format!("add --data disk --key-file key {sizes}")).expect(MEMORY).says("--cache");
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

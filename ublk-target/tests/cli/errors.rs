//! The table of errors: each is one line that names path and value and says what to do, and has an
//! exit code. What needs ublk, or a disk that fails, is in `tests/vm`.

use crate::harness::*;
use nix::fcntl::{Flock, FlockArg};
use std::fs;

/// A command, its exit code, and what its line has: the path (or the word of the command line that
/// is wrong), the value (that it has, or that it must have), what to do. Empty where there is none:
/// a path that is not there has no value.
type Case = (&'static str, i32, &'static str, &'static str, &'static str);

const FORMAT: &[Case] = &[
    // Sizes name what they must be.
    (
        "format --data x --create --size 1048577 --key-file key",
        ARGUMENTS,
        "",
        "1048577 bytes",
        "multiple of the block size, 4096",
    ),
    ("format --data x --create --size 100T --key-file key", ARGUMENTS, "", "109951162777600 bytes", "to 64 TiB"),
    (
        "format --data x --create --size 8M --log-size 65K --key-file key",
        ARGUMENTS,
        "",
        "66560 bytes",
        "multiple of 4096",
    ),
    (
        "format --data x --create --size 8M --block-size 3 --key-file key",
        ARGUMENTS,
        "",
        "3 bytes",
        "512, 1024, 2048 or 4096",
    ),
    (
        "format --data x --create --size 8M --block-size 8G --key-file key",
        ARGUMENTS,
        "",
        "4294967295 bytes",
        "512, 1024",
    ),
    (
        "format --data x --create --size 8M --assume-atomic 8K --key-file key",
        ARGUMENTS,
        "--assume-atomic",
        "8K",
        "must be 512, 1K, 2K or 4K",
    ),
    (
        "format --data x --create --size 8M --assume-atomic 1K --block-size 2K --key-file key",
        ARGUMENTS,
        "--assume-atomic",
        "2048",
        "lower the one or raise the other",
    ),
    (
        "format --data x --create --size 8M --label a\u{7}b --key-file key",
        ARGUMENTS,
        "--label",
        "",
        "no control characters",
    ),
    (
        "format --data x --create --size 8M --max-size 4M --key-file key",
        ARGUMENTS,
        "",
        "4194304 bytes",
        "from the volume's own size, 8388608 bytes, to 64 TiB",
    ),
    ("format --data x --create --size 1.5G --key-file key", ARGUMENTS, "--size", "1.5G", "--help"),
    ("format --data x --key-file key", DEVICE, "x does not exist", "", "--create with --size"),
    ("format --data nowhere/x --create --size 8M --key-file key", DEVICE, "nowhere/x", "", "No such file"),
    (
        "format --data /dev/no-such-disk --create --size 8M --key-file key",
        DEVICE,
        "/dev/no-such-disk",
        "",
        "no file is made in /dev",
    ),
    ("format --data zeros --size 1G --key-file key", DEVICE, "zeros", "4194304 bytes", "needs "),
    ("format --data disk --key-file key", BUSY, "disk holds ublk-integrity", "at 0x0", "--force"),
    ("format --data short --key-file key", BUSY, "short holds data", "at 0x0", "--force"),
    ("format --data . --key-file key", DEVICE, ". is neither", "", "a block device nor a regular file"),
    ("format --data zeros --meta zeros --key-file key", ARGUMENTS, "--data and --meta", "", "leave --meta out"),
];

const DEVICES: &[Case] = &[
    // The path of the one that it is.
    ("check --data empty --key-file key", DEVICE, "empty is empty", "0 bytes", ""),
    ("dump --data empty", DEVICE, "empty is empty", "0 bytes", ""),
    ("dump --data zeros", DEVICE, "no ublk-integrity volume on zeros", "", "`format`"),
    ("check --data short --key-file key", DEVICE, "short has", "5 bytes", "too short"),
    ("check --data zeros --key-file key", DEVICE, "no ublk-integrity volume on zeros", "", "`format`"),
    ("check --data d1 --meta zeros --key-file key", DEVICE, "d1 holds the data of volume", "-", "--meta"),
    ("check --data cut --key-file key", DEVICE, "cut has", "2097152 bytes, the volume needs ", "cut short?"),
    (
        "check --data d1 --meta cut-meta --key-file key",
        DEVICE,
        "cut-meta has",
        "1048576 bytes, the volume needs ",
        "cut short?",
    ),
    ("check --data damaged --key-file key", DEVICE, "on damaged", "both superblock copies", "a copy of its first MiB"),
    ("check --data m1 --key-file key", DEVICE, "m1 holds the metadata of volume", "-", "--data"),
    ("check --data d1 --key-file key", DEVICE, "d1 holds the data of volume", "-", "--meta"),
    ("check --data d2 --meta m1 --key-file key", DEVICE, "m1 to volume", "d2 belongs to volume", ""),
    ("check --data d1 --meta disk --key-file key", DEVICE, "disk", "on one device", "--meta"),
    ("check --data m1 --meta d1 --key-file key", DEVICE, "the other way round", "--data d1", "--meta m1"),
    ("check --data nowhere --key-file key", DEVICE, "nowhere", "", "No such file"),
    ("check --data . --key-file key", DEVICE, ". is neither", "", "a block device nor a regular file"),
    (
        "check --data disk --key-file key --uuid 00000000-0000-4000-8000-000000000000",
        DEVICE,
        "disk holds volume",
        "00000000-0000-4000-8000-000000000000",
        "another device?",
    ),
    ("check --data forged --key-file key", INTEGRITY, "on forged", "superblock", "tampered with"),
    ("check --data locked --key-file key", BUSY, "locked is in use", "", "`ublk-integrity list`"),
    ("dump --data locked --meta locked", ARGUMENTS, "--data and --meta", "", "leave --meta out"),
];

const CONTENT: &[Case] = &[
    ("import --data disk --key-file key nowhere", DEVICE, "nowhere", "", "No such file"),
    ("import --data disk --key-file key empty", ARGUMENTS, "empty is empty", "", "nothing is written"),
    ("import --data disk --key-file key short", ARGUMENTS, "short", "5 bytes, the volume 8388608", "--zero-rest"),
    ("import --data disk --key-file key disk", ARGUMENTS, "disk", "", "the volume itself"),
    ("import --data disk --key-file - -", ARGUMENTS, "standard input", "", "can't be both"),
    ("import --data full --key-file key in", BUSY, "volume ", "holds data", "--force"),
    ("export --data disk --key-file key short", BUSY, "short exists", "", "--force"),
    ("export --data disk --key-file key key --force", ARGUMENTS, "key", "", "is the key file"),
    ("export --data disk --key-file key nowhere/out", DEVICE, "nowhere/out", "", "No such file"),
    ("export --data disk --key-file key --rescue -", ARGUMENTS, "--rescue", "three files", "name OUT"),
];

const RESIZE: &[Case] = &[
    ("resize --data disk --key-file key --size 16M", ARGUMENTS, "on disk", "page areas hold 8388608", "`import`"),
    ("resize --data disk --key-file key --size 4M", ARGUMENTS, "on disk", "8388608 bytes", "do not shrink"),
    ("resize --data disk --key-file key --size 8388609", ARGUMENTS, "", "8388609 bytes", "block size, 4096 bytes"),
    ("resize --data roomy --key-file key --size 32M", DEVICE, "roomy has", "33554432 bytes", "make it larger first"),
    ("resize --data locked --key-file key", BUSY, "locked is in use", "", "`ublk-integrity list`"),
    ("resize --data disk", ARGUMENTS, "no key", "", "--key-file"),
    ("resize --data disk 3 --key-file key", ARGUMENTS, "--data", "", "--help"),
    ("resize --meta disk 3", ARGUMENTS, "--meta", "", "--help"),
    ("resize", ARGUMENTS, "--data", "", "--help"),
    ("resize 4999", DEVICE, "4999", "", "`ublk-integrity list`"),
];

const KEYS: &[Case] = &[
    ("check --data disk --key-file other", KEY, "on disk", "wrong key for volume", ""),
    ("check --data disk --key-file newline", KEY, "on disk", "wrong key", "ends in a newline"),
    ("check --data disk --key-file short", KEY, "/short", "5 bytes", "from 32 to 4096"),
    ("check --data disk --key-file zeros", KEY, "/zeros", "4194304 bytes", "from 32 to 4096"),
    ("check --data disk --key-file nowhere", KEY, "/nowhere", "", "No such file"),
    ("check --data disk --key keyring:no-such", KEY, "no-such", "", "keyrings"),
    ("check --data disk --key no-such", ARGUMENTS, "--key", "no-such", "keyring:NAME"),
    ("check --data disk", ARGUMENTS, "--key-file", "", "--help"),
    ("keygen key", BUSY, "key file key", "", "File exists"),
];

const ARGUMENT_WORDS: &[Case] = &[
    // The word that was meant, and where help is.
    ("format --dat disk", ARGUMENTS, "--dat", "'--data'", "`ublk-integrity format --help`"),
    ("del", ARGUMENTS, "--all", "", "--help"),
    ("status -n /dev/sda", ARGUMENTS, "/dev/sda", "", "/dev/ublkb0"),
    ("status -n /dev/ublkb4999", DEVICE, "4999", "", "`ublk-integrity list`"),
    ("scrub -n ublkb4999 --wait", DEVICE, "4999", "", "`ublk-integrity list`"),
    ("scrub 1 --rate 0", ARGUMENTS, "--rate", "0", "at least one byte a second, like 20M"),
    ("scrub 1 --status --wait", ARGUMENTS, "--wait", "", "--help"),
    ("del ublkb4999", DEVICE, "4999", "", "`ublk-integrity list`"),
    (
        "del 00000000-0000-4000-8000-000000000000",
        DEVICE,
        "00000000-0000-4000-8000-000000000000",
        "",
        "`ublk-integrity list`",
    ),
    ("events --class nonsense", ARGUMENTS, "--class", "nonsense", "mismatch, "),
    ("clear", ARGUMENTS, "--all", "", "--help"),
    ("clear 4999", DEVICE, "4999", "", "`ublk-integrity list`"),
    ("top --delay 0 --once", ARGUMENTS, "--delay", "0", "0.1 to 3600"),
    ("del 1 --all", ARGUMENTS, "--all", "", "--help"),
    ("recover 1048576", ARGUMENTS, "1048576", "1048575", "/dev/ublkb0"),
    ("upgrade", ARGUMENTS, "--all", "", "--help"),
    ("upgrade 4999", DEVICE, "4999", "", "`ublk-integrity list`"),
    ("upgrade 4999 --binary nowhere", DEVICE, "nowhere", "", "No such file"),
    ("upgrade 4999 --key-file -", ARGUMENTS, "a pipe", "", "--key-file FILE"),
    ("benchmark --data . --size 1000", ARGUMENTS, "--size", "1000 bytes", "1M"),
    ("benchmark --data nowhere", DEVICE, "nowhere", "", ""),
    ("benchmark --data key", DEVICE, "key is no folder", "", ""),
    ("benchmark --time 0", ARGUMENTS, "--time", "0", "0.01"),
    ("add --data disk --key-file key --max-io 5000", ARGUMENTS, "--max-io", "5000 bytes", "multiple of 4K"),
    (
        "add --data disk --key-file key --depth 2 --threads-per-queue 3",
        ARGUMENTS,
        "--threads-per-queue 3",
        "2 requests",
        "lower it",
    ),
    ("add --data disk --key-file key --cache 1P", MEMORY, "--cache", "1.01 PiB", "lower --queues"),
];

#[test]
fn every_failure_names_value_path_and_what_to_do() {
    let f = Folder::with_volume();
    prepare(&f);
    let _locked = Flock::lock(fs::File::open(f.path("locked")).unwrap(), FlockArg::LockExclusive).unwrap();
    let mut missed = Vec::new();
    for (args, exit, path, value, what_to_do) in [FORMAT, DEVICES, CONTENT, RESIZE, KEYS, ARGUMENT_WORDS].concat() {
        let run = f.run(args);
        let is_one_line = run.err.lines().count() == 1 && run.err.starts_with("ublk-integrity: ");
        let all_there = [path, value, what_to_do].iter().all(|words| run.err.contains(words));
        if run.code != exit || !is_one_line || !all_there {
            missed.push(format!(
                "{args}: exit code {}, not {exit}, or not all of {path:?} {value:?} {what_to_do:?}: {}",
                run.code, run.err
            ));
        }
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}

/// What the table speaks of.
fn prepare(f: &Folder) {
    f.run("format --data d1 --meta m1 --create --size 8M --key-file key").expect(DONE);
    f.run("format --data d2 --meta m2 --create --size 8M --key-file key").expect(DONE);
    f.run("format --data roomy --create --size 8M --max-size 64M --key-file key").expect(DONE);
    f.run("keygen other").expect(DONE);
    fs::write(f.path("empty"), "").unwrap();
    fs::write(f.path("short"), "short").unwrap();
    fs::write(f.path("zeros"), vec![0; 4 << 20]).unwrap();
    fs::write(f.path("newline"), "a key of more than thirty-two letters\n").unwrap();
    fs::write(f.path("in"), vec![7; 8 << 20]).unwrap();
    let copied = |from: &str, to: &str| {
        fs::copy(f.path(from), f.path(to)).unwrap();
        fs::OpenOptions::new().read(true).write(true).open(f.path(to)).unwrap()
    };
    copied("disk", "cut").set_len(2 << 20).unwrap();
    copied("m1", "cut-meta").set_len(1 << 20).unwrap();
    copied("disk", "locked");
    copied("disk", "full");
    f.run("import --data full --key-file key in").expect(DONE);
    copied("disk", "damaged");
    [100, (512 << 10) + 100].into_iter().for_each(|at| f.flip_bit("damaged", at));
    // Not what the checksum covers, but the MAC beside it.
    copied("disk", "forged");
    [500, (512 << 10) + 500].into_iter().for_each(|at| f.flip_bit("forged", at));
}

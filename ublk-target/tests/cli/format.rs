//! `format`: what somebody may still want is not destroyed unasked, and nothing is
//! left of it when asked.

use crate::harness::*;
use std::{
    fs,
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
    process::{Command, Stdio},
};

const SIZE: u64 = 512 << 20;

fn disk(f: &Folder, name: &str, size: u64) -> fs::File {
    let file = fs::OpenOptions::new().read(true).write(true).create(true).truncate(true).open(f.path(name)).unwrap();
    file.set_len(size).unwrap();
    file
}

/// Runs other programs in the folder, also those of administrators: what they print, or how they
/// failed.
fn tool(f: &Folder, line: &str) -> Result<String, String> {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap());
    let mut command = Command::new("sh");
    command.args(["-c", line]).current_dir(f.dir.path()).env("PATH", path).stdin(Stdio::null());
    let output = command.output().unwrap();
    match output.status.code() {
        // 2: `blkid` finds nothing.
        Some(0 | 2) => Ok(String::from_utf8(output.stdout).unwrap()),
        _ => Err(format!("{line}: {}", String::from_utf8_lossy(&output.stderr).lines().next().unwrap_or_default())),
    }
}

/// The first and the last of the disk.
fn ends(f: &Folder) -> Vec<u8> {
    let (file, mut bytes) = (fs::File::open(f.path("disk")).unwrap(), vec![0; 4 << 20]);
    let (first, last) = bytes.split_at_mut(2 << 20);
    file.read_exact_at(first, 0).unwrap();
    file.read_exact_at(last, file.metadata().unwrap().len() - (2 << 20)).unwrap();
    bytes
}

/// Not formatted unasked, with the name of what is there; and when asked, nobody finds anything any
/// more.
#[track_caller]
fn is_kept_and_then_gone(f: &Folder, name: &str) {
    let before = ends(f);
    let refused = f.run("format --data disk --key-file key").expect(BUSY).says(name).says("--force").says(" at 0x");
    assert!(ends(f) == before, "{name}: {}", refused.err);
    let forced = f.run("format --data disk --key-file key --force").expect(DONE);
    let said = String::from_utf8(forced.out).unwrap();
    assert!(said.lines().any(|line| line.starts_with("wiped ") && line.contains(name)), "{name}: {said}");
    assert_eq!(tool(f, "wipefs --no-act --parsable disk").unwrap(), "", "{name}");
    assert_eq!(tool(f, "blkid -p disk").unwrap(), "", "{name}");
    f.run("check --data disk --key-file key").expect(DONE);
}

#[test]
fn data_in_the_middle_of_a_file_is_data() {
    let f = Folder::new();
    disk(&f, "disk", SIZE).write_all_at(b"somebody's", SIZE / 2).unwrap();
    f.run("format --data disk --key-file key").expect(BUSY).says("disk holds data at 0x10000000").says("--force");
    f.run("format --data disk --key-file key --force").expect(DONE);
}

#[test]
fn every_file_system_that_can_be_made_here_is_known() {
    let f = Folder::new();
    // What is not installed here is skipped, and says so.
    let makers = [
        ("ext2", "mkfs.ext2 -qF disk"),
        ("ext3", "mkfs.ext3 -qF disk"),
        ("ext4", "mkfs.ext4 -qF disk"),
        ("xfs", "mkfs.xfs -qf disk"),
        ("btrfs", "mkfs.btrfs -qf disk"),
        ("f2fs", "mkfs.f2fs -qf disk"),
        ("nilfs2", "mkfs.nilfs2 -qf disk"),
        ("jfs", "mkfs.jfs -q disk"),
        ("reiserfs", "mkfs.reiserfs -qff disk"),
        ("ocfs2", "mkfs.ocfs2 -qF --fs-features=local -M local disk </dev/null"),
        ("gfs2", "mkfs.gfs2 -qO -p lock_nolock disk"),
        ("udf", "mkfs.udf -b 512 disk"),
        ("ntfs", "mkfs.ntfs -qfF disk"),
        ("exfat", "mkfs.exfat disk"),
        ("vfat", "mkfs.fat disk"),
        ("minix", "mkfs.minix disk"),
        ("bfs", "mkfs.bfs disk"),
        ("swap", "mkswap -q disk"),
        ("crypto_LUKS", "cryptsetup -q luksFormat --pbkdf pbkdf2 --pbkdf-force-iterations 1000 disk key"),
        ("crypto_LUKS", "cryptsetup -q luksFormat --type luks1 --pbkdf-force-iterations 1000 disk key"),
        ("DM_verity_hash", "head -c 64K /dev/zero >zeros && veritysetup format zeros disk"),
        ("squashfs", "mksquashfs key disk -noappend -quiet && truncate -s 512M disk"),
        ("erofs", "mkdir -p folder && rm disk && mkfs.erofs disk folder && truncate -s 512M disk"),
        ("gpt", "echo ,10M | sfdisk -q --label gpt disk"),
        ("dos", "echo ,10M | sfdisk -q --label dos disk"),
        ("sun", "echo ,10M | sfdisk -q --label sun disk"),
        ("sgi", "echo ,10M | sfdisk -q --label sgi disk"),
        ("qcow2", "qemu-img create -q -f qcow2 disk 1G && truncate -s 512M disk"),
        ("VMDK", "qemu-img create -q -f vmdk disk 1G && truncate -s 512M disk"),
        ("VHDX", "qemu-img create -q -f vhdx disk 1G && truncate -s 512M disk"),
        ("VHD", "rm disk && qemu-img create -q -f vpc -o subformat=fixed disk 511M"),
        ("VDI", "qemu-img create -q -f vdi disk 1G && truncate -s 512M disk"),
    ];
    let mut known = 0;
    for (name, maker) in makers {
        disk(&f, "disk", SIZE);
        match tool(&f, maker) {
            Ok(_) => {
                is_kept_and_then_gone(&f, name);
                known += 1;
            }
            Err(why) => println!("SKIPPED: {name}: {why}"),
        }
    }
    assert!(known > 0, "nothing here makes file systems");
}

/// A superblock of md: version 0.90, or one of 1.0, 1.1 and 1.2.
fn md(disk: &fs::File, minor: Option<u32>) {
    const MAGIC: u32 = 0xa92b_4efc;
    let mut sb = vec![0u8; 4096];
    let mut put = |at: usize, value: u64, len: usize| sb[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
    let Some(minor) = minor else {
        put(0, MAGIC.into(), 4);
        put(8, 90, 4);
        // raid level, size in KiB, disks
        for (at, value) in [(28, 1), (32, SIZE / 1024 - 64), (40, 2)] {
            put(at, value, 4);
        }
        disk.write_all_at(&sb, SIZE / 65536 * 65536 - 65536).unwrap();
        return;
    };
    let at = match minor {
        0 => (SIZE - 8192) / 4096 * 4096,
        1 => 0,
        _ => 4096,
    };
    put(0, MAGIC.into(), 4);
    put(4, 1, 4);
    put(144, at / 512, 8);
    put(16, 0x1122_3344_5566_7788, 8);
    disk.write_all_at(&sb, at).unwrap();
}

#[test]
fn what_lies_at_the_end_is_known_too() {
    let f = Folder::new();
    for minor in [None, Some(0), Some(1), Some(2)] {
        md(&disk(&f, "disk", SIZE), minor);
        is_kept_and_then_gone(&f, "linux_raid_member");
    }
    // A GPT whose first header is gone.
    let file = disk(&f, "disk", SIZE);
    if tool(&f, "echo ,10M | sfdisk -q --label gpt disk").is_ok() {
        file.write_all_at(&[0; 1 << 16], 0).unwrap();
        is_kept_and_then_gone(&f, "gpt at 0x1ffffe00");
    }
    // ZFS labels 2 and 3, in the last 512 KiB: their uberblocks.
    let file = disk(&f, "disk", SIZE);
    for label in [SIZE - (512 << 10), SIZE - (256 << 10)] {
        for i in 0..128 {
            let mut uberblock = [0; 1024];
            uberblock[..8].copy_from_slice(&0x00ba_b10c_u64.to_le_bytes());
            file.write_all_at(&uberblock, label + (128 << 10) + i * 1024).unwrap();
        }
    }
    is_kept_and_then_gone(&f, "zfs_member");
}

#[test]
fn a_physical_volume_of_lvm_is_known() {
    let f = Folder::new();
    // `pvcreate` takes no files: the label in sector 1, whose checksum nobody has made.
    let mut label = [0; 32];
    label[..8].copy_from_slice(b"LABELONE");
    label[8] = 1;
    label[20] = 32;
    label[24..].copy_from_slice(b"LVM2 001");
    disk(&f, "disk", SIZE).write_all_at(&label, 512).unwrap();
    is_kept_and_then_gone(&f, "LVM2_member");
}

#[test]
fn a_bad_checksum_hides_nothing() {
    let f = Folder::new();
    let file = disk(&f, "disk", SIZE);
    if tool(&f, "mkfs.btrfs -qf disk").is_err() {
        println!("SKIPPED: no mkfs.btrfs");
        return;
    }
    file.write_all_at(&[0xff; 4], 0x10000).unwrap();
    is_kept_and_then_gone(&f, "btrfs");
}

#[test]
fn any_content_of_a_file_is_somebodys() {
    let f = Folder::new();
    for at in [0, (1 << 20) - 1, SIZE - (1 << 20), SIZE - 1] {
        disk(&f, "disk", SIZE).write_all_at(b"x", at).unwrap();
        is_kept_and_then_gone(&f, "data");
    }
}

#[test]
fn a_volume_of_ours_is_known_whatever_is_left_of_it() {
    let f = Folder::new();
    let uuid =
        |disk: &str| f.run(&format!("dump --json --data {disk}")).expect(DONE).json()["volume"]["uuid"].to_string();
    f.run("format --data disk --create --size 64M --key-file key").expect(DONE);
    fs::write(f.path("in"), vec![7; 64 << 20]).unwrap();
    f.run("import --data disk --key-file key in").expect(DONE);
    f.run("format --data disk --key-file key").expect(BUSY).says(uuid("disk").trim_matches('"'));
    fs::copy(f.path("disk"), f.path("whole")).unwrap();
    let damage: [&[u64]; 3] = [&[0], &[512 << 10], &[0, 512 << 10]];
    for places in damage {
        for bytes in [[0xffu8; 512], [0; 512]] {
            fs::copy(f.path("whole"), f.path("disk")).unwrap();
            let file = fs::OpenOptions::new().write(true).open(f.path("disk")).unwrap();
            // The magic stays, or goes too.
            let from = u64::from(bytes[0] == 0xff) * 100;
            places.iter().for_each(|at| file.write_all_at(&bytes[from as usize..], at + from).unwrap());
            is_kept_and_then_gone(&f, "ublk-integrity");
        }
    }
    // Metadata elsewhere: either device.
    f.run("format --data d --meta m --create --size 8M --key-file key").expect(DONE);
    for device in ["d", "m"] {
        fs::copy(f.path(device), f.path("disk")).unwrap();
        fs::OpenOptions::new().write(true).open(f.path("disk")).unwrap().set_len(64 << 20).unwrap();
        is_kept_and_then_gone(&f, "ublk-integrity");
    }
    f.run("format --data d --meta m --key-file key").expect(BUSY);
}

#[test]
fn what_cannot_be_done_destroys_nothing() {
    let f = Folder::new();
    disk(&f, "disk", 16 << 20).write_all_at(b"precious", 0).unwrap();
    for args in ["--size 1G", "--size 5000000", "--log-size 65K", "--block-size 3"] {
        let code = if args == "--size 1G" { DEVICE } else { ARGUMENTS };
        f.run(&format!("format --data disk --key-file key --force {args}")).expect(code);
        assert_eq!(&fs::read(f.path("disk")).unwrap()[..8], b"precious", "{args}");
    }
}

#[test]
fn files_are_made_on_request_only() {
    let f = Folder::new();
    f.run("format --data disk --size 8M --key-file key").expect(DEVICE).says("disk does not exist").says("--create");
    f.run("format --data disk --create --key-file key").expect(ARGUMENTS).says("--size");
    assert!(!f.path("disk").exists());
    let name = format!("/dev/ublk-integrity-test-{}", std::process::id());
    for path in [name.clone(), format!("/dev/../{name}")] {
        let run = f.run(&format!("format --data {path} --create --size 8M --key-file key"));
        let there = Path::new(&name).exists();
        let _ = fs::remove_file(&name);
        assert!(!there);
        run.expect(DEVICE).says("no such device");
    }
    let run = f.run("format --data disk --meta m --create --size 8M --key-file key").expect(DONE);
    let said = String::from_utf8(run.out).unwrap();
    assert!(said.contains("made          disk") && said.contains("made          m"), "{said}");
    assert_eq!(fs::metadata(f.path("disk")).unwrap().mode() & 0o777, 0o600);
    // What is there is not made.
    let run = f.run("format --data disk --meta n --create --size 8M --key-file key --force --json").expect(DONE);
    assert_eq!(run.json()["made"], serde_json::json!(["n"]));
}

#[test]
fn without_util_linux_only_force_helps() {
    // The places where it is are hidden in a mount namespace of root's.
    if !nix::unistd::geteuid().is_root() || Command::new("unshare").args(["-m", "true"]).status().is_err() {
        println!("SKIPPED: needs root and unshare");
        return;
    }
    let f = Folder::new();
    disk(&f, "disk", 16 << 20);
    let program = env!("CARGO_BIN_EXE_ublk-integrity");
    let hidden = |args: &str| {
        let line = format!(
            "for at in /usr/sbin/wipefs /sbin/wipefs /usr/bin/wipefs /bin/wipefs; do [ ! -e $at ] || mount --bind /dev/null $at 2>/dev/null; done; exec {program} {args}"
        );
        let mut command = Command::new("unshare");
        Run::of(command.args(["-m", "sh", "-c", &line]).current_dir(f.dir.path()).output().unwrap())
    };
    hidden("format --data disk --key-file key").expect(DEVICE).says("wipefs").says("--force");
    let forced = hidden("format --data disk --key-file key --force");
    assert_eq!((forced.code, forced.err.lines().count()), (DONE, 1), "{}", forced.err);
    assert!(forced.err.contains("warning: disk: can't tell what it holds"), "{}", forced.err);
}

/// What a run that went well has printed.
fn printed(run: &Run) -> String {
    String::from_utf8(run.out.clone()).unwrap()
}

#[test]
fn what_the_device_is_trusted_to_write_is_recorded_and_shown() {
    let f = Folder::new();
    // A file counts as writing 4096 bytes atomically.
    let run = f.run("format --data disk --create --size 8M --assume-atomic 512 --key-file key");
    assert_eq!((run.code, run.err.lines().count()), (DONE, 1), "{}", run.err);
    let said =
        "warning: disk says that it writes 4096 bytes atomically, and is trusted to write 512 so (--assume-atomic)";
    assert!(run.err.contains(said) && run.err.contains("read as errors"), "{}", run.err);
    let out = printed(&run);
    assert!(out.contains("block size    512\natomic        512 bytes, as the user says\n"), "{out}");
    assert!(printed(&f.run("dump --data disk").expect(DONE)).contains("atomic        512 bytes, as the user says\n"));
    let dump = f.run("dump --data disk --json").expect(DONE).json();
    assert_eq!((&dump["volume"]["assumed_atomic_bytes"], &dump["copies"][1]["version"]), (&512.into(), &2.into()));
    // Such a volume is used like any other, and stays what it is.
    fs::write(f.path("in"), vec![7; 8 << 20]).unwrap();
    f.run("import --data disk --key-file key in").expect(DONE);
    f.run("check --data disk --key-file key").expect(DONE);
    f.run("export --data disk --key-file key out").expect(DONE);
    assert!(fs::read(f.path("out")).unwrap() == fs::read(f.path("in")).unwrap());
    assert_eq!(f.run("dump --data disk --json").expect(DONE).json()["version2"]["assumed_atomic_bytes"], 512);
    // What the device says itself is no news.
    f.run("format --data same --create --size 8M --assume-atomic 4K --key-file key").expect(DONE);
    let plain = f.run("format --data plain --create --size 8M --key-file key --json").expect(DONE).json();
    assert_eq!((&plain["assumed_atomic_bytes"], &plain["label"]), (&serde_json::Value::Null, &"".into()));
    assert_eq!(f.run("dump --data plain --json").expect(DONE).json()["copies"][0]["version"], 1);
}

#[test]
fn what_no_device_can_be_trusted_with_is_refused() {
    let f = Folder::new();
    for value in ["0", "256", "3000", "8K", "4G", "-1", "much"] {
        let run = f.run(&format!("format --data disk --create --size 8M --key-file key --assume-atomic={value}"));
        run.expect(ARGUMENTS).says("--assume-atomic").says(value);
    }
    let format = "format --data disk --create --size 8M --key-file key";
    f.run(&format!("{format} --assume-atomic 1K --block-size 2K")).expect(ARGUMENTS).says("2048").says("1024");
    assert!(!f.path("disk").exists(), "nothing half-made");
}

#[test]
fn a_label_is_shown() {
    let f = Folder::new();
    let run = f.run("format --data disk --create --size 8M --label größer --key-file key").expect(DONE);
    assert!(printed(&run).contains("\nlabel         größer\n"), "{}", printed(&run));
    assert!(printed(&f.run("dump --data disk").expect(DONE)).contains("\nlabel         größer\n"));
    let dump = f.run("dump --data disk --json").expect(DONE).json();
    assert_eq!((&dump["volume"]["label"], &dump["version2"]["label"]), (&"größer".into(), &"größer".into()));
    let long = "x".repeat(33);
    for (label, says) in [(long.as_str(), "at most 32 bytes, this has 33"), ("a\u{7}b", "no control characters")] {
        let mut command = f.command("format --data other --create --size 8M --key-file key --label");
        Run::of(command.arg(label).output().unwrap()).expect(ARGUMENTS).says("--label").says(says);
    }
    assert!(!f.path("other").exists());
    f.run("add --data disk --key-file key --sync-log maybe").expect(ARGUMENTS).says("--sync-log").says("auto");
}
